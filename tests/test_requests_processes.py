"""Requests of real processes: lost and late ranks, interruptions, forks, and the end."""

import re
import signal
import time

import pytest

from tests.crew import Crew

SOON = 10  # seconds: the limit for what takes less than a tenth of one on an idle machine
SHORT = 2  # seconds: a timeout that ranks which are started at once do not need


class TestResults:
    @pytest.mark.parametrize("n", [2, 3])
    def test_any_order_of_waits(self, n):
        """Each rank decides for itself which calls block, and when it waits for the others."""
        program = """
rng = np.random.default_rng(comm.rank)
every, active, size = [], [], comm.size
room = comm.zeros(60_000, "int64")
persistent = comm.Allreduce_init(nvcoll.IN_PLACE, room)
for number in range(300):
    x = np.full((1, 10, 3000, 60_000)[number % 4 if number % 20 < 4 else 0], comm.rank + number, "int64")
    every.append(x)
    if rng.integers(3):
        active.append(comm.Iallreduce(x))
    else:
        comm.Allreduce(x)
    if number % 20 == 7:
        persistent.Wait()
        room[:] = number
        persistent.Start()
    while active and rng.integers(2):
        active.pop(int(rng.integers(len(active)))).Wait()
persistent.Wait()
nvcoll.Request.Waitall(active)
wrong = [k for k, x in enumerate(every) if (x != size * k + size * (size - 1) // 2).any()]
tell(wrong=wrong, room=bool((room == 287 * size).all()), sum=total())
"""
        with Crew(program, n) as crew:
            want = {"wrong": [], "room": True, "sum": [n * (n + 1) / 2] * 3}
            assert list(crew.all_told().values()) == [want] * n
            assert set(crew.wait().values()) == {0}


class TestLostRanks:
    @pytest.mark.parametrize(
        ("end", "how"), [("os.kill(os.getpid(), signal.SIGKILL)", "has ended"), ("sys.exit()", "has left")]
    )
    @pytest.mark.parametrize("verb", ["Wait", "Test"])
    def test_is_named(self, verb, end, how):
        program = f"""
tell(sum=total())
if comm.rank == 2:
    {end}
with queue_held():
    requests = [comm.Iallreduce(np.ones(4)) for _ in range(2)]

def test(request):
    while not request.Test():
        time.sleep(0.01)

for request in requests:
    tell(**attempt({"request.Wait" if verb == "Wait" else "test, request"}))
tell(**attempt(comm.Iallreduce, np.ones(4)))
"""
        with Crew(program, 3) as crew:
            crew.all_told()
            for rank, told in crew.all_told(but={2}).items():
                assert told["kind"] == "PeerLostError"
                assert told["text"].startswith(f"Allreduce (call 2 on rank {rank}): rank 2 {how} in or before call 2")
                assert told["seconds"] < SOON
            for _ in range(2):
                for told in crew.all_told(but={2}).values():
                    assert told["kind"] == "StateError"
                    assert "an earlier call on this communicator failed" in told["text"]
            assert set(crew.wait(but={2}).values()) == {0}

    def test_killed_with_requests_outstanding(self):
        program = """
tell(sum=total())
if comm.rank == 0:
    requests = [comm.Iallreduce(np.ones(4)) for _ in range(100)]
    when_waiting(2, os.kill, os.getpid(), signal.SIGKILL)
    time.sleep(60)
if comm.rank == 1:
    gate()
for _ in range(2):
    tell(**attempt(comm.Iallreduce(np.ones(4)).Wait) if comm._world.planner.state.failure is None else {"kind": None})
"""
        with Crew(program, 3) as crew:
            crew.all_told()
            assert crew.wait(but={1, 2}) == {0: -signal.SIGKILL}
            for rank in (2, 1):
                found = [crew.told(rank) for _ in range(2)]
                crew.let_go(1)
                lost = [told for told in found if told["kind"] == "PeerLostError"]
                assert re.match(rf"Allreduce \(call [23] on rank {rank}\): rank 0 has ended", lost[0]["text"])

    def test_late_ranks_are_named_when_the_time_is_over(self):
        program = """
tell(imported=True)
gate()
tell(sum=total())
if comm.rank == 1:
    gate()
    sys.exit()
tell(**attempt(comm.Iallreduce(np.ones(4)).Wait))
"""
        with Crew(program, 3, NVCOLL_TIMEOUT=str(SHORT)) as crew:
            crew.all_told()
            crew.let_go()
            crew.all_told()
            for told in crew.all_told(but={1}).values():
                assert told["kind"] == "TimeoutError"
                assert "did not arrive: rank 1." in told["text"]
            crew.let_go(1)
            assert set(crew.wait().values()) == {0}


class TestInterruption:
    @pytest.mark.parametrize("runs_elsewhere", [False, True])
    def test_ctrl_c_ends_a_wait(self, runs_elsewhere):
        """And the call with it, if the thread that waits is the one that runs it: only the queue's own goes on."""
        program = f"""
tell(sum=total())
if comm.rank == 0:
    when_waiting(2, os.kill, os.getpid(), signal.SIGINT)
    def begin_and_wait():  # the signal comes in here, however long it takes
        global request
        request = comm.Iallreduce(np.ones(4))
        while {runs_elsewhere} and comm._world.planner.state.sequence < 2:
            time.sleep(0.001)
        request.Wait()
    tell(**attempt(begin_and_wait))
else:
    gate()
    request = comm.Iallreduce(np.ones(4))
tell(**attempt(request.Wait))
tell(**attempt(comm.Barrier))
"""
        with Crew(program, 2) as crew:
            crew.all_told()
            told = crew.told(0)
            assert (told["kind"], told["seconds"] < SOON) == ("KeyboardInterrupt", True)
            crew.let_go(1)
            first, second = crew.all_told(), crew.all_told()
            assert first[0]["kind"] is None
            if second[0]["kind"] is None:
                assert (first[1]["kind"], second[1]["kind"]) == (None, None)
            else:
                assert not runs_elsewhere
                assert second[0]["kind"] == "StateError"
                assert "PeerLostError" in {first[1]["kind"], second[1]["kind"]}
            assert set(crew.wait().values()) == {0}

    def test_of_a_call_that_waits_for_its_turn(self):
        program = """
tell(sum=total())
if comm.rank == 0:
    when_waiting(2, os.kill, os.getpid(), signal.SIGINT)
    request = comm.Iallreduce(np.ones(4))
    while comm._world.planner.state.sequence < 2:
        time.sleep(0.001)
    tell(**attempt(comm.Barrier))
    tell(**attempt(request.Wait))
    tell(sum=total())
else:
    gate()
    comm.Iallreduce(np.ones(4)).Wait()
    tell(sum=total())
"""
        with Crew(program, 2) as crew:
            crew.all_told()
            assert crew.told(0)["kind"] == "KeyboardInterrupt"
            crew.let_go(1)
            assert crew.told(0)["kind"] is None
            assert [told["sum"] for told in crew.all_told().values()] == [[3.0] * 3] * 2

    def test_a_handler_that_waits_for_the_call_it_interrupts(self):
        """Is refused where the call runs on the same thread, for it cannot go on before the handler has returned."""
        program = """
signal.signal(signal.SIGUSR1, lambda number, frame: tell(**attempt(request.Wait)))
tell(sum=total())
if comm.rank == 0:
    when_waiting(2, os.kill, os.getpid(), signal.SIGUSR1)
else:
    gate()
request = comm.Iallreduce(np.ones(4))
request.Wait()
tell(sum=total())
"""
        with Crew(program, 2) as crew:
            crew.all_told()
            time.sleep(1)
            crew.let_go(1)
            told = crew.told(0)
            assert told["kind"] in {"StateError", None}
            assert told["kind"] is None or "calls on one communicator take turns" in told["text"]
            assert [told["sum"] for told in crew.all_told().values()] == [[3.0] * 3] * 2


class TestEnd:
    def test_finalize_with_requests_outstanding(self):
        program = """
tell(sum=total())
if comm.rank == 0:
    requests = [comm.Iallreduce(np.ones(4)) for _ in range(3)]
    persistent = comm.Allreduce_init(np.ones(4))
    while comm._world.planner.state.sequence < 2:
        time.sleep(0.001)
    tell(**attempt(nvcoll.Finalize))
    for request in requests:
        tell(**attempt(request.Wait))
    tell(**attempt(persistent.Start))
    tell(threads=threading.active_count())
else:
    gate()
    tell(**attempt(lambda: [comm.Barrier() for _ in range(2)]))
    nvcoll.Finalize()
tell(sum=total())
tell(sum=attempt(comm.Iallreduce(np.ones(4)).Wait)["kind"])
"""
        with Crew(program, 2) as crew:
            crew.all_told()
            told = crew.told(0)
            assert (told["kind"], told["seconds"] < SOON) == (None, True)
            for _ in range(3):
                told = crew.told(0)
                assert (told["kind"], told["seconds"] < SOON) == ("StateError", True)
                assert told["text"] == (
                    "Iallreduce: the communicator has ended before this call was done; Wait for every request before "
                    "Finalize, or before an emulated rank returns"
                )
            assert "this communicator was freed or finalized" in crew.told(0)["text"]
            assert crew.told(0) == {"threads": 1}
            crew.let_go(1)
            assert crew.told(1)["kind"] in {"PeerLostError", "MismatchError"}
            assert [told["sum"] for told in crew.all_told().values()] == [[3.0] * 3] * 2
            assert [told["sum"] for told in crew.all_told().values()] == [None] * 2
            assert set(crew.wait().values()) == {0}

    @pytest.mark.parametrize(
        "end", ["", "sys.exit(7)", "raise ValueError", "threading.Thread(target=time.sleep, args=(0.2,)).start()"]
    )
    def test_a_process_ends_with_requests_outstanding(self, end):
        program = f"""
tell(sum=total())
if comm.rank == 1:
    gate()
    sys.exit()
requests = [comm.Iallreduce(np.ones(4)) for _ in range(3)]
time.sleep(0.1)
{end}
"""
        with Crew(program, 2) as crew:
            crew.all_told()
            status = {"s": 7, "r": 1}.get(end[:1], 0)
            assert crew.wait(but={1}) == {0: status}
            crew.let_go(1)
            assert crew.wait() == {0: status, 1: 0}

    def test_requests_serve_until_finalize_at_exit(self):
        program = """
import atexit
tell(sum=total())
x = np.full(3, comm.rank + 1.0)
request = comm.Iallreduce(x)

@atexit.register
def last():
    request.Wait()
    comm.Iallreduce(y := np.ones(1)).Wait()
    tell(sum=x.tolist(), one=y.tolist())
"""
        with Crew(program, 2) as crew:
            crew.all_told()
            assert list(crew.all_told().values()) == [{"sum": [3.0] * 3, "one": [2.0]}] * 2
            assert set(crew.wait().values()) == {0}


def test_a_forked_child_has_no_requests():
    program = """
comm.Iallreduce(np.ones(2)).Wait()
comm.Barrier()
persistent, requests = comm.Allreduce_init(np.ones(4)), []
if comm.rank == 0:
    requests = [comm.Iallreduce(x := np.ones(4)) for _ in range(3)]
    while comm._world.planner.state.sequence < 3:
        time.sleep(0.001)
    if os.fork() == 0:
        for request in requests:
            tell(**attempt(request.Wait))
        tell(**attempt(persistent.Start))
        tell(**attempt(comm.Iallreduce, np.ones(4)))
        sys.exit()
    os.wait()
else:
    gate()
    requests = [comm.Iallreduce(x := np.ones(4)) for _ in range(3)]
nvcoll.Request.Waitall(requests)
persistent.Start()
persistent.Wait()
tell(sum=total(), x=x.tolist())
"""
    with Crew(program, 2) as crew:
        for _ in range(4):
            told = crew.told(0)
            assert told["kind"] == "StateError"
            assert told["text"].startswith("this process was forked from a rank and is none itself; its requests are")
        assert "this process was forked from a rank and is none itself" in crew.told(0)["text"]
        crew.let_go(1)
        assert list(crew.all_told().values()) == [{"sum": [3.0] * 3, "x": [2.0] * 4}] * 2
        assert set(crew.wait().values()) == {0}
