"""The soak itself: it notices what is wrong, stops in time, and finds nothing wrong in a short run."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import nvcoll
from nvcoll.planning import candidates
from tests.gpu.soak import __main__ as program
from tests.gpu.soak.calls import usable

ROOT = Path(__file__).parents[2]
PROGRAM = Path(program.__file__)
ENV = {"PYTHONPATH": str(ROOT), "NVCOLL_TIMEOUT": "30", "NVCOLL_HEAP": "512M"}
QUICK = ("--graph-calls", "0", "--largest", "64K", "--algorithms", "one_shot/simple,ring/simple", "--sleep", "1e-4")


class Spoilt:
    """A communicator, one of whose calls `spoil` does instead."""

    def __init__(self, comm, number, spoil):
        self.comm, self.number, self.spoil, self.calls = comm, number, spoil, 0

    def __getattr__(self, name):
        return getattr(self.comm, name)

    def Allreduce(self, *arrays, **options):
        self.calls += 1
        if self.calls - 1 == self.number:
            self.spoil(self.comm, arrays, options)
        else:
            self.comm.Allreduce(*arrays, **options)


def outcome(*arguments, size=2, number=-1, spoil=None):
    options = program.parse([*QUICK, *arguments])
    return nvcoll.emulate(size).run(lambda comm: program.soak(Spoilt(comm, number, spoil), options))


def leave_out(comm, arrays, options):
    comm.Allreduce(np.ones(1000), np.ones(1000))


def spoil_a_byte(comm, arrays, options):
    comm.Allreduce(*arrays, **options)
    if comm.rank == 1:
        np.asarray(arrays[-1][0])[-1] ^= 0x10


@pytest.mark.parametrize(("spoil", "number"), [(leave_out, 21), (spoil_a_byte, 11)])
def test_a_wrong_result_is_told(capsys, spoil, number):
    assert outcome("--calls", "40", "--ops", "SUM", number=number, spoil=spoil) == [1, 1]
    told = capsys.readouterr().out
    assert f"FAULT eager, rank 1, call {number}: " in told
    assert " wrong elements, the first at " in told
    assert "soak: FAILED" in told


def test_all_kinds_of_calls(capsys):
    assert outcome("--calls", "160", "--datatypes", "all", "--ops", "all", size=3) == [0] * 3
    told = capsys.readouterr().out
    assert "eager: 160 of 160 calls, 0 wrong elements, 0 results that differ" in told
    assert "soak: all right" in told


def test_kernels_are_compiled_beforehand(monkeypatch):
    compiled = []
    monkeypatch.setattr("nvcoll.backends.driver.Device", lambda ordinal: SimpleNamespace(arch="sm_90"))
    monkeypatch.setattr(program, "compile_kernels", lambda *told: compiled.append(told))
    wanted = ("--algorithms", "nvrar,two_shot", "--datatypes", "float32,uint8", "--largest", "64M", "--calls", "400")
    for reach in ("near", "far"):
        assert program.main(["--compile", reach, *wanted, "--graph-calls", "0"]) == 0
    (near, *_), (far, arch, remote) = compiled
    assert {kernel[0] for kernel in near} == {"nvrar", "two_shot"}
    assert {kernel[0] for kernel in far} == {"nvrar"}
    assert {kernel[3:] for kernel in near} == {("float32", False), ("float32", True), ("uint8", False)}
    assert (arch, remote) == ("sm_90", True)


def test_emulated_ranks(capsys):
    quick = ("--emulate", "3", "--ranks-per-node", "2", "--calls", "40", *QUICK[:4])
    assert program.main([*quick, "--algorithms", "nvrar"]) == 0
    told = capsys.readouterr().out
    assert "soak: 3 ranks, emulated, nodes ((0, 1), (2,)), seed 1" in told
    assert "eager: 40 of 40 calls, 0 wrong elements" in told


def test_the_time_is_up_on_all_ranks_at_the_same_call(capsys):
    assert outcome("--calls", "100000", "--seconds", "1") == [0, 0]
    assert "of 100000 calls (time is up)" in capsys.readouterr().out


def test_calls_are_the_same_on_all_ranks_and_of_all_sizes():
    options = program.parse(["--datatypes", "all", "--ops", "all"])
    first, second = program.drawn(options, candidates())
    assert (first, second) == program.drawn(options, candidates())
    assert len(second) == options.calls
    assert {call.algorithm for call in second} == set(candidates())
    assert min(call.nbytes for call in second) <= 16
    assert max(call.nbytes for call in second) > options.largest // 2
    assert {call.in_place for call in first} == {True, False}


def test_what_cannot_be_checked_or_does_not_serve_is_left_out(capsys):
    assert outcome("--calls", "8", "--graph-calls", "100", "--datatypes", "uint8") == [0, 0]
    assert "graph: left out: it checks float32" in capsys.readouterr().out
    assert outcome("--calls", "8", "--graph-calls", "100") == [0, 0]
    assert "graph: left out: the ranks are not on GPUs" in capsys.readouterr().out
    assert outcome("--calls", "8", size=1) == [1]
    names = nvcoll.emulate(2).run(lambda comm: usable(comm, ["ring", "nvrar/simple"]))[0]
    assert names == (["nvrar/simple", "ring/low_latency", "ring/simple"], {})


def test_unknown_names(capsys):
    with pytest.raises(SystemExit):
        program.parse(["--algorithms", "ring,rang"])
    assert "there is no algorithm rang" in capsys.readouterr().err


def test_processes_of_a_host(run_ranks):
    ranks = run_ranks(PROGRAM, 2, *QUICK, "--calls", "100", "--seconds", "1000", env=ENV | {"NVCOLL_BACKEND": "shm"})
    assert "eager: 100 of 100 calls, 0 wrong elements" in ranks.stdout[0]


@pytest.mark.gpu
@pytest.mark.slow
def test_a_short_soak_on_gpus(run_ranks):
    pytest.importorskip("torch", reason="torch, with which graphs are made here, is not installed")
    arguments = ("--graph-calls", "4000", "--calls", "300", "--seconds", "20", "--algorithms", "ring,nvrar,two_shot")
    ranks = run_ranks(PROGRAM, 2, *arguments, timeout=110, env=ENV | {"NVCOLL_BACKEND": "nvshmem"})
    assert "calls in 20 replays" in ranks.stdout[0] or "(time is up)" in ranks.stdout[0]
    assert "graph: " in ranks.stdout[0]
    assert "eager: " in ranks.stdout[0]
    assert "soak: all right" in ranks.stdout[0]


@pytest.mark.gpu
@pytest.mark.slow
def test_a_short_soak_of_ranks_that_share_a_gpu(run_command):
    pytest.importorskip("torch", reason="torch, with which graphs are made here, is not installed")
    arguments = ("--emulate", "4", "--ranks-per-node", "2", "--device", "0", "--graph-calls", "4000", "--calls", "300")
    few = ("--algorithms", "one_shot,nvrar", "--datatypes", "float32,bfloat16", "--ops", "SUM", "--seconds", "20")
    status, told = run_command([sys.executable, "-m", "tests.gpu.soak", *arguments, *few], timeout=110, env=ENV)
    assert status == 0, told
    assert "graph: 4000 calls in 20 replays and " in told
    assert "soak: all right" in told
