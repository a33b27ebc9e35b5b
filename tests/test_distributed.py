"""Laws of sequences cut over MPI ranks: the same answer as in one piece, on 1 to 4 ranks, however they are cut; and one error on all ranks.

Starting MPI takes a second: so one process group for each number of ranks does all jobs (`ranks.py`), and the laws judge what it wrote.
"""
from __future__ import annotations

import math
import os
import pickle
import queue
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st

from refattn import State, causal_linear_attention, chunks, distributed, distributed_bench, oracle, recurrence, vjp
from refattn.experiment import results_load
from refattn.testing import budgets, laws
from refattn.testing.rules_budget import rules_budget
from refattn.testing.strategies import cases, rule_cases

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]
RULES = ("linear", "gated", "delta", "gated_delta")
HERE, SEED, SECONDS = Path(__file__).parent, 2020, 240
seeds = st.integers(0, 2**32 - 1)
each_rule = pytest.mark.parametrize("rule", RULES)


def drawn(strategy, count):
    """The first so many examples; the same every time."""
    found = []

    @hypothesis_seed(SEED)
    @settings(max_examples=count, database=None, phases=[Phase.generate])
    @given(strategy)
    def collect(c):
        found.append(c)

    collect()
    return found


def cases_of(rule, **options):
    """`cases` with the fields of `rule_cases`."""
    if rule != "linear":
        return rule_cases(rule, **options)
    return cases(**options).map(lambda c: SimpleNamespace(**c._asdict(), g=None, beta=None))


def at(x, rows, ndim):
    return None if x is None else x[..., rows, :] if x.ndim == ndim else x[..., rows]


def present(*xs):
    return [x for x in xs if x is not None]


# --- without MPI: the map of a slice ----------------------------------------------------------------------------------------------------

def slices_map(c, rule, rows=slice(None)):
    """[B | A] of positions `rows`, from no state."""
    k, v, g, beta = (at(x, rows, c.k.ndim) for x in (c.k, c.v, c.g, c.beta))
    S = np.zeros_like(c.state)
    message = np.concatenate([S, distributed._unit(c.dims.D, S, rule, c.g is not None, np)], -1)
    return distributed.last_state(distributed._writes, k, (k, v, g, beta), message)


@each_rule
@pytest.mark.parametrize("buffers", [1, chunks.BUFFER_BYTES])
@given(st.data())
def test_the_map_of_a_slice_is_the_recurrence_and_maps_of_two_slices_compose(rule, buffers, data):
    c = data.draw(cases_of(rule, exact=True, longest=100))
    M, cut = c.dims.M, data.draw(st.integers(0, c.dims.N))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "BUFFER_BYTES", buffers)
        whole, first, then = (slices_map(c, rule, rows) for rows in (slice(None), slice(cut), slice(cut, None)))
    laws.law_equal_bits({"whole": [whole], "composed": [distributed._composed(first, then, M)]})
    start = np.concatenate([c.state, np.zeros_like(whole[..., M:])], -1)
    end = recurrence(c.q, c.k, c.v, c.g, c.beta, c.state, rule=rule)[1]
    laws.law_equal_bits({"recurrence": [end], "map": [distributed._composed(start, whole, M)[..., :M]]})


@each_rule
@pytest.mark.parametrize("buffers", [1, chunks.BUFFER_BYTES])
@given(st.data())
def test_the_cotangent_before_a_slice_is_that_of_the_backward(rule, buffers, data):
    c = data.draw(cases_of(rule, exact=True, longest=100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "BUFFER_BYTES", buffers)
        R = distributed.last_state(distributed._reads, c.k, (c.q, c.dout, c.k, c.g, c.beta), c.dstate, reverse=True)
    _, pullback = vjp(recurrence, c.q, c.k, c.v, c.g, c.beta, c.state, rule=rule)
    laws.law_equal_bits({"backward": [pullback(c.dout, c.dstate)[-1]], "slice": [R]})


# --- on ranks ----------------------------------------------------------------------------------------------------------------------------

def mpi():
    """mpiexec of this environment; skips where there is none."""
    pytest.importorskip("mpi4py", reason="needs mpi4py: pip install 'refattn[mpi]'")
    beside = Path(sys.executable).parent / "mpiexec"
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    if found is None:
        pytest.skip("needs mpiexec: pip install 'refattn[mpi]'")
    return found


def on_ranks(size, *command, folder, check=True):
    """The command on so many ranks, more than there are cores if need be, and as whoever runs the tests; ranks that wait for ever are ended."""
    allow = {f"{who}_ALLOW_RUN_AS_ROOT{confirm}": "1" for who in ("OMPI", "PRTE") for confirm in ("", "_CONFIRM")}
    environment = os.environ | allow | {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", "OMPI_MCA_mpi_yield_when_idle": "1",
                                        "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent), "MPIEXEC_TIMEOUT": str(SECONDS)}
    done = subprocess.run([mpi(), "-n", str(size), sys.executable, "-W", "error", *map(str, command)], env=environment, capture_output=True,
                          text=True, timeout=SECONDS + 60, cwd=folder)
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done


def job(function, arrays, state, dout, dstates, options, rng, size, **more):
    N = arrays[0].shape[-2]
    cuts = [0, *sorted(int(x) for x in rng.integers(0, N + 1, size - 1)), N]                       # empty slices among them
    return {"function": function, "arrays": arrays, "state": state, "dout": dout, "options": options, "cuts": cuts,
            "dstates": [*[None] * (size - len(dstates)), *dstates], **more}


def recurrence_job(c, rule, rng, size, scale=1.0, dstates=None, **more):
    return job("recurrence", (c.q, c.k, c.v, c.g, c.beta), c.state, c.dout, [c.dstate] if dstates is None else dstates,
               {"rule": rule, "scale": scale}, rng, size, **more)


def attention_job(c, rng, size, *, exact, **more):
    """Features that are 1, 2, … or elu + 1; states as positive keys leave them."""
    z, dz = (np.abs(rng.integers(1, 4, c.state.shape[:-1]) if exact else rng.standard_normal(c.state.shape[:-1])).astype(c.state.dtype) for _ in "12")
    q, k = (np.abs(x) if exact else x for x in (c.q, c.k))
    return job("causal_linear_attention", (q, k, c.v), State(c.state, z), c.dout, [State(c.dstate, dz)],
               {"feature_map": "identity" if exact else "elu1", "eps": 0.0 if exact else 1e-6}, rng, size, **more)


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def done(request, tmp_path_factory):
    """(number of ranks, {kind: [(job, results of all ranks)]})."""
    size, rng = request.param, np.random.default_rng([SEED, request.param])
    kinds = {"exact": [], "real": [], "attention": [], "exact attention": [], "states": [], "failing": []}
    for rule in RULES:
        for dtype in DTYPES:
            exact = drawn(cases_of(rule, dtype=dtype, exact=True, longest=70), 6)
            kinds["exact"] += [recurrence_job(c, rule, rng, size, scale=0.5, of=rule) for c in exact]
        for dtype in (np.float64, np.float32, np.float16):
            finite = {} if rule in ("linear", "delta") or dtype != np.float64 else {"mixtures": ("none", "mild", "growing", "strong")}
            real = drawn(cases_of(rule, dtype=dtype, longest=40, **finite), 6)
            kinds["real"] += [recurrence_job(c, rule, rng, size, scale=-0.25, case=c) for c in real]
        for c in drawn(cases_of(rule, exact=True, longest=40), 4):
            some = [rng.integers(-2, 3, c.state.shape).astype(c.state.dtype) if rng.random() < 0.7 else None for _ in range(size)]
            kinds["states"].append(recurrence_job(c, rule, rng, size, dstates=some))
            kinds["states"].append(recurrence_job(c, rule, rng, size, dstates=some) | {"dout": None, "state": None})
    for dtype in DTYPES:
        kinds["attention"] += [attention_job(c, rng, size, exact=False, case=c) for c in drawn(cases(dtype=dtype, longest=40), 6)]
        kinds["exact attention"] += [attention_job(c, rng, size, exact=True) for c in drawn(cases(dtype=dtype, exact=True, longest=40), 6)]
    c = drawn(cases_of("gated_delta", longest=40).filter(lambda c: c.dims.N > 4), 1)[0]
    right = recurrence_job(c, "gated_delta", rng, size)
    normalised = attention_job(drawn(cases(longest=40), 1)[0], rng, size, exact=False)
    kinds["failing"] = [right | change for change in failures(right, size)] + [normalised | change for change in failures_of_attention(size)]
    jobs = [j for some in kinds.values() for j in some]
    folder = tmp_path_factory.mktemp("ranks")
    with open(folder / "jobs", "wb") as file:
        pickle.dump(jobs, file)
    on_ranks(size, HERE / "ranks.py", folder / "jobs", folder=folder)
    results = []
    for rank in range(size):
        with open(folder / f"jobs.{rank}", "rb") as file:
            results.append(pickle.load(file))
    got = iter(zip(*results, strict=True))
    return size, {kind: [(j, next(got)) for j in some] for kind, some in kinds.items()}


def failures(right, size):
    """Changes of a job with which one rank, the last but one where there are so many, fails, and what all ranks are to be told."""
    if size == 1:
        return [{"wrong": (0, {"options": right["options"] | {"rule": "linear"}}), "told": (ValueError, "g: rule 'linear' has no g, got an array;")}]
    rank, arrays = max(size - 2, 0), right["arrays"]
    narrow = (arrays[0], arrays[1][..., :-1], *arrays[2:])
    say, short = f"rank {rank} of {size}: ", f"rank {rank} of {size}: MemoryError: no room for it"
    return [{"wrong": (rank, {"arrays": narrow}), "told": (ValueError, say + "k: expected (..., Hkv, N, D) = ")},
            {"wrong": (rank, {"arrays": tuple(None if x is None else x.astype(np.float32) if i else x for i, x in enumerate(arrays))}),
             "told": (TypeError, say + "q is float64 and k is float32")},
            {"states_everywhere": True, "told": (ValueError, f"rank 1 of {size}: state: expected None, got a state; what preceded the sequence")},
            {"wrong": (size - 1, {"options": right["options"] | {"scale": 2.0}}),
             "told": (ValueError, f"rank 0 of {size} calls recurrence(q ")},
            {"wrong": (size - 1, {"function": "causal_linear_attention", "arrays": arrays[:3], "options": {}}),
             "told": (ValueError, f"rank {size - 1} causal_linear_attention(q ")},
            {"wrong": (rank, {"dstates": [arrays[0]] * size}), "told": (ValueError, say + "dstate: expected the shape of the output")},
            {"raises": (rank, "last_state", 1), "told": (RuntimeError, short)},
            {"raises": (rank, "one_recurrence_vjp", 1), "told": (RuntimeError, short)},
            {"raises": (size - 1, "last_state", 1), "told": (RuntimeError, short.replace(f"rank {rank}", f"rank {size - 1}"))},
            {"raises": (rank, "one_recurrence_vjp", 0), "told": (RuntimeError, short)},
            {}]                                                                    # after all that the ranks are in step


def failures_of_attention(size):
    if size == 1:
        return [{}]
    told = (RuntimeError, f"rank {size - 1} of {size}: MemoryError: no room for it")
    return [{"raises": (0, "linear_attention_state", 1), "told": (RuntimeError, f"rank 0 of {size}: MemoryError: no room for it")},
            {"raises": (size - 1, "one_attention_vjp", 1), "told": told}, {"raises": (size - 1, "_states_cotangent", 1), "told": told},
            {"raises": (size - 1, "one_attention_vjp", 0), "told": told}, {}]


def alone(j):
    """A job on one rank, in one piece, by the function that is not distributed."""
    f = {"recurrence": recurrence, "causal_linear_attention": causal_linear_attention}[j["function"]]
    (out, end), pullback = vjp(f, *j["arrays"], j["state"], **j["options"])
    return flat(out, end, pullback(j["dout"], j["dstates"][-1]))


def together(j, results):
    """What the ranks have, as one: slices joined, the last one's state, the first one's dstate0."""
    for r in results:
        if isinstance(r, Exception):
            raise r
    ndim, state = j["arrays"][0].ndim, j["state"]
    for rank, r in enumerate(results[1:], 1):
        assert r["gradients"][-1] is None, f"rank {rank} has a gradient of the state, which is rank 0's"
    for rank, r in enumerate(results):
        rows = slice(*j["cuts"][rank: rank + 2])
        for x, d in zip(j["arrays"], r["gradients"], strict=False):
            assert (x is None) == (d is None) and (x is None or (d.shape, d.dtype) == (at(x, rows, ndim).shape, x.dtype))
    gradients = [None if x is None else np.concatenate([r["gradients"][i] for r in results], -2 if x.ndim == ndim else -1)
                 for i, x in enumerate(j["arrays"])]
    assert (results[0]["gradients"][-1] is None) == (state is None)
    return flat(np.concatenate([r["out"] for r in results], -2), results[-1]["end"], [*gradients, results[0]["gradients"][-1]])


def flat(out, end, gradients):
    return [y for x in (out, end, *gradients) if x is not None for y in (x if isinstance(x, State) else (x,))]


@pytest.mark.parametrize("kind", ["exact", "exact attention"])
def test_on_integers_the_cut_sequence_has_the_bits_of_the_whole_one(done, kind):
    """All rules, dtypes and kinds of decay. Of the normalised form, whose quotients are not integers, the outputs and the states."""
    for j, results in done[1][kind]:
        whole, cut = alone(j), together(j, results)
        count = len(whole) if kind == "exact" else 3
        laws.law_equal_bits({"whole": whole[:count], "cut": cut[:count]})


def test_states_between_ranks_have_cotangents_of_their_own(done):
    """Against the slices one after the other, each from the state of the one before: with cotangents for any of these states, and for no output."""
    for j, results in done[1]["states"]:
        state, pullbacks, ends, ndim = j["state"], [], [], j["arrays"][0].ndim
        for a, b in zip(j["cuts"][:-1], j["cuts"][1:], strict=True):
            S = np.zeros_like(results[0]["end"]) if state is None else state
            (_, state), pullback = vjp(recurrence, *(at(x, slice(a, b), ndim) for x in j["arrays"]), S, **j["options"])
            pullbacks.append(pullback)
            ends.append(state)
        R = np.zeros_like(state)
        for rank in reversed(range(len(results))):
            rows, given_here = slice(*j["cuts"][rank: rank + 2]), j["dstates"][rank]
            dout = None if j["dout"] is None else at(j["dout"], rows, ndim)
            *expected, R = pullbacks[rank](dout, R if given_here is None else R + given_here)
            laws.law_equal_bits({"one after the other": present(ends[rank], *expected),
                                 "on ranks": present(results[rank]["end"], *results[rank]["gradients"][:-1])})
        if j["state"] is not None:
            laws.law_equal_bits({"one after the other": [R], "on ranks": [results[0]["gradients"][-1]]})


def wide(x):
    return None if x is None else State(*(y.astype(float) for y in x)) if isinstance(x, State) else x.astype(float)


def widened(j):
    lists = {name: [wide(x) for x in j[name]] for name in ("arrays", "dstates")}
    return j | lists | {"state": wide(j["state"]), "dout": wide(j["dout"])}


def budget_of(j):
    c, scale = j["case"], j["options"].get("scale", 1.0)
    if j["function"] == "causal_linear_attention":
        return budgets.attention_budget(*j["arrays"], *j["state"], j["dout"], *j["dstates"][-1], phi=oracle.eq7, dphi=elu1_slope)
    if c.g is None and c.beta is None:
        return budgets.recurrence_budget(c.q, c.k, c.v, c.state, c.dout, c.dstate, scale=scale)
    return rules_budget(c.q, c.k, c.v, c.g, c.beta, c.state, c.dout, c.dstate, scale=scale)


def elu1_slope(x):
    return np.where(x > 0, 1.0, np.exp(np.minimum(x, 0)))


def definition(j):
    """(out, states) by the oracle."""
    if j["function"] == "causal_linear_attention":
        out, end = oracle.causal_linear_attention(*j["arrays"], j["state"], eps=j["options"]["eps"])
        return [out, *end]
    return list(oracle.full_recurrence(*j["arrays"], j["state"], scale=j["options"]["scale"]))


@pytest.mark.parametrize("kind", ["real", "attention"])
def test_rounding_stays_within_the_budget_of_one_piece(done, kind):
    """Outputs against the definition, gradients against float64 in one piece. The budget is the scan's: a slice is a chunk, their maps composed."""
    for j, results in done[1][kind]:
        got, bounds = together(j, results), present(*budget_of(j))
        expected = definition(j)
        expected += alone(widened(j))[len(expected):]
        for i, (x, y, bound) in enumerate(zip(got, expected, bounds, strict=True)):
            budgets.assert_within(x, y, bound, f"result {i}")


@pytest.mark.parametrize("kind", ["real", "attention"])
def test_backward_is_the_transpose_of_the_definition(done, kind):
    rng = np.random.default_rng(SEED)
    for j, results in done[1][kind]:
        if j["arrays"][0].dtype != np.float64:                                    # of which no decay is -inf: exp of -inf + i·h is NaN
            continue
        kinds, state = [x is not None for x in j["arrays"]], [*flat(j["state"], None, [])]
        count = sum(kinds)

        def function(*xs, j=j, kinds=kinds, count=count):
            given_arrays = iter(xs[:count])
            arrays, state = [next(given_arrays) if there else None for there in kinds], xs[count:]
            return definition(j | {"arrays": arrays, "state": State(*state) if len(state) > 1 else state[0]})

        cotangents = flat(j["dout"], j["dstates"][-1], [])
        got, bounds, first = together(j, results), present(*budget_of(j)), len(cotangents)
        laws.law_backward_is_the_transpose(function, [*present(*j["arrays"]), *state], got[first:], bounds[first:], cotangents, rng)


def test_messages_do_not_grow_with_the_sequence(done):
    """D·(M + E) numbers a head, E = 0, 1 or D by the rule, from each rank ⌈log₂ ranks⌉ times at most, each way."""
    size = done[0]
    for kind in ("exact", "attention"):
        for j, results in done[1][kind]:
            k, v, end = j["arrays"][1], j["arrays"][2], results[0]["end"]
            extra = 1 if kind == "attention" else {"linear": 0, "gated": 1}.get(j["of"], k.shape[-1])
            one = math.prod(k.shape[:-2]) * k.shape[-1] * (v.shape[-1] + extra) * (end.S if kind == "attention" else end).itemsize
            for rank, r in enumerate(results):
                assert r["forward bytes"] == [one] * sum(rank + 2**i < size for i in range(8))
                assert r["backward bytes"] == [one] * sum(rank - 2**i >= 0 for i in range(8))
                assert len(r["forward bytes"]) <= math.ceil(math.log2(size))


def test_where_one_rank_fails_all_are_told_the_same_and_stay_in_step(done):
    for j, results in done[1]["failing"]:
        if "told" not in j:
            for x, y, bound in zip(together(j, results), alone(j), alone(j), strict=True):         # right again
                assert np.allclose(x, y, rtol=1e-6, atol=1e-6 * np.abs(bound).max(initial=0))
            continue
        kind, words = j["told"]
        assert [type(r) for r in results] == [kind] * len(results), results
        assert all(str(r) == str(results[0]) and words in str(r) for r in results), results


def test_what_is_not_caught_ends_the_run_with_the_words(tmp_path):
    c = drawn(cases_of("gated"), 1)[0]
    bad = recurrence_job(c, "gated", np.random.default_rng(0), 3, uncaught=True, raises=(1, "last_state", 1))
    with open(tmp_path / "jobs", "wb") as file:
        pickle.dump([bad], file)
    ended = on_ranks(3, HERE / "ranks.py", tmp_path / "jobs", folder=tmp_path, check=False)
    assert ended.returncode and "RuntimeError: rank 1 of 3: MemoryError: no room for it" in ended.stderr


# --- the command -------------------------------------------------------------------------------------------------------------------------

def test_the_command_checks_counts_and_predicts(tmp_path):
    told = on_ranks(3, "-m", "refattn", "distributed", "--smoke", "--rule", "gated_delta", "--json", tmp_path / "figures.json", folder=tmp_path)
    figures = results_load(tmp_path / "figures.json")
    assert told.stdout.count("1,000 positions, H = 2, D = M = 8, float32, on 3 ranks") == 1         # one rank speaks
    assert figures["messages"] == [[1024] * 2, [1024] * 2, [1024] * 2] and "6, 6,144 bytes in all" in told.stdout
    assert figures["worst"] <= figures["allowed"] and len(figures["model"]) == 2 * len(distributed_bench.POSITIONS) * len(distributed_bench.RANKS)


def test_the_command_draws_the_same_sequence_however_it_is_cut():
    args = SimpleNamespace(seed=3, heads=2, features=4, rule="gated_delta")
    whole, dout = distributed_bench.inputs(args, slice(0, 3000))
    for rows in (slice(0, 0), slice(5, 5), slice(0, 1024), slice(1000, 2050), slice(2999, 3000)):
        part, dout_part = distributed_bench.inputs(args, rows)
        laws.law_equal_bits({"whole": [at(x, rows, 3) for x in (*whole, dout)], "part": [*part, dout_part]})


def test_the_model_is_its_formula():
    """T = t + c·H·N/P + ⌈log₂ P⌉·(l + bytes/w + j) + 4·⌈log₂ P⌉·l; twice the messages with the backward."""
    c = {"H": 3, "D": 8, "bytes": 1000, "one": {"forward": 2e-9, "both": 5e-9}, "many": {"forward": 3e-9, "both": 8e-9},
         "empty": {"forward": 1e-4, "both": 2e-4}, "join": 1e-5, "latency": 1e-6, "bandwidth": 1e9}
    for way, messages in (("forward", 1), ("both", 2)):
        row = distributed_bench.predicted(c, 10**7, 100, way)
        T = c["empty"][way] + c["many"][way] * 3 * 1e5 + messages * 7 * (1e-6 + 1e-6 + 1e-5 + 4e-6)
        assert np.isclose(row["seconds"], T, rtol=1e-12) and np.isclose(row["efficiency"], c["one"][way] * 3e7 / 100 / T, rtol=1e-12)


# --- CuPy's arrays, in threads -----------------------------------------------------------------------------------------------------------

def in_threads(size, work, kinds=""):
    """work(comm) for each rank of a communicator of threads; the results in order. One thread works at a time: the stand-in's emulator knows no
    threads."""
    MPI = pytest.importorskip("mpi4py.MPI", reason="needs mpi4py: pip install 'refattn[mpi]'", exc_type=ImportError)
    lines = {(a, b): queue.Queue() for a in range(size) for b in range(size)}
    barrier, shared, turn = threading.Barrier(size), [None] * size, threading.Lock()

    def waiting(wait, seconds=60):
        turn.release()
        try:
            return wait(timeout=seconds)
        finally:
            turn.acquire()

    def communicator(rank):
        def sendrecv(x, to, tag, y, source, tag2):
            if to != MPI.PROC_NULL:
                lines[rank, to].put(x.copy())
            if source != MPI.PROC_NULL:
                y[...] = waiting(lines[source, rank].get)

        def allgather(x):
            shared[rank] = x
            waiting(barrier.wait)
            everyone = list(shared)
            waiting(barrier.wait)
            return everyone

        def allreduce(x, y, op):
            assert op == MPI.MIN
            y[...] = np.min(allgather(x.copy()), axis=0)

        return SimpleNamespace(Get_rank=lambda: rank, Get_size=lambda: size, Get_info=lambda: {"mpi_memory_alloc_kinds": kinds}, Sendrecv=sendrecv,
                               Allreduce=allreduce, allgather=allgather, bcast=lambda x, root: allgather(x)[root])

    results = [None] * size

    def one(rank):
        with turn:
            try:
                results[rank] = work(communicator(rank))
            except Exception as error:
                results[rank] = error
                barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for r in results:
        if isinstance(r, Exception):
            raise r
    return results


@pytest.mark.parametrize("kinds", ["", "mpi,system,cuda:device"])
@pytest.mark.parametrize("function", [*RULES, "attention"])
def test_cupy_arrays_give_the_same_bits(cp, function, kinds):
    """Whether messages go from device to device or through host memory. Outputs and states; gradients too where they are sums of products."""
    rng, size = np.random.default_rng(SEED), 3
    for c in drawn(cases_of("linear" if function == "attention" else function, exact=True, dtype=np.float32, longest=40), 3):
        j = attention_job(c, rng, size, exact=True) if function == "attention" else recurrence_job(c, function, rng, size)
        ndim, xp = c.k.ndim, cp

        def work(comm, j=j, ndim=ndim, xp=xp):
            rank = comm.Get_rank()
            rows = slice(*j["cuts"][rank: rank + 2])
            there = lambda x: None if x is None else State(*map(xp.asarray, x)) if isinstance(x, State) else xp.asarray(np.ascontiguousarray(x))
            back = lambda x: None if x is None else State(*(y.get() for y in x)) if isinstance(x, State) else x.get()
            (out, end), pullback = getattr(distributed, j["function"] + "_vjp")(
                *(there(at(x, rows, ndim)) for x in j["arrays"]), there(j["state"]) if rank == 0 else None, comm=comm, **j["options"])
            gradients = pullback(there(at(j["dout"], rows, ndim)), there(j["dstates"][rank]))
            return {"out": back(out), "end": back(end), "gradients": [back(x) for x in gradients]}

        whole, cut = alone(j), together(j, in_threads(size, work, kinds))
        count = 3 if function == "attention" else len(whole)
        laws.law_equal_bits({"NumPy, whole": whole[:count], "CuPy, cut": cut[:count]})


# --- small things ------------------------------------------------------------------------------------------------------------------------

def test_shares_cover_the_sequence_in_order():
    for size in (1, 2, 3, 7):
        for N in (0, 1, 5, 100):
            rows = [distributed.share(N, SimpleNamespace(Get_rank=lambda r=r: r, Get_size=lambda s=size: s)) for r in range(size)]
            assert [r.start for r in rows[1:]] == [r.stop for r in rows[:-1]] and rows[0].start == 0 and rows[-1].stop == N
            assert max(r.stop - r.start for r in rows) - min(r.stop - r.start for r in rows) <= 1


def test_without_mpi4py_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    x = np.ones((2, 1))
    with pytest.raises(ImportError, match=r"this needs mpi4py and an MPI library, .* pip install 'refattn\[mpi\]'"):
        distributed.recurrence(x, x, x)


def test_what_is_no_communicator_is_said():
    x = np.ones((2, 1))
    with pytest.raises(TypeError, match="comm: expected a communicator of mpi4py, got int"):
        distributed.recurrence(x, x, x, comm=4)
