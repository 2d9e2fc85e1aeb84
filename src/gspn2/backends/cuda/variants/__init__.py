"""One module for each family of kernels: what it takes, and how it is launched."""
