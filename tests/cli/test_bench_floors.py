"""What the benchmark of GPUs measures of the hardware itself."""

import types

import pytest

from nvcoll import jit_cuda
from nvcoll.cli.bench.gpu import clock, floors
from tests.cli.test_bench_gpu import Alone


@pytest.mark.parametrize(("early", "arch"), [(True, "sm_90"), (True, "sm_100"), (False, "sm_80")])
def test_the_kernel_that_exchanges_a_word_becomes_machine_code(early, arch):
    assert ("griddepcontrol" in floors._exchange(early)) is early
    assert b"exchange" in jit_cuda.assemble(floors._exchange(early), arch).cubin


@pytest.mark.parametrize(
    ("size", "gpus", "remote", "address"),
    [(1, "a", False, 8), (2, "aa", False, 8), (2, "ab", True, 8), (2, "ab", False, 0)],
)
def test_ranks_that_cannot_store_to_each_other_exchange_no_word(size, gpus, remote, address):
    comm = Alone()
    comm.size = size
    area = types.SimpleNamespace(counterpart=lambda mine, rank: address)
    comm._world.planner = types.SimpleNamespace(area=area, remote=remote)
    comm.zeros = lambda count, dtype: types.SimpleNamespace(address=64, free=lambda: None)
    stage = types.SimpleNamespace(comm=comm)
    assert floors.least_call(stage, clock.ExchangingRanks(comm), [{"uuid": gpu} for gpu in gpus]) is None
