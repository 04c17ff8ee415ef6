"""Which family a user's model belongs to, told by its structure."""
