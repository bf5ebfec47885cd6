"""The PyTorch bridge."""
