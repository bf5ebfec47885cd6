"""How long the kernels take on a GPU, beside their peers."""
