"""What each kernel demands: one module a generation, as in `kernels.vendor`."""
