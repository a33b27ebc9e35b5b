"""Checkpoints that a kill cannot tear: the arrays and the record that explains them are one file, and that file is replaced whole.

    write a neighbour · fsync · rename over the old file

A reader finds the old checkpoint or the new one, never a mixture: the record (JSON) travels in the header of the safetensors file, so
there is no second file that it could disagree with.
"""
from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from refattn._array import missing_extra

_RECORD, _NAMES = "refattn", "refattn.names"         # safetensors sorts its arrays: their order is noted beside the record


def checkpoint_save(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> None:
    """Write arrays and a JSON record to one file, atomically.

    Parameters
    ----------
    path : path of the file; its folder must exist
    arrays : dict of str to array
        Any shapes and strides; float64 to float16, bfloat16, integers, bool. What is written is the values in C order.
    record : dict
        What JSON can hold, integers of any size included (a bit generator's state, for example). Tuples come back as lists.

    Raises
    ------
    TypeError
        ``arrays['x']: expected a NumPy array, got list; pass np.asarray of it``, or json's own words for what it cannot hold.
    ImportError
        If safetensors is not installed, with the command that installs it.

    Notes
    -----
    If the process dies inside this function, whatever the moment, `path` holds what it held before or all of the new checkpoint. After a
    loss of power too, on file systems that keep the order of fsync and rename. A kill may leave a hidden neighbour ``.name.pid.part``
    behind; it may be deleted. Time and extra memory: the size of the arrays, twice.

    >>> import tempfile, os
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "model.safetensors")
    ...     checkpoint_save(path, {"weight": np.arange(6.0).reshape(2, 3).T}, {"update": 7})
    ...     arrays, record = checkpoint_load(path)
    >>> arrays["weight"].shape, record
    ((3, 2), {'update': 7})
    """
    try:
        import safetensors.numpy as safetensors
    except ModuleNotFoundError:
        raise missing_extra("safetensors", "demo") from None
    for name, x in arrays.items():
        if not isinstance(x, np.ndarray):
            raise TypeError(f"arrays[{name!r}]: expected a NumPy array, got {type(x).__name__}; pass np.asarray of it")
    # safetensors reads an array's memory from its first byte on, whatever its strides
    packed = {name: np.array(x, order="C", copy=None) for name, x in arrays.items()}
    replace_file(path, safetensors.save(packed, {_RECORD: json.dumps(record, allow_nan=False), _NAMES: json.dumps(list(packed))}))


def checkpoint_load(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read what `checkpoint_save` wrote: (arrays, record). The arrays are the caller's own, writable.

    Parameters
    ----------
    path : path of the file

    Returns
    -------
    arrays : dict of str to array
        Names in the order as saved; shapes, dtypes and values too, bit for bit.
    record : dict

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        ``model.safetensors: expected a whole checkpoint of refattn, got a file that …; delete it or name another``.
    ImportError
        If safetensors is not installed, with the command that installs it.

    Notes
    -----
    Time and memory: the size of the file. See `checkpoint_save` for an example.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError:
        raise missing_extra("safetensors", "demo") from None
    if not os.path.exists(path):
        raise FileNotFoundError(f"{os.fspath(path)}: no checkpoint there")
    try:
        with safe_open(path, framework="np") as file:
            header = file.metadata() or {}
            if _RECORD not in header:
                raise ValueError(_unreadable(path, "has no record of refattn"))
            return {name: np.array(file.get_tensor(name)) for name in json.loads(header[_NAMES])}, json.loads(header[_RECORD])
    except SafetensorError as error:
        raise ValueError(_unreadable(path, f"safetensors cannot read ({error})")) from None


def replace_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Make `data` the content of `path` in one indivisible move; an error on the way leaves `path` as it was.

    >>> import tempfile, os
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     replace_file(os.path.join(folder, "note"), b"whole")
    ...     os.listdir(folder)
    ['note']
    """
    folder, name = os.path.split(os.path.abspath(path))
    part = os.path.join(folder, f".{name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        if os.path.exists(part):
            os.remove(part)
        raise
    if os.name == "posix":              # the rename itself is on disk only when the folder is
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _unreadable(path: str | os.PathLike[str], why: str) -> str:
    return f"{os.fspath(path)}: expected a whole checkpoint of refattn, got a file that {why}; delete it or name another"
