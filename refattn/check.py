"""`python -m refattn check module:function`: is this kernel the recurrence? The report on stdout, 0 if nothing was found, 1 if something was.

    python -m refattn check mine:forward --backward mine:backward --rule gated --layout bnhd --scale 0.125

The module is looked for from the current folder on. What the options mean and how a kernel is called: `refattn.testing.check.check_kernel`.
"""
from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from .rules import RULES


def main(argv: Sequence[str] | None = None) -> int:
    """Judge one kernel; returns the exit code: 0 right as far as was looked, 1 wrong, 2 not understood."""
    from .testing.check import Report, check_kernel
    from .testing.frameworks import MAKE
    from .testing.kernel import ATTENTIONS, LAYOUTS, PRESETS, STATE_LAYOUTS

    options = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)            # what is not said is check_kernel's default
    options.add_argument("--rule", choices=(*RULES, *ATTENTIONS), help="what the kernel is said to be (default: linear)")
    options.add_argument("--layout", choices=tuple(LAYOUTS), help="of q (default: bhnd)")
    options.add_argument("--state-layout", choices=tuple(STATE_LAYOUTS), help="(default: bhdm)")
    options.add_argument("--scale", type=lambda s: s if s == "1/sqrt(d)" else float(s), help="that the kernel applies; also 1/sqrt(d) (default: 1)")
    options.add_argument("--decay", choices=("head", "channel"), help="one for each of these (default: head)")
    options.add_argument("--decay-space", choices=("log", "linear"), help="(default: log)")
    options.add_argument("--not-causal", dest="causal", action="store_false", help="attention to all keys")
    options.add_argument("--eps", type=float, help="what linear_attention adds to its denominator (default: 1e-6)")
    options.add_argument("--no-states", dest="states", action="store_false", help="the kernel takes no initial state")
    options.add_argument("--no-resets", dest="resets", action="store_false", help="the kernel has no decays of exactly 0 (g = -inf)")
    options.add_argument("--grouped", action="store_true", help="several query heads may share a key head")
    options.add_argument("--into", action="store_true", help="results are written into given memory, behind the inputs")
    options.add_argument("--contiguous", action="store_true", help="the kernel takes contiguous arrays alone")
    options.add_argument("--multiple-of", type=int, metavar="N", help="the numbers of positions that the kernel takes (default: 1)")
    options.add_argument("--widths", type=lambda s: tuple(map(int, s.split(","))), action="append", metavar="D,M", help="(default: any)")
    options.add_argument("--dtype", choices=("float16", "bfloat16", "float32", "float64"), help="(default: float32)")
    options.add_argument("--factors", choices=("accumulator", "dtype"), help="what products of half precisions are made of (default: accumulator)")
    options.add_argument("--to", metavar="LIBRARY", help=f"of its arrays: {', '.join(MAKE)}, or module:function that makes one of NumPy's")
    options.add_argument("--max-examples", dest="examples", type=int, metavar="N", help="cases for each law (default: 100)")
    options.add_argument("--seed", type=int, help="of the search (default: 0)")
    options.add_argument("--time-limit", type=float, metavar="SECONDS", help="(default: 60)")
    options.add_argument("--factor", type=float, help="what bounds are multiplied by (default: 1)")
    options.add_argument("--backward", metavar="module:function",
                         help="called with dout, dstate and the same arrays; gives their gradients. autodiff: the library's own")
    parser = argparse.ArgumentParser("python -m refattn check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     parents=[options])
    parser.add_argument("kernel", metavar="module:function", help="called with q, k, v, then g and beta where the rule has them, then the state")
    parser.add_argument("--preset", choices=tuple(PRESETS), help="the options for that library's functions; those that are given here win")
    parser.add_argument("--json", metavar="FILE", help="write the report there too")
    chosen = vars(parser.parse_args(argv))
    kernel, preset, path = (chosen.pop(name) for name in ("kernel", "preset", "json"))
    for name, words in (("backward", ("autodiff",)), ("to", tuple(MAKE))):
        if name in chosen and chosen[name] not in words:
            chosen[name] = _function(parser, f"--{name}", chosen[name])
    if "widths" in chosen:
        chosen["widths"] = tuple(chosen["widths"])
    try:
        report: Report = check_kernel(_function(parser, "kernel", kernel), **{**PRESETS.get(preset, {}), **chosen})
    except (ImportError, TypeError, ValueError) as error:
        parser.error(str(error))
    print(report)
    if path:
        failures = [{"law": f.law, "words": f.words, "guess": f.guess, "case": f.code} for f in report.failures]
        with open(path, "w", encoding="utf-8") as file:
            json.dump({**report._asdict(), "failures": failures}, file, indent=1)
    return 0 if report.passed else 1


def _function(parser: argparse.ArgumentParser, name: str, spec: str) -> Callable[..., Any]:
    module, colon, attribute = spec.partition(":")
    if not (module and colon and attribute):
        parser.error(f"argument {name}: expected module:function, got {spec!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        parser.error(f"argument {name}: {error}")
    if not callable(found):
        parser.error(f"argument {name}: expected a function, got {type(found).__name__}")
    return found                                                                                        # type: ignore[no-any-return]
