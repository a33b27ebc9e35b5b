"""Laws of the package itself: what an import costs, what the public face promises, what a wheel contains, what the repository says."""
from __future__ import annotations

import configparser
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import pkgutil
import re
import shutil
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

import refattn

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "refattn"
EXTRAS = {"sklearn", "matplotlib", "tqdm", "safetensors", "ml_dtypes", "cupy", "cupyx", "torch", "jax", "autograd", "onnx", "onnxruntime",
          "mpi4py", "fast_transformers", "rapidfuzz", "scipy", "numba", "threadpoolctl", "hypothesis", "pytest", "array_api_strict"}
CORE = {"numpy", "threadpoolctl"}

IMPORT_COST = 0.050   # seconds of processor time on top of NumPy's own import


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def lines(option: str) -> list[str]:
    return [line for line in option.splitlines() if line]


def extras() -> dict[str, list[str]]:
    return {name: lines(value) for name, value in setup_cfg()["options.extras_require"].items()}


def run_python(code: str) -> str:
    """What a fresh interpreter prints for `code`. It may write byte code, so that later runs import as a user's would."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules() -> list[str]:
    """Every module of the package but the ones that are programs."""
    found = [info.name for info in pkgutil.walk_packages([str(PACKAGE)], "refattn.", onerror=lambda name: None)]
    return [name for name in found if not name.endswith("__main__")]


def tracked_files() -> list[Path]:
    """What a clone would contain; everything outside hidden and generated folders where this is no git checkout."""
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True) if shutil.which("git") else None
    if listed is not None and listed.returncode == 0 and listed.stdout:
        names = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        names = [path for room in ("refattn", "tests", "docs", "examples") for path in (ROOT / room).rglob("*")] + list(ROOT.glob("*"))
    return [path for path in names if path.is_file() and "__pycache__" not in path.parts]


# --- what an import brings and costs -------------------------------------------------------------------------------------------------

def test_import_brings_numpy_and_nothing_else():
    code = "import sys, refattn; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = set(run_python(code).split())
    assert {"refattn", "numpy"} <= loaded
    assert not loaded & EXTRAS, f"import refattn also imported {sorted(loaded & EXTRAS)}"


def test_import_costs_no_more_than_numpy_plus_50_ms():
    """In processor time, not by the clock: with the other test processes beside it, the clock measures them too. Waiting is not seen."""
    code = "import time, numpy; start = time.process_time(); import refattn; print(time.process_time() - start)"
    run_python(code)                                                    # byte code is written once, not at every import
    costs = [float(run_python(code)) for _ in range(7)]
    assert statistics.median(costs) <= IMPORT_COST, f"import refattn costs {[f'{1e3 * cost:.0f} ms' for cost in costs]} after NumPy's"


def test_walk_reaches_subpackages():
    assert {"refattn._array", "refattn.testing.budgets"} <= set(modules())


@pytest.mark.parametrize("name", modules())
def test_module_imports_or_names_the_extra_that_is_missing(name):
    code = f"""
import importlib, json
try:
    importlib.import_module({name!r})
except ImportError as error:
    print(json.dumps(str(error)))
else:
    print("null")
"""
    error = json.loads(run_python(code).splitlines()[-1])
    if error is not None:
        remedy = re.search(r"pip install 'refattn\[(\w+)\]'", error)
        assert remedy and remedy.group(1) in extras(), f"{name}: {error}"


# --- what the public face promises ---------------------------------------------------------------------------------------------------

FACE = sorted(refattn.__all__)
FUNCTIONS = [name for name in FACE if inspect.isfunction(getattr(refattn, name))]


def sections(doc: str) -> dict[str, str]:
    """A numpydoc docstring cut at its underlined headings."""
    parts = re.split(r"^(\w[\w ]*)\n-{3,}$", inspect.cleandoc(doc), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


def test_face_is_what_all_says():
    ours = {name for name, value in vars(refattn).items()
            if not name.startswith("_") and getattr(value, "__module__", "").startswith("refattn")}
    assert set(FACE) >= ours, f"public in refattn but not in __all__: {sorted(ours - set(FACE))}"
    assert len(FACE) == len(refattn.__all__), "a name stands twice in __all__"


@pytest.mark.parametrize("name", FACE)
def test_public_name_has_a_docstring_that_says_what_it_is(name):
    value = getattr(refattn, name)
    if inspect.isfunction(value) or inspect.isclass(value):
        assert value.__doc__ and not value.__doc__.startswith(f"{name}("), f"{name} has no docstring of its own"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_function_is_documented_in_numpydoc_with_a_doctest(name):
    function = getattr(refattn, name)
    found = sections(function.__doc__ or "")
    for heading in ("Parameters", "Returns", "Raises", "Notes"):
        assert heading in found, f"{name}: the docstring has no section {heading}, only {sorted(found)}"
    assert ">>> " in function.__doc__, f"{name}: the docstring shows no doctest"
    described = set(re.findall(r"\w+", " ".join(line for line in found["Parameters"].splitlines() if re.match(r"\S", line))))
    missing = [parameter for parameter in inspect.signature(function).parameters if parameter not in described]
    assert not missing, f"{name}: Parameters do not describe {missing}"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_function_is_typed(name):
    function = getattr(refattn, name)
    untyped = [parameter for parameter in (*inspect.signature(function).parameters, "return") if parameter not in function.__annotations__]
    assert not untyped, f"{name}: no annotation for {untyped}"


def test_every_module_says_what_it_is():
    silent = []
    for path in sorted(PACKAGE.rglob("*.py")):
        first = path.read_text(encoding="utf-8").lstrip()
        if first and not first.startswith(('"""', 'r"""')):
            silent.append(str(path.relative_to(ROOT)))
    assert not silent, f"no docstring on top of {silent}"


# --- metadata and the wheel ------------------------------------------------------------------------------------------------------------

def test_version_is_that_of_setup_cfg():
    try:
        importlib.metadata.version("refattn")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("refattn is not installed in this environment; `make test` installs it")
    assert refattn.__version__ == setup_cfg()["metadata"]["version"]


def test_extras_are_those_that_the_errors_name():
    expected = {"browser", "cuda12x", "cuda13x", "nvrtc", "bf16", "check", "demo", "test", "docs", "jax", "autograd", "onnx", "mpi", "numba",
                "speech", "torch"}
    assert set(extras()) == expected
    named = {name for path in PACKAGE.rglob("*.py")
             for name in re.findall(r'missing_extra\("[^"]+", "(\w+)"\)', path.read_text(encoding="utf-8"))}
    assert named <= expected, f"messages name extras that do not exist: {sorted(named - expected)}"


def test_requirements_are_numpy_and_threadpoolctl():
    assert {Requirement(line).name for line in lines(setup_cfg()["options"]["install_requires"])} == CORE


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the sources, so that no build folder is left in the checkout; nothing is downloaded for it."""
    import setuptools
    if int(setuptools.__version__.partition(".")[0]) < 77:
        pytest.skip(f"building the wheel offline needs setuptools 77 or later, as in the extra test; here is {setuptools.__version__}")
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(PACKAGE, source / "refattn", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
                    "--disable-pip-version-check", "--wheel-dir", str(source / "dist"), str(source)],
                   check=True, capture_output=True, text=True)
    (path,) = (source / "dist").glob("refattn-*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.mark.slow
def test_wheel_holds_every_source_and_the_mark_of_typing(wheel):
    shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
    kept = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*")
            if path.suffix in (".py", ".cu", ".cuh", ".h", ".cpp") or path.name == "py.typed" if "__pycache__" not in path.parts}
    assert "refattn/py.typed" in shipped
    assert shipped == kept, f"only in the wheel: {sorted(shipped - kept)}; missing from it: {sorted(kept - shipped)}"


@pytest.mark.slow
def test_wheel_says_what_setup_cfg_says(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    said = wheel.read(name).decode("utf-8").splitlines()
    for line in ("Name: refattn", f"Version: {setup_cfg()['metadata']['version']}", "Requires-Python: >=3.10", "License: MIT"):
        assert line in said or line.replace("License:", "License-Expression:") in said, line
    assert {line.removeprefix("Provides-Extra: ") for line in said if line.startswith("Provides-Extra: ")} == set(extras())
    unconditional = [Requirement(line.removeprefix("Requires-Dist: ")) for line in said if line.startswith("Requires-Dist: ")]
    assert {requirement.name for requirement in unconditional if requirement.marker is None} == CORE


# --- what the repository says ----------------------------------------------------------------------------------------------------------

MACHINE_PATH = re.compile(r"(?<![\w.~$}/-])/(?:home|root|Users|work|mnt)/\w|\b[A-Z]:\\{1,2}Users\\")


def test_no_file_names_a_path_of_a_machine():
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue                                                    # a picture
        for number, line in enumerate(text.splitlines(), 1):
            if MACHINE_PATH.search(line) or str(ROOT) + "/" in line:
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("text, names_one", [
    ("see " + "/home" + "/ada/refattn", True), ("open('" + "/Users" + "/ada/x')", True), ("=" + "/root" + "/x", True),
    ("https://example.org" + "/home" + "/page", False), ("${HOME}" + "/work" + "/x", False), ("out/demo/mnt/x", False)])
def test_a_path_of_a_machine_is_told_from_a_relative_one(text, names_one):
    assert bool(MACHINE_PATH.search(text)) == names_one


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")                     # Keras's own, of its variables
@pytest.mark.parametrize("path", documents(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_examples_in_documents_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each python block runs; the blocks of one document run in order, in one namespace, beside the files that the document shows."""
    text = path.read_text(encoding="utf-8")
    if "simt.build(" in text and shutil.which("g++") is None:
        pytest.skip("the emulator needs g++")
    for name, content in re.findall(r"[Ii]n a file `([\w.]+)`:\n\n```cpp\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        (tmp_path / name).write_text(content, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    blocks = re.findall(r"^```(?:python|\{code-cell\} \w+)\n(?::.*\n)*(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    if re.search("^(import|from) matplotlib", "\n".join(blocks), flags=re.MULTILINE):
        pytest.importorskip("matplotlib", reason="the page draws figures: pip install 'refattn[demo]'").use("agg")
    if path.parent.name == "embed":
        for name in re.findall(r"^(?:import|from) (?:refattn\.adapters\.)?(\w+)", "\n".join(blocks), flags=re.MULTILINE):
            if importlib.util.find_spec(name) is None:
                pytest.skip(f"the page shows refattn inside {name}, which is not installed")
    with np.printoptions():                                                      # what a page sets ends with it
        for block in blocks:
            exec(compile(block, path.name, "exec"), namespace)
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.mark.parametrize("path", documents() + [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"],
                         ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_in_documents_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)                 # code has x[0](y), which is no link
    broken = [target for target in re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", text) if not (path.parent / target).exists()]
    assert not broken, f"{path.name} links to {broken}"


def exists(name: str) -> bool:
    """A module of an extra that is not installed is there, too: importing it says which extra."""
    try:
        pkgutil.resolve_name(name)
    except AttributeError:
        try:
            importlib.import_module(name if ROOT.joinpath(*name.split(".")).with_suffix(".py").is_file() else name.rpartition(".")[0])
        except ImportError as error:
            return "pip install 'refattn[" in str(error)
        return False
    except ImportError as error:
        return "pip install 'refattn[" in str(error)
    return True


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_names_in_documents_exist(path):
    """Every dotted name refattn.x.y in backticks can be imported, so that no document speaks of what is not there."""
    absent = [name for name in set(re.findall(r"`(refattn(?:\.\w+)+)`", path.read_text(encoding="utf-8"))) if not exists(name)]
    assert not absent, f"{path.name} speaks of {sorted(absent)}"


def test_laws_in_documents_exist():
    tests = "\n".join(path.read_text("utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    defined = set(re.findall(r"^def (test_\w+)", tests, re.MULTILINE))
    named = {name for path in documents() for name in re.findall(r"`(test_\w+)`", path.read_text("utf-8"))}
    assert named, "the README names no law"
    assert named <= defined, f"documents name laws that do not exist: {sorted(named - defined)}"
