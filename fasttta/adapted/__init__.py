"""What a user holds: adapt and load, and the objects that they return."""
