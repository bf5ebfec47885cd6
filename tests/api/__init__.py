"""The public functions, layers and gradients, the reference, and what explains them."""
