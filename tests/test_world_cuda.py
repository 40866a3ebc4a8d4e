"""Worlds on GPUs: who is far from whom, agreed by all ranks, and their ends. What opens them needs GPUs."""

import dataclasses
import sys
import threading
from collections import defaultdict
from types import SimpleNamespace

import pytest

from nvcoll import _topology, settings, world_cuda
from nvcoll.backends.driver import Device
from nvcoll.backends.emulated import Hub, LocalExchange, on_gpu
from nvcoll.backends.group import Member
from nvcoll.errors import BootstrapError, DeviceError
from nvcoll.world_cuda import DeviceCommon, DeviceWorld
from tests.fake_cuda import STREAM, FakeDriver, Result, install

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


class TestParts:
    """What a part is told of its ranks, of which some may be far from some."""

    @pytest.fixture(autouse=True)
    def driver(self, monkeypatch):
        install(monkeypatch, FakeDriver())

    @pytest.fixture
    def part(self, monkeypatch):
        """``part(ranks)``: for each of the ranks of two nodes of three, what its part is built with."""
        monkeypatch.setattr(world_cuda, "build_world", lambda *args: SimpleNamespace(args=args))

        def make(ranks):
            found, hub = {}, Hub(len(ranks), 10)

            def one(rank):
                far = {3, 4, 5} if rank < 3 else {0, 1, 2}
                heap = SimpleNamespace(memory=Member(None, tuple(range(6)), rank, 4096, -1))
                topology = _topology.detect(rank, [b"a"] * 3 + [b"b"] * 3, gpus=[f"GPU {k}" for k in range(6)])
                exchange = SimpleNamespace(rank=rank, size=6)
                common = DeviceCommon(settings.read({}), {}, Device(0), 2, "nvshmem")
                world = DeviceWorld(exchange, topology, None, heap, common, None, far, 0)
                made = world.part(LocalExchange(hub, ranks.index(rank)), ranks)
                assert made.origins == tuple(ranks)
                found[rank] = (*made.args, world)

            threads = [threading.Thread(target=one, args=(rank,)) for rank in ranks]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return [found[rank] for rank in ranks]

        return make

    def test_of_ranks_that_reach_each_other(self, part):
        for place, (exchange, topology, memory, common, far, remote, whole, world) in enumerate(part([2, 0])):
            assert (exchange.rank, topology.nodes, topology.gpus) == (place, ((0, 1),), ("GPU 2", "GPU 0"))
            assert (memory.place, memory.members, memory.origins) == (place, (0, 1), (2, 0))
            assert (set(far), remote, whole, common) == (set(), False, world, world.common)

    def test_of_ranks_of_which_some_are_far(self, part):
        told = part([1, 4, 5])
        assert [set(one[4]) for one in told] == [{1, 2}, {0}, {0}]
        assert [one[5] for one in told] == [True] * 3
        assert [one[1].nodes for one in told] == [((0,), (1, 2))] * 3
        assert [one[2].origins for one in told] == [(1, 4, 5)] * 3

    def test_kernels_are_shared_by_those_of_a_kind(self):
        common = DeviceCommon(settings.read({}), {}, Device(0), 1, "nvshmem")
        assert common.kernels(True) is common.kernels(True)
        assert common.kernels(True).remote
        assert not common.kernels(False).remote
        near = object()
        assert DeviceCommon(None, {}, Device(0), 1, "emulated", near).kernels(False) is near


class TestEnds:
    """What a world does at its end, in order."""

    @pytest.fixture
    def done(self):
        return []

    @pytest.fixture
    def world(self, monkeypatch, done):
        """What makes a world, on a driver without a GPU, that writes down what it does."""
        fake = FakeDriver()
        install(monkeypatch, fake)
        monkeypatch.setattr(world_cuda.driver, "stream_wait", lambda stream: done.append(("wait", stream)))

        def note(name):
            return lambda *args: done.append((name, *args))

        def make(backend, stream, reported=False, whole=None):
            state = SimpleNamespace(precede=note("precede"), end=note("end"), reported=reported)
            planner = SimpleNamespace(
                state=state, area=SimpleNamespace(close=note("close area"), give_up=note("give up"))
            )
            heap = SimpleNamespace(close=note("close heap"), retire=note("retire heap"), give_back=note("give back"))
            exchange = make.exchange = SimpleNamespace(rank=0, size=2, close=note("leave"), timeout=600.0)
            common = DeviceCommon(None, {}, Device(0), 1, backend)
            footing = SimpleNamespace(close=note("close footing"))
            return DeviceWorld(exchange, None, planner, heap, common, footing, (), stream, whole)

        make.driver = fake
        return make

    @pytest.mark.parametrize("reported", [False, True])
    def test_of_a_process(self, world, done, reported):
        world("nvshmem", 0, reported).close()
        ends = [("close area",), ("close footing",), ("close heap",), ("leave", reported)]
        assert done == [("end", 0), ("wait", 0), ("end",), *ends]
        assert world.exchange.timeout == (world_cuda.PATIENCE if reported else 600)  # some ranks may not come

    def test_after_an_exception_that_nobody_caught(self, world, done, monkeypatch):
        monkeypatch.setattr(sys, "last_value", ValueError(), raising=False)
        world("nvshmem", 0).close()
        assert world.exchange.timeout == world_cuda.PATIENCE
        assert done[-1] == ("leave", False)

    def test_of_a_process_whose_last_stream_is_gone(self, world, done):
        def gone(*stream):
            if stream:
                raise DeviceError("cuEventRecord: CUDA_ERROR_INVALID_HANDLE")

        one = world("nvshmem", 0)
        one.planner.state.end = gone
        one.close()
        assert done[-4:] == [("close area",), ("close footing",), ("close heap",), ("leave", False)]
        assert "cuCtxSynchronize" in world.driver.calls

    def test_after_ctrl_c_no_kernel_is_waited_for(self, monkeypatch, world, done):
        def interrupt(stream):
            raise KeyboardInterrupt

        monkeypatch.setattr(world_cuda.driver, "stream_wait", interrupt)
        one = world("nvshmem", 0)
        with pytest.raises(KeyboardInterrupt):
            one.finish()  # for calls that may still succeed
        assert ("give up",) not in done
        with pytest.raises(KeyboardInterrupt):
            one.close()
        assert done[-3:] == [("end",), ("retire heap",), ("leave", True)]
        assert ("give up",) in done

    def test_of_a_process_whose_context_is_lost(self, world, done):
        world.driver.fail["cuCtxSynchronize"] = Result.CUDA_ERROR_INVALID_CONTEXT
        world("nvshmem", 0).close()
        assert done[-2:] == [("retire heap",), ("leave", True)]
        assert ("close area",) not in done

    def test_of_a_process_whose_memory_cannot_be_given_back(self, world, done):
        one = world("nvshmem", 0)
        one.heap.close = lambda: 1 / 0
        with pytest.raises(ZeroDivisionError):
            one.close()
        assert done[-3:] == [("close area",), ("close footing",), ("leave", False)]

    @pytest.mark.parametrize("reported", [False, True])
    def test_of_a_part(self, world, done, reported):
        """Its memory goes with that of the whole, which hears of a failure."""
        whole = world("nvshmem", 0)
        part = world("nvshmem", 0, reported, whole)
        part.close()
        left = [("end", 0), ("wait", 0), ("end",)]
        assert done == [*left, ("close area",), ("retire heap",), ("leave", reported)]
        done.clear()
        whole.close()
        assert done == [*left, ("close area",), ("close footing",), ("close heap",), ("leave", reported)]

    def test_of_a_part_that_is_freed(self, world, done):
        whole = world("nvshmem", 0)
        world("nvshmem", 0, False, whole).free()
        assert done[3:] == [("give back", "Free", True), ("close area",), ("retire heap",), ("leave", False)]
        done.clear()
        failed = world("nvshmem", 0, True, whole)
        assert failed.free()
        assert done[3:] == [("give back", "Free", False), ("close area",), ("retire heap",), ("leave", False)]

    def test_a_part_that_cannot_leave_keeps_the_memory(self, monkeypatch, world, done):
        def fails(stream):
            raise DeviceError("cuEventQuery: CUDA_ERROR_LAUNCH_FAILED")

        whole = world("nvshmem", 0)
        part = world("nvshmem", 0, False, whole)
        with monkeypatch.context() as patch:
            patch.setattr(world_cuda.driver, "stream_wait", fails)
            part.close()
        assert done[-2:] == [("retire heap",), ("leave", True)]
        whole.close()
        assert done[-2:] == [("retire heap",), ("leave", True)]
        assert ("close area",) not in done

    def test_of_an_emulated_rank_with_parts(self, monkeypatch, world, done):
        """The stream is that of the rank, and given to others once."""
        monkeypatch.setattr(world_cuda, "_idle", defaultdict(list))
        whole = world("emulated", STREAM)
        world("emulated", STREAM, False, whole)
        with on_gpu():
            whole.retire()
        assert done[-2:] == [("close area",), ("close footing",)]
        assert done.count(("close area",)) == 2
        assert world_cuda._idle[0] == [STREAM]
        assert not whole._parts

    def test_of_an_emulated_rank(self, world, done):
        """Calls on other streams are waited for, and what may wait for ranks that run is put off until none does."""
        one = world("emulated", STREAM)
        with on_gpu():
            one.retire()
            assert done == [("end", STREAM), ("wait", STREAM), ("end",), ("retire heap",)]
        assert done[-2:] == [("close area",), ("close footing",)]

    def test_streams_of_emulated_ranks_are_used_again(self, monkeypatch, world, done):
        """They are never destroyed: others may name them still, and none is given out twice."""
        gpu, ranks = Device(0), []
        monkeypatch.setattr(world_cuda, "_idle", defaultdict(list))
        handles = iter([50, 60, 70])
        monkeypatch.setattr(world.driver, "cuStreamCreate", lambda flags: (Result(0), next(handles)))
        ranks = [world("emulated", world_cuda._stream_on(gpu)) for _ in range(2)]
        assert [rank.stream for rank in ranks] == [50, 60]
        for rank in ranks:
            assert [rank.leave(), rank.leave()] == [True, True]
        assert sorted(world_cuda._stream_on(gpu) for _ in range(3)) == [50, 60, 70]
        assert "cuStreamDestroy" not in world.driver.calls

    def test_a_stream_on_which_something_went_wrong_is_not_used_again(self, monkeypatch, world, done):
        def fails(stream):
            raise DeviceError("cuStreamSynchronize: CUDA_ERROR_LAUNCH_FAILED")

        monkeypatch.setattr(world_cuda, "_idle", defaultdict(list))
        rank = world("emulated", STREAM)
        monkeypatch.setattr(world_cuda.driver, "stream_wait", fails)
        assert [rank.leave(), rank.leave()] == [False, False]
        assert not world_cuda._idle[0]

    def test_before_a_kernel_is_loaded_calls_on_all_streams_are_waited_for(self, world, done):
        world("emulated", STREAM).settle()
        world("nvshmem", 0).settle()  # whose siblings have contexts of their own
        assert done == [("precede", STREAM), ("wait", STREAM)]

    def test_calls_are_finished_on_all_streams(self, world, done):
        world("emulated", STREAM).finish()
        world("nvshmem", 0).finish()
        assert done == [("precede", STREAM), ("wait", STREAM), ("precede", 0), ("wait", 0)]

    def test_the_heap_waits_for_calls_before_it_gives_out_what_was_dropped(self, monkeypatch, world):
        install(monkeypatch, world.driver)
        heap = SimpleNamespace(allocate=lambda nbytes, verb: None, finish=None)
        planner = SimpleNamespace(state=None)
        for name, made in {"Heap": heap, "Footing": None, "DeviceArea": object(), "DevicePlanner": planner}.items():
            monkeypatch.setattr(world_cuda, name, lambda *args, made=made: made)
        exchange = SimpleNamespace(rank=0, size=1, verb="Init", allgather=lambda data: [data])
        memory, topology = SimpleNamespace(members=(0,)), SimpleNamespace(node_sizes=(1,))
        common = DeviceCommon(settings.read({}), {}, Device(0), 1, "nvshmem")
        built = world_cuda.build_world(exchange, topology, memory, common)
        assert heap.finish == built.finish
