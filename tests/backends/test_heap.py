"""The symmetric heap: ranks that are threads agree on where everything lies, and on what goes wrong."""

import errno
import gc
import mmap
import threading
import time

import numpy as np
import pytest

from nvcoll.backends.emulated import EmulatedMemory, Hub, LocalExchange, reserve
from nvcoll.backends.heap import ALIGN, Heap
from nvcoll.backends.nvshmem import CLOSING
from nvcoll.buffers import Buffer
from nvcoll.errors import AllocationError, MismatchError, PeerLostError, StateError

EXTENT = 64 * ALIGN


def on_ranks(act, n=3, extent=EXTENT):
    """Call ``act(heap, rank)`` on `n` threads whose heaps belong together; return the results, exceptions too."""
    hub, segment, found = Hub(n, 10), reserve(n, extent), [None] * n

    def run(rank):
        exchange = LocalExchange(hub, rank)
        try:
            found[rank] = act(Heap(EmulatedMemory(exchange, segment)), rank)
        except Exception as exc:
            found[rank] = exc
            exchange.abandon()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def same(found):
    """The result that all ranks have in common."""
    for one in found:
        if isinstance(one, Exception):
            raise one
    assert found == [found[0]] * len(found)
    return found[0]


def outcome(call, *args):
    """What a call raised: (class, message), or None."""
    try:
        call(*args)
    except Exception as exc:
        return type(exc), str(exc)
    return None


def test_pages_of_any_size_are_given_back_whole():
    assert ALIGN % mmap.PAGESIZE == 0


def test_the_end_does_not_wait_for_a_thread_that_waits_for_others():
    def act(heap, rank):
        waiting = threading.Thread(target=lambda: outcome(heap.allocate, 1))
        if rank == 0:
            waiting.start()
            while not heap._lock.locked():
                time.sleep(0.001)
            start = time.monotonic()
            heap.close()
            seconds = time.monotonic() - start
            heap.memory.exchange.abandon()
            waiting.join()
            return seconds < 5, outcome(heap.allocate, 1)
        return None

    told = (StateError, "empty: the heap was given back; its buffers are gone")
    assert on_ranks(act, n=2)[0] == (True, told)


class TestAllocate:
    def test_the_same_place_on_all_ranks_in_whole_pages(self):
        def act(heap, rank):
            pieces = [heap.allocate(nbytes) for nbytes in (1, ALIGN, ALIGN + 1, 0, 5)]
            own = [piece.address - heap.memory.address(rank) for piece in pieces]
            assert own == [piece.offset for piece in pieces]
            return own, [piece.nbytes for piece in pieces]

        places, sizes = same(on_ranks(act))
        assert places == [0, ALIGN, 2 * ALIGN, 4 * ALIGN, 5 * ALIGN]
        assert sizes == [1, ALIGN, ALIGN + 1, 0, 5]

    def test_the_first_gap_that_is_large_enough(self):
        def act(heap, rank):
            pieces = [heap.allocate(pages * ALIGN) for pages in (2, 1, 3, 1, 1)]
            for number in (2, 0):
                pieces[number].free()
            return [heap.allocate(pages * ALIGN).offset // ALIGN for pages in (3, 1, 2, 1)]

        assert same(on_ranks(act)) == [3, 0, 8, 1]

    def test_all_of_it(self):
        def act(heap, rank):
            piece = heap.allocate(EXTENT)
            told = outcome(heap.allocate, 1)
            piece.free()
            return told, heap.allocate(EXTENT).offset

        (kind, text), offset = same(on_ranks(act))
        assert kind is AllocationError
        assert text == (
            f"empty: out of memory: rank 0: needs 1 bytes, the heap of {EXTENT} bytes has no such room; "
            "free buffers or raise NVCOLL_HEAP"
        )
        assert offset == 0

    def test_scratch_memory_that_is_too_large(self, monkeypatch):
        def act(heap, rank):
            first = outcome(heap.allocate, EXTENT + 1, "Init")

            def full(offset, nbytes):
                raise OSError(errno.ENOSPC, "No space left on device")

            monkeypatch.setattr(heap.memory, "take", full)
            return first, outcome(heap.allocate, 1, "Init")

        told = [text for _, text in same(on_ranks(act))]
        assert told[0].endswith("has no such room; raise NVCOLL_HEAP or lower NVCOLL_SCRATCH")
        assert told[1].endswith("No space left on device; free some memory or lower NVCOLL_SCRATCH")

    def test_no_room_on_one_rank_is_an_error_on_all_and_gives_all_back(self, monkeypatch):
        def act(heap, rank):
            taken = []
            take = heap.memory.take

            def limited(offset, nbytes):
                if rank == 1 and nbytes > 2 * ALIGN:
                    raise OSError(errno.ENOSPC, "No space left on device")
                take(offset, nbytes)
                taken.append((offset, nbytes))

            monkeypatch.setattr(heap.memory, "take", limited)
            monkeypatch.setattr(heap.memory, "give", lambda *part: taken.remove(part) if part in taken else None)
            told = outcome(heap.allocate, 3 * ALIGN, "zeros")
            assert taken == []
            return told, heap.allocate(ALIGN).offset

        found = on_ranks(act)
        (kind, text), offset = same(found)
        assert kind is AllocationError
        assert text == (
            f"zeros: out of memory: rank 1: needs {3 * ALIGN} bytes, the system says: No space left on device; "
            "free some memory"
        )
        assert offset == 0

    def test_a_rank_that_never_comes(self):
        def act(heap, rank):
            if rank == 2:
                raise ValueError
            return outcome(heap.allocate, 1)

        found = on_ranks(act)
        assert [kind for kind, _ in found[:2]] == [PeerLostError] * 2


class TestMismatches:
    def test_sizes(self):
        found = on_ranks(lambda heap, rank: outcome(heap.allocate, 100 + (rank == 2)))
        assert [kind for kind, _ in found] == [MismatchError] * 3
        cure = "; allocate and free in the same order on all ranks"
        assert found[0][1] == "empty: rank 0 allocates 100 bytes, rank 2 allocates 101 bytes" + cure
        assert found[2][1] == "empty: rank 2 allocates 101 bytes, rank 0 allocates 100 bytes" + cure

    def test_a_rank_that_finalizes(self):
        def act(heap, rank):
            return outcome(heap.allocate, 5) if rank == 0 else heap.memory.exchange.allgather(CLOSING)

        kind, text = on_ranks(act)[0]
        assert kind is MismatchError
        assert text.startswith("empty: rank 0 allocates 5 bytes, rank 1 finalizes; ")

    def test_orders(self):
        def act(heap, rank):
            first, second = heap.allocate(1), heap.allocate(2)
            told = [
                outcome((second if rank else first).free),
                outcome(*((heap.allocate, 3) if rank else (first.free,))),
            ]
            first.free()  # nothing has happened to it
            return told, heap.allocate(4).offset

        found = on_ranks(act)
        assert [[kind for kind, _ in told] for told, _ in found] == [[MismatchError] * 2] * 3
        assert "rank 0 frees allocation 1, rank 1 frees allocation 2" in found[0][0][0][1]
        assert "rank 1 allocates 3 bytes, rank 0 frees allocation 1" in found[1][0][1][1]
        assert [offset for _, offset in found] == [0] * 3


class TestDropped:
    def test_is_given_out_when_no_call_uses_it(self):
        """Whatever the ranks do together next, they wait first, if they have dropped anything."""

        def act(heap, rank):
            waited, other = [], heap.allocate(3)
            heap.finish = lambda: waited.append(list(heap.dropped))
            dropped = heap.allocate(1)
            dropped.drop()
            other.free()
            heap.allocate(2).drop()
            heap.retire()
            return waited, heap.finish

        assert same(on_ranks(act)) == ([[2]], None)

    def test_is_given_back_when_all_ranks_have_dropped_it(self):
        def act(heap, rank):
            pieces = [heap.allocate(ALIGN) for _ in range(3)]
            pieces[0].drop()
            if rank:
                pieces[1].drop()
            places = [heap.allocate(ALIGN).offset // ALIGN]
            if not rank:
                pieces[1].drop()
            pieces[2].free()  # what was dropped travels with every agreement
            return places + [heap.allocate(ALIGN).offset // ALIGN for _ in range(2)]

        assert same(on_ranks(act)) == [0, 1, 2]

    def test_never_communicates(self):
        def act(heap, rank):
            piece = heap.allocate(ALIGN)
            if rank == 0:  # the others do not take part
                with heap._lock:  # in a finalizer, while this thread allocates
                    piece.drop()
                return heap.dropped
            return None

        assert on_ranks(act) == [[1], None, None]

    def test_buffers_are_dropped_with_their_last_view(self):
        def act(heap, rank):
            buffer = Buffer.on(heap.allocate(400), 100, np.float32)
            view = buffer[3:]
            del buffer
            kept = list(heap.dropped)
            del view
            gc.collect()
            return kept, heap.dropped

        assert same(on_ranks(act)) == ([], [1])


class TestEnd:
    @pytest.mark.parametrize("end", ["close", "retire"])
    def test_it_is_refused_afterwards(self, end):
        def act(heap, rank):
            piece = heap.allocate(1)
            getattr(heap, end)()
            return outcome(heap.allocate, 1), outcome(piece.free)

        [told] = on_ranks(act, 1)
        assert [kind for kind, _ in told] == [StateError] * 2
        assert told[1][1] == "free: the heap was given back; its buffers are gone"

    def test_buffers_end_and_views_keep_the_memory(self):
        def act(heap, rank):
            buffer, other = (Buffer.on(heap.allocate(400), 100, np.float32) for _ in range(2))
            buffer[:] = 7
            view = buffer[10:].reshape(9, 10).T
            heap.close()
            return buffer.freed, other.freed, float(view.sum())

        assert on_ranks(act, 1) == [(True, True, 630.0)]

    def test_without_arrays_the_memory_goes_at_once(self):
        def act(heap, rank):
            buffer = Buffer.on(heap.allocate(400), 100, np.float32)
            del buffer
            heap.close()
            return heap.memory.segment.address

        assert on_ranks(act, 1) == [0]


@pytest.mark.parametrize("seed", range(3))
def test_pieces_never_overlap(seed):
    """Any row of allocations, frees and drops."""

    def act(heap, rank):
        rng, alive, places = np.random.default_rng(seed), [], []
        for _ in range(150):
            if alive and rng.random() < 0.45:
                piece = alive.pop(rng.integers(len(alive)))
                piece.free() if rng.random() < 0.5 else piece.drop()
                continue
            try:
                piece = heap.allocate(int(rng.integers(0, 6 * ALIGN)))
            except AllocationError:
                continue
            for other in alive:
                assert piece.offset + piece.nbytes <= other.offset or other.offset + other.nbytes <= piece.offset
            assert piece.offset + piece.nbytes <= EXTENT
            alive.append(piece)
            places.append(piece.offset)
        return places

    assert len(same(on_ranks(act))) > 50
