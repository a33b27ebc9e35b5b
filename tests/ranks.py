"""What each rank of `test_distributed` does: `mpiexec -n P python ranks.py JOBS`. It judges nothing; the laws are in the tests.

JOBS is a pickled list of jobs; rank r writes what it got for each to JOBS.r. A job is a dict: `function`, `arrays` and `options` of the whole
sequence, `cuts` (where a rank's slice ends and the next begins), `state`, `dout`, a `dstates` for each rank. What goes wrong on purpose:
`wrong` (rank, changes of the job on that rank), or `raises` (rank, name of a function of `distributed`, which of its calls; 0: the pullback that
it returns).
"""
from __future__ import annotations

import pickle
import sys
from types import SimpleNamespace

from mpi4py import MPI

from refattn import distributed


def counted(comm):
    """The communicator, and the bytes of each message that it sends."""
    sizes = []

    def sendrecv(buffer, to, *rest):
        if to != MPI.PROC_NULL:
            sizes.append(buffer.nbytes)
        comm.Sendrecv(buffer, to, *rest)

    kept = {name: getattr(comm, name) for name in ("Get_rank", "Get_size", "Get_info", "Allreduce", "bcast", "allgather")}
    return SimpleNamespace(**kept, Sendrecv=sendrecv), sizes


def at(x, rows, ndim):
    """Positions `rows` of an array (..., N, D), or of one (..., N)."""
    return None if x is None else x[..., rows, :] if x.ndim == ndim else x[..., rows]


def run(job, comm):
    rank = comm.Get_rank()
    if "wrong" in job and job["wrong"][0] == rank:
        job = job | job["wrong"][1]
    counting, sizes = counted(comm)
    rows = slice(job["cuts"][rank], job["cuts"][rank + 1])
    state = job["state"] if rank == 0 or job.get("states_everywhere") else None
    ndim = job["arrays"][0].ndim
    arrays = [at(x, rows, ndim) for x in job["arrays"]]
    function = getattr(distributed, job["function"] + "_vjp")
    (out, end), pullback = function(*arrays, state, comm=counting, **job["options"])
    forward = list(sizes)
    gradients = pullback(None if job["dout"] is None else at(job["dout"], rows, ndim), job["dstates"][rank])
    return {"out": out, "end": end, "gradients": gradients, "forward bytes": forward, "backward bytes": sizes[len(forward):]}


def failing(name, which):
    """The function of that name, which raises at one of its calls."""
    right, calls = getattr(distributed, name), []

    def full(*args):
        raise MemoryError("no room for it")

    def wrong(*args, **kwargs):
        calls.append(None)
        if len(calls) == which:
            full()
        results = right(*args, **kwargs)
        return (results[0], full) if which == 0 else results

    return right, wrong


def main():
    comm, results = MPI.COMM_WORLD, []
    with open(sys.argv[1], "rb") as file:
        jobs = pickle.load(file)
    for job in jobs:
        rank, name, which = job.get("raises", (None, None, 0))
        if rank == comm.Get_rank():
            right, wrong = failing(name, which)
            setattr(distributed, name, wrong)
        try:
            results.append(run(job, comm))
        except Exception as error:
            if job.get("uncaught"):
                raise
            results.append(error)
        finally:
            if rank == comm.Get_rank():
                setattr(distributed, name, right)
    with open(f"{sys.argv[1]}.{comm.Get_rank()}", "wb") as file:
        pickle.dump(results, file)


if __name__ == "__main__":
    main()
