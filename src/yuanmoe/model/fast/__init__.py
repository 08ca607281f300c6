"""A whole pass through all layers in one call of the CPU kernels, with the numbers of the modules."""
