"""What kernels compute and how they are called: the reference, the CPU, our NKI kernels and those of the SDK."""
