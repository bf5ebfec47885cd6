"""Benchmarks of gpuconv on the layers of real models; they run from a checkout."""
