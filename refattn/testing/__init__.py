"""Laws, strategies and error budgets: what the tests of this library are made of, and yours can be; `check_kernel` asks them of any kernel."""
from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "check_kernel":
        from .check import check_kernel              # lazily: it needs Hypothesis, and the budgets alone do not
        return check_kernel
    raise AttributeError(f"module 'refattn.testing' has no attribute {name!r}")
