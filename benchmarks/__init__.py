"""Benchmarks: `python -m benchmarks`; a static report on GPU kernels: `python -m benchmarks.static_gpu`."""
