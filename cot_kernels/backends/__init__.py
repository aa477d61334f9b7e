"""Where the arithmetic happens: ATen for any device, Triton for GPUs. Both offer the same four functions."""
