"""Symmetric arrays of real worlds: what they hold, that memory comes back, and that ranks agree or are told."""

import gc
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import nvcoll
from nvcoll import COMM_SELF
from nvcoll.comm import Comm
from nvcoll.device.common import STAMP_BITS
from nvcoll.device_calls import DeviceCalls
from nvcoll.ops import DATATYPES


@pytest.fixture(autouse=True)
def small_worlds(monkeypatch):
    monkeypatch.setenv("NVCOLL_TIMEOUT", "20")
    monkeypatch.setenv("NVCOLL_SCRATCH", "128K")
    nvcoll.Finalize()  # COMM_SELF keeps the settings it was opened with
    yield
    nvcoll.Finalize()


def place(buffer):
    """Where a buffer lies in the heap, as it says itself."""
    return int(re.search(r"symmetric at (0x[0-9a-f]+)", repr(buffer))[1], 16)


class TestContents:
    @pytest.mark.parametrize("name", DATATYPES)
    def test_of_every_type(self, name):
        def main(comm):
            dtype = DATATYPES[name].dtype
            zeros, ones = comm.zeros((2, 3), name), comm.full(5, 1, dtype)
            data = np.arange(6).reshape(2, 3).astype(dtype)
            copied = comm.array(data)
            assert isinstance(comm.empty(4, DATATYPES[name]), nvcoll.Buffer)
            for buffer, shape in ((zeros, (2, 3)), (ones, (5,)), (copied, (2, 3))):
                assert (buffer.dtype, buffer.shape) == (dtype, shape)
                assert buffer.flags.c_contiguous
                assert buffer.flags.writeable
            assert copied.tobytes() == data.tobytes()
            assert zeros.tobytes() == bytes(zeros.nbytes)
            assert ones.tobytes() == np.ones(5, dtype).tobytes()
            return place(zeros) < place(ones) < place(copied)

        assert nvcoll.emulate(2).run(main) == [True, True]

    @pytest.mark.parametrize(
        ("shape", "expected"),
        [
            (3, (3,)),
            ((), ()),
            (0, (0,)),
            ((2, 0, 3), (2, 0, 3)),
            ([2, 3], (2, 3)),
            (np.int64(4), (4,)),
            (np.array([1, 2]), (1, 2)),
            ((1,) * 64, (1,) * 64),
            ((0, 2**58), (0, 2**58)),
        ],
    )
    def test_shapes(self, shape, expected):
        for buffer in (COMM_SELF.empty(shape), COMM_SELF.zeros(shape), COMM_SELF.full(shape, 2)):
            assert (buffer.shape, buffer.dtype) == (expected, np.float32)
            buffer.free()

    @pytest.mark.parametrize("name", ["empty", "zeros", "full"])
    def test_the_type_that_is_given_if_none_is_asked_for_is_told(self, name):
        default = inspect.signature(getattr(COMM_SELF, name)).parameters["dtype"].default
        assert re.search(rf"\b{default.__name__}\b", inspect.getdoc(getattr(COMM_SELF, name)))
        assert COMM_SELF.full(2, 16777217).tolist() == [16777216.0] * 2

    def test_array_takes_the_type_of_its_data_or_the_one_that_is_asked_for(self):
        assert COMM_SELF.array([1, 2, 3]).dtype == np.int64
        assert COMM_SELF.array(2.5).shape == ()
        assert COMM_SELF.array(np.float32([1, 2]), "float16").dtype == np.float16
        assert COMM_SELF.array([[True], [False]]).tolist() == [[True], [False]]
        assert COMM_SELF.array(np.arange(6).reshape(2, 3)[:, ::2]).tolist() == [[0, 2], [3, 5]]

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda comm: comm.empty(-1), "empty: shape -1 has a negative dimension; give sizes of 0 or more"),
            (lambda comm: comm.zeros((-2, -3)), "zeros: shape (-2, -3) has a negative dimension"),
            (lambda comm: comm.full((0, -1), 0), "full: shape (0, -1) has a negative dimension"),
            (lambda comm: comm.empty(3, None), "empty: dtype is None, expected a datatype"),
            (lambda comm: comm.empty(3, "float80"), "empty: dtype is 'float80', expected a datatype"),
            (lambda comm: comm.zeros(3, "float80"), "zeros: dtype is 'float80', expected a datatype"),
            (lambda comm: comm.array([object()]), "array: dtype is object, expected one of bool, int8"),
            (lambda comm: comm.array(["text"]), "array: dtype is <U4, expected one of bool, int8"),
            (lambda comm: comm.array([1], "float80"), "array: dtype is 'float80', expected a datatype"),
        ],
    )
    def test_refusals(self, call, message):
        with pytest.raises(nvcoll.ArgumentError, match="^" + re.escape(message)):
            call(COMM_SELF)

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda comm: comm.full(3, "abc"), r"full: fill_value .* expected what float32 can hold"),
            (lambda comm: comm.full(3, [1, 2, 3]), r"full: fill_value .* expected what float32 can hold"),
            (lambda comm: comm.full(3, 300, np.uint8), r"full: fill_value .* expected what uint8 can hold"),
            (lambda comm: comm.full(3, 1j), r"full: fill_value .* expected what float32 can hold"),
            (lambda comm: comm.array([[1, 2], [3]]), r"array: data .* expected an array of numbers"),
            (lambda comm: comm.array(["text"], "float32"), r"array: data .* expected what float32 can hold"),
        ],
    )
    def test_values_that_numpy_refuses_take_no_memory(self, call, message):
        first = COMM_SELF.empty(1)
        with pytest.raises(nvcoll.ArgumentError, match=f"^{message}"):
            call(COMM_SELF)
        assert place(COMM_SELF.empty(1)) == place(first) + 4096

    @pytest.mark.parametrize(
        ("shape", "told"),
        [
            ((2**40, 2**40), "has more elements than addresses; give a product below 2**59"),
            ((0, 2**62), "has more elements than addresses; give a product below 2**59"),
            ((1,) * 65, "has 65 dimensions; give 64 at most, as NumPy takes"),
            (2.5, "is 2.5, expected whole numbers; give a length or a tuple"),
            ("3", "is '3', expected whole numbers; give a length or a tuple"),
        ],
    )
    def test_shapes_that_cannot_be_take_no_memory(self, shape, told):
        first = COMM_SELF.empty(1)
        with pytest.raises(nvcoll.ArgumentError, match=r"^empty: shape .*" + re.escape(told) + "$"):
            COMM_SELF.empty(shape)
        assert place(COMM_SELF.empty(1)) == place(first) + 4096


class TestMemory:
    def test_buffers_are_apart_and_reach_to_their_ends(self):
        def main(comm):
            sizes = [1, 4095, 4096, 4097, 100_000, 0, 7]
            buffers = [comm.full(size, number, np.uint8) for number, size in enumerate(sizes)]
            comm.Allreduce(buffers[4], algorithm="ring")
            expected = [number if number != 4 else 4 * comm.size for number in range(len(sizes))]
            return all((buffer == value).all() for buffer, value in zip(buffers, expected, strict=True))

        assert all(nvcoll.emulate(3).run(main))

    def test_what_is_freed_is_given_again(self):
        def main(comm):
            a, b, c = (comm.zeros(5000, np.uint8) for _ in range(3))
            places = [place(x) for x in (a, b, c)]
            b.free()
            small = comm.zeros(100, np.uint8)  # fits the gap
            large = comm.zeros(20_000, np.uint8)  # does not
            assert place(small) == places[1]
            assert place(large) > places[2]
            a.free()
            small.free()
            assert place(comm.zeros(10_000, np.uint8)) == places[0]  # two gaps have become one
            return places

        places = nvcoll.emulate(3).run(main)
        assert places == [places[0]] * 3

    def test_a_dropped_buffer_is_given_back_once_all_ranks_have_dropped_it(self):
        def main(comm):
            first = comm.zeros(100)
            at = place(first)
            view = first[:10] if comm.rank == 1 else None
            del first
            gc.collect()
            second = comm.zeros(100)
            assert place(second) != at
            assert view is None or (view == 0).all()
            del view
            gc.collect()
            third = comm.zeros(100)
            assert place(third) == at
            comm.Allreduce(third)
            return True

        assert nvcoll.emulate(2).run(main) == [True, True]

    def test_dropped_buffers_are_given_back_when_another_is_freed(self):
        def main(comm):
            a, b = comm.zeros(100), comm.zeros(100)
            at = place(a)
            del a
            gc.collect()
            b.free()
            return place(comm.zeros(3000)) == at

        assert nvcoll.emulate(3).run(main) == [True] * 3

    def test_with_frees_on_all_ranks(self):
        def main(comm):
            with comm.full(10, comm.rank + 1) as x:
                comm.Allreduce(x)
                total, at = float(x[0]), place(x)
            assert x.freed
            with pytest.raises(nvcoll.StateError, match=r"^Allreduce: sendbuf is a Buffer that was freed"):
                comm.Allreduce(x)
            with pytest.raises(nvcoll.StateError, match=r"^free: the Buffer was freed; allocate another"):
                x.free()
            return total, place(comm.empty(10)) == at

        assert nvcoll.emulate(3).run(main) == [(6.0, True)] * 3

    def test_the_system_gets_its_memory_back(self):
        def main(comm):
            before = resident()
            for _ in range(3):
                with comm.full(32 << 20, 1, np.uint8) as buffer:
                    comm.Barrier()
                    during = resident()
                    comm.Barrier()
                assert buffer.freed
            comm.Barrier()
            return during - before, resident() - before

        gc.collect()
        for during, after in nvcoll.emulate(2).run(main):
            assert during > 48 << 20
            assert after < 16 << 20

    def test_many_come_and_go_without_growth(self):
        def main(comm):
            rng = np.random.default_rng(5)  # the same on all ranks
            held, highest = [], 0
            for _ in range(200):
                if held and rng.random() < 0.5:
                    buffer = held.pop(rng.integers(len(held)))
                    if rng.random() < 0.5:
                        buffer.free()
                    del buffer
                else:
                    held.append(comm.full(int(rng.integers(1, 3000)), len(held), np.int32))
                    highest = max(highest, place(held[-1]))
                held = held[-10:]
            values = [int(buffer[0]) for buffer in held]
            assert all((buffer == value).all() for buffer, value in zip(held, values, strict=True))
            return highest

        assert max(nvcoll.emulate(2).run(main)) < 1 << 20


def resident():
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


ALLOCATIONS = {"empty": (3,), "zeros": (3,), "full": (3, 1), "array": ([1, 2, 3],)}
FAILED = "^an earlier call on this communicator failed; it can only be ended: call Free or Finalize$"


class TestAfterAFailedCall:
    def test_no_memory_is_given(self):
        def main(comm):
            with pytest.raises(nvcoll.MismatchError):
                comm.Allreduce(np.ones(3 + comm.rank))
            for verb, args in ALLOCATIONS.items():
                with pytest.raises(nvcoll.StateError, match=FAILED):
                    getattr(comm, verb)(*args)
            return True

        assert nvcoll.emulate(2).run(main) == [True, True]

    @pytest.mark.parametrize("verb", ALLOCATIONS)
    def test_on_gpus_its_error_is_raised_first(self, verb):
        state = SimpleNamespace(failed=True, sequence=3, demand=lambda: None)
        boards = [3 << STAMP_BITS, 2 << STAMP_BITS]
        planner = SimpleNamespace(state=state, area=SimpleNamespace(boards=lambda: boards), timeout=2.0)
        world = SimpleNamespace(rank=0, size=2, of="", target="cuda", planner=planner, raised=False)
        comm = Comm(lambda: world, "on GPUs")
        comm.__dict__.update(_world=world, _calls=DeviceCalls(world))
        with pytest.raises(nvcoll.TimeoutError, match=f"^{verb}: a call up to number 3, .* did not arrive: rank 1"):
            getattr(comm, verb)(*ALLOCATIONS[verb])
        with pytest.raises(nvcoll.StateError, match=FAILED):
            getattr(comm, verb)(*ALLOCATIONS[verb])


class TestDisagreement:
    def test_without_room_all_ranks_are_told_and_may_go_on(self, monkeypatch):
        monkeypatch.setenv("NVCOLL_HEAP", "1M")

        def main(comm):
            with pytest.raises(
                nvcoll.AllocationError, match=r"^zeros: out of memory: rank 0: needs 1048576 "
            ) as caught:
                comm.zeros(1 << 20, np.uint8)
            assert isinstance(caught.value, MemoryError)
            assert "the heap of 1048576 bytes has no such room; free buffers or raise NVCOLL_HEAP" in str(caught.value)
            buffer = comm.zeros((1 << 20) - (128 << 10), np.uint8)  # all that is left
            with pytest.raises(nvcoll.AllocationError, match=r"needs 1 bytes"):
                comm.empty(1, np.uint8)
            buffer.free()
            x = comm.full(3, 1)
            comm.Allreduce(x)
            return x.tolist()

        assert nvcoll.emulate(3).run(main) == [[3.0] * 3] * 3

    def test_a_heap_without_room_for_scratch_memory(self, monkeypatch):
        monkeypatch.setenv("NVCOLL_HEAP", "64K")
        with pytest.raises(nvcoll.AllocationError, match=r"^Init: out of memory: rank 0: needs 131072 bytes"):
            nvcoll.emulate(2).run(lambda comm: comm.rank)

    @pytest.mark.parametrize(
        ("calls", "message"),
        [
            (("comm.empty(1)", "comm.empty(2)"), "empty: rank 0 allocates 4 bytes, rank 1 allocates 8 bytes; "),
            (("x.free()", "comm.empty(2)"), "free: rank 0 frees allocation 2, rank 1 allocates 8 bytes; "),
            (("x.free()", "y.free()"), "free: rank 0 frees allocation 2, rank 1 frees allocation 3; "),
        ],
    )
    def test_ranks_that_ask_for_different_things(self, calls, message):
        def main(comm):
            x, y = comm.zeros(3), comm.zeros(3)
            with pytest.raises(nvcoll.MismatchError) as caught:
                eval(calls[comm.rank], {"comm": comm, "x": x, "y": y})
            assert not x.freed
            assert not y.freed
            comm.Allreduce(x)  # nothing has changed
            assert place(comm.empty(3)) > place(y)
            return str(caught.value)

        told = nvcoll.emulate(2).run(main)
        assert told[0].startswith(message)
        assert told[0].endswith("; allocate and free in the same order on all ranks")
