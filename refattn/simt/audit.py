"""What an audited launch found, in words: races, accesses out of bounds, uninitialised reads, misalignment, and the traffic of every line."""
from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Counts(NamedTuple):
    """Traffic of one line: warp `requests`, `lanes` that took part, and, of global memory, 32-byte `sectors`, of shared memory bank `passes`;
    `ideal_…` are the fewest that the same bytes can need."""

    requests: int
    lanes: int
    sectors: int
    ideal_sectors: int
    passes: int
    ideal_passes: int


class Report(NamedTuple):
    """`findings`: what is wrong, in words. `traffic`: counts by (line of the source, "global" or "shared", "R" or "W", bytes of a lane)."""

    findings: list[str]
    traffic: dict[tuple[str, str, str, int], Counts]


def watch(library: ctypes.CDLL, arrays: dict[int, np.ndarray], addresses: dict[int, int], traffic_only: bool) -> None:
    raise NotImplementedError


def read_report(library: ctypes.CDLL, path: Path, files: tuple[str, ...], arrays: dict[int, np.ndarray]) -> Report:
    raise NotImplementedError


def find_lines(path: Path, files: tuple[str, ...], text: str) -> str:
    return text
