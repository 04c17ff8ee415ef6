"""CLIP: towers, checkpoints, conversion of other packages' modules."""
