"""NaN, infinities, zeros of both signs on GPUs: whatever the result is, all ranks have the same bits of it."""

import numpy as np
import pytest

import nvcoll
from nvcoll.ops import DATATYPES, OPS
from tests.algorithms.test_special_values import WORLDS, apart, out_of_order, words, zeros
from tests.gpu.kernels import EVERY

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("compiled_every")]

CALLS = [
    (algorithm, datatype, op)
    for algorithm, pairs in EVERY.items()
    for datatype, op in pairs
    if DATATYPES[datatype].kind in {"float", "complex"}
]


def make(comm, calls, contribution):
    """Make calls on a rank; return the bytes of each result."""
    results = []
    for algorithm, datatype, op in calls:
        with comm.array(contribution(datatype, comm.rank)) as x:
            comm.Allreduce(x, op=OPS[op], algorithm=algorithm)
            results.append(x.copy_to().tobytes())
    return results


def numbers(datatype, rank):
    """Ordinary ones, of which products are, too."""
    rng, dtype = np.random.default_rng(rank), DATATYPES[datatype].dtype
    parts = rng.uniform(0.5, 1.5, (2, 4096)) * rng.choice([-1, 1], (2, 4096))
    return (parts[0] + 1j * parts[1] if dtype.kind == "c" else parts[0]).astype(dtype)


@pytest.mark.parametrize("contribution", [words, numbers])
@pytest.mark.parametrize(("size", "nodes"), WORLDS)
def test_all_ranks_have_the_same_bits(size, nodes, contribution):
    """Compilers may arrange a sum or a product in one way where it is mine that comes first, and else in another."""
    assert not apart(nvcoll.emulate(size, nodes, device=0).run(make, CALLS, contribution), CALLS)


def test_ranks_that_are_not_in_the_order_of_their_nodes(monkeypatch):
    monkeypatch.setenv("NVCOLL_HEAP", "1G")  # each communicator takes 128 MiB
    calls = [call for call in CALLS if call[2] in {"MIN", "MAX"} and call[0].startswith("nvrar/")]

    def main(comm):
        part = out_of_order(comm, 2)
        return part.rank, make(part, calls, zeros)

    ranks, results = zip(*nvcoll.emulate(8, 2, device=0).run(main), strict=True)
    assert list(ranks) != sorted(ranks)
    assert not apart(results, calls)
