"""Figures and comparisons of half an hour on one GPU, and what is carried to it: benchmarks/gpu_figures.sh."""
