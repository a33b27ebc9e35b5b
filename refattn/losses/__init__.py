"""Losses: each forward returns a number and residuals, its backward turns the number's cotangent into that of the predictions."""
from .cross_entropy import bits, cross_entropy_backward, cross_entropy_forward

__all__ = ["bits", "cross_entropy_backward", "cross_entropy_forward"]
