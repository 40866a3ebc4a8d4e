"""Which backend is chosen, and that all ranks choose the same."""

import pytest

from nvcoll.backends.choice import agree_on_backend, choose
from nvcoll.errors import BootstrapError


class Exchange:
    """An exchange whose other ranks gave `others`."""

    def __init__(self, *others):
        self.others, self.given = others, []

    def allgather(self, data):
        self.given.append(data)
        return [data, *self.others]


class TestChoose:
    def test_the_hosts_where_asked_for(self):
        assert choose("shm", [None, None], [2]) == ("shm", "NVCOLL_BACKEND asks for it")

    @pytest.mark.parametrize("wanted", ["auto", "nvshmem"])
    def test_the_gpus_where_every_rank_can(self, wanted):
        assert choose(wanted, [None] * 4, [2, 2]) == ("nvshmem", "every rank can use a GPU and NVSHMEM")

    @pytest.mark.parametrize(
        ("reasons", "hosts", "problem"),
        [
            ([None, "no GPU; buy one", "no driver"], [3], "rank 1: no GPU; buy one"),
            (
                [None] * 3,
                [2, 1],
                "NVSHMEM needs the same number of ranks on every host, got 2, 1; start as many on each",
            ),
        ],
    )
    def test_where_one_cannot(self, reasons, hosts, problem):
        assert choose("auto", reasons, hosts) == ("shm", problem)
        with pytest.raises(BootstrapError) as caught:
            choose("nvshmem", reasons, hosts)
        assert str(caught.value) == (
            f"NVCOLL_BACKEND=nvshmem: {problem}; or set NVCOLL_BACKEND=shm, and reduce on the hosts"
        )


class TestAgree:
    def test_every_rank_tells(self):
        exchange = Exchange(b"no GPU", b"")
        assert agree_on_backend(exchange, "auto", [3], lambda: None) == ("shm", "rank 1: no GPU")
        assert exchange.given == [b""]
        exchange = Exchange(b"", b"")
        assert agree_on_backend(exchange, "auto", [3], lambda: "mine") == ("shm", "rank 0: mine")
        assert agree_on_backend(exchange, "auto", [3], lambda: None)[0] == "nvshmem"

    def test_nobody_is_asked_where_there_is_no_choice(self):
        def usable():
            raise AssertionError

        exchange = Exchange()
        assert agree_on_backend(exchange, "shm", [1], usable)[0] == "shm"
        assert exchange.given == []


def test_every_rank_learns_that_the_gpus_cannot_be_had(run_ranks):
    program = """
import nvcoll
try:
    nvcoll.COMM_WORLD.rank
except nvcoll.BootstrapError as exc:
    print(exc)
"""
    ranks = run_ranks(program, 2, env={"NVCOLL_BACKEND": "nvshmem", "CUDA_VISIBLE_DEVICES": ""})
    assert ranks.stdout[0] == ranks.stdout[1]
    assert ranks.stdout[0].startswith("NVCOLL_BACKEND=nvshmem: ")
    assert "or set NVCOLL_BACKEND=shm" in ranks.stdout[0]
