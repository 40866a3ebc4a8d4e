"""Memory that ranks share, and the sign that they live."""

import contextlib
import ctypes
import errno
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from nvcoll._bootstrap import Segment, anonymous
from nvcoll.errors import StateError

PAGE = os.sysconf("SC_PAGESIZE")
MEBIBYTE = 1 << 20


@pytest.fixture
def name():
    """A name for a segment, which is gone afterwards."""
    name = f"/nvcoll-test-{uuid.uuid4().hex}"
    yield name
    Path(f"/dev/shm{name}").unlink(missing_ok=True)


@pytest.fixture
def segment(name):
    with contextlib.closing(Segment.create(name, 16 * MEBIBYTE)) as segment:
        yield segment


@pytest.fixture
def peer():
    """Start Python programs that print a line when they are ready and end with their standard input."""
    with contextlib.ExitStack() as stack:

        def start(code, *args):
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", f"import os, sys\nfrom nvcoll._bootstrap import *\n{code}", *args],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            stack.callback(process.kill)
            return process, process.stdout.readline().strip()

        yield start


def view(memory):
    return (ctypes.c_ubyte * memory.size).from_address(memory.address)


def used(segment):
    """Bytes of memory behind a segment."""
    return os.fstat(segment.fd).st_blocks * 512


def descriptors():
    return sorted(str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink())


class TestMemory:
    def test_new_memory_is_zero_and_takes_nothing(self, segment):
        assert segment.size == 16 * MEBIBYTE
        assert segment.address % PAGE == 0
        assert used(segment) == 0
        assert view(segment)[5 * MEBIBYTE] == 0

    def test_more_than_the_host_has_can_be_laid_out(self, name):
        with contextlib.closing(Segment.create(name, 1 << 44)) as segment:
            view(segment)[(1 << 44) - 1] = 7
            assert used(segment) == PAGE

    def test_processes_see_each_others_stores(self, segment, peer):
        view(segment)[100] = 42
        process, line = peer(
            "import ctypes; s = Segment.open(sys.argv[1], 16 << 20)\n"
            "v = (ctypes.c_ubyte * s.size).from_address(s.address); print(v[100]); v[101] = 43; s.close()",
            segment.name,
        )
        process.wait(10)
        assert line == "42"
        assert view(segment)[101] == 43

    def test_a_name_needs_no_slash(self, name):
        with contextlib.closing(Segment.create(name[1:], PAGE)) as segment:
            assert segment.name == name
            assert Path(f"/dev/shm{name}").stat().st_mode & 0o777 == 0o600

    def test_descriptor_is_not_inherited(self, segment):
        assert not os.get_inheritable(segment.fd)

    def test_unlinked_memory_stays_mapped(self, segment, name):
        segment.unlink()
        assert not Path(f"/dev/shm{name}").exists()
        view(segment)[0] = 1
        segment.reserve(0, PAGE)
        with pytest.raises(FileNotFoundError, match=f"cannot unlink shared memory {name}"):
            segment.unlink()

    def test_close_unmaps_and_closes(self, name):
        before = descriptors()
        segment = Segment.create(name, MEBIBYTE)
        assert name in Path("/proc/self/maps").read_text()
        segment.close()
        segment.close()
        assert name not in Path("/proc/self/maps").read_text()
        assert descriptors() == before
        assert (segment.address, segment.fd) == (0, -1)

    def test_a_dropped_segment_is_closed(self, name):
        before = descriptors()
        segment = Segment.create(name, MEBIBYTE)
        del segment
        assert descriptors() == before
        Segment.open(name, MEBIBYTE).close()  # nor does it count as open


def flags_of(memory):
    """What the kernel says of the mapping that begins at an address."""
    found = Path("/proc/self/smaps").read_text().partition(f"{memory.address:x}-")[2]
    return found.partition("VmFlags:")[2].partition("\n")[0].split()


@pytest.mark.parametrize("make", [Segment.create, lambda name, size: anonymous(size)], ids=["shared", "private"])
def test_core_dumps_leave_memory_out(name, make):
    with contextlib.closing(make(name, MEBIBYTE)) as memory:
        assert "dd" in flags_of(memory)


class TestErrors:
    @pytest.mark.parametrize(
        ("make", "code", "message"),
        [
            (lambda name: Segment.open(name, PAGE), errno.ENOENT, "cannot open shared memory"),
            (lambda name: Segment.create(name + "x" * 300, PAGE), errno.EINVAL, "cannot create"),
            (lambda name: Segment.create(name, 1 << 62), errno.ENOMEM, "cannot map 4611686018427387904 bytes"),
            (lambda name: Segment.create(name, 1 << 70), errno.ENOMEM, "cannot map 1180591620717411303424 bytes"),
            (lambda name: Segment.open(name, 1 << 70), errno.ENOMEM, "cannot map 1180591620717411303424 bytes"),
            (lambda name: anonymous(1 << 70), errno.ENOMEM, "cannot map .* a smaller NVCOLL_HEAP may fit"),
        ],
    )
    def test_system_errors_name_what_failed_and_leave_nothing(self, name, make, code, message):
        before = descriptors()
        with pytest.raises(OSError, match=message) as caught:
            make(name)
        assert caught.value.errno == code
        assert os.strerror(code) in str(caught.value)
        assert descriptors() == before
        assert not list(Path("/dev/shm").glob(f"{name[1:]}*"))

    def test_create_takes_no_existing_one(self, segment):
        with pytest.raises(FileExistsError, match=f"cannot create shared memory {segment.name}"):
            Segment.create(segment.name, PAGE)
        assert Path(f"/dev/shm{segment.name}").exists()

    def test_another_size_is_refused(self, name):
        Path(f"/dev/shm{name}").touch(0o600)
        Path(f"/dev/shm{name}").write_bytes(bytes(PAGE))
        before = descriptors()
        with pytest.raises(OSError, match=f"has {PAGE} bytes, expected {2 * PAGE}") as caught:
            Segment.open(name, 2 * PAGE)
        assert caught.value.errno == errno.EINVAL
        assert descriptors() == before

    @pytest.mark.parametrize("mode", [0o604, 0o640, 0o620, 0o602])
    def test_what_others_may_use_is_not_mapped(self, segment, peer, mode):
        Path(f"/dev/shm{segment.name}").chmod(mode)
        _, line = peer("try: Segment.open(sys.argv[1], 16 << 20)\nexcept OSError as e: print(e.errno, e)", segment.name)
        assert line.startswith(f"{errno.EPERM} [Errno {errno.EPERM}] {os.strerror(errno.EPERM)}: shared memory ")
        assert f"with mode {mode:o}, expected user {os.geteuid()} with mode 600; start the ranks anew" in line

    def test_what_belongs_to_another_user_is_not_mapped(self, name, monkeypatch):
        Path(f"/dev/shm{name}").touch(0o600)
        os.truncate(f"/dev/shm{name}", PAGE)
        before, owner = descriptors(), os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
        with pytest.raises(PermissionError, match=f"{name} is of user {owner} .*, expected user {owner + 1}"):
            Segment.open(name, PAGE)
        assert descriptors() == before
        assert name not in Path("/proc/self/maps").read_text()

    @pytest.mark.parametrize(("name", "size"), [("/", 1), ("", 1), ("/nvcoll-x", 0), ("/nvcoll-x", -1)])
    def test_senseless_arguments(self, name, size):
        with pytest.raises(ValueError, match="a segment needs a name and a size of 1 or more"):
            Segment.create(name, size)

    @pytest.mark.parametrize("verb", ["reserve", "release"])
    @pytest.mark.parametrize(("offset", "nbytes"), [(-1, 1), (0, -1), (0, (16 << 20) + 1), (16 << 20, 1), (1, 1 << 62)])
    def test_outside(self, segment, verb, offset, nbytes):
        with pytest.raises(ValueError, match="are outside of <Segment /nvcoll-test-"):
            getattr(segment, verb)(offset, nbytes)

    @pytest.mark.parametrize("call", [("reserve", 0, 1), ("release", 0, 1), ("lock", 0), ("is_alive", 0)])
    def test_closed(self, segment, call):
        segment.close()
        with pytest.raises(StateError, match=r"<Segment .* is closed"):
            getattr(segment, call[0])(*call[1:])


class TestReserve:
    def test_takes_memory_and_maps_it(self, segment):
        view(segment)[MEBIBYTE + 5] = 9
        segment.reserve(MEBIBYTE, MEBIBYTE)
        assert used(segment) == MEBIBYTE
        assert view(segment)[MEBIBYTE + 5] == 9
        smaps = Path("/proc/self/smaps").read_text().partition(segment.name)[2]
        assert int(smaps.partition("Rss:")[2].split()[0]) << 10 >= MEBIBYTE

    def test_any_offset_and_length(self, segment):
        segment.reserve(PAGE - 1, 2)
        assert used(segment) == 2 * PAGE
        segment.reserve(0, 0)
        segment.reserve(segment.size, 0)
        segment.reserve(segment.size - 1, 1)
        assert used(segment) == 3 * PAGE

    def test_want_of_memory_is_an_error_now_not_a_signal_later(self, name):
        with contextlib.closing(Segment.create(name, 1 << 45)) as segment:
            with pytest.raises(OSError, match="/dev/shm larger") as caught:
                segment.reserve(0, 1 << 45)
            assert caught.value.errno == errno.ENOSPC
            assert used(segment) == 0

    def test_release_gives_whole_pages_back(self, segment):
        segment.reserve(0, 4 * PAGE)
        view(segment)[: 4 * PAGE] = [1] * (4 * PAGE)
        segment.release(1, 3 * PAGE)
        assert used(segment) == 2 * PAGE
        assert (view(segment)[PAGE - 1], view(segment)[PAGE], view(segment)[3 * PAGE]) == (1, 0, 1)
        segment.release(PAGE + 1, PAGE)  # no whole page
        segment.release(0, segment.size)
        assert used(segment) == 0

    def test_release_up_to_an_odd_end(self, name):
        with contextlib.closing(Segment.create(name, PAGE + 10)) as segment:
            segment.reserve(0, PAGE + 10)
            segment.release(PAGE, 10)
            assert used(segment) == PAGE


LOCK = "s = Segment.open(sys.argv[1], 16 << 20); s.lock(3); print('ready', flush=True); sys.stdin.read()"


class TestLiveness:
    def test_a_lock_lives_as_long_as_its_process(self, segment, peer):
        assert not segment.is_alive(3)
        process, line = peer(LOCK, segment.name)
        assert line == "ready"
        assert segment.is_alive(3)
        assert not segment.is_alive(2)
        process.kill()
        process.wait(10)
        assert not segment.is_alive(3)

    def test_own_locks_count(self, segment):
        segment.lock(0)
        segment.lock(1 << 40)
        assert segment.is_alive(0)
        assert segment.is_alive(1 << 40)
        assert not segment.is_alive(1)

    def test_two_processes_cannot_hold_one_lock(self, segment, peer):
        peer(LOCK, segment.name)
        with pytest.raises(OSError, match=r"cannot take lock 3 .*; another process holds it") as caught:
            segment.lock(3)
        assert caught.value.errno in {errno.EAGAIN, errno.EACCES}

    def test_a_second_descriptor_is_refused_so_that_locks_hold(self, segment, peer):
        segment.lock(5)
        with pytest.raises(FileExistsError, match="is already open in this process"):
            Segment.open(segment.name, segment.size)
        _, line = peer("print(Segment.open(sys.argv[1], 16 << 20).is_alive(5), flush=True)", segment.name)
        assert line == "True"

    def test_a_forked_child_does_not_stand_in_for_its_parent(self, segment, peer):
        code = (
            "s = Segment.open(sys.argv[1], 16 << 20); s.lock(3)\n"
            "if pid := os.fork(): print(pid, flush=True)\n"
            "sys.stdin.read()"
        )
        process, child = peer(code, segment.name)
        assert segment.is_alive(3)
        process.kill()
        process.wait(10)
        try:
            os.kill(int(child), 0)  # it still runs, with the memory mapped
            assert not segment.is_alive(3)
        finally:
            os.kill(int(child), signal.SIGKILL)

    def test_a_child_does_not_take_its_parents_locks_for_its_own(self, segment):
        segment.lock(3)
        read, write = os.pipe()
        if not os.fork():
            os.write(write, b"alive" if segment.is_alive(3) else b"dead")
            os._exit(0)
        os.close(write)
        assert os.read(read, 100) == b"alive"  # seen as another process's lock
        os.close(read)
        os.wait()

    def test_nothing_remains_of_ranks_that_were_killed(self, name, peer):
        code = (
            "s = Segment.{}(sys.argv[1], 16 << 20); s.lock({}); s.reserve({} << 20, 1 << 20)\n"
            "print('ready', flush=True)\nsys.stdin.readline(); {}; print('ready', flush=True); sys.stdin.read()"
        )
        first, _ = peer(code.format("create", 0, 0, "s.unlink()"), name)
        second, _ = peer(code.format("open", 1, 1, "pass"), name)
        for process in (first, second):
            print(file=process.stdin, flush=True)
            assert process.stdout.readline() == "ready\n"
        assert not Path(f"/dev/shm{name}").exists()
        for process in (first, second):
            process.kill()
            process.wait(10)
        assert not list(Path("/dev/shm").glob(f"{name[1:]}*"))


class TestAnonymous:
    def test_memory_without_a_name(self):
        memory = anonymous(8 * PAGE)
        assert (memory.size, memory.fd, memory.name) == (8 * PAGE, -1, None)
        memory.reserve(0, 8 * PAGE)
        view(memory)[PAGE] = 1
        memory.release(PAGE, PAGE)
        assert view(memory)[PAGE] == 0
        memory.unlink()
        memory.close()
        memory.close()
        with pytest.raises(StateError, match=f"<Anonymous memory of {8 * PAGE} bytes> is closed"):
            memory.reserve(0, 1)

    def test_more_than_there_is_can_be_laid_out_but_not_reserved(self):
        with contextlib.closing(anonymous(1 << 44)) as memory:
            view(memory)[(1 << 44) - 1] = 1
            with pytest.raises(ValueError, match="are outside of"):
                memory.reserve(1 << 44, 1)

    def test_refused(self):
        with pytest.raises(ValueError, match="a size of 1 or more, got 0"):
            anonymous(0)
        with pytest.raises(OSError, match="cannot map") as caught:
            anonymous(1 << 62)
        assert caught.value.errno == errno.ENOMEM
