"""`python -m benchmarks` times the kernels; `python -m benchmarks.static_gpu` needs no GPU."""
