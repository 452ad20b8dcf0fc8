"""What the CUDA kernels cost, read from what nvcc makes of them."""
