"""refattn: the reference implementation of linear and causal attention, every form proved equal to its definition.

Functions of arrays in the layout (..., H, N, D), for NumPy and, in time, CuPy; no framework. `vjp` gives the hand-derived backward of each.
"""
from __future__ import annotations

from ._vjp import vjp
from .attention import State, causal_linear_attention, causal_linear_attention_step, linear_attention
from .rules import recurrence, recurrence_step
from .softmax import softmax_attention

__all__ = [
    "State",
    "causal_linear_attention",
    "causal_linear_attention_step",
    "linear_attention",
    "recurrence",
    "recurrence_step",
    "softmax_attention",
    "vjp",
]


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib.metadata import version       # lazily: reading the metadata costs more than the import itself
        return version("refattn")
    raise AttributeError(f"module 'refattn' has no attribute {name!r}")
