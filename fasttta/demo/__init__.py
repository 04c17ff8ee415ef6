"""A demo that needs no downloads: handwritten digits, the same digits spoken, a small model."""
