"""Laws of checkpoints: what comes back is what went in, and no death of the process shows."""
from __future__ import annotations

import builtins
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refattn import checkpoint
from refattn.checkpoint import checkpoint_load, checkpoint_save, replace_file

DTYPES = [np.dtype(d) for d in ("f8", "f4", "f2", "i8", "i4", "u1", "?", ">f4", ">i8", ml_dtypes.bfloat16)]
VIEWS = {
    "plain": lambda x: x,
    "transposed": lambda x: x.T,
    "fortran": np.asfortranarray,
    "reversed": lambda x: x[..., ::-1] if x.ndim else x,
    "every second": lambda x: x[..., ::2] if x.ndim else x,
    "repeated": lambda x: np.broadcast_to(x, (3, *x.shape)),
}


@given(shape=st.lists(st.integers(0, 4), max_size=3), dtype=st.sampled_from(DTYPES), view=st.sampled_from(sorted(VIEWS)),
       seed=st.integers(0, 2**32))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arrays_come_back_bit_for_bit(tmp_path: Path, shape: list[int], dtype: np.dtype[Any], view: str, seed: int) -> None:
    x = VIEWS[view](np.asarray(np.random.default_rng(seed).standard_normal(shape) * 100).astype(np.int8).astype(dtype))
    x.flags.writeable = False
    path = tmp_path / "x.safetensors"
    checkpoint_save(path, {"x": x, "other": np.arange(3.0)}, {})     # not the order of their names, nor of their sizes
    arrays, _ = checkpoint_load(path)
    back = arrays["x"]
    assert list(arrays) == ["x", "other"]
    assert (back.shape, back.dtype) == (x.shape, x.dtype.newbyteorder("="))
    assert back.tobytes() == x.astype(back.dtype).tobytes()
    assert back.flags.writeable


def test_special_values_come_back(tmp_path: Path) -> None:
    x = np.array([np.nan, np.inf, -np.inf, -0.0, 5e-324])
    checkpoint_save(tmp_path / "x", {"x": x}, {})
    assert checkpoint_load(tmp_path / "x")[0]["x"].tobytes() == x.tobytes()


_finite = st.floats(allow_nan=False, allow_infinity=False)
_json = st.recursive(st.none() | st.booleans() | st.integers(-2**200, 2**200) | _finite | st.text(),
                     lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8)


@given(record=st.dictionaries(st.text().filter(lambda s: s.isprintable()), _json, max_size=3))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_records_come_back_as_they_were(tmp_path: Path, record: dict[str, Any]) -> None:
    checkpoint_save(tmp_path / "x", {}, record)
    assert checkpoint_load(tmp_path / "x") == ({}, record)


def test_a_generator_goes_on_where_it_stood(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    rng.standard_normal(5)
    rng.integers(7, dtype=np.int32)                 # leaves half a word in the generator's buffer
    checkpoint_save(tmp_path / "x", {}, {"rng": rng.bit_generator.state})
    other = np.random.default_rng()
    other.bit_generator.state = checkpoint_load(tmp_path / "x")[1]["rng"]
    for draw in (lambda r: r.integers(7, dtype=np.int32), lambda r: r.permutation(9), lambda r: r.standard_normal(3)):
        np.testing.assert_array_equal(draw(rng), draw(other))


@pytest.mark.parametrize("moment", ["open", "write", "fsync", "replace"])
def test_an_error_at_any_moment_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    path = tmp_path / "x.safetensors"
    checkpoint_save(path, {"x": np.zeros(5)}, {"update": 0})
    before = path.read_bytes()

    def fail(*arguments: Any) -> Any:
        raise OSError("disk full")

    class HalfFile:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *arguments: object) -> None:
            self.file.close()

        def write(self, data: bytes) -> None:
            self.file.write(data[: len(data) // 2])
            fail()

    with monkeypatch.context() as patch:
        if moment == "open":
            patch.setattr(builtins, "open", fail)
        elif moment == "write":
            whole = builtins.open
            patch.setattr(builtins, "open", lambda *arguments: HalfFile(whole(*arguments)))
        else:
            patch.setattr(checkpoint.os, moment, fail)
        with pytest.raises(OSError, match="disk full"):
            checkpoint_save(path, {"x": np.ones(5)}, {"update": 1})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.safetensors"]


WRITER = """
import sys
import numpy as np
from refattn.checkpoint import checkpoint_save
for update in range(10**9):
    checkpoint_save(sys.argv[1], {name: np.full(20_000, float(update)) for name in ("a", "b")}, {"update": update})
    print(update, flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
@pytest.mark.parametrize("patience", [0.0, 0.0004, 0.0031, 0.0107])
def test_a_kill_at_any_moment_leaves_one_whole_checkpoint(tmp_path: Path, patience: float) -> None:
    path = tmp_path / "x.safetensors"
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        for _ in range(3):
            seen = int(writer.stdout.readline())
        time.sleep(patience)
        writer.send_signal(signal.SIGKILL)
    arrays, record = checkpoint_load(path)
    assert record["update"] >= seen
    for x in arrays.values():
        np.testing.assert_array_equal(x, np.full(20_000, float(record["update"])))
    checkpoint_save(path, {"a": np.ones(1)}, {"update": -1})        # what the dead process left behind is in nobody's way
    assert checkpoint_load(path)[1] == {"update": -1}


def test_readers_see_whole_files_while_a_writer_replaces_them(tmp_path: Path) -> None:
    path = tmp_path / "note"
    replace_file(path, b"a" * 10_000)
    with open(path, "rb") as reader:
        first = reader.read(10)
        replace_file(path, b"b" * 10_000)
        assert first + reader.read() == b"a" * 10_000
    assert path.read_bytes() == b"b" * 10_000


@pytest.mark.parametrize("cut", [0, 1, 7, 60, -1])
def test_a_damaged_file_is_refused_with_words(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "x.safetensors"
    checkpoint_save(path, {"x": np.arange(9.0)}, {"update": 1})
    path.write_bytes(path.read_bytes()[:cut])
    words = r"x\.safetensors: expected a whole checkpoint of refattn, got a file that .*; delete it or name another"
    with pytest.raises(ValueError, match=words):
        checkpoint_load(path)


def test_a_stranger_s_safetensors_file_is_refused_with_words(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(2)}, tmp_path / "x")
    with pytest.raises(ValueError, match="a file that has no record of refattn"):
        checkpoint_load(tmp_path / "x")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing.here: no checkpoint there"):
        checkpoint_load(tmp_path / "nothing.here")


def test_what_cannot_be_saved_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"arrays\['x'\]: expected a NumPy array, got list; pass np.asarray of it"):
        checkpoint_save(tmp_path / "x", {"x": [1.0]}, {})           # type: ignore[dict-item]
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoint_save(tmp_path / "x", {}, {"x": np.zeros(2)})
    with pytest.raises(ValueError, match="JSON compliant"):
        checkpoint_save(tmp_path / "x", {}, {"loss": float("nan")})
    assert os.listdir(tmp_path) == []


def test_without_safetensors_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("safetensors", "safetensors.numpy"):
        monkeypatch.setitem(sys.modules, name, None)
    for call in (lambda: checkpoint_save(tmp_path / "x", {}, {}), lambda: checkpoint_load(tmp_path / "x")):
        with pytest.raises(ImportError, match=r"this needs safetensors, .*pip install 'refattn\[demo\]'"):
            call()


def test_the_record_can_be_read_without_refattn(tmp_path: Path) -> None:
    from safetensors import safe_open

    checkpoint_save(tmp_path / "x", {"x": np.zeros(2)}, {"update": 5})
    with safe_open(tmp_path / "x", framework="np") as file:
        assert json.loads(file.metadata()["refattn"]) == {"update": 5}
