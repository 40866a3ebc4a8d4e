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


def test_kernels_are_loaded_when_all_ranks_have_launched_the_same(emulated):
    """While odd and even ranks call their own, with one communicator more in every round."""
    emulated("""
from nvcoll.backends import siblings

looks = []

def counts():
    found = {}
    for one in siblings._present(0):
        found.setdefault(one.group, set()).add(one.state.sequence)
    return found

def load(self, *key):
    with self._quiet():
        before = counts()
        time.sleep(0.002)
        after = counts()  # some may have been made or freed
        same = all(after.get(group, its) == its for group, its in before.items())
        looks.append(same and all(len(one) == 1 for one in before.values()))
    return 0x77

def main(comm):
    part = comm.Split(comm.rank % 2)
    for number, datatype in enumerate(("int8", "int16", "int32", "int64", "float32", "float64")):
        x = part.zeros(1000, datatype)
        for op in (nvcoll.SUM, nvcoll.MAX, nvcoll.MIN)[:1 + comm.rank % 2 * 2]:
            for _ in range(20):
                part.Allreduce(x, op=op)
        x = comm.zeros(number + 1, datatype)
        comm.Allreduce(x, op=nvcoll.MIN)
        more = part.Dup()
        more.Allreduce(x)
        if number:
            more.Free()

patch.setattr(kernels.Kernels, "_load", load)
nvcoll.emulate(5, device=0).run(main)
assert all(looks) and len(looks) >= 18, looks
""")
