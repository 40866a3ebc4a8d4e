"""The barrier that counts its threads: what the verbs rely on once a thread has given up."""

import numpy as np
import pytest

import nvcoll
from nvcoll._plan import DEVICE_FIELDS, DevicePlan
from nvcoll.backends import driver
from nvcoll.device.cuda import ptx
from nvcoll.jit import ENTRY
from nvcoll.jit_cuda import assemble, ptx_of
from nvcoll.ops import DATATYPES

pytestmark = pytest.mark.gpu
THREADS = 256
LATE = 200_000
"""Nanoseconds after which a thread ends, or comes to the barrier, that is late."""

ENDS = ["False", "t // 32 == 3", "t == 5", "t != 0", "t % 2 == 1", "False"]
"""Which threads of each block end before the barrier."""

LATECOMERS = ["nobody", "who ends", "who stays"]

TEXT = """
def kernel({fields}):
    b, t = block(), thread()
    ends = {ends}
    if (count == 1 and ends) or (count == 2 and not ends):
        began = clock()
        while clock() - began < LATE:
            pass
    if ends:
        leave()
    meet(-1 if b == {last} and t == 77 else 7)
    store(recv + 8 * (b * THREADS + t), 1)
"""


def kernel(arch):
    """A cubin whose threads store 1 after the barrier, in blocks that lose the threads of `ENDS` before it."""
    ends = " or ".join(f"(b == {number} and {which})" for number, which in enumerate(ENDS))
    names = {name: getattr(ptx, name) for name in ("block", "thread", "clock", "leave", "meet", "store")}
    names |= {"THREADS": THREADS, "LATE": LATE}
    exec(TEXT.format(fields=", ".join(DEVICE_FIELDS), ends=ends, last=len(ENDS) - 1), names)
    return assemble(ptx_of("barriers", names["kernel"], arch), arch).cubin


@pytest.mark.parametrize("late", LATECOMERS)
def test_a_block_that_has_lost_threads_ends_at_the_barrier(gpu, late):
    def main(comm):
        world = comm._world
        x = comm.empty((len(ENDS), THREADS), DATATYPES["int64"].name)
        x.copy_from(np.zeros(x.shape, np.int64))
        with world.device:
            module = driver.load_module(kernel(gpu.arch))
            count = LATECOMERS.index(late)
            plan = DevicePlan(world.planner.state, module.function(ENTRY), {"count": count}, len(ENDS), THREADS, module)
            assert plan.run(x.address, x.address, comm.stream)
            driver.stream_synchronize(comm.stream)
        return x.copy_to()

    [stored] = nvcoll.emulate(1, device=0).run(main)
    np.testing.assert_array_equal(stored.sum(axis=1), [THREADS, *[0] * (len(ENDS) - 1)])
