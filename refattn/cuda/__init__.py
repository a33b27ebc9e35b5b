"""CUDA kernels for the causal cumulative sum, and the code that launches them. See `linear.cu` for the equations."""
