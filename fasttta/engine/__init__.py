"""Running a method on a model: precision, state, steps."""
