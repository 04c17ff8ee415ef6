"""CAV-MAE: the model, its checkpoints, its form with prompts (BriMPR)."""
