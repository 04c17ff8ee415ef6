"""What a step costs on a GPU, counted without one."""
