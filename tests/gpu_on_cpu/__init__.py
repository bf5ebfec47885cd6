"""The real CuPy on a machine without a GPU.

CuPy's wheel and gpuconv.runtime run unchanged. Under them lie
- a stand-in for the functions of CUDA's runtime and driver that CuPy calls: cuda_*.py, which hooks.py puts in place;
- host memory in the part of the device's: memory.py;
- queues that run work as late and in as odd an order as CUDA's rules allow: streams.py;
- a translator from the PTX that NVRTC makes of a kernel to C++, which hostcuda's fibers execute: ptx.py, ptx.h,
  modules.py.

    python -m tests.gpu_on_cpu python -m pytest -m gpu
    python -m tests.gpu_on_cpu --arch sm_75 python -m gpuconv verify --device gpu

What it proves: that gpuconv uses CuPy as CuPy is, and that what NVRTC makes of the kernels computes what it should,
with the launches, streams, events, graphs and devices of the real gpuconv.runtime. What it cannot show: what ptxas
makes of that PTX, speed, threads that truly run at once, the order of memory accesses between them, PyTorch on CUDA.
"""
