"""Run CUDA kernels on the CPU."""
from .audit import Counts, Report
from .build import Module, SimtError, build, dtype_code

__all__ = ["Counts", "Module", "Report", "SimtError", "build", "dtype_code"]
