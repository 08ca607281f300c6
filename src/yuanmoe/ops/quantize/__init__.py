"""Weights in 4 and 8 bits: rounding, GPTQ compensation, the packed layout. Not files, not the kernels that multiply."""
