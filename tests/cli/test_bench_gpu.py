"""The benchmark on GPUs, on a stage without one: who takes part, what is checked, and what is told."""

import argparse
import importlib.util
import json
import os
import sys
import types
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from nvcoll.cli import bench
from nvcoll.cli.bench import gpu, report
from nvcoll.cli.bench.check import Verdict
from nvcoll.cli.bench.gpu import clock, floors, peers
from nvcoll.cli.bench.gpu.report import best, merged
from nvcoll.cli.bench.gpu.stage import Stage, load_torch
from nvcoll.cli.bench.measure import Budget
from nvcoll.errors import ArgumentError
from nvcoll.ops import OPS
from tests.cli.test_bench import parsed, row, timing
from tests.gpu.devices import GPUS

NVCOLL = Path(sys.executable).with_name("nvcoll")
QUICK = ["--max", "4K", "--factor", "16", "--time", "0.001"]
REPLAY = 1e-4  # seconds


class OnHost(Stage):
    """A stage whose tensors are NumPy arrays, and on which a replay always takes as long."""

    torch = types.SimpleNamespace(__version__="2")
    handle = 7

    def __init__(self, comm, count, datatype):
        self.comm, self.count, self.datatype = comm, count, datatype
        self._buffers, self._tensors, self._mirrors = {}, {}, {}

    def facts(self):
        return {"name": "Imagined", "uuid": "1", "host": "here"}

    def plain(self, name="plain"):
        return self._tensors.setdefault(name, np.zeros(self.count, self.datatype.dtype))

    def symmetric(self, role):
        return self._buffer(role), self._buffer(role)

    def upload(self, array, tensor):
        tensor[...] = array

    def download(self, tensor, array):
        array[...] = tensor

    def current(self):
        return nullcontext()

    def synchronize(self):
        pass

    def capture(self, enqueue, calls):
        return calls

    def replay(self, graph, times):
        return [REPLAY] * times


class Buffer(np.ndarray):
    def free(self):
        self.fill(0)


class Alone:
    """A communicator of one rank on a GPU: what the benchmark uses of one, and no more."""

    rank, size, target, bootstrap = 0, 1, "cuda", "single"

    def __init__(self):
        exchange = types.SimpleNamespace(allgather=lambda data: [data])
        self._world = types.SimpleNamespace(exchange=exchange)
        self.calls = []

    def empty(self, count, dtype):
        return np.full(count, 1, dtype).view(Buffer)

    def Allreduce(self, sendbuf, recvbuf=None, *, op, stream, algorithm=None):
        self.calls.append((type(sendbuf), stream, algorithm))
        if algorithm == "tree/simple":
            raise ArgumentError("Allreduce: tree needs two nodes")
        if recvbuf is not None:
            recvbuf[...] = sendbuf

    def algorithms(self, verb):
        return ["ring/simple", "tree/simple"]

    def explain(self, verb, nbytes, dtype, op):
        return argparse.Namespace(algorithm="ring", protocol="simple")


class Peer(peers.Peer):
    """A peer that is wrong from `spoilt` elements on, and refuses below `least`."""

    version = "1"

    def __init__(self, stage, name, spoilt=1 << 30, least=0):
        self.stage, self.name, self.spoilt, self.least = stage, name, spoilt, least

    def prepare(self, count):
        tensor = self.stage.plain()[:count]
        self._set(count, tensor, tensor, partial(self.reduce, tensor))

    def reduce(self, tensor):
        if tensor.size < self.least:
            raise RuntimeError("too small\nC++ stack")
        if tensor.size >= self.spoilt:
            tensor[0] += 1


@pytest.fixture
def stage(monkeypatch):
    """Put the imagined GPU in place of torch's; returns the table of peers, which tests fill."""
    known = {}
    group = types.SimpleNamespace(close=lambda: known.setdefault("closed", True))
    monkeypatch.setattr(gpu, "Stage", OnHost)
    monkeypatch.setattr(peers, "PEERS", known)
    monkeypatch.setattr(peers, "unusable", lambda stage, op, gpus: "")
    monkeypatch.setattr(peers, "ProcessGroup", lambda ranks, stage: group)
    monkeypatch.setattr(floors, "bare_launch", lambda stage: 7.5e-6)
    monkeypatch.setattr(floors, "least_call", lambda stage, ranks, gpus: 1.5e-6)
    monkeypatch.setattr(floors, "copy_bandwidth", lambda stage, gpus: (0.5, "GPUs 0 and 1"))
    for name in ("nccl", "nccl_symmetric", "symm_mem"):
        known[name] = lambda group, stage, op, name=name: [Peer(stage, name)]
    return known


def output(*options, comm=None):
    lines = []
    return bench.bench(comm or Alone(), parsed(*QUICK, *options), lines.append), lines


def table(lines):
    return [line.split() for line in lines if not line.startswith("#")]


def test_names_of_peers_are_parsed():
    assert parsed("--compare", "nccl,symm_mem", "--compare", "nccl_symmetric").compare == [
        *("nccl", "symm_mem", "nccl_symmetric"),
    ]
    with pytest.raises(argparse.ArgumentTypeError, match="expected names of mpi, nccl, nccl_symmetric, symm_mem, got"):
        bench.peers("nccl,rccl")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--buffer", "numpy"], "--buffer numpy is for ranks on hosts; take one of symmetric, torch, out-of-place"),
        (["--compare", "mpi"], "--compare mpi is for ranks on hosts; take one of nccl, nccl_symmetric, symm_mem"),
    ],
)
def test_options_of_hosts_are_refused(stage, options, words):
    with pytest.raises(ArgumentError, match=words):
        output(*options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--buffer", "torch"],
            "--buffer torch is for ranks on GPUs, these are on hosts; take one of symmetric, numpy",
        ),
        (["--compare", "nccl"], "--compare nccl is for ranks on GPUs, these are on hosts; take one of mpi"),
        (["--eager"], "--eager is for ranks on GPUs"),
    ],
)
def test_options_of_gpus_are_refused_on_hosts(options, words):
    host = Alone()
    host.target = "host"
    host.Allreduce = lambda sendbuf, recvbuf, op: recvbuf.__setitem__(..., sendbuf)
    with pytest.raises(ArgumentError, match=words):
        output(*options, comm=host)


def test_without_torch_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with mock.patch.dict(os.environ, TORCH_SYMM_MEM_DISABLE_MULTICAST="given"):
        os.environ.pop("NCCL_NVLS_ENABLE", None)
        with pytest.raises(ArgumentError, match=r"needs torch \(.*\); pip install torch"):
            load_torch()
        assert os.environ["NCCL_NVLS_ENABLE"] == "0"
        assert os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] == "given", "what the user has set stays"


def test_table_of_graphs(stage):
    comm = Alone()
    status, lines = output("--compare", "nccl,nccl_symmetric", "--buffer", "symmetric", "--buffer", "torch", comm=comm)
    assert status == 0
    heads = next(line for line in lines if "busbw" in line).split()
    assert heads[-1] == "link"
    assert "nccl_symmetric/nvcoll" in heads
    cells = table(lines)
    assert [line[3] for line in cells] == ["symmetric", "torch"] * 3
    # 50 calls took REPLAY seconds; all were right, and the ratio of equal times is 1
    assert {tuple(line[5:7]) for line in cells} == {("2.00", "2.00")}
    assert [line[9:] for line in cells] == [["0", *["2.00", "2.00", "0", "1.00"] * 2, *line[-2:]] for line in cells]
    assert len({len(line) for line in lines if not line.startswith("# ")}) == 1, "columns stand below each other"
    assert "# GPUs: 1 x Imagined; timed: replays of CUDA graphs, 50 calls each" in lines
    assert "# copies between GPUs 0 and 1, both ways at once: 0 GB/s each way" in lines
    assert {kind for kind, _, _ in comm.calls} == {Buffer, np.ndarray}
    assert {stream for _, stream, _ in comm.calls} == {7}, "every call is on the benchmark's stream"
    assert stage["closed"]


def test_json(stage, tmp_path):
    stage["symm_mem"] = lambda group, stage, op: [
        Peer(stage, "symm_mem/one_shot"),
        Peer(stage, "symm_mem/two_shot", least=100),
    ]
    path = tmp_path / "x.json"
    status, lines = output("--compare", "symm_mem", "--iters", "20", "--json", str(path))
    assert status == 0
    document = json.loads(path.read_text())
    assert document["schema"] == report.SCHEMA
    assert document["settings"]["compare"] == ["symm_mem"]
    assert document["versions"]["symm_mem"] == "1"
    assert document["gpu"]["copy_gbs"] == 0.5
    assert document["gpu"]["launch_us"] is None
    assert document["gpu"]["exchange_us"] == pytest.approx(1.5)
    assert "# kernels that only exchange a word with another rank: 1.50 us" in lines
    assert document["gpu"]["calls"] == 20
    assert "replays" in document["explanation"][0]
    first = document["rows"][0]
    assert {"time_us", "p99_us", "algbw_gbs", "busbw_gbs", "link_share", "batches_us"} <= set(first)
    assert first["time_us"] == pytest.approx(REPLAY / 20 * 1e6)
    assert len(first["batches_us"][0]) >= clock.LEAST
    assert set(first["peers"]) == {"symm_mem"}
    peer = first["peers"]["symm_mem"]
    assert (peer["ratio"], peer["variant"]) == (pytest.approx(1), "one_shot")
    assert peer["variants"]["two_shot"]["refused"] == "symm_mem/two_shot: too small"
    assert document["geometric_means"] == {"symm_mem": {"symmetric": pytest.approx(1)}}
    assert "# refused: symm_mem/two_shot: too small" not in lines, "another kernel did it"


@pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason='needs matplotlib: pip install "nvcoll[bench]"'
)
@pytest.mark.filterwarnings("default")  # matplotlib's own, of its dependencies
def test_plot(stage, tmp_path):
    path = tmp_path / "x.svg"
    status, _ = output("--compare", "nccl,symm_mem", "--plot", str(path))
    assert status == 0
    assert "Imagined" in path.read_text(), "the title names the GPU"


def test_eager_tells_no_bandwidth(stage, tmp_path):
    path = tmp_path / "x.json"
    status, lines = output("--eager", "--json", str(path))
    assert status == 0
    assert "# bare launch of an empty kernel, through ctypes: 7.50 us" in lines
    assert all(line[7:9] == ["-", "-"] and line[-1] == "-" and float(line[5]) > 0 for line in table(lines))
    document = json.loads(path.read_text())
    assert document["gpu"]["launch_us"] == pytest.approx(7.5)
    assert {row["busbw_gbs"] for row in document["rows"]} == {None}


def test_a_peer_that_cannot_be_set_up_is_left_out(stage, tmp_path):
    def broken(group, stage, op):
        raise RuntimeError("no windows here\nC++ stack")

    stage["nccl_symmetric"] = broken
    path = tmp_path / "x.json"
    status, lines = output("--compare", "nccl_symmetric,nccl", "--json", str(path))
    assert status == 0
    assert "# left out: nccl_symmetric: rank 0: no windows here" in lines
    assert "nccl_symmetric" not in next(line for line in lines if "busbw" in line)
    assert set(json.loads(path.read_text())["rows"][0]["peers"]) == {"nccl"}


def test_no_peer_takes_part_where_none_can(stage, monkeypatch):
    monkeypatch.setattr(peers, "unusable", lambda stage, op, gpus: "no NCCL")
    status, lines = output("--compare", "nccl,symm_mem")
    assert status == 0
    assert [line for line in lines if "left out" in line] == [
        *("# left out: nccl: no NCCL", "# left out: symm_mem: no NCCL"),
    ]


def test_wrong_answers_are_told_and_never_timed(stage):
    stage["nccl"] = lambda group, stage, op: [Peer(stage, "nccl", spoilt=100)]
    status, lines = output("--compare", "nccl")
    assert status == 1
    assert table(lines)[-1][10:14] == ["-", "-", "WRONG", "-"]
    assert any("WRONG: nccl, 2048 bytes" in line for line in lines)


def test_refused_algorithms_have_reasons(stage):
    status, lines = output("--algorithm", "all")
    assert status == 0
    assert [line[9] for line in table(lines)[:2]] == ["0", "refused"]
    assert "# refused: Allreduce: tree needs two nodes" in lines


def test_best_of_a_peers_kernels():
    right, wrong = Verdict(0.0, 0), Verdict(1.0, 1)
    slow, fast = (report.Outcome(right, timing([seconds])) for seconds in (2.0, 1.0))
    refused, bad = report.Outcome(None, None, "no"), report.Outcome(wrong, None)
    assert best([slow, fast]) is best([fast, refused]) is fast
    assert best([refused, refused]) is refused
    assert best([fast, bad]) is bad, "a wrong answer is the library's"
    one = row(seconds=2.0, ranks=2, peers={"a": slow, "b/one": slow, "b/two": fast})
    whole = merged(one, eager=False, link=one.busbw * 2)
    assert (whole.ratio("a"), whole.ratio("b")) == (1, 0.5)
    assert whole.share == pytest.approx(0.5)
    assert merged(one, eager=True, link=1.0).share is None
    assert whole.fields()["peers"]["b"]["variant"] == "two"


def test_ranks_agree_on_whether_a_peer_is_there():
    ranks = types.SimpleNamespace(exchange=lambda value: ["", "out of memory"])
    assert peers.agreed(ranks, lambda: None) == "rank 1: out of memory", "it works here, and not there"


@pytest.mark.parametrize(
    ("uuids", "nccl", "op", "words"),
    [
        ("ab", True, "SUM", ""),
        ("aa", True, "SUM", "needs a GPU for each rank, ranks 0 and 1 share one"),
        ("ab", False, "SUM", "torch 2 was built without NCCL"),
        ("ab", True, "LAND", "NCCL and torch have no LAND; choose another --op"),
    ],
)
def test_why_no_peer_can_take_part(uuids, nccl, op, words):
    distributed = types.SimpleNamespace(is_available=lambda: True, is_nccl_available=lambda: nccl)
    torch = types.SimpleNamespace(distributed=distributed, __version__="2")
    found = peers.unusable(types.SimpleNamespace(torch=torch), OPS[op], [{"uuid": uuid} for uuid in uuids])
    assert found.startswith(words)
    assert bool(found) == bool(words)


@pytest.mark.parametrize(("seconds", "replay", "replays"), [(0.3, 0.01, 30), (0.3, 1.0, 10), (0.3, 1e-4, 100)])
def test_time_decides_on_replays(seconds, replay, replays):
    assert clock.turns_of(Budget(seconds), replay) * clock.AT_A_TIME == replays


def test_importing_the_benchmark_imports_no_torch(run_command):
    code = "import sys, nvcoll.cli.bench; assert 'torch' not in sys.modules and 'cuda' not in sys.modules"
    status, text = run_command([sys.executable, "-c", code])
    assert status == 0, text


def bench_on_gpus(run_command, ranks, path, *options):
    pytest.importorskip("torch")
    command = [NVCOLL, "bench", "allreduce", "-n", ranks, "--max", "1M", "--factor", "64", "--time", "0.02"]
    status, text = run_command([*command, "--json", path, *options], timeout=110, env={"NVCOLL_BACKEND": "nvshmem"})
    assert status == 0, text
    return json.loads(path.read_text())


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [[], ["--eager"]], ids=["graphs", "eager"])
def test_one_gpu(run_command, tmp_path, mode):
    document = bench_on_gpus(run_command, 1, tmp_path / "x.json", *mode, "--buffer", "symmetric", "--buffer", "torch")
    assert all(row["wrong"] == 0 and row["time_us"] > 0 for row in document["rows"])
    assert document["gpu"]["copy_gbs"] is document["gpu"]["exchange_us"] is None
    assert bool(document["gpu"]["launch_us"]) == bool(mode)


@pytest.mark.gpu
@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_gpus_beside_all_peers(run_command, tmp_path, dtype):
    names = ["nccl", "nccl_symmetric", "symm_mem"]
    document = bench_on_gpus(run_command, 2, tmp_path / "x.json", "--dtype", dtype, "--compare", ",".join(names))
    assert not document["left_out"]
    assert document["gpu"]["copy_gbs"] > 1
    assert document["gpu"]["exchange_us"] > 0
    for found in document["rows"]:
        assert list(found["peers"]) == names
        assert found["link_share"] > 0
        assert all(peer["wrong"] == 0 and peer["ratio"] > 0 for peer in found["peers"].values())
