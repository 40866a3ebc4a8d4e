"""Emulated ranks on a GPU that is none, with several communicators: all that the host does, down to the launch."""

import sys
from pathlib import Path

PROGRAM = """
import numpy as np, pytest
import nvcoll
from nvcoll import planning_cuda, world_cuda
from tests import fake_cuda

fake_cuda.MEMORY = 1 << 29
world_cuda.SCRATCH = 16 << 20
patch, fake = pytest.MonkeyPatch(), fake_cuda.FakeDriver(gpus=1)
fake_cuda.install(patch, fake)
patch.setattr(planning_cuda.Kernels, "get", lambda self, *key: 0x77)
patch.setattr(planning_cuda.Kernels, "occupancy", lambda self, function, threads: 4)


def main(comm):
    part, dup = comm.Split(comm.rank % 2, -comm.rank), comm.Dup()
    x, y = comm.array(np.ones(10, np.float32)), part.array(np.ones(10, np.int32))
    for one in (comm, part, dup):
        one.Allreduce(x)
    inner = part.Dup()
    inner.Allreduce(y)
    inner.Iallreduce(y)
    taken, place = set(fake.taken), part._world.planner.area.piece.offset
    inner.Free()
    part.Free()
    again = dup.Split(comm.rank % 2)
    assert again._world.planner.area.piece.offset == place
    assert set(fake.taken) == taken  # nothing of the driver's, which may wait for kernels of siblings
    return y.freed, x.freed, bool(part), bool(again), [one._world.planner.state.sequence for one in (comm, dup)]


found = nvcoll.emulate(4, [2, 2], device=0).run(main)
assert found == [(True, False, False, True, [1, 1])] * 4, found
kept = nvcoll.emulate(2, device=0).run(lambda comm: comm.Dup())
for call in (kept[0].Free, kept[1].Dup):
    with pytest.raises(nvcoll.StateError):
        call()
del kept, call
import gc
gc.collect()
with nvcoll.backends.emulated.on_gpu():
    pass
assert not fake.taken and not fake.events, (fake.taken.keys(), fake.events)
print("right")
"""


def test_they_come_and_go_and_leave_nothing(run_command, folder):
    root = str(Path(__file__).parents[2])
    env = {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": root, "NVCOLL_HEAP": "96M", "NVCOLL_TIMEOUT": "20"}
    status, output = run_command([sys.executable, "-c", PROGRAM], env=env)
    assert (status, output) == (0, "right\n"), output
