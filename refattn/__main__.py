"""`python -m refattn demo`, `bench`, `check`, `distributed` and `simt`: the programs of the library. Each is imported only when it is asked for."""
from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "demo": "train a causal linear transformer on handwritten digits, let it draw, and time it",
    "bench": "time and memory of every form against the length of the sequence",
    "check": "hold a kernel of your own, from any library, against the definition, and be shown the smallest case in which it differs",
    "distributed": "under mpiexec: cut a sequence over ranks, check it, time it, and tell what a cluster would take",
    "simt": "run a CUDA kernel of your own on the CPU, and be shown its races, bad accesses and traffic",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 something is missing or wrong (said on stderr), 2 not understood.

    >>> main(["--version"])  # doctest: +ELLIPSIS
    refattn ...
    0
    """
    parser = argparse.ArgumentParser("python -m refattn", description="Linear and causal attention with hand-derived gradients, in NumPy.",
                                     epilog="`python -m refattn demo --help` explains the options of a command.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="command")
    for name, line in COMMANDS.items():
        commands.add_parser(name, help=line, add_help=False)        # --help belongs to the command itself
    chosen, rest = parser.parse_known_args(argv)
    if chosen.version:
        print("refattn", _version())
        return 0
    if chosen.command is None:
        parser.error(f"expected a command: {' or '.join(COMMANDS)}" + (f", got {' '.join(rest)}" if rest else ""))
    try:
        return int(importlib.import_module(f"refattn.{chosen.command}").main(rest))
    except ImportError as error:
        if error.name is not None:      # only a missing extra comes without the name of a module; the rest are defects, shown whole
            raise
        print(error, file=sys.stderr)
        return 1


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version
    try:
        return version("refattn")
    except PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
