"""Our NKI kernels, for NKI 0.6 and 0.7, and what the host computes before a launch. Kernels import `nki`."""
