"""`python -m refattn simt`: run a kernel of your own on the CPU, and be shown its races, its bad accesses and its traffic.

The kernel runs under audit, and if it keeps to its arrays once more without.

    python -m refattn simt scale.cu --kernel 'scale<float, 4>' --grid 4 --block 256 \\
        --array 'float32 4,256' --array 'out:float32 4,256' --scalar int32:1024

Arrays and scalars are the kernel's arguments, in their order. Arrays hold random normals (of integers: zeros), after `out:` NaN.
The exit code is 0 if nothing is wrong, 1 if something is.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._array import missing_extra
from .audit import Report, traffic_table
from .build import Audit, build


class _InOrder(argparse.Action):
    """Arrays and scalars go into one list, as they come."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, text: Any, option: str | None = None) -> None:
        try:
            value = _array(text) if self.dest == "array" else _scalar(text)
        except (TypeError, ValueError) as error:
            parser.error(f"{option} {text!r}: {error}")
        namespace.arguments.append(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, audit, print; returns the exit code."""
    assert __doc__
    parser = argparse.ArgumentParser(prog="python -m refattn simt", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(arguments=[])
    parser.add_argument("file", type=Path, help="the .cu file; what it includes is looked up in its folder")
    parser.add_argument("--kernel", required=True, help="name of the kernel, with template arguments: 'scale<float, 64>'")
    parser.add_argument("--grid", required=True, type=_extent, metavar="X[,Y[,Z]]", help="blocks")
    parser.add_argument("--block", required=True, type=_extent, metavar="X[,Y[,Z]]", help="threads of a block")
    parser.add_argument("--shared", type=int, default=0, metavar="BYTES", help="size of the dynamic shared memory")
    parser.add_argument("--define", action="append", default=[], metavar="X[=VALUE]", help="a macro; may be repeated")
    parser.add_argument("--array", action=_InOrder, metavar="'[out:]DTYPE SHAPE'", help="the next argument: 'float32 2,64,64'")
    parser.add_argument("--scalar", action=_InOrder, metavar="DTYPE:VALUE", help="the next argument: int32:64")
    args = parser.parse_args(argv)
    try:
        source = args.file.read_text(encoding="utf-8")

        def run(audit: Audit) -> tuple[Report | None, list[Any], list[str]]:
            module = build(source, [args.kernel], defines=args.define, audit=audit, path=args.file)
            arguments = [x.copy() for x in args.arguments]          # each run starts from the same
            return module.launch(args.kernel, args.grid, args.block, arguments, shared=args.shared), arguments, module.signature(args.kernel)

        report, _, _ = run(True)
        assert report is not None
        if not any(text.startswith(("out of bounds", "misaligned")) for text in report.findings):       # without the audit these harm Python itself
            _summarise(*run(False)[1:])
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(report.findings) or "no findings", traffic_table(report), sep="\n\n")
    return int(bool(report.findings))


def _summarise(arguments: list[Any], codes: list[str]) -> None:
    for i, (x, code) in enumerate(zip(arguments, codes)):
        if code.startswith("p:") and isinstance(x, np.ndarray):
            with np.errstate(invalid="ignore"):                     # a signalling NaN of bfloat16
                bad = int(np.count_nonzero(~np.isfinite(x.astype(np.float64))))
            state = f"{bad} of {x.size} elements are NaN or infinite" if bad else "all finite"
            print(f"argument {i} ({x.dtype.name}, shape {x.shape}) after the run: {state}")


def _extent(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))


def _dtype(name: str) -> np.dtype:
    if name == "bfloat16":
        try:
            import ml_dtypes
        except ImportError:
            raise missing_extra("ml_dtypes", "bf16") from None
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def _array(text: str) -> np.ndarray:
    name, _, shape = text.removeprefix("out:").partition(" ")
    if not shape.strip():
        raise ValueError("expected a dtype and a shape, such as 'float32 2,64,64'")
    dtype, extent = _dtype(name), _extent(shape)
    if text.startswith("out:"):
        array = np.empty(extent, dtype)
        array.reshape(-1).view(np.uint8)[...] = 0xFF
        return array
    if dtype.kind in "iub":
        return np.zeros(extent, dtype)
    return np.random.default_rng(0).standard_normal(extent).astype(dtype)


def _scalar(text: str) -> Any:
    name, _, value = text.partition(":")
    if not value:
        raise ValueError("expected a dtype and a value, such as int32:64")
    dtype = _dtype(name)
    return dtype.type(int(value) if dtype.kind in "iu" else float(value))
