"""What a communicator has of the driver is given back once, whoever ends it, and nothing uses it afterwards."""

MAKE = """
from nvcoll.world_cuda import open_emulated_on

comms = [Comm(lambda world=world: world, "COMM_WORLD") for world in open_emulated_on(0, {ranks}, ({ranks},))]
for comm in comms:
    comm._world.exchange.timeout = 20.0
"""


def test_a_part_is_freed_while_another_thread_finalizes(emulated):
    emulated(f"""{MAKE.format(ranks=2)}
parts, freed = {{}}, []
at_once(*(lambda comm=comm: parts.update({{comm.rank: comm.Dup()}}) for comm in comms))
waits = threading.Thread(target=lambda: freed.append(told(parts[0].Free)))
waits.start()
time.sleep(0.3)
comms[0]._close()
assert told(parts[1].Free) in (None, "StateError", "PeerLostError")
waits.join()
assert freed[0] in ("StateError", "PeerLostError"), freed
assert not fake.wrong, fake.wrong
""")


def test_a_run_ends_while_a_thread_of_a_rank_makes_a_part(emulated):
    emulated("""
from nvcoll.backends.emulated import LocalExchange

go, found, split = threading.Event(), [], LocalExchange.split

def slow(self, color, key):
    if self.rank == 1:
        go.wait(20)
    return split(self, color, key)

def main(comm):
    thread = threading.Thread(target=lambda: found.append(told(comm.Dup)))
    thread.start()
    time.sleep(0.3)
    return thread

patch.setattr(LocalExchange, "split", slow)
threads = nvcoll.emulate(2, device=0).run(main)
go.set()
for thread in threads:
    thread.join()
assert found == ["StateError"] * 2, found
assert not fake.wrong, fake.wrong
""")


def test_arrays_of_a_request_stay_until_its_kernel_has_ended(emulated):
    """Whoever waits for it, and however the communicator ends meanwhile."""
    emulated(f"""
import weakref
{MAKE.format(ranks=1)}
class Array:
    __cuda_array_interface__ = {{"shape": (4,), "typestr": "<f4", "data": (1 << 20, False), "version": 3}}

running, seen = threading.Event(), []
running.set()

def wait_for_stream(stream):
    while running.is_set():
        time.sleep(0.01)
    return fake_cuda.Result(0)

x = Array()
gone = weakref.ref(x)
request = comms[0].Iallreduce(x)
del x
fake.cuStreamSynchronize, fake.looks = wait_for_stream, 1 << 40

def wait():
    told(request.Wait)
    seen.append(running.is_set())

waits, ends = threading.Thread(target=wait), threading.Thread(target=comms[0]._close)
waits.start()
ends.start()
time.sleep(0.5)
assert not seen and gone() is not None
running.clear()
fake.looks = 0
waits.join()
ends.join()
assert seen == [False] and gone() is None
""")


def test_several_threads_finalize(emulated):
    emulated(f"""
import sys
sys.setswitchinterval(1e-6)
for _ in range(100):
    {MAKE.format(ranks=1).replace(chr(10), chr(10) + "    ")}
    dup = comms[0].Dup()
    both, found = threading.Barrier(3), []
    def end(call):
        both.wait()
        try:
            call()
        except nvcoll.Error:
            pass
        except BaseException as exc:
            found.append(exc)
    at_once(*(lambda call=call: end(call) for call in (comms[0]._close, comms[0]._close, dup.Free)))
    assert not found and not fake.wrong, (found, fake.wrong)
""")


def test_a_set_up_that_fails_leaves_nothing(emulated):
    """Whichever call of the driver fails, on whichever rank."""
    emulated("""
from nvcoll.backends import siblings

failures = 0
for name in ("cuMemAlloc", "cuEventCreate", "cuCtxGetCurrent", "cuStreamCreate", "cuMemsetD8Async", "cuMemcpyAsync",
             "cuMemHostAlloc", "cuMemHostGetDevicePointer"):
    for number in range(1, 1000):
        world_cuda._idle.clear()
        fake.fail_once = [name, number, fake_cuda.Result.CUDA_ERROR_OUT_OF_MEMORY]
        failed = told(lambda: nvcoll.emulate(2, device=0).run(lambda comm: comm.Dup().Free()))
        fake.streams.clear()  # those of the ranks, for others
        assert not left(), (name, number, left())
        if fake.fail_once[1] > 0:  # there were not so many
            break
        assert failed, (name, number)
        failures += 1
assert failures > 20, failures
""")


def test_ctrl_c_of_a_run(emulated):
    """Its ranks go on until they see it; then all is given back."""
    emulated("""
import signal

def main(comm):
    if comm.rank == 0:
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    time.sleep(2.0)

with pytest.raises(KeyboardInterrupt):
    nvcoll.emulate(2, device=0).run(main)
assert left()
deadline = time.monotonic() + 20
while left() and time.monotonic() < deadline:
    time.sleep(0.1)
assert not left(), left()
""")


def test_ctrl_c_ends_kernels_that_wait_for_a_rank(emulated):
    """A stream is waited for until its rank gives up, as if a kernel on it waited for a rank that does not come."""
    emulated("""
import os, signal
from nvcoll.backends import emulated
from nvcoll.backends.device_area import DeviceArea

gave_up, mark, marked = threading.Event(), DeviceArea._mark, []
synchronize, stalling, stalled = world_cuda.driver.stream_synchronize, set(), []

def note(area):
    mark(area)
    marked.append(area)
    if len(marked) == 3:
        gave_up.set()

def wait(stream):
    if stream in stalling:
        stalled.append(stream)
        gave_up.wait(20)
    synchronize(stream)

def main(comm):
    comm.empty(4)
    stalling.add(comm.stream)
    if comm.rank == 1:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    comm._world.finish()

DeviceArea._mark = note
patch.setattr(world_cuda.driver, "stream_synchronize", wait)
started = time.monotonic()
try:
    nvcoll.emulate(3, device=0).run(main)
except KeyboardInterrupt:
    seconds = time.monotonic() - started
assert seconds < 15 and len(marked) == 3 and len(stalled) >= 3
assert nvcoll.emulate(2, device=0).run(lambda comm: comm.rank) == [0, 1]
while emulated._running:
    time.sleep(0.01)
marked.clear()
assert not left(), left()
""")
