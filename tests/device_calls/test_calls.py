"""Calls on GPUs, with everything beneath them faked: what is judged before a launch, and the words of what failed."""

from types import SimpleNamespace

import numpy as np
import pytest

import nvcoll
from nvcoll import IN_PLACE, device_calls
from nvcoll.buffers import streams
from nvcoll.device.common import STAMP_BITS
from nvcoll.ops import DATATYPES, MAX, SUM
from nvcoll.planning import EMPTY
from tests.buffers.gpu import CudaInterface, on_gpu
from tests.fake_device_world import HISTORY, TOKEN, Told, reduce, values


class TestJudgement:
    def test_two_buffers_and_one(self, world, calls):
        send, recv = on_gpu(values()), on_gpu(values())
        for args in [(send, recv), (recv,), (IN_PLACE, recv), (recv, IN_PLACE), (recv, recv), ([recv, 8],)]:
            reduce(calls, *args)
        [plan] = world.planner.plans  # a plan serves all places, and is made once
        assert plan.told == Told("allreduce", 8, "float32", "SUM", None)
        assert plan.launched == [(send.address, recv.address, 0)] + [(recv.address, recv.address, 0)] * 5
        assert world.settled == 1

    def test_plans_are_known_by_type_size_operator_and_algorithm(self, world, calls):
        x = on_gpu(values())
        for args in [(x,), ([x, 4],), (x, None, MAX), (x, None, SUM, None, "ring"), (on_gpu(values(8, np.int32)),)]:
            reduce(calls, *args)
        assert len(world.planner.plans) == 5

    def test_other_arrays_of_gpus(self, world, calls):
        data = values()
        reduce(calls, CudaInterface(data))
        assert world.planner.plans[0].launched == [(data.ctypes.data,) * 2 + (0,)]

    def test_without_elements_the_ranks_meet(self, world, calls):
        reduce(calls, on_gpu(values(0)), stream=5)
        reduce(calls, on_gpu(values(0, np.int8)))
        [plan] = world.planner.plans
        assert plan.told == Told("allreduce of no elements", 2, "int64", "MAX", None)  # which no other call matches
        assert plan.launched == [(TOKEN, TOKEN, 5), (TOKEN, TOKEN, 0)]

    def test_streams(self, world, calls):
        x = on_gpu(values())
        reduce(calls, x, stream=77)
        reduce(calls, x, stream=SimpleNamespace(cuda_stream=78))
        world.stream = 99  # of an emulated rank
        reduce(calls, x)
        reduce(calls, x, stream=77)
        assert [stream for *_, stream in world.planner.plans[0].launched] == [77, 78, 99, 77]

    @pytest.mark.parametrize(
        ("args", "kind", "message"),
        [
            ((IN_PLACE,), "ArgumentError", r"sendbuf is IN_PLACE and recvbuf missing; pass the array as recvbuf"),
            ((np.ones(3),), "DatatypeError", r"sendbuf"),
            ((IN_PLACE, np.ones(3)), "DatatypeError", r"recvbuf is in memory of the host"),
            ((np.ones(3), IN_PLACE), "DatatypeError", r"sendbuf is in memory of the host"),
            ((on_gpu(values()), on_gpu(values(7))), "ArgumentError", r"7.*8|8.*7"),
            ((on_gpu(values()), on_gpu(values(8, np.float64))), "DatatypeError", r"float32|float64"),
            ((on_gpu(values()), None, nvcoll.BAND), "DatatypeError", r"BAND"),
            ((on_gpu(values()), None, "sum"), "ArgumentError", r"op"),
            ((on_gpu(values()), None, SUM, "stream"), "ArgumentError", r"stream is 'stream'"),
        ],
    )
    def test_refusals_come_before_anything_is_planned(self, world, calls, args, kind, message):
        with pytest.raises(getattr(nvcoll, kind), match=rf"^Allreduce: .*({message})"):
            reduce(calls, *args)
        assert world.planner.plans == []

    def test_none_with_a_datatype_is_a_call_without_elements(self, world, calls):
        reduce(calls, [None, 0, DATATYPES["float32"]], [None, DATATYPES["float32"]])
        reduce(calls, IN_PLACE, [None, 0, DATATYPES["float64"]])
        assert [plan.told.verb for plan in world.planner.plans] == [EMPTY]

    def test_an_array_of_another_gpu(self, world, calls):
        world.device.ordinal = 5
        with pytest.raises(nvcoll.ArgumentError) as caught:
            reduce(calls, on_gpu(values()))
        assert str(caught.value) == (
            "Allreduce: sendbuf is on GPU 3, rank 1 works on GPU 5; copy it there, and copy the result back, or set "
            "NVCOLL_DEVICE"
        )
        with pytest.raises(nvcoll.ArgumentError, match=r"^Allreduce: recvbuf is on GPU 3, "):
            reduce(calls, IN_PLACE, on_gpu(values()))
        with pytest.raises(nvcoll.ArgumentError, match=r"^Allreduce: sendbuf is on GPU 3, .+; copy it there, or set"):
            reduce(calls, on_gpu(values()), on_gpu(values()))

    def test_an_array_that_does_not_tell_its_gpu(self, world, calls):
        x = CudaInterface(values())
        world.places[x.values.ctypes.data] = world.device.ordinal
        reduce(calls, x)
        world.places[x.values.ctypes.data] = 0
        with pytest.raises(nvcoll.ArgumentError, match=r"^Allreduce: sendbuf is on GPU 0, rank 1 works on GPU 3; copy"):
            reduce(calls, x)

    @pytest.mark.parametrize(("name", "shift", "unit"), [("float32", 2, 4), ("complex128", 4, 8), ("int16", 1, 2)])
    def test_elements_that_gpus_cannot_load_whole(self, world, calls, name, shift, unit):
        memory = on_gpu(np.zeros(200, np.uint8))
        assert memory.address % 8 == 0
        with pytest.raises(nvcoll.ArgumentError) as caught:
            reduce(calls, [memory[shift : shift + 160], DATATYPES[name]])
        assert str(caught.value) == (
            f"Allreduce: sendbuf begins at {memory.address + shift:#x}, expected a multiple of {unit} bytes, "
            f"for GPUs load {name} whole; pass a copy, and copy the result back"
        )
        with pytest.raises(nvcoll.ArgumentError, match=r"^Allreduce: sendbuf begins at .+; pass a copy$"):
            reduce(calls, [memory[shift:], 1, DATATYPES[name]], on_gpu(np.zeros(1, name)))
        reduce(calls, [memory[8:168], DATATYPES[name]])
        reduce(calls, [memory[3:13], DATATYPES["int8"]])
        assert len(world.planner.plans) == 2

    def test_plans_are_not_kept_for_ever(self, world, calls, monkeypatch):
        monkeypatch.setattr(device_calls, "MOST_KEPT", 2)
        x = on_gpu(values())
        for count in (1, 2, 3, 1):
            reduce(calls, [x, count])
        assert len(world.planner.plans) == 4
        assert len(calls._kept) == 2


class Recorded(list):
    """Stands for an OnStream: what it was made of, and the stream."""

    def __init__(self, *args):
        super().__init__(args)

    def record(self, stream):
        self.append(stream)


class TestNonblocking:
    def test_it_is_judged_at_once_and_launched_by_what_is_returned(self, world, calls, monkeypatch):
        monkeypatch.setattr(device_calls, "OnStream", Recorded)
        x = on_gpu(values())
        start = calls.begin("Iallreduce", x, None, SUM, 55, None)
        [plan] = world.planner.plans
        assert plan.launched == []
        device, check, _, owners, stream = start()
        assert plan.launched == [(x.address, x.address, 55)]
        assert (device, stream, owners) == (world.device, 55, (x, x))
        check()
        world.planner.state.failed = True
        world.planner.tags = [1 << STAMP_BITS] * 4
        with pytest.raises(nvcoll.TimeoutError, match=r"^Iallreduce: "):
            check()

    def test_after_the_end_of_the_communicator(self, world, calls, monkeypatch):
        monkeypatch.setattr(device_calls, "OnStream", Recorded)
        _, check, over, *_ = calls.begin("Iallreduce", on_gpu(values()), None, SUM, 55, None)()
        assert not over()
        start = calls.begin("Allreduce_init", on_gpu(values()), None, SUM, 55, None)
        world.planner.state.over = True
        world.capturing.add(55)  # which is not looked at any more
        with pytest.raises(nvcoll.StateError, match="finalized"):
            start()
        assert not over()  # the kernel may run yet
        world.left = True
        assert over()
        check()  # the call was completed
        world.planner.state.reported = True
        with pytest.raises(nvcoll.StateError, match="failed"):
            check()

    def test_a_stream_that_is_captured(self, world, calls):
        """Nothing is planned then, for to load a kernel may spoil the graph."""
        start = calls.begin("Allreduce_init", on_gpu(values()), None, SUM, 55, None)
        world.capturing.add(55)
        with pytest.raises(nvcoll.StateError, match=r"^Iallreduce: the stream is being captured"):
            calls.begin("Iallreduce", on_gpu(values(4)), None, SUM, 55, None)
        with pytest.raises(nvcoll.StateError, match=r"^Allreduce_init: the stream is being captured"):
            start()
        assert [plan.launched for plan in world.planner.plans] == [[]]

    def test_without_elements_the_ranks_meet(self, world, calls, monkeypatch):
        monkeypatch.setattr(device_calls, "OnStream", Recorded)
        calls.begin("Iallreduce", on_gpu(values(0)), None, SUM, 55, None)()
        assert world.planner.plans[0].launched == [(TOKEN, TOKEN, 55)]

    def test_a_buffer_that_was_freed_meanwhile(self, calls):
        x = on_gpu(values())
        start = calls.begin("Allreduce_init", x, None, SUM, None, None)
        x.free()
        with pytest.raises(nvcoll.StateError, match=r"^Allreduce_init: the DeviceBuffer was freed"):
            start()


class TestBarrier:
    def test_it_waits_for_its_stream(self, world, calls):
        world.stream = 99
        calls.barrier()
        calls.barrier()
        [plan] = world.planner.plans
        assert plan.launched == [(HISTORY, TOKEN, 99)] * 2
        assert plan.told == Told("barrier", 2, "int64", "MAX", None)  # which no reduction is taken for
        assert world.planner.waited == [99, 99]

    def test_a_library_that_captures_a_graph(self, world, calls, monkeypatch):
        x = calls.allocate("empty", (3,), DATATYPES["int8"])
        monkeypatch.setattr(streams, "captured_stream", SimpleNamespace)
        for verb, call in [
            ("Barrier", calls.barrier),
            ("empty", lambda: calls.allocate("empty", (3,), DATATYPES["int8"])),
            ("free", x.free),
        ]:
            with pytest.raises(nvcoll.StateError, match=rf"^{verb}: types captures a graph, expected none, for this"):
                call()
        assert world.planner.plans == []
        assert not x.freed

    def test_calls_before_it_that_did_not_match(self, world, calls):
        world.planner.same = False
        reduce(calls, on_gpu(values()))
        with pytest.raises(nvcoll.MismatchError) as caught:
            calls.barrier()
        assert str(caught.value) == (
            "Barrier: in a call up to number 2 of rank 1, or a replay of one, the ranks have not called the same "
            "(count, datatype, operator or algorithm), and its result is wrong; make the calls agree"
        )
        for refused in (calls.barrier, lambda: reduce(calls, on_gpu(values()))):
            with pytest.raises(nvcoll.StateError, match=r"^an earlier call on this communicator failed"):
                refused()

    def test_after_a_failure_it_meets_nobody(self, world, calls):
        world.planner.state.failed = True
        world.planner.tags = [5 << STAMP_BITS, 6 << STAMP_BITS, None, 6 << STAMP_BITS]
        world.heap = None
        with pytest.raises(nvcoll.TimeoutError, match=r"^Barrier: .*did not arrive: rank 0\. "):
            calls.barrier()

    def test_it_tells_what_went_wrong(self, world, calls):
        world.planner.tags = [5 << STAMP_BITS, 6 << STAMP_BITS, None, 6 << STAMP_BITS]

        def fails(stream):
            world.planner.state.failed = True

        world.planner.area.same_history = fails
        with pytest.raises(nvcoll.TimeoutError, match=r"^Barrier: .*did not arrive: rank 0\. "):
            calls.barrier()

    def test_ctrl_c_ends_it_and_the_communicator(self, world, calls):
        def interrupt(stream):
            raise KeyboardInterrupt

        world.planner.area.same_history = interrupt
        with pytest.raises(KeyboardInterrupt):
            calls.barrier()
        assert world.planner.state.failed
        with pytest.raises(nvcoll.StateError, match=r"^an earlier call on this communicator failed"):
            calls.barrier()


class TestFailures:
    """Tags are epochs and stamps; rank 1 of 4 tells what it knows of the boards."""

    def error(self, world, calls, tags, sequence=12):
        state = world.planner.state
        state.failed, state.sequence = True, sequence
        world.planner.tags = tags
        with pytest.raises(nvcoll.Error) as caught:
            reduce(calls, on_gpu(values()))
        return caught.value

    @staticmethod
    def tag(epoch, stamp=7):
        return epoch << STAMP_BITS | stamp

    def test_ranks_that_did_not_come(self, world, calls):
        tag = self.tag
        error = self.error(world, calls, [tag(19), tag(20), tag(20), tag(3)])
        assert isinstance(error, nvcoll.TimeoutError)
        assert str(error) == (
            "Allreduce: a call up to number 12, or a replay of one, failed on the GPU of rank 1: no answer "
            "within NVCOLL_TIMEOUT (2 s); did not arrive: rank 0, rank 3. See what those ranks do, or raise "
            "NVCOLL_TIMEOUT if they are only slow"
        )

    def test_all_came_in_the_end(self, world, calls):
        error = self.error(world, calls, [self.tag(20), self.tag(20), self.tag(20), self.tag(21)])
        assert isinstance(error, nvcoll.TimeoutError)
        assert "; all have arrived by now. " in str(error)

    def test_ranks_whose_boards_cannot_be_read(self, world, calls):
        error = self.error(world, calls, [self.tag(20), self.tag(20), None, self.tag(21)])
        assert "; those that can be seen from here have arrived by now. " in str(error)

    def test_no_board_can_be_read(self, world, calls):
        assert "; none can be seen from here. " in str(self.error(world, calls, [None, self.tag(20), None, None]))

    def test_boards_cannot_be_looked_at(self, world, calls):
        """The context is lost, or Ctrl-C comes meanwhile."""

        def raises(error):
            def boards():
                raise error

            return boards

        seen, world.planner.area.boards = world.planner.area.boards, raises(KeyboardInterrupt)
        world.planner.state.failed = True
        with pytest.raises(KeyboardInterrupt):
            reduce(calls, on_gpu(values()))
        world.planner.area.boards = raises(nvcoll.DeviceError("700"))
        assert "none can be seen from here" in str(self.error(world, calls, []))
        world.planner.area.boards = seen
        with pytest.raises(nvcoll.StateError, match="an earlier call on this communicator failed"):
            reduce(calls, on_gpu(values()))

    def test_ranks_that_call_something_else(self, world, calls):
        error = self.error(world, calls, [self.tag(20, 8), self.tag(20), self.tag(19), self.tag(20)])
        assert isinstance(error, nvcoll.MismatchError)
        assert str(error).endswith(
            ": rank 0 calls something else (count, datatype, operator or algorithm, or Barrier); make the calls agree"
        )

    def test_the_next_call_is_refused(self, world, calls):
        self.error(world, calls, [self.tag(20)] * 4)
        with pytest.raises(nvcoll.StateError) as caught:
            reduce(calls, on_gpu(values()))
        assert str(caught.value) == (
            "an earlier call on this communicator failed; it can only be ended: call Free or Finalize"
        )


def test_arrays_are_made_on_the_heap(world, calls, monkeypatch):
    swept = []
    monkeypatch.setattr(device_calls, "sweep", lambda: swept.append(1))
    world.stream = 9
    x = calls.allocate("zeros", (2, 3), DATATYPES["int16"])
    assert (x.shape, x.dtype, x.nbytes) == ((2, 3), np.int16, 12)
    assert x._owner.allocation.verb == "zeros"
    x.copy_from(np.ones((2, 3), np.int16))
    assert device_calls.driver.calls == [("copy", 12, 9)]  # on the rank's own stream
    assert swept == [1]  # what dropped requests have left may be what is given out
