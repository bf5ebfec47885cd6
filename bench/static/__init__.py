"""What the compiler made of the kernels, without a GPU, and the times that follow from it."""
