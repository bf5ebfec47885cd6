"""`gpuconv verify` and its cases."""
