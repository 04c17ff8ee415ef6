"""RAda: the head, models that end in it, its fine-tuning."""
