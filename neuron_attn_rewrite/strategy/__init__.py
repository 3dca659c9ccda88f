"""Chooses: which kernels can compute an attention, which one is fastest, and what becomes of each site."""
