"""``fasttta demo clip``: methods for single images on a small CLIP under attack."""
