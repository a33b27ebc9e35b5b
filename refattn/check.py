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
    from .testing.check import Report, case_code, check_kernel
    from .testing.kernel import LAYOUTS

    parser = argparse.ArgumentParser("python -m refattn check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernel", metavar="module:function", help="called with q, k, v, then g and beta where the rule has them, then the state")
    parser.add_argument("--backward", metavar="module:function", help="called with dout, dstate and the same arrays; gives their gradients")
    parser.add_argument("--rule", choices=tuple(RULES), default="linear", help="(default: %(default)s)")
    parser.add_argument("--layout", choices=tuple(LAYOUTS), default="bhnd", help="of q (default: %(default)s)")
    parser.add_argument("--state-layout", choices=("bhdm", "bhmd"), default="bhdm", help="(default: %(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="that the kernel applies (default: %(default)s)")
    parser.add_argument("--decay", choices=("head", "channel"), default="head", help="one for each of these (default: %(default)s)")
    parser.add_argument("--decay-space", choices=("log", "linear"), default="log", help="(default: %(default)s)")
    parser.add_argument("--no-states", action="store_true", help="the kernel takes no initial state")
    parser.add_argument("--no-resets", action="store_true", help="the kernel has no decays of exactly 0 (g = -inf)")
    parser.add_argument("--grouped", action="store_true", help="several query heads may share a key head")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32", "float64"), default="float32", help="(default: %(default)s)")
    parser.add_argument("--to", metavar="module:function", help="makes the kernel's arrays from NumPy's, torch:from_numpy for example")
    parser.add_argument("--max-examples", type=int, default=100, metavar="N", help="cases for each law (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the search (default: %(default)s)")
    parser.add_argument("--time-limit", type=float, default=60.0, metavar="SECONDS", help="(default: %(default)s)")
    parser.add_argument("--factor", type=float, default=1.0, help="what bounds are multiplied by (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the report there too")
    chosen = parser.parse_args(argv)
    found = {name: _function(parser, name, spec) for name, spec in (("kernel", chosen.kernel), ("--backward", chosen.backward), ("--to", chosen.to))
             if spec is not None}
    options: dict[str, Any] = {"to": found["--to"]} if "--to" in found else {}
    try:
        report: Report = check_kernel(
            found["kernel"], backward=found.get("--backward"), rule=chosen.rule, layout=chosen.layout, state_layout=chosen.state_layout,
            scale=chosen.scale, decay=chosen.decay, decay_space=chosen.decay_space, states=not chosen.no_states, resets=not chosen.no_resets,
            grouped=chosen.grouped, dtype=chosen.dtype, examples=chosen.max_examples, seed=chosen.seed, time_limit=chosen.time_limit,
            factor=chosen.factor, **options)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    print(report)
    if chosen.json:
        failures = [{"law": f.law, "words": f.words, "guess": f.guess, "case": case_code(f.case)} for f in report.failures]
        record = {**report._asdict(), "failures": failures}
        with open(chosen.json, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
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
