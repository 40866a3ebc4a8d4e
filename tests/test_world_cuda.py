"""Worlds on GPUs: who is far from whom, agreed by all ranks. What opens them needs GPUs."""

import dataclasses
import threading
from types import SimpleNamespace

import pytest

from nvcoll import settings, world_cuda
from nvcoll.backends.emulated import Hub, LocalExchange
from nvcoll.errors import BootstrapError

HOSTS = [b"a", b"a", b"b", b"b"]


def on_ranks(size, one):
    """Let `one(exchange)` run on every rank; return what was raised."""
    hub, raised = Hub(size, 10), []

    def run(rank):
        try:
            one(LocalExchange(hub, rank))
        except BootstrapError as exc:
            raised.append(str(exc))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def reach(unreachable, identities=HOSTS, problem=None, **changes):
    """Let every rank find out whom it reaches; return what each found: its nodes, who is far, and whether any is."""
    size = len(identities)
    values = dataclasses.replace(settings.read({}), **changes)
    found = [None] * size

    def one(exchange):
        rank = exchange.rank
        addresses = [0 if other in unreachable.get(rank, ()) else 1 << 20 for other in range(size)]
        memory = SimpleNamespace(addresses=addresses, gpus=[f"GPU {k}" for k in range(size)])
        here, far, remote = world_cuda._reach(exchange, identities, memory, values)
        found[rank] = (here.nodes, set(far), remote)

    return found, on_ranks(size, one)


@pytest.fixture(autouse=True)
def no_transport_chosen(monkeypatch):
    for name in ("NVSHMEM_REMOTE_TRANSPORT", "NVSHMEM_IB_ENABLE_IBGDA"):
        monkeypatch.delenv(name, raising=False)


def test_where_all_reach_all_nobody_is_far():
    assert reach({}) == ([(((0, 1), (2, 3)), set(), False)] * 4, [])


def test_hosts_between_which_there_is_only_a_network():
    found, _ = reach({0: {2, 3}, 1: {2, 3}, 2: {0, 1}, 3: {0, 1}})
    nodes = ((0, 1), (2, 3))
    assert found == [(nodes, {2, 3}, True)] * 2 + [(nodes, {0, 1}, True)] * 2


def test_ranks_of_a_host_that_do_not_reach_each_other_are_nodes_of_their_own():
    found, _ = reach({0: {1}}, [b"a"] * 3)
    nodes = ((0,), (1,), (2,))
    assert found == [(nodes, {1}, True), (nodes, set(), True), (nodes, set(), True)]


def test_other_nodes_count_as_far_on_demand():
    found, _ = reach({}, [b"a"] * 4, ranks_per_node=2)
    nodes = ((0, 1), (2, 3))
    assert found == [(nodes, {2, 3}, True)] * 2 + [(nodes, {0, 1}, True)] * 2
    assert reach({}, [b"a"] * 4, ranks_per_node=4)[0][0] == (((0, 1, 2, 3),), set(), False)


def same(*facts):
    """Let every rank compare what it holds of facts; return what was raised."""
    return on_ranks(len(facts), lambda exchange: world_cuda._same(exchange, facts[exchange.rank]))


def test_ranks_that_would_cut_messages_differently_are_refused_on_all_ranks():
    facts = {"numba": "0.61", "text": "abc"}
    assert same(facts, dict(facts), facts) == []
    raised = same(facts, facts, facts | {"numba": ""})
    told = "Init: numba must be the same on all ranks, and differs on ranks 0 and 2: 0.61 and none"
    assert raised == [f"{told}; make it so, or set NVCOLL_BACKEND=shm"] * 3
    [first, second] = same(facts, facts | {"text": "abd"})
    assert first == second
    assert "text must be the same on all ranks, and differs on ranks 0 and 1: abc and abd;" in first


def test_a_transport_that_kernels_cannot_use_is_refused_on_all_ranks_if_it_is_needed(monkeypatch):
    monkeypatch.setenv("NVSHMEM_IB_ENABLE_IBGDA", "1")
    assert reach({})[1] == []
    _, raised = reach({0: {2}})
    assert len(raised) == 4
    assert all("other nodes cannot be reached" in text and "NVSHMEM_IB_ENABLE_IBGDA" in text for text in raised)
