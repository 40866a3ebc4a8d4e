"""`emulate`: ranks are threads, results come in rank order, and what goes wrong on one rank is raised by run."""

import builtins
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import nvcoll
from nvcoll import emulation
from nvcoll.world import open_emulated
from tests.conftest import eventually
from tests.fake_cuda import FakeDriver, install


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    monkeypatch.setenv("NVCOLL_TIMEOUT", "20")


def total(comm, value=1.0):
    x = np.full(3, value)
    comm.Allreduce(x)
    return x[0]


def test_what_requests_have_left_on_a_gpu_goes_with_the_emulation(monkeypatch):
    swept = []
    monkeypatch.setattr(emulation, "sweep", lambda: swept.append(threading.active_count()))
    monkeypatch.setattr(emulation.Emulation, "_open", lambda self: list(open_emulated(self.size, self.node_sizes)))
    threads = threading.active_count()
    assert nvcoll.emulate(2).run(total) == [2.0] * 2
    assert swept == []
    assert nvcoll.emulate(2, device=0).run(total) == [2.0] * 2
    assert swept == [threads] * 2  # before, and when no rank runs any more


class TestRun:
    def test_results_come_by_rank(self):
        assert nvcoll.emulate(5).run(lambda comm: (comm.rank, comm.size)) == [(rank, 5) for rank in range(5)]

    def test_arguments_are_given_to_every_rank_as_they_are(self):
        given = [1, 2]
        results = nvcoll.emulate(3).run(lambda comm, *args: args, given, "x")
        assert all(first is given and second == "x" for first, second in results)

    def test_each_rank_is_a_thread_of_its_own_in_this_process(self):
        names = nvcoll.emulate(3).run(lambda comm: threading.current_thread().name)
        assert names == ["rank 0", "rank 1", "rank 2"]

    def test_a_communicator_says_what_it_is(self):
        def main(comm):
            return repr(comm), comm.name, comm.backend, comm.bootstrap, repr(comm)

        assert nvcoll.emulate(2).run(main)[1] == (
            "<nvcoll.Comm emulated rank 1, not in use yet>",
            "emulated rank 1",
            "emulated",
            "emulated",
            "<nvcoll.Comm emulated rank 1: rank 1 of 2, emulated>",
        )

    def test_one_world_runs_again_and_again(self):
        world = nvcoll.emulate(3)
        assert [world.run(total, value)[2] for value in (1.0, 2.0, 0.5)] == [3.0, 6.0, 1.5]

    def test_worlds_in_worlds_and_side_by_side(self):
        def outer(comm):
            inner = nvcoll.emulate(comm.rank + 1).run(total, 2.0)
            return inner, total(comm)

        assert nvcoll.emulate(3).run(outer) == [([2.0], 3.0), ([4.0] * 2, 3.0), ([6.0] * 3, 3.0)]

    def test_a_rank_that_waits_lets_others_run_python(self):
        def main(comm):
            if comm.rank:
                deadline = time.monotonic() + 0.2
                while time.monotonic() < deadline:  # holds the GIL, but for its switches
                    pass
            return total(comm)

        assert nvcoll.emulate(3).run(main) == [3.0] * 3

    def test_settings_are_read_when_it_runs(self, monkeypatch):
        world = nvcoll.emulate(2)
        monkeypatch.setenv("NVCOLL_SCRATCH", "100")
        with pytest.raises(nvcoll.ArgumentError, match=r"^NVCOLL_SCRATCH: 100 bytes are too few for 2 ranks"):
            world.run(total)
        monkeypatch.setenv("NVCOLL_SCRATCH", "plenty")
        with pytest.raises(nvcoll.ArgumentError, match=r"^NVCOLL_SCRATCH: expected a number of bytes"):
            world.run(total)
        monkeypatch.delenv("NVCOLL_SCRATCH")
        assert world.run(total) == [2.0, 2.0]

    def test_nothing_is_left_of_a_run(self):
        nvcoll.emulate(4).run(total)
        threads, mapped = threading.active_count(), address_space()
        for _ in range(20):
            nvcoll.emulate(4).run(total)
        assert threading.active_count() == threads
        assert address_space() - mapped < 2 << 30  # a world of four ranks reserves 4 GiB

    def test_arrays_that_a_run_returns_live_on(self):
        found = nvcoll.emulate(2).run(lambda comm: comm.full(1000, comm.rank))
        found += nvcoll.emulate(2).run(lambda comm: comm.full(1000, comm.rank)[1:])
        assert [array.sum() for array in found] == [0, 1000, 0, 999]

    @pytest.mark.parametrize("what", ["comm.Allreduce(np.ones(3))", "comm.empty(3)", "comm.Barrier()", "buffer.free()"])
    def test_communicators_that_outlive_a_run_raise_and_do_not_crash(self, run_command, what):
        program = f"""
import numpy as np, nvcoll
kept = []
nvcoll.emulate(2).run(lambda comm: kept.append((comm, comm.zeros(3))))
comm, buffer = kept[0]
try:
    {what}
except nvcoll.StateError as exc:
    print("raised", type(exc).__name__)
"""
        status, output = run_command([sys.executable, "-c", program], env={"NVCOLL_TIMEOUT": "2"})
        assert status == 0, output
        assert output.startswith("raised ")


def address_space():
    """Bytes of address space of this process."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * 4096


class TestNodes:
    @pytest.mark.parametrize(
        ("size", "ranks_per_node", "expected"),
        [
            (4, None, (4,)),
            (4, 2, (2, 2)),
            (5, 2, (2, 2, 1)),
            (3, 8, (3,)),
            (3, 1, (1, 1, 1)),
            (6, [1, 3, 2], (1, 3, 2)),
            (6, (5, 1), (5, 1)),
            (1, None, (1,)),
        ],
    )
    def test_sizes(self, size, ranks_per_node, expected):
        world = nvcoll.emulate(size, ranks_per_node)
        assert (world.size, world.node_sizes) == (size, expected)
        topologies = world.run(lambda comm: comm._world.topology)
        assert [topology.node_sizes for topology in topologies] == [expected] * size
        assert [topology.rank for topology in topologies] == list(range(size))
        assert nvcoll.emulate(size, ranks_per_node=ranks_per_node).run(total) == [float(size)] * size

    @pytest.mark.parametrize(
        ("size", "ranks_per_node", "message"),
        [
            (0, None, "emulate: size is 0, expected 1 or more ranks"),
            (-2, None, "emulate: size is -2, expected 1 or more ranks"),
            (4, 0, "emulate: ranks_per_node is 0, expected 1 or more"),
            (4, [1, 2], r"emulate: ranks_per_node is \[1, 2\], expected positive numbers that add up to 4"),
            (4, [4, 0], r"emulate: ranks_per_node is \[4, 0\], expected positive numbers that add up to 4"),
            (4, [5, -1], r"emulate: ranks_per_node is \[5, -1\], expected positive numbers that add up to 4"),
            (4, [], r"emulate: ranks_per_node is \[\], expected positive numbers that add up to 4"),
            (4, np.array(1.5), r"emulate: ranks_per_node is array\(1\.5\), expected 1 or more"),
            (np.array(1.5), None, r"emulate: size is array\(1\.5\), expected 1 or more ranks"),
            (4, 1.5, r"emulate: ranks_per_node is 1\.5, expected 1 or more"),
            (2, [1.0, 1.0], r"emulate: ranks_per_node is \[1\.0, 1\.0\], expected positive numbers that add up to 2"),
        ],
    )
    def test_numbers_that_do_not_fit(self, size, ranks_per_node, message):
        with pytest.raises(nvcoll.ArgumentError, match=f"^{message}$"):
            nvcoll.emulate(size, ranks_per_node)

    def test_what_is_no_function(self):
        with pytest.raises(nvcoll.ArgumentError, match=r"^emulate: run got a list, expected a function, to"):
            nvcoll.emulate(2).run([1.0])

    def test_numbers_of_numpy(self):
        assert nvcoll.emulate(np.int64(5), np.int8(2)).node_sizes == (2, 2, 1)
        assert nvcoll.emulate(4, np.array(2)).node_sizes == (2, 2)
        assert nvcoll.emulate(np.uint8(3), np.array([1, 2])).node_sizes == (1, 2)
        assert type(nvcoll.emulate(np.int64(5)).size) is int

    @pytest.mark.parametrize("device", [-1, True, "0", 0.0])
    def test_devices_that_are_none(self, device):
        with pytest.raises(nvcoll.ArgumentError) as caught:
            nvcoll.emulate(2, device=device)
        assert str(caught.value) == (
            f"emulate: device is {device!r}, expected the ordinal of a GPU, 0 or more; leave it out for the host"
        )

    def test_a_gpu_that_is_not_there(self, monkeypatch):
        install(monkeypatch, FakeDriver(gpus=1))
        with pytest.raises(nvcoll.DeviceError, match=r"^Device: there is no GPU 7, this process may use 1; "):
            nvcoll.emulate(2, device=7).run(total)

    def test_the_choice_of_an_algorithm_knows_of_nodes(self):
        def main(comm):
            return comm.explain("allreduce", 4096).reason, comm.explain("allreduce", 4096).algorithm

        assert nvcoll.emulate(4).run(main)[0][0].startswith("rule: ")
        reason, _ = nvcoll.emulate(4, 2).run(main)[0]  # the package's rules speak of single nodes
        assert reason.startswith("no rule: ")


class TestErrors:
    @pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit, nvcoll.PeerLostError])
    def test_what_a_rank_raises_is_raised_with_its_number(self, kind):
        def main(comm):
            if comm.rank == 2:
                raise kind("on purpose")
            return comm.rank

        with pytest.raises(kind, match="on purpose") as caught:
            nvcoll.emulate(4).run(main)
        assert caught.value.__notes__ == ["raised on emulated rank 2"]

    @pytest.mark.parametrize("wait", [total, lambda comm: comm.empty(3), lambda comm: comm.Barrier()])
    def test_the_others_do_not_wait_for_it_and_their_errors_are_not_reported(self, wait):
        seen = []

        def main(comm):
            if comm.rank == 1:
                raise ValueError("on purpose")
            try:
                wait(comm)
            except nvcoll.PeerLostError as exc:
                seen.append(str(exc))
                raise

        start = time.monotonic()
        with pytest.raises(ValueError, match="on purpose") as caught:
            nvcoll.emulate(3).run(main)
        assert caught.value.__notes__ == ["raised on emulated rank 1"]
        assert len(seen) == 2
        assert time.monotonic() - start < 10

    def test_of_several_errors_the_lowest_rank_s_is_raised(self):
        def main(comm):
            if comm.rank:
                raise ValueError(f"on {comm.rank}")

        with pytest.raises(ValueError, match="on 1") as caught:
            nvcoll.emulate(4).run(main)
        assert caught.value.__notes__ == ["raised on emulated rank 1; 3 ranks failed"]

    def test_a_rank_that_returns_early_is_named_to_those_who_wait(self):
        def main(comm):
            if comm.rank == 1:
                return
            total(comm)

        with pytest.raises(nvcoll.PeerLostError, match="rank 1 has left") as caught:
            nvcoll.emulate(2).run(main)
        assert isinstance(caught.value, ConnectionError)

    def test_a_rank_that_returns_after_the_last_call_is_not_missed(self):
        def main(comm):
            for _ in range(20):
                total(comm)
            if comm.rank == 0:
                time.sleep(0.05)
            return total(comm)

        assert nvcoll.emulate(4).run(main) == [4.0] * 4

    def test_a_rank_that_does_not_come_is_named_when_the_time_is_over(self, monkeypatch):
        monkeypatch.setenv("NVCOLL_TIMEOUT", "1")
        messages, failed = [], threading.Barrier(3, timeout=20)

        def main(comm):
            if comm.rank == 1:
                failed.wait()
                return
            with pytest.raises(nvcoll.TimeoutError) as caught:
                total(comm)
            assert isinstance(caught.value, builtins.TimeoutError)
            messages.append(str(caught.value))
            failed.wait()
            with pytest.raises(nvcoll.StateError, match="an earlier call on this communicator failed"):
                total(comm)

        nvcoll.emulate(3).run(main)
        assert len(messages) == 2
        assert all("rank 1" in message and "NVCOLL_TIMEOUT" in message for message in messages)
        assert any("did not arrive: rank 1" in message for message in messages)

    def test_a_rank_that_does_not_come_to_an_allocation(self, monkeypatch):
        monkeypatch.setenv("NVCOLL_TIMEOUT", "1")
        messages, failed = [], threading.Barrier(3, timeout=20)

        def main(comm):
            if comm.rank == 1:
                failed.wait()
            with pytest.raises(nvcoll.TimeoutError) as caught:
                comm.empty(3)
            if comm.rank != 1:
                failed.wait()
            messages.append(str(caught.value))

        nvcoll.emulate(3).run(main)
        assert len(messages) == 3  # who comes later hears the same
        assert all(message.startswith("empty: rank 1 did not arrive within 1 s; ") for message in messages)

    def test_a_rank_that_fails_before_others_free(self):
        messages = []

        def main(comm):
            buffer = comm.empty(3)
            comm.Barrier()  # all have it
            if comm.rank == 1:
                raise ValueError("of its own")
            with pytest.raises(nvcoll.PeerLostError) as caught:
                buffer.free()
            messages.append(str(caught.value))

        with pytest.raises(ValueError, match="of its own"):
            nvcoll.emulate(2).run(main)
        assert messages == ["free: rank 0 waits for a rank that failed; see its exception"]

    @pytest.mark.parametrize(
        ("first", "second", "told"),
        [
            ({"count": 3}, {"count": 4}, "of 3 float64, SUM, by .*; rank 1 calls Allreduce of 4 float64, SUM, by"),
            ({"dtype": "float32"}, {}, "3 float32, SUM, .* 3 float64, SUM"),
            ({"op": nvcoll.MAX}, {}, "3 float64, MAX, .* 3 float64, SUM"),
            ({"algorithm": "ring"}, {"algorithm": "nvrar"}, "by ring/simple; .* by nvrar/simple; make the calls agree"),
            ({"algorithm": "ring"}, {"algorithm": "ring/low_latency"}, "by ring/simple; .* by ring/low_latency"),
        ],
    )
    def test_calls_that_do_not_match_are_told_apart(self, first, second, told):
        def main(comm):
            call = {"count": 3, "dtype": "float64", **(second if comm.rank else first)}
            x = np.ones(call.pop("count"), call.pop("dtype"))
            if comm.rank == 0:
                with pytest.raises(nvcoll.MismatchError, match=told):
                    comm.Allreduce(x, **call)
            else:
                with pytest.raises(nvcoll.Error):
                    comm.Allreduce(x, **call)

        nvcoll.emulate(2).run(main)

    def test_a_communicator_serves_one_thread_at_a_time(self):
        def main(comm):
            if comm.rank == 0:
                total(comm)
                waiting = threading.Thread(target=total, args=(comm,))
                waiting.start()
                eventually(lambda: comm._world.planner.state.sequence >= 2, 60)
                with pytest.raises(nvcoll.StateError, match="another thread is in a call on this communicator"):
                    total(comm)
                found.set()
                waiting.join()
            else:
                total(comm)
                found.wait(10)
                total(comm)
            return total(comm)

        found = threading.Event()
        assert nvcoll.emulate(2).run(main) == [2.0, 2.0]
