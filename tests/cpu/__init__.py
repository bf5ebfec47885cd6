"""The NumPy path."""
