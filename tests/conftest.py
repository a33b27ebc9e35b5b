"""Hypothesis profiles and the fixtures that every test file may use.

HYPOTHESIS_PROFILE=daily      25 new examples for each law; what `make test` runs at a desk
HYPOTHESIS_PROFILE=ci         50 examples, always the same ones; chosen by itself where CI is set
HYPOTHESIS_PROFILE=thorough   500 new examples, for a law that was just written or is in doubt
HYPOTHESIS_PROFILE=mutants    10 examples, always the same ones, failures not made smaller; for `make mutants`
"""
from __future__ import annotations

import os
import platform
import shutil

import hypothesis
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings

SEED = 2020

# On a machine that others use too, how long one example takes says nothing about the code: no deadline, no complaint about slowness.
_ALWAYS = {"deadline": None, "print_blob": True, "suppress_health_check": [HealthCheck.too_slow]}

settings.register_profile("daily", max_examples=25, **_ALWAYS)
settings.register_profile("ci", max_examples=50, derandomize=True, database=None, **_ALWAYS)
settings.register_profile("thorough", max_examples=500, **_ALWAYS)
settings.register_profile("mutants", max_examples=10, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate], **_ALWAYS)

PROFILE = os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI", "").lower() not in ("", "0", "false") else "daily")
settings.load_profile(PROFILE)


def pytest_report_header(config: pytest.Config) -> str:
    chosen = settings.get_profile(PROFILE)
    drawn = "the same every time, each law seeded by its source" if chosen.derandomize else "new every time, failures replayed first"
    return (f"hypothesis profile {PROFILE}: {chosen.max_examples} examples, {drawn}; rng fixture: seed {SEED}; "
            f"numpy {np.__version__}, hypothesis {hypothesis.__version__}, {platform.machine()}")


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers that are the same in every run and for every test. Inside @given draw from Hypothesis instead."""
    return np.random.default_rng(SEED)


@pytest.fixture(scope="session")
def simt():
    """The stand-in for CuPy, which runs CUDA kernels on the CPU."""
    if shutil.which("g++") is None:
        pytest.skip("the kernels are compiled for the CPU by g++, which is not here")
    from refattn.simt import cupy
    return cupy


@pytest.fixture(scope="session", params=["simt", pytest.param("cupy", marks=pytest.mark.gpu)])
def cp(request):
    """The stand-in, and with `-m gpu` the device."""
    if request.param == "simt":
        return request.getfixturevalue("simt")
    cupy = pytest.importorskip("cupy")
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"no CUDA device: {error}")
    return cupy


@pytest.fixture
def small_groups(monkeypatch):
    """Kernels with groups of 64 positions, compiled anew: a planted bug is not to be kept."""
    from refattn.cuda import launch
    monkeypatch.setattr(launch, "group_rows", lambda heads, N: 64)
    monkeypatch.setattr(launch, "_kernels", launch._kernels.__wrapped__)


@pytest.fixture(scope="session")
def wheels():
    """`refattn.testing.nvrtc`, where its wheels are."""
    from refattn.testing import nvrtc
    try:
        nvrtc._nvrtc()
    except ImportError as error:
        pytest.skip(str(error))
    return nvrtc
