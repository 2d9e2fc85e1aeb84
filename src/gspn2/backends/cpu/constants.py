"""What planning and kernels agree on; free of Numba, so that planning costs no import."""

LANES = 16
"""Elements of a vector: one AVX-512 register of float32; LLVM splits it where registers are shorter."""
