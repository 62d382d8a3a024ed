"""Hand-written Triton kernels; needs torch and triton only, and importing it loads neither."""
