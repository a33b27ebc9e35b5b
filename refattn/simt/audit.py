"""What an audited launch found, in words: races, accesses out of bounds, uninitialised reads, misalignment, and the traffic of every line."""
from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np


KINDS = ("out of bounds", "misaligned", "race", "uninitialised")     # what ends a launch comes first, what a race entails last


class Counts(NamedTuple):
    """Traffic of one line: warp `requests`; `lanes` that took part in them; 32-byte `sectors` of global memory that they touched; `passes`
    over the banks of shared memory. `ideal_sectors` and `ideal_passes` are the fewest that hold the same bytes."""

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


def traffic_table(report: Report) -> str:
    """The traffic as a table, a row for each line of the source: requests of warps, and how many lanes, sectors and passes one request has
    on average, ideal in parentheses. ← marks what takes more than it need."""
    width = max([4, *(len(line) for line, *_ in report.traffic)])
    rows = [f"{'line':{width}}  memory    bytes  requests  lanes   sectors or passes (ideal)"]
    for (line, space, way, size), c in report.traffic.items():
        took, ideal = (c.sectors, c.ideal_sectors) if space == "global" else (c.passes, c.ideal_passes)
        rows.append(f"{line:{width}}  {space} {way}  {size:5d}  {c.requests:8d}  {c.lanes / c.requests:5.1f}   {took / c.requests:5.2f} "
                    f"{'sectors' if space == 'global' else 'passes'} ({ideal / c.requests:.2f})" + "  ←" * (took > ideal))
    return "\n".join(rows)


def watch(library: ctypes.CDLL, arrays: dict[int, np.ndarray], addresses: dict[int, int], *, traffic_only: bool) -> None:
    """Before a launch: tell the audit where the arrays lie. Those that overlap count as one array, named after all of them."""
    spans: list[tuple[int, int, list[int]]] = []
    for i in sorted(arrays, key=lambda i: addresses[i]):
        low, high = addresses[i], addresses[i] + arrays[i].nbytes
        if spans and low < spans[-1][1]:
            spans[-1] = spans[-1][0], max(high, spans[-1][1]), [*spans[-1][2], i]
        else:
            spans.append((low, high, [i]))
    library.simt_audit_start(int(traffic_only), ctypes.c_size_t(min(addresses.values(), default=0) // 256 * 256))
    for low, high, members in spans:
        name = " ".join(map(str, members)).encode()
        library.simt_audit_array(ctypes.c_size_t(low), ctypes.c_size_t(high - low), min(arrays[i].itemsize for i in members), name)


def read_report(library: ctypes.CDLL, path: Path, files: tuple[str, ...], arrays: dict[int, np.ndarray]) -> Report:
    """After a launch: what the audit has found. `files` are the names of the source's files: a place in another is not shown."""
    library.simt_audit_findings.restype = library.simt_audit_traffic.restype = ctypes.c_char_p
    found = [line.split("\t") for line in library.simt_audit_findings().decode().splitlines()]
    counted = [line.split() for line in library.simt_audit_traffic().decode().splitlines()]
    places = {int(field[1:], 16) for fields in found for field in fields if field.startswith("@")} | {int(fields[0]) for fields in counted}
    lines = _lines(path, files, places)
    traffic: dict[tuple[str, str, str, int], Counts] = {}
    for place, space, way, size, *numbers in counted:
        key = lines[int(place)], space, way, int(size)
        traffic[key] = Counts(*(a + int(b) for a, b in zip(traffic.get(key, (0,) * 6), numbers)))
    findings = [_sentence([lines[int(field[1:], 16)] if field.startswith("@") else field for field in fields], arrays) for fields in found]
    findings.sort(key=lambda text: KINDS.index(text.partition(":")[0]))
    return Report(list(dict.fromkeys(findings)), {key: traffic[key] for key in sorted(traffic, key=_by_line) if traffic[key].requests})


def _by_line(key: tuple[str, str, str, int]) -> tuple[str, int, str, str, int]:
    file, _, line = key[0].rpartition(":")
    return file, int(line), *key[1:]


def _lines(path: Path, files: tuple[str, ...], places: Iterable[int]) -> dict[int, str]:
    """The line of the source that each place of the library was compiled from: of inlined calls the innermost that is not the emulator's own."""
    ordered = sorted(places)
    if not ordered:
        return {}
    asked = "\n".join(map(hex, ordered))
    out = subprocess.run(["addr2line", "-a", "-i", "-e", str(path)], input=asked, capture_output=True, text=True, check=True).stdout
    lines = {}
    for place, frames in zip(ordered, re.split(r"(?m)^0x[0-9a-f]+\n", out)[1:]):
        places_of = [re.sub(r" \(discriminator \d+\)|^.*/", "", frame) for frame in frames.splitlines()]
        names = {Path(file).name for file in files}
        lines[place] = next((frame for frame in places_of if frame.rpartition(":")[0] in names), places_of[0])
    return lines


def _sentence(fields: list[str], arrays: dict[int, np.ndarray]) -> str:
    more, kind, place, thread, way, size, region, offset, extent, element, *other = fields
    again = "" if more == "0" else f" ({more} more like it)"
    members = [int(i) for i in region.split()] if region[0].isdigit() else []
    name = " and ".join(f"argument {i} ({arrays[i].dtype.name}, shape {arrays[i].shape})" for i in members) or region
    byte = int(offset)
    if region == "no array":
        return f"out of bounds: {place}: {thread} {way} {size} bytes at 0x{byte & 2**64 - 1:x}, far from every array: a null or wild pointer"
    if kind == "out of bounds":
        last = byte + int(size) - int(extent)
        how = (f"{-byte} bytes before the start of" if byte < 0 else f"{byte - int(extent)} bytes past the end of" if byte >= int(extent) else
               f"the last {last} of them past the end of")
        return f"out of bounds: {place}: {thread} {way} {size} bytes, {how} {name}"
    if kind == "misaligned":
        return f"misaligned: {place}: {thread} uses {size} bytes at once at byte {byte} of {name}, which is not a multiple of {size}"
    what = f"element {byte // int(element)}"
    if len(members) == 1 and arrays[members[0]].ndim > 1:
        index = np.unravel_index(byte // int(element), arrays[members[0]].shape)
        what = f"element ({', '.join(str(int(i)) for i in index)})"
    elif len(members) > 1 or element == "1":
        what = f"byte {byte}"
    if kind == "uninitialised":
        return f"uninitialised: {place}: {thread} reads {what} of {name}, which no thread of the block has written{again}"
    line, other_thread, did = other
    who, _, block = other_thread.partition(" of ")
    if thread.endswith(block):
        return f"race: {place}: {thread} {way} {what} of {name}, which {who} {did} at {line} with no barrier between{again}"
    return f"race: {place}: {thread} {way} {what} of {name}, which {other_thread} {did} at {line}: blocks run in any order{again}"
