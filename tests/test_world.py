"""The life of a communicator among real processes: when it begins and ends, and who takes part."""

import json
import signal
import sys
from pathlib import Path

import pytest

from tests.conftest import segments, wait_until_empty
from tests.crew import PRELUDE, Crew

NVCOLL = Path(sys.executable).with_name("nvcoll")
SOON = 10  # seconds: the limit for what takes less than a tenth of one on an idle machine

COUNT = """
def held():
    # Descriptors, and mappings of shared memory, that this process holds.
    mappings = [line for line in open("/proc/self/maps") if "nvcoll-" in line]
    return len(os.listdir("/proc/self/fd")), len(mappings)
"""


class TestBeginAndEnd:
    def test_it_lives_from_first_use_to_finalize(self):
        program = """
tell(alive=[nvcoll.Is_initialized()], text=repr(comm))
found = [comm.size, nvcoll.Is_initialized()]
nvcoll.Init()  # does nothing
tell(alive=found, text=repr(comm), sum=total())
nvcoll.Finalize()
nvcoll.Finalize()
tell(alive=[nvcoll.Is_initialized()], text=repr(comm))
buffer = comm.empty(4)  # first use again
tell(alive=[nvcoll.Is_initialized()], text=repr(comm), sum=total())
"""
        with Crew(program, 2) as crew:
            for rank in range(2):
                asleep = {"alive": [False], "text": "<nvcoll.Comm COMM_WORLD, not in use yet>"}
                awake = {"text": f"<nvcoll.Comm COMM_WORLD: rank {rank} of 2, shm>", "sum": [3.0] * 3}
                assert [crew.told(rank) for _ in range(4)] == [
                    asleep,
                    {"alive": [2, True], **awake},
                    asleep,
                    {"alive": [True], **awake},
                ]

    def test_again_and_again_at_their_own_pace(self):
        program = (
            COUNT
            + """
rng = np.random.default_rng(int(os.environ["NVCOLL_RANK"]))
def life():
    time.sleep(rng.uniform(0, 0.03))
    buffer = comm.full(1000, comm.rank + 1.0)
    comm.Allreduce(buffer)
    time.sleep(rng.uniform(0, 0.03))
    found = float(buffer.sum())
    nvcoll.Finalize()
    return found
tell(sum=life())
before = held()
tell(sums=[life() for _ in range(20)], same=held() == before)
"""
        )
        with Crew(program, 3) as crew:
            assert {told["sum"] for told in crew.all_told().values()} == {6000.0}
            for told in crew.all_told().values():
                assert told == {"sums": [6000.0] * 20, "same": True}
            assert set(crew.wait().values()) == {0}

    def test_threads_that_come_first_at_once_open_one_world(self):
        program = """
ranks = []
threads = [threading.Thread(target=lambda: ranks.append(comm.rank)) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
tell(ranks=ranks, sum=total())
"""
        with Crew(program, 2) as crew:
            for rank, told in crew.all_told().items():
                assert told == {"ranks": [rank] * 8, "sum": [3.0] * 3}

    def test_alone_is_possible_among_others(self):
        """COMM_SELF asks nobody, and lives beside COMM_WORLD."""
        program = """
from nvcoll import COMM_SELF
def alone():
    x = np.full(3, 2.0)
    COMM_SELF.Allreduce(x)
    return [COMM_SELF.rank, COMM_SELF.size, *x.tolist()]
if os.environ["NVCOLL_RANK"] == "0":
    tell(alone=alone(), world=nvcoll.Is_initialized())
    gate()
tell(sum=total(), alone=alone())
"""
        with Crew(program, 2) as crew:
            assert crew.told(0) == {"alone": [0, 1, 2.0, 2.0, 2.0], "world": False}
            crew.let_go(0)
            for told in crew.all_told().values():
                assert told == {"sum": [3.0] * 3, "alone": [0, 1, 2.0, 2.0, 2.0]}

    def test_views_that_outlive_their_world_may_be_read(self):
        program = """
buffer = comm.full(1000, 7.0)
view = buffer[10:]
nvcoll.Finalize()
nvcoll.Init()
tell(freed=buffer.freed, sum=float(view.sum()), refused=attempt(comm.Allreduce, view)["kind"], works=total())
"""
        with Crew(program, 2) as crew:
            expected = {"freed": True, "sum": 6930.0, "refused": "StateError", "works": [3.0] * 3}
            assert crew.all_told() == {0: expected, 1: expected}


class TestThreads:
    def test_two_in_one_communicator(self):
        """The second is refused, and the first is not disturbed."""
        program = """
tell(sum=total())
if comm.rank == 1:
    gate()
    tell(sum=total())
else:
    def intrude():
        for _ in range(3):
            tell(**attempt(comm.Allreduce, np.ones(3)))
    when_waiting(2, intrude)
    tell(sum=total())
tell(sum=total())
"""
        with Crew(program, 2) as crew:
            crew.all_told()
            for _ in range(3):
                told = crew.told(0)
                assert told["kind"] == "StateError"
                assert "another thread is in a call on this communicator" in told["text"]
            crew.let_go(1)
            for _ in range(2):
                assert [told["sum"] for told in crew.all_told().values()] == [[3.0] * 3] * 2

    def test_finalize_ends_the_wait_of_another(self):
        program = """
comm.Barrier()
if comm.rank == 0:
    finalizing = when_waiting(2, nvcoll.Finalize)
    tell(**attempt(comm.Barrier))
    finalizing.join()
else:
    gate()
    for _ in range(2):
        tell(**attempt(comm.Barrier))
    nvcoll.Finalize()
tell(sum=total())
"""
        with Crew(program, 2) as crew:
            told = crew.told(0)
            assert (told["kind"], told["seconds"] < SOON) == ("StateError", True)
            assert "another thread finalized COMM_WORLD meanwhile" in told["text"]
            crew.let_go(1)
            assert "PeerLostError" in {crew.told(1)["kind"], crew.told(1)["kind"]}
            assert [told["sum"] for told in crew.all_told().values()] == [[3.0] * 3] * 2

    def test_a_process_ends_while_a_thread_waits(self):
        program = """
total()
if comm.rank == 0:
    threading.Thread(target=comm.Barrier, daemon=True).start()
    when_waiting(2, print).join()
    sys.exit(7)
gate()
"""
        with Crew(program, 2) as crew:
            assert crew.wait(but={1}) == {0: 7}


class TestForks:
    CHILD = """
def child():
    buffer[:] = 5  # memory is shared, as it is with any other mapping
    tell(
        alive=nvcoll.Is_initialized(),
        calls=[attempt(call) for call in (comm.Barrier, lambda: comm.empty(3), lambda: comm.rank, buffer.free)],
    )
    nvcoll.Finalize()

buffer = comm.zeros(3)
total()
"""

    @pytest.mark.parametrize(
        "fork",
        [
            """
if os.fork() == 0:
    child()
    sys.exit(0)  # runs what is registered for the exit
os.wait()
""",
            """
import multiprocessing
process = multiprocessing.get_context("fork").Process(target=child)
process.start()
process.join()
""",
        ],
        ids=["os.fork", "multiprocessing"],
    )
    def test_a_child_is_no_rank_and_harms_none(self, fork):
        program = self.CHILD + fork + "tell(seen=buffer.tolist(), sum=total())\nbuffer.free()\ntell(sum=total())"
        with Crew(program, 2) as crew:
            for rank in range(2):
                told = crew.told(rank)
                assert told["alive"] is False
                assert [call["kind"] for call in told["calls"]] == ["StateError"] * 4
                text = (
                    "COMM_WORLD: this process was forked from a rank and is none itself; start ranks with a launcher, "
                    "and helper processes that use nvcoll with the 'spawn' start method and NVCOLL_BOOTSTRAP=single"
                )
                assert [call["text"] for call in told["calls"][:3]] == [text] * 3
                assert f"this process was forked from rank {rank} and is no rank itself" in told["calls"][3]["text"]
            for told in crew.all_told().values():
                assert told == {"seen": [5.0] * 3, "sum": [3.0] * 3}
            assert [told["sum"] for told in crew.all_told().values()] == [[3.0] * 3] * 2

    def test_a_child_of_a_process_that_was_no_rank_yet_may_be_one(self):
        program = """
if os.fork() == 0:
    tell(sum=total())
    sys.exit(0)
assert os.wait()[1] == 0
tell(sum=total())
"""
        with Crew(program, 2) as crew:
            for _ in range(2):
                assert [told["sum"] for told in crew.all_told().values()] == [[3.0] * 3] * 2

    def test_a_child_does_not_pass_for_its_parent(self):
        """It holds the memory mapped and the descriptor open, but the others see that the rank is gone."""
        program = """
total()
if comm.rank == 0:
    if os.fork() == 0:
        signal.alarm(20)  # the test does not know this process
        gate()
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)
tell(**attempt(comm.Barrier))
"""
        with Crew(program, 2) as crew:
            told = crew.told(1)
            assert (told["kind"], told["seconds"] < SOON) == ("PeerLostError", True)
            assert "rank 0 has ended" in told["text"]
            crew.let_go(0)


class TestSettings:
    """Ranks must not differ in them, so those of rank 0 are in force."""

    def told(self, program, n=3):
        with Crew("rank = int(os.environ['NVCOLL_RANK'])\n" + program, n) as crew:
            return list(crew.all_told().values())

    def test_of_rank_0_are_in_force(self):
        program = """
for name, values in [("SCRATCH", "512K 1M 2M"), ("HEAP", "64M 32M 16M"), ("SPIN", "1 2 auto"), ("TIMEOUT", "60 60 1")]:
    os.environ["NVCOLL_" + name] = values.split()[rank]
x = np.arange(100_000.0)  # many rounds through scratch memory
comm.Allreduce(x)
time.sleep(2 * (rank == 1))  # for allocations, too
tell(right=bool((x == 3 * np.arange(100_000)).all()), big=comm.empty(40 << 20, "uint8").nbytes)
"""
        assert self.told(program) == [{"right": True, "big": 40 << 20}] * 3

    def test_an_unknown_one_is_told_once(self):
        program = """
import warnings
os.environ["NVCOLL_TIMEUOT"] = "5"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    nvcoll.Init()
tell(warned=[str(one.message) for one in caught])
"""
        told = "NVCOLL_TIMEUOT is no setting of nvcoll; did you mean NVCOLL_TIMEOUT?"
        assert self.told(program, 2) == [{"warned": [told]}] * 2

    def test_rules(self, tmp_path):
        for name in ("ring", "one_shot"):
            rules = {"host": [{"verb": "allreduce", "use": f"{name}/simple"}]}
            (tmp_path / f"{name}.json").write_text(json.dumps(rules))
        program = f"""
os.environ["NVCOLL_RULES"] = ("{tmp_path}/ring.json", "{tmp_path}/one_shot.json", "/nowhere")[rank]
tell(use=comm.explain("allreduce", 80).algorithm)
"""
        assert self.told(program) == [{"use": "ring"}] * 3

    @pytest.mark.parametrize(
        ("variable", "value", "message"),
        [
            ("NVCOLL_RULES", "/nowhere", "NVCOLL_RULES: /nowhere: "),
            ("NVCOLL_SCRATCH", "4K", "NVCOLL_SCRATCH: 4096 bytes are too few for 3 ranks on a node; raise it"),
        ],
    )
    def test_a_mistake_is_told_on_all_ranks(self, variable, value, message):
        told = self.told(f"os.environ[{variable!r}] = {value!r}\ntell(**attempt(nvcoll.Init))")
        for one in told:
            assert one["kind"] == "ArgumentError"
            assert message in one["text"]
            assert one["seconds"] < SOON

    def test_a_heap_without_room(self):
        for one in self.told("os.environ['NVCOLL_HEAP'] = '1M'\ntell(**attempt(nvcoll.Init))"):
            assert one["kind"] == "AllocationError"
            assert one["text"] == (
                "Init: out of memory: rank 0: needs 8388608 bytes, the heap of 1048576 bytes has no such room; "
                "raise NVCOLL_HEAP or lower NVCOLL_SCRATCH"
            )


class TestSharedMemory:
    @pytest.fixture
    def in_small_shm(self, run_command):
        """Run a program on 3 ranks whose /dev/shm is a file system of their own of `megabytes`."""

        def run(program, megabytes, **env):
            mount = f'mount -t tmpfs -o size={megabytes}M tmpfs /dev/shm && exec "$@"'
            inside = ["unshare", "--mount", "sh", "-c", mount, "sh"]
            status, output = run_command([*inside, "true"])
            if status != 0:
                pytest.skip(f"no mount namespaces here: {output.strip()}")
            command = [*inside, NVCOLL, "run", "-n", "3", "-c", PRELUDE + program]
            status, output = run_command(command, timeout=40, env=env)
            assert status == 0, output
            return [json.loads(line) for line in output.splitlines()]

        return run

    def test_too_little_for_a_buffer(self, in_small_shm):
        """All ranks hear of it, none hangs or crashes, and what was taken is given back."""
        program = """
used = lambda: os.statvfs("/dev/shm").f_blocks - os.statvfs("/dev/shm").f_bavail
total()
before = used()
for _ in range(3):
    failed = attempt(comm.empty, 6 << 20, "uint8")
comm.Barrier()
after = used()
buffer = comm.full(1 << 18, 1.0)
comm.Allreduce(buffer)
tell(**failed, grown=after - before, sum=float(buffer[-1]))
"""
        for told in in_small_shm(program, 16, NVCOLL_SCRATCH="1M"):
            assert told["kind"] == "AllocationError"
            assert told["text"].startswith("empty: out of memory: rank ")
            assert "needs 6291456 bytes, the system says: No space left on device" in told["text"]
            assert "make /dev/shm larger (in a container: --shm-size)" in told["text"]
            assert told["seconds"] < SOON
            assert (told["grown"], told["sum"]) == (0, 3.0)

    def test_too_little_to_begin(self, in_small_shm):
        program = """
found = attempt(nvcoll.Init)
os.environ["NVCOLL_SCRATCH"] = "1M"
tell(**found, sum=total())
"""
        for told in in_small_shm(program, 16):
            assert told["kind"] == "AllocationError"
            assert told["text"].startswith("Init: out of memory: rank ")
            assert "needs 8388608 bytes" in told["text"]
            assert told["sum"] == [6.0] * 3

    def test_memory_comes_back_to_the_system(self):
        program = """
used = lambda: os.fstat(comm._world.heap.memory.descriptor).st_blocks * 512
def cycle(k):
    kept = comm.full(50_000, k)
    with comm.empty(10_000 * (k % 7 + 1)) as other:
        other[:] = k
        comm.Allreduce(other)
    comm.Allreduce(kept)  # dropped here, and reused after a next allocation
cycle(0)
comm.empty(1).free()
comm.Barrier()
before = used()
for k in range(150):
    cycle(k)
comm.empty(1).free()
comm.Barrier()
tell(grown=used() - before)
"""
        with Crew(program, 3) as crew:
            assert {told["grown"] for told in crew.all_told().values()} == {0}

    def test_the_name_is_gone_while_ranks_live(self):
        with Crew("tell(sum=total())\ngate()", 2) as crew:
            crew.all_told()
            assert not wait_until_empty(lambda: segments() - crew.before)
            crew.send(0, signal.SIGTERM)
            crew.send(1, signal.SIGKILL)
            assert crew.wait() == {0: -signal.SIGTERM, 1: -signal.SIGKILL}
