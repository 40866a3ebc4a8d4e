"""`nvcoll tune` on GPUs, on a stage without one: contestants, and shapes of launches, each with plans of its own."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from nvcoll import _selection
from nvcoll._selection import LAUNCH
from nvcoll.cli import tune
from nvcoll.cli.tune import launch
from nvcoll.errors import ArgumentError
from nvcoll.planning import Candidate, read_rules
from tests.cli import test_bench_gpu
from tests.cli.test_tune import parsed
from tests.gpu.devices import GPUS

NVCOLL = Path(sys.executable).with_name("nvcoll")
NAMES = ("one_shot/low_latency", "two_shot/simple")
stage = test_bench_gpu.stage


class Imagined(test_bench_gpu.Alone):
    """A communicator that notes the launches in force and the plans at each call; alone, but says it is not."""

    node_sizes = (4,)

    def __init__(self):
        super().__init__()
        topology = SimpleNamespace(node_sizes=self.node_sizes)
        self._world.planner = SimpleNamespace(
            launches=read_rules(None)[LAUNCH], kind="cuda", topology=topology, crowded=False,
            remote=len(self.node_sizes) > 1, launched=lambda nbytes: -(-nbytes // len(self.node_sizes)),
        )  # fmt: skip
        self._calls = SimpleNamespace(_world=self._world, _kept={}, _fast={})
        self.seen = []

    def Allreduce(self, sendbuf, recvbuf=None, *, op, stream, algorithm=None):
        calls = self._calls
        key = (sendbuf.nbytes, algorithm)
        made = calls._kept.setdefault(key, json.dumps(calls._world.planner.launches))
        assert made == json.dumps(calls._world.planner.launches), "a plan of another shape"
        self.seen.append((sendbuf.nbytes, algorithm, made))

    def algorithms(self, verb):
        return list(NAMES)

    def explain(self, verb, nbytes, dtype, op):
        found = tuple(Candidate(name, None, 1e-6) for name in NAMES)
        return SimpleNamespace(algorithm="two_shot", protocol="simple", candidates=found)


class Far(Imagined):
    node_sizes = (2, 2)


def output(monkeypatch, tmp_path, comm, *words):
    """Exit status and lines of a run in this process."""
    refuse = tune._refuse
    monkeypatch.setattr(tune, "_refuse", lambda comm, args: refuse(SizedAs(comm, 4), args))
    lines, args = [], parsed("--max", "4K", "--factor", "8", "--time", "0.001", *words)
    args.output = tmp_path / "rules.json"
    return tune.tune(comm, args, lines.append), lines


class SizedAs:
    """A communicator but for its size."""

    def __init__(self, comm, size):
        self.comm, self.size = comm, size

    def __getattr__(self, name):
        return getattr(self.comm, name)


def test_rules_for_gpus(stage, monkeypatch, tmp_path):
    status, lines = output(monkeypatch, tmp_path, Imagined())
    assert status == 0
    measured = [line.split()[4] for line in lines if not line.startswith("#")]
    assert measured == [name for _ in range(4) for name in NAMES]
    rules = json.loads((tmp_path / "rules.json").read_text())
    assert rules["cuda"][0] == {
        "verb": "allreduce",
        "nodes": [1, 1],
        "oversubscribed": False,
        "ranks": [1, 1],
        "use": NAMES[0],
        "note": rules["cuda"][0]["note"],
    }
    assert rules["cuda"][0]["note"].startswith("1 x Imagined; float32 SUM, symmetric; ")
    assert rules["cuda"][1:] == read_rules(None)["cuda"]
    assert LAUNCH not in rules


@pytest.mark.parametrize("kind", [Imagined, Far])
def test_shapes_of_launches(stage, monkeypatch, tmp_path, kind):
    comm, far = kind(), kind is Far
    before, calls = comm._world.planner.launches, comm._calls
    kept, fast = calls._kept, calls._fast
    status, lines = output(monkeypatch, tmp_path, comm, "--launch")
    assert status == 0
    assert (calls._kept, calls._fast) == (kept, fast)
    assert calls._kept is kept
    assert comm._world.planner.launches is before, "calls have the shapes in force again"
    seen = {(nbytes, algorithm, made) for nbytes, algorithm, made in comm.seen if made != json.dumps(before)}
    assert seen == {
        (nbytes, NAMES[0], json.dumps([form.rule()]))
        for nbytes in (8, 64, 512, 4096)
        for form in launch.FORMS[far].values()
    }
    rules = read_rules(tmp_path / "rules.json")[LAUNCH]
    assert rules[0] == launch.FORMS[far][rules_name(rules[0])].rule() | {"far": far, "note": rules[0]["note"]}
    assert _selection.shape_launch(rules, 64, not far) == _selection.shape_launch(before, 64, not far)
    at = lines.index("# rules for launch:")
    assert json.loads(lines[at + 1].removeprefix("#")) == rules[0]
    assert "64 threads" in lines[at + 3], "the shape in force, beside that which was chosen"


def rules_name(rule):
    return str(launch.Form(rule["threads"], rule.get("deep", False), rule.get("blocks")))


def test_the_shape_in_force():
    rules = [{"upto": 8, "threads": 64, "blocks": 3}, {"far": True, "threads": 512, "blocks": 16}, {"threads": 64}]
    shapes = [launch._in_force(rules, nbytes, far) for nbytes, far in ((8, False), (9, False), (9, True))]
    assert shapes == ["64 threads, 3 blocks", "64 threads", "512 threads, 16 blocks"]
    assert shapes[0] not in launch.FORMS[True]
    assert shapes[1] in launch.FORMS[False]
    assert shapes[2] in launch.FORMS[True]


def test_hosts_have_no_shapes(stage):
    with pytest.raises(ArgumentError, match="--launch shapes launches on GPUs, these ranks are on hosts; leave it out"):
        launch.refuse(SimpleNamespace(target="host"))


def test_buffers_of_hosts_are_refused(stage, monkeypatch, tmp_path):
    with pytest.raises(ArgumentError, match="--buffer numpy is for ranks on hosts; take one of symmetric, torch"):
        output(monkeypatch, tmp_path, Imagined(), "--buffer", "numpy")


def test_options_have_defaults():
    assert parsed() == argparse.Namespace(
        verb="allreduce",
        n=None,
        min=8,
        max=16 << 20,
        factor=2,
        dtype="float32",
        op="SUM",
        buffer="symmetric",
        algorithm=None,
        time=0.1,
        margin=0.03,
        launch=False,
        output=Path("rules.json"),
        dry_run=False,
    )


@pytest.mark.gpu
@pytest.mark.timeout(210)
@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
@pytest.mark.parametrize(
    ("far", "algorithms"), [(False, ["one_shot", "two_shot"]), (True, ["nvrar/low_latency"])], ids=["near", "far"]
)
def test_on_gpus(run_command, tmp_path, far, algorithms):
    path = tmp_path / "rules.json"
    env = {"NVCOLL_BACKEND": "nvshmem"} | ({"NVCOLL_RANKS_PER_NODE": "1"} if far else {})
    sizes = ["-n", "2", "--max", "64K", "--factor", "16", "--time", "0.01"]
    named = [word for name in algorithms for word in ("--algorithm", name)]
    command = [NVCOLL, "tune", "allreduce", *sizes, "--launch", *named, "--output", path]
    status, text = run_command(command, timeout=100, env=env)
    assert status == 0, text
    rules = read_rules(path)
    assert rules["cuda"][0]["ranks"] == [2, 2]
    assert rules[LAUNCH][0]["far"] is far
    env["NVCOLL_RULES"] = str(path)
    status, text = run_command([NVCOLL, "bench", "allreduce", *sizes], timeout=100, env=env)
    assert status == 0, text
