"""Hand-written Triton kernels. The package needs only torch and triton, and importing it loads neither."""
