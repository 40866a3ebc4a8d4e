"""NVSHMEM's memory, with fakes of the driver and of NVSHMEM."""

import dataclasses
import json
import sys
import threading

import pytest

from nvcoll import _topology, settings
from nvcoll.backends import driver as nvidia
from nvcoll.backends import nvshmem
from nvcoll.backends.emulated import Hub, LocalExchange
from nvcoll.backends.heap import Heap
from nvcoll.buffers import DeviceBuffer
from nvcoll.errors import AllocationError, BootstrapError, DeviceError, PeerLostError, TimeoutError
from tests.fake_nvshmem import FAR, FakeNvshmem, NVSHMEMError

HEAP = 8 << 20


class Pair:
    """The exchange of rank `rank` of two: the other says the same, or what `others` makes of it at call number ..."""

    size = 2

    def __init__(self, rank=0, **others):
        self.rank, self.others, self.number = rank, {int(name[1:]): make for name, make in others.items()}, 0

    def allgather(self, data):
        self.number += 1
        other = self.others.get(self.number, lambda data: data)(data)
        return [data, other] if self.rank == 0 else [other, data]


LOOK, IDENTITY, START, RANKS, MEMORY, DEVICE, CLOSE = range(1, 8)  # calls of the exchange


@pytest.fixture
def fake(monkeypatch, driver, tmp_path):
    for name in ("NVSHMEM_SYMMETRIC_SIZE", "NVSHMEM_HEAP_KIND", "NVSHMEM_REMOTE_TRANSPORT", "NVSHMEM_DISABLE_P2P"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_topology, "nics", lambda root="/": [])
    found = FakeNvshmem(driver, tmp_path)
    found.install(monkeypatch)
    return found


def open_memory(exchange=None, **changes):
    exchange = exchange or Pair()
    values = dataclasses.replace(settings.read({}), **{"heap": HEAP, "timeout": 10.0, **changes})
    return nvshmem.SymmetricMemory(exchange, _topology.detect(exchange.rank, [b"host"] * exchange.size), values)


class TestUsable:
    def test_all_is_there(self, fake):
        assert nvshmem.usable() is None
        found = nvshmem.find()
        assert (found.package, found.library, found.headers) == ("0.4.1", "3.8.0", "3.8.0")
        assert found.library_path == "/lib/libnvshmem_host.so.3"
        assert found.headers_path == str(fake.folder)

    def test_no_gpu(self, driver):
        driver.gpus = 0
        assert nvshmem.usable().startswith("the NVIDIA driver shows no GPU")

    def test_no_nvshmem4py(self, fake, monkeypatch):
        monkeypatch.setitem(sys.modules, "nvshmem", None)
        assert nvshmem.usable().startswith("nvshmem4py is not installed (")
        assert nvshmem.usable().endswith('; pip install "nvcoll[cuda]"')

    def test_no_library(self, fake, monkeypatch):
        fake.install(monkeypatch, RuntimeError("libnvshmem_host.so.3: not found"))
        reason = "libnvshmem_host does not load (libnvshmem_host.so.3: not found); pip install nvidia-nvshmem-cu13"
        assert nvshmem.usable() == reason

    def test_parts_that_do_not_fit(self, driver, monkeypatch, tmp_path):
        FakeNvshmem(driver, tmp_path, headers=(3, 4, 5)).install(monkeypatch)
        assert nvshmem.usable() == (
            f"NVSHMEM 3.8.0 was found at /lib/libnvshmem_host.so.3 (host library), 3.4.5 at {tmp_path} (device part); "
            "install one: pip install --force-reinstall nvidia-nvshmem-cu13"
        )

    def test_bindings_that_know_more_than_the_library(self, fake):
        fake.fail["vendor_get_version_info"] = NVSHMEMError("function is not found")
        assert nvshmem.usable() == (
            "nvshmem4py 0.4.1 does not fit the host library at /lib/libnvshmem_host.so.3 (NVSHMEMError: function is "
            "not found); install both anew: pip install --upgrade --force-reinstall nvshmem4py-cu13 nvidia-nvshmem-cu13"
        )

    def test_without_a_device_part(self, driver, monkeypatch, tmp_path):
        FakeNvshmem(driver, tmp_path, headers=None).install(monkeypatch)
        assert nvshmem.usable() is None
        assert nvshmem.find().headers is None


class TestLife:
    def test_from_start_to_end(self, fake, driver):
        memory = open_memory()
        assert fake.calls == [
            ("get_unique_id", False),
            ("get_unique_id", True),
            ("init", 0, b"the id", "uid"),
            ("malloc", HEAP),
        ]
        assert (memory.members, memory.place, memory.extent, memory.descriptor) == ((0, 1), 0, HEAP, -1)
        assert [memory.address(place) for place in range(2)] == [FAR, 2 * FAR]
        assert memory.gpus == ("GPU-00000000-0000-0000-0000-000000000000",) * 2
        assert fake.environ["NVSHMEM_SYMMETRIC_SIZE"] == str(HEAP + (2 << 20))
        assert fake.environ["NVSHMEM_DISABLE_NVLS"] == "1"
        assert fake.environ["NVSHMEM_REMOTE_TRANSPORT"] == "none"
        assert settings.foreign("NVSHMEM_SYMMETRIC_SIZE") is None
        assert driver.stack == []
        memory.close()
        memory.close()
        assert fake.calls[4:] == [("free", FAR), ("finalize",)]
        assert driver.contexts == []
        open_memory().close()  # and again
        assert fake.calls[-2:] == [("free", FAR), ("finalize",)]

    def test_the_other_rank_takes_the_id_of_rank_0(self, fake):
        memory = open_memory(Pair(1, _2=lambda data: b"\0" + b"its id".ljust(128, b"\0")))
        assert ("get_unique_id", False) not in fake.calls
        assert ("init", 1, b"its id", "uid") in fake.calls  # on the second GPU, which is its turn
        assert [memory.address(place) for place in range(2)] == [FAR, FAR]

    def test_a_rank_alone(self, fake):
        memory = open_memory(LocalExchange(Hub(1, 10), 0))
        assert memory.members == (0,)
        memory.close()
        assert fake.calls[-1] == ("finalize",)

    def test_peers_out_of_reach(self, fake):
        fake.unreachable = {1}
        assert [open_memory().address(place) for place in range(2)] == [FAR, 0]

    def test_the_users_variables_stand(self, fake, monkeypatch):
        monkeypatch.setenv("NVSHMEM_DISABLE_NVLS", "0")
        monkeypatch.setenv("NVSHMEM_REMOTE_TRANSPORT", "ucx")
        open_memory()
        assert (fake.environ["NVSHMEM_DISABLE_NVLS"], fake.environ["NVSHMEM_REMOTE_TRANSPORT"]) == ("0", "ucx")

    def test_an_adapter_leaves_the_network_to_nvshmem(self, fake, monkeypatch):
        monkeypatch.setattr(_topology, "nics", lambda root="/": ["mlx5_0"])
        open_memory()
        assert "NVSHMEM_REMOTE_TRANSPORT" not in fake.environ

    def test_the_wanted_gpu(self, fake):
        assert open_memory(device=1).device.ordinal == 1

    def test_a_heap_can_be_allocated_from(self, fake):
        heap = Heap(open_memory(LocalExchange(Hub(1, 10), 0)))
        first, second = heap.allocate(5000), heap.allocate(10)
        assert (first.address, second.address) == (FAR, FAR + 8192)
        with pytest.raises(AllocationError, match="has no such room"):
            heap.allocate(HEAP)
        first.free()
        heap.close()
        assert fake.calls[-1] == ("finalize",)

    @pytest.mark.parametrize("how", ["alive", "freed", "exported"])
    def test_a_heap_ends_with_its_communicator_whatever_refers_to_it(self, fake, how):
        for _ in range(2):
            memory = open_memory(LocalExchange(Hub(1, 10), 0))
            heap = Heap(memory)
            buffer = DeviceBuffer.on(heap.allocate(4096), 10, "float32", memory.device, nvidia)
            kept = buffer.__dlpack__() if how == "exported" else buffer[2:]
            if how == "freed":
                buffer.free()
            heap.close()
            assert fake.calls[-2:] == [("free", FAR), ("finalize",)]
            assert buffer.freed
            del kept
        assert [call[0] for call in fake.calls].count("init") == 2

    def test_ranges_outside_of_the_heap(self, fake):
        memory = open_memory()
        memory.take(0, HEAP)
        memory.give(HEAP, 0)
        for offset, nbytes in ((-1, 1), (0, HEAP + 1), (HEAP, 1), (4, -1)):
            with pytest.raises(ValueError, match=r"are not in the heap of 8388608 bytes"):
                memory.take(offset, nbytes)


class TestKernels:
    def test_modules_are_introduced(self, fake):
        nvshmem.introduce(77)
        assert fake.calls == [("cumodule_init", 77)]
        open_memory(LocalExchange(Hub(1, 10), 0)).close()
        assert fake.calls[-3:] == [("free", FAR), ("cumodule_finalize", 77), ("finalize",)]
        open_memory(LocalExchange(Hub(1, 10), 0)).close()
        assert fake.calls[-2:] == [("free", FAR), ("finalize",)]

    def test_a_module_that_nvshmem_does_not_take(self, fake):
        fake.status = 7
        with pytest.raises(
            BootstrapError, match=r"^Init: NVSHMEM does not take kernels .* \(status 7\); NVSHMEM_DEBUG"
        ):
            nvshmem.introduce(77)
        fake.fail["cumodule_init"] = NVSHMEMError("no")
        with pytest.raises(BootstrapError, match=r"\(NVSHMEMError: no\)"):
            nvshmem.introduce(77)

    @pytest.mark.parametrize(
        ("name", "text", "fits"),
        [
            ("NVSHMEM_REMOTE_TRANSPORT", "ucx", True),
            ("NVSHMEM_REMOTE_TRANSPORT", "gpunetio", False),
            ("NVSHMEM_IB_ENABLE_IBGDA", "0", True),
            ("NVSHMEM_IB_ENABLE_IBGDA", "1", False),
            ("NVSHMEM_IB_ENABLE_IBGDA", "", True),
        ],
    )
    def test_transports_that_kernels_compiled_at_run_time_cannot_use(self, fake, monkeypatch, name, text, fits):
        monkeypatch.delenv("NVSHMEM_IB_ENABLE_IBGDA", raising=False)
        monkeypatch.setenv(name, text)
        reason = nvshmem.unfit_transport()
        assert reason is None if fits else reason.startswith(name)


class TestEnd:
    def test_a_lost_rank_leaves_it_to_the_end_of_the_process(self, fake, driver):
        def lose(data):
            raise PeerLostError("gone")

        memory = open_memory(Pair(_6=lose))
        memory.close()
        assert fake.calls[-1] == ("malloc", HEAP)
        assert driver.contexts == [0]  # the memory is in it

    def test_so_does_a_rank_that_does_something_else(self, fake):
        open_memory(Pair(_6=lambda data: b"a" + bytes(8))).close()
        assert fake.calls[-1] == ("malloc", HEAP)


class TestStartedByOthers:
    def test_its_start_is_used_and_its_end_left_to_it(self, fake):
        fake.stage, fake.rank, fake.size = 2, 0, 2
        open_memory().close()
        assert fake.calls == [("malloc", HEAP), ("free", FAR)]

    def test_ranks_that_know_each_other_need_no_id(self, fake):
        fake.stage = 1
        open_memory()
        assert ("get_unique_id", False) not in fake.calls

    def test_with_other_numbers(self, fake):
        fake.stage, fake.rank, fake.size = 2, 1, 2
        text = (
            r"^NVSHMEM cannot be used: rank 0: it was started by other code, this rank being 1 of 2, to nvcoll it is 0"
        )
        with pytest.raises(BootstrapError, match=text):
            open_memory()
        assert fake.calls == []

    def test_on_some_ranks_only(self, fake):
        def begun(data):
            return b"\0" + json.dumps(json.loads(data[1:]) | {"stage": 2}).encode()

        with pytest.raises(BootstrapError, match="it runs on rank 1 already and not on rank 0"):
            open_memory(Pair(_1=begun))
        assert fake.calls == []


class TestProblems:
    """Whatever fails on one rank is raised by all."""

    def test_unusable_here(self, fake, driver):
        driver.version = 12000
        with pytest.raises(
            BootstrapError, match=r"^NVSHMEM cannot be used: rank 0: the NVIDIA driver supports CUDA 12\.0"
        ):
            open_memory()

    def test_unusable_there(self, fake):
        with pytest.raises(BootstrapError, match=r"^NVSHMEM cannot be used: rank 1: no GPU$"):
            open_memory(Pair(_1=lambda data: b"\1no GPU"))
        assert fake.calls == []

    def test_a_gpu_that_is_not_there(self, fake):
        with pytest.raises(
            BootstrapError, match="rank 0: NVCOLL_DEVICE: there is no GPU 7, this process may use 2; count from 0"
        ):
            open_memory(device=7)

    def test_no_id(self, fake, driver):
        fake.fail["get_unique_id"] = NVSHMEMError("Status code 7")
        with pytest.raises(BootstrapError, match=r"^NVSHMEM gives no unique id: rank 0: NVSHMEMError: Status code 7"):
            open_memory()
        assert driver.contexts == []

    def test_no_start(self, fake, driver):
        fake.fail["init"] = NVSHMEMError("Status code 7")
        with pytest.raises(
            BootstrapError, match=r"^NVSHMEM does not start: rank 0: NVSHMEMError: Status code 7; .*DEBUG"
        ):
            open_memory()
        assert (driver.stack, driver.contexts) == ([], [])

    @pytest.mark.parametrize("name", ["free", "finalize"])
    def test_no_end(self, fake, driver, name):
        memory = open_memory()
        fake.fail[name] = NVSHMEMError("Status code 7")
        with pytest.raises(
            DeviceError, match=r"^Finalize: NVSHMEM does not end \(NVSHMEMError: Status code 7\); NVSHMEM"
        ):
            memory.close()
        assert driver.contexts == []

    def test_a_start_that_hangs(self, fake, monkeypatch):
        hangs = threading.Event()
        monkeypatch.setattr(FakeNvshmem, "init", lambda *args, **options: hangs.wait(60))
        fake.install(monkeypatch)
        with pytest.raises(BootstrapError, match=r"rank 0: NVSHMEM: expected an answer within 0\.1 s, none came"):
            open_memory(timeout=0.1)
        hangs.set()
        for thread in threading.enumerate():
            if thread.name == "nvcoll: NVSHMEM":  # else it might look for modules when the fake ones are gone
                thread.join(10)

    def test_no_memory_here(self, fake):
        fake.room = False
        with pytest.raises(AllocationError, match=r"^NVSHMEM has no memory: rank 0: a heap takes 8388608 bytes; free"):
            open_memory()
        assert fake.calls[-1] == ("finalize",)

    def test_no_memory_there(self, fake):
        with pytest.raises(AllocationError, match=r"^NVSHMEM has no memory: rank 1: full"):
            open_memory(Pair(_5=lambda data: b"\1full"))
        assert fake.calls[-2:] == [("malloc", HEAP), ("finalize",)]  # a free would wait for the rank that has none

    def test_no_room_on_the_gpu(self, fake):
        with pytest.raises(AllocationError, match=r"the heaps of 2 ranks take 134217728 bytes of the GPU of rank 0"):
            open_memory(heap=64 << 20)


class TestWithin:
    def test_errors_come_through(self):
        with pytest.raises(ZeroDivisionError):
            nvshmem.within(10, "it", lambda: 1 / 0)

    def test_a_deadline(self):
        hangs = threading.Event()
        with pytest.raises(
            TimeoutError, match=r"^it: expected an answer within 0\.05 s, none came; raise NVCOLL_TIMEOUT"
        ):
            nvshmem.within(0.05, "it", lambda: hangs.wait(60))
        hangs.set()


def test_nothing_is_imported_where_there_is_no_driver(run_command):
    code = (
        "import sys\nfrom nvcoll.backends import nvshmem\nprint(nvshmem.usable() is None)\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('nvshmem', 'torch')])"
    )
    status, output = run_command([sys.executable, "-c", code], env={"CUDA_VISIBLE_DEVICES": ""})
    assert (status, output) == (0, "False\n[]\n")
