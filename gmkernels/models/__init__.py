"""Models: one paradigm a file, on top of gmkernels.ops."""
