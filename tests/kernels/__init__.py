"""The kernels and their families, under hostcuda and NVRTC."""
