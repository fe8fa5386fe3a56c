"""`python -m benchmarks.counted`: what the CUDA kernels would take, counted from their machine code, without a GPU."""
