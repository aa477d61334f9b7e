"""Triton kernels: GPUs, and the CPU under Triton's interpreter. :mod:`.backend` is the way in."""
