"""The cost of the CUDA kernels, read from the code that nvcc makes of them."""
