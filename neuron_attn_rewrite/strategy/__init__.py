"""Chooses: which kernels can compute an attention, which one is fastest, and what happens to each site."""
