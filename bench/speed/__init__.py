"""How long the kernels and their peers take on a GPU."""
