"""NKI kernels, for NKI 0.6 and 0.7. Importing one needs `nki`, or the simulator in its place."""
