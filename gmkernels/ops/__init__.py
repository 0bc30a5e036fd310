"""One folder an op family; see gmkernels.registry for the list."""
