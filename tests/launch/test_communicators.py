"""Emulated ranks on a GPU that is none, with several communicators: all that the host does, down to the launch."""

COME_AND_GO = """
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
assert [told(kept[0].Free), told(kept[1].Dup)] == ["StateError"] * 2
del kept
assert not left(), left()
"""


def test_they_come_and_go_and_leave_nothing(emulated):
    emulated(COME_AND_GO)
