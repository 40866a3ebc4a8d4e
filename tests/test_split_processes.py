"""Parts of ranks that are processes, started as each kind of launcher does (MPI's is in test_bootstrap_mpi)."""

import pytest

from nvcoll._bootstrap import RendezvousServer
from tests.meeting import as_run, as_torchrun, as_torchrun_with_a_store

# Ranks 0 and 1, and 3 and 2 in this order, are parts.
SPLIT = """
exchange.verb = "Split"
part, members = exchange.split(rank // 2, -rank if rank > 1 else rank)
"""
MEMBERS = [(0, 1), (0, 1), (3, 2), (3, 2)]


@pytest.fixture
def server():
    with RendezvousServer(4) as server:
        yield server


class TestRun:
    def test_a_killed_rank_is_named_in_every_group_it_is_in_and_no_other_ends(self, ranks, server):
        code = """
part.allgather(b"")
if rank == 3:
    os.kill(os.getpid(), signal.SIGKILL)
tell(attempt(part.allgather, b"r%d" % rank))
tell(attempt(exchange.allgather, b""))
"""
        started = ranks(SPLIT + code, as_run(server, NVCOLL_TIMEOUT="10"))
        for rank in (0, 1):
            assert started[rank][1]() == [["r0", "r1"]]
        [(kind, text, seconds)] = started[2][1]()
        assert (kind, seconds < 5) == ("PeerLostError", True)
        assert text.startswith("Init: rank 0 has died while rank 1 waited; look at its own output")
        for rank in (0, 1, 2):
            [(kind, text, seconds)] = started[rank][1]()
            assert (kind, seconds < 5) == ("PeerLostError", True)
            assert text.startswith(f"Split: rank 3 has died while rank {rank} waited")

    def test_a_forked_child_is_told_that_it_is_no_rank_and_harms_none(self, ranks, server):
        code = """
if os.fork():
    os.wait()
else:
    tell(attempt(part.allgather, b""), attempt(part.split, 0, 0), attempt(exchange.split, 0, 0))
    part.close()
    os._exit(0)
tell(attempt(part.allgather, b"r%d" % rank))
"""
        for rank, (_, told) in enumerate(ranks(SPLIT + code, as_run(server, NVCOLL_TIMEOUT="10"))):
            members = MEMBERS[rank]
            for (kind, text, _), name in zip(told(), [members.index(rank)] * 2 + [rank], strict=True):
                assert kind == "StateError"
                assert f"this process was forked from rank {name} and is no rank itself" in text
            assert told() == [[f"r{member}" for member in members]]

    def test_a_forked_child_does_not_hide_the_death_of_its_parent(self, ranks, server):
        code = """
part.allgather(b"")
if rank == 1:
    if os.fork():
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(100)
tell(attempt(part.allgather, b""))
"""
        [(kind, text, seconds)] = ranks(SPLIT + code, as_run(server, NVCOLL_TIMEOUT="10"))[0][1]()
        assert (kind, seconds < 5) == ("PeerLostError", True)
        assert "rank 1 has died" in text


class TestTorchrun:
    CODE = """
found = [part.kind, part.rank, members, attempt(part.allgather, b"r%d" % rank)]
inner, own = part.split(None if part.rank else 0, 0) or (None, ())
again, _ = exchange.split(rank // 2, 0)
mixed = [attempt(again.allgather, b"again"), attempt(part.allgather, b"part"), attempt(exchange.allgather, b"all")]
tell(*found, own, mixed, inner and attempt(inner.allgather, b"inner"))
exchange.allgather(b"")  # rank 0 is the meeting point perhaps
"""

    def told(self, rank):
        members = MEMBERS[rank]
        place = members.index(rank)
        mixed = [["again"] * 2, ["part"] * 2, ["all"] * 4]
        inner = ([], None) if place else ([0], ["inner"])
        return ["torchrun", place, list(members), [f"r{member}" for member in members], inner[0], mixed, inner[1]]

    def test_rank_0_is_the_meeting_point(self, ranks):
        for rank, (_, told) in enumerate(ranks(SPLIT + self.CODE, as_torchrun(4, NVCOLL_TIMEOUT="10"))):
            assert told() == self.told(rank)

    def test_a_store_of_torchs(self, ranks, tmp_path):
        for rank, (process, told) in enumerate(ranks(SPLIT + self.CODE, as_torchrun_with_a_store(4, tmp_path))):
            assert told() == self.told(rank)
            process.wait(10)
        # of each group the keys of its last call remain: of all ranks, of two parts twice, and of a part of each
        assert len(list((tmp_path / "torch").glob("nvcoll_0_*"))) == 4 + 2 * 2 * 2 + 2

    def test_a_rank_that_does_not_come_to_a_store_is_named_by_its_rank_in_the_part(self, ranks, tmp_path):
        code = """
part.allgather(b"")
part.timeout = 0.5
time.sleep(100) if rank == 3 else tell(attempt(part.allgather, b"r%d" % rank))
"""
        started = ranks(SPLIT + code, as_torchrun_with_a_store(4, tmp_path))
        [(kind, text, seconds)] = started[2][1]()
        assert (kind, seconds < 5) == ("TimeoutError", True)
        assert text.startswith("Init: rank 0 did not arrive within 0.5 s; ")
        assert started[0][1]() == [["r0", "r1"]]
