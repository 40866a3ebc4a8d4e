"""A world on GPUs for `DeviceCalls`, with everything beneath the calls faked; takes notes of what they launch."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np

import nvcoll
from nvcoll import device_calls
from nvcoll.ops import SUM
from tests.buffers.gpu import FakeDriver, FakeGpu
from tests.buffers.memory import FakeAllocation

TOKEN, HISTORY = 0x70CE, 0x4157


class Plan:
    """Takes notes of launches; says that an earlier call failed once `state` reports it."""

    def __init__(self, state, told):
        self.state, self.told, self.launched = state, told, []

    def run(self, send, recv, stream, owner=None):
        if self.state.failed:
            return False
        self.state.sequence += 1
        self.launched.append((send, recv, stream))
        return True


@dataclass
class State:
    """Stands for a DeviceState."""

    failed: bool = False
    reported: bool = False
    sequence: int = 0
    over: bool = False
    preceded: list = field(default_factory=list)

    def demand(self):
        if self.over:
            raise nvcoll.StateError("this communicator was freed or finalized")

    def precede(self, stream):
        self.preceded.append(stream)


@dataclass(frozen=True)
class Told:
    """Stands for an Explanation."""

    verb: str
    count: int
    datatype: str
    op: str
    algorithm: str | None


class Planner:
    def __init__(self):
        self.state = State()
        self.area = SimpleNamespace(boards=lambda: self.tags, token=TOKEN, history=HISTORY, fail=self.fail)
        self.area.same_history = self.same_history
        self.tags, self.plans, self.timeout = [], [], 2.0
        self.waited, self.same = [], True

    def same_history(self, stream):
        self.waited.append(stream)
        return self.same

    def fail(self):
        self.state.failed = True

    def explain(self, verb, count, datatype, op, algorithm=None):
        return Told(verb, count, datatype.name, op.name, algorithm)

    def plan(self, told, datatype, op):
        self.plans.append(Plan(self.state, told))
        return self.plans[-1]


class World(SimpleNamespace):
    """Stands for a DeviceWorld."""

    raised, whole, _parts = False, None, ()


class NeverFast:
    """A fast route that knows no plan."""

    def __init__(self, in_place, types, stream, captured, device):
        self.stream = stream

    def add(self, *args):
        pass

    def run(self, *args):
        return None


def fake_world(monkeypatch):
    """Return a world of rank 1 of 4; what it is told of is in its `synchronized`, `capturing`, `places`, `settled`."""
    monkeypatch.setattr(device_calls, "DevicePlans", NeverFast)
    gpu = FakeGpu()
    world = World(rank=1, size=4, of="", device=gpu, stream=0, planner=Planner(), settled=0, left=False)
    world.heap = SimpleNamespace(allocate=FakeAllocation)
    world.give_up = world.planner.fail
    world.synchronized = []
    driver = FakeDriver(gpu)
    driver.stream_synchronize = world.synchronized.append
    world.capturing = set()
    driver.stream_capturing = world.capturing.__contains__
    world.places = {}
    driver.gpu_of = world.places.get
    monkeypatch.setattr(device_calls, "driver", driver)

    def settle():
        world.settled += 1

    world.settle = settle
    return world


def reduce(calls, sendbuf, recvbuf=None, op=SUM, stream=None, algorithm=None):
    calls.allreduce(sendbuf, recvbuf, op, stream, algorithm)


def values(n=8, dtype=np.float32):
    return np.arange(n).astype(dtype)
