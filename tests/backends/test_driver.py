"""The driver: errors that name the call, contexts pushed and popped in pairs; the real one where there is a GPU."""

import ctypes
import gc
import threading

import pytest

from nvcoll.backends import driver, looking
from nvcoll.errors import AllocationError, ArgumentError, DeviceError
from tests.fake_cuda import (
    EVENT,
    FUNCTION,
    STREAM,
    DynamicLibNotFoundError,
    FakeDriver,
    FunctionNotFoundError,
    Result,
    install,
)


@pytest.fixture
def fake(monkeypatch):
    found = FakeDriver()
    install(monkeypatch, found)
    return found


class TestAvailable:
    def test_a_gpu(self, fake):
        assert driver.available() is None
        assert (driver.count(), driver.driver_version(), fake.contexts) == (2, (13, 0), [])

    def test_no_cuda_python(self, monkeypatch):
        install(monkeypatch, None)
        reason = driver.available()
        assert reason.startswith("cuda-python is not installed (")
        assert reason.endswith('; pip install "nvcoll[cuda]"')

    def test_no_library(self, fake, monkeypatch):
        def load():
            raise OSError("libcuda.so.1: cannot open shared object file")

        monkeypatch.setattr(driver, "library", load)
        reason = "libcuda.so.1 does not load (libcuda.so.1: cannot open shared object file); install the NVIDIA driver"
        assert driver.available() == reason
        assert fake.calls == []

    def test_no_driver(self, fake):
        fake.fail["cuDriverGetVersion"] = DynamicLibNotFoundError("only found via system search.")
        reason = "libcuda.so.1 does not load (only found via system search); install the NVIDIA driver"
        assert driver.available() == reason

    def test_a_driver_without_a_function(self, fake):
        fake.fail["cuDeviceGetCount"] = FunctionNotFoundError("function cuDeviceGetCount is not found")
        assert driver.available() == "the NVIDIA driver is too old: it lacks cuDeviceGetCount; install a newer one"

    def test_an_old_driver(self, fake):
        fake.version = 12080
        reason = "the NVIDIA driver supports CUDA 12.8, 13.0 is needed; install a newer one"
        assert driver.available() == reason

    def test_no_gpu(self, fake):
        fake.gpus = 0
        assert driver.available().startswith("the NVIDIA driver shows no GPU; look at `nvidia-smi`")
        fake.fail["cuInit"] = Result.CUDA_ERROR_NO_DEVICE
        assert driver.available().startswith("cuInit: CUDA_ERROR_NO_DEVICE (100), words on it; look at `nvidia-smi`")

    def test_no_memory_for_the_driver(self, fake):
        fake.fail["cuInit"] = Result.CUDA_ERROR_OUT_OF_MEMORY
        assert driver.available().startswith("cuInit: CUDA_ERROR_OUT_OF_MEMORY")


class TestDevice:
    def test_what_it_tells(self, fake):
        device = driver.Device(1)
        assert (device.ordinal, device.name, device.arch) == (1, "Fake 1", "sm_90")
        assert device.multiprocessors == 132
        assert device.nbytes == 64 << 20
        assert repr(device) == "<Device 1: Fake 1, sm_90>"
        assert driver.uuid(1) == "GPU-01010101-0101-0101-0101-010101010101"
        assert fake.contexts == []  # to ask makes none

    @pytest.mark.parametrize("ordinal", [-1, 2])
    def test_one_that_is_not_there(self, fake, ordinal):
        with pytest.raises(DeviceError, match=rf"^Device: there is no GPU {ordinal}, this process may use 2; look at"):
            driver.Device(ordinal)

    def test_an_attribute_that_is_not_there(self, fake):
        with pytest.raises(ArgumentError, match=r"^attribute: the CUDA driver knows no CU_DEVICE_ATTRIBUTE_COLOUR;"):
            driver.Device(0).attribute("colour")

    def test_pushes_and_pops_are_balanced(self, fake):
        first, second = driver.Device(0), driver.Device(1)
        with first, second, first:
            assert fake.stack == ["context of 0", "context of 1", "context of 0"]
        assert fake.stack == []
        with pytest.raises(AllocationError), first:
            driver.allocate(1 << 30)
        assert fake.stack == []
        assert fake.contexts == [0, 1]  # retained once each

    def test_each_thread_has_its_own_context(self, fake):
        device, seen = driver.Device(0), []
        barrier = threading.Barrier(4)

        def enter():
            barrier.wait(10)
            with device:
                barrier.wait(10)
                seen.append(list(fake.stack))
            seen.append(list(fake.stack))

        threads = [threading.Thread(target=enter) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(seen) == [[]] * 4 + [["context of 0"]] * 4
        assert fake.contexts == [0]

    def test_the_context_is_released_once(self, fake):
        device = driver.Device(0)
        device.close()
        with device:
            pass
        device.close()
        device.close()
        assert fake.contexts == []
        with device:  # used again
            assert fake.contexts == [0]
        del device
        gc.collect()
        assert fake.contexts == [0]  # there may be memory in it


class TestMemory:
    def test_filled_and_copied(self, fake):
        with driver.Device(0):
            address = driver.allocate(100)
            host, mapped = driver.host_allocate(100)
            assert mapped == host + (1 << 40)
            driver.memset(address, 7, 100)
            driver.copy(host, address, 60, STREAM)
            assert ctypes.string_at(host, 100) == b"\7" * 60 + bytes(40)
            assert driver.memory_info() == ((64 << 20) - 200, 64 << 20)
            driver.free(address)
            driver.host_free(host)
        assert fake.taken == {}

    def test_nothing_to_do(self, fake):
        driver.memset(1, 0, 0)
        driver.copy(1, 2, 0)
        assert fake.calls == []

    def test_waits_for_what_it_enqueued(self, fake):
        with driver.Device(0):
            address = driver.allocate(8)
            driver.memset(address, 0, 8)
            assert fake.calls[-2:] == ["cuMemsetD8Async", "cuStreamSynchronize"]
            driver.copy(address, address, 8)
            assert fake.calls[-2:] == ["cuMemcpyAsync", "cuStreamSynchronize"]

    def test_waits_so_that_ctrl_c_gets_through(self, fake, monkeypatch):
        def nap(seconds):
            naps.append(seconds)
            if len(naps) == 4:
                raise KeyboardInterrupt

        naps = []
        monkeypatch.setattr(looking.time, "sleep", nap)
        monkeypatch.setattr(looking, "IMPATIENT", 1)
        with driver.Device(0):
            fake.looks = 2
            driver.stream_wait(STREAM)
            assert fake.recorded == [(EVENT, STREAM)]
            assert naps == [0, looking.NAP]
            fake.looks = 1000
            with pytest.raises(KeyboardInterrupt):
                driver.stream_wait(0)
            assert fake.calls.count("cuEventDestroy") == 2
            assert "cuStreamSynchronize" not in fake.calls

    def test_threads_that_hear_no_ctrl_c_leave_waiting_to_the_driver(self, fake):
        def wait():
            with driver.Device(0):
                driver.stream_wait(STREAM)

        thread = threading.Thread(target=wait)
        thread.start()
        thread.join()
        assert "cuStreamSynchronize" in fake.calls
        assert "cuEventCreate" not in fake.calls

    def test_pinned_memory_that_cannot_be_mapped_is_freed(self, fake):
        fake.fail["cuMemHostGetDevicePointer"] = Result.CUDA_ERROR_INVALID_VALUE
        with pytest.raises(DeviceError, match=r"^cuMemHostGetDevicePointer: "), driver.Device(0):
            driver.host_allocate(100)
        assert fake.taken == {}

    def test_outside_of_a_device(self, fake):
        cure = (
            r"^cuMemAlloc: CUDA_ERROR_INVALID_CONTEXT \(201\), words on it; call it inside `with Device\(ordinal\):`$"
        )
        with pytest.raises(DeviceError, match=cure):
            driver.allocate(8)

    @pytest.mark.parametrize("nbytes", [1 << 40, 1 << 70])
    def test_too_much(self, fake, nbytes):
        text = r"^cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY \(2\), words on it; free memory of the GPU or lower NVCOLL_HEAP$"
        with pytest.raises(AllocationError, match=text), driver.Device(0):
            driver.allocate(nbytes)

    def test_an_error_that_the_driver_has_no_words_for(self, fake):
        fake.fail["cuMemFree"] = Result.CUDA_ERROR_STRANGE
        with pytest.raises(DeviceError, match=r"^cuMemFree: unknown to the driver \(99999\), unknown to the driver$"):
            driver.free(8)


@pytest.mark.parametrize(
    ("facts", "gpu"),
    [({2: 2, 8: 0, 9: 5}, 5), ({2: 2, 8: 1, 9: 5}, None), ({2: 1, 8: 0, 9: 5}, None), ({2: 2, 8: 0}, None)],
)
def test_the_gpu_of_memory(fake, facts, gpu):
    assert driver.gpu_of(0x1000) is None
    fake.pointers[0x1000] = facts
    assert driver.gpu_of(0x1000) == gpu


def test_streams(fake):
    stream = driver.stream_create()
    driver.stream_synchronize(stream)
    driver.stream_synchronize(0)
    assert not driver.stream_capturing(stream)
    fake.capturing.add(stream)
    assert driver.stream_capturing(stream)
    driver.stream_destroy(stream)
    assert stream == STREAM


def test_modules(fake):
    module = driver.load_module(b"\x7fELF")
    assert module.function("kernel") == FUNCTION
    assert fake.calls[-1] == "cuFuncLoad"  # not at the first launch, when a sibling may wait for it
    driver.share_multiprocessors(FUNCTION)
    assert fake.attributes == {(FUNCTION, 9): 100}
    assert driver.occupancy(FUNCTION, 256) == 8
    with pytest.raises(DeviceError, match=r"^cuModuleGetFunction: CUDA_ERROR_NOT_FOUND"):
        module.function("other")


@pytest.mark.gpu
class TestReal:
    def test_memory_and_streams(self):
        assert driver.available() is None
        with driver.Device(driver.count() - 1) as device:
            assert device.arch.startswith("sm_")
            assert driver.uuid(device.ordinal).startswith("GPU-")
            free, total = driver.memory_info()
            assert 0 < free <= total == device.nbytes
            address, stream = driver.allocate(1 << 20), driver.stream_create()
            host, mapped = driver.host_allocate(1 << 20)
            try:
                driver.memset(address, 5, 1 << 20, stream)
                driver.memset(address + 100, 6, 1)
                driver.copy(host, address, 1 << 20, stream)
                assert ctypes.string_at(host + 99, 3) == b"\5\6\5"
                for current in (device, driver.Device(0)):
                    with current:
                        found = [driver.gpu_of(one) for one in (address + 100, host, id(driver))]
                    assert found == [device.ordinal, None, None]
                driver.memset(mapped, 9, 10)
                assert ctypes.string_at(host, 11) == b"\t" * 10 + b"\5"
                pageable = ctypes.create_string_buffer(b"from the host", 20)
                driver.copy(address, ctypes.addressof(pageable), 20)
                driver.copy(host, address, 20)
                assert ctypes.string_at(host, 13) == b"from the host"
            finally:
                driver.free(address)
                driver.host_free(host)
                driver.stream_destroy(stream)

    def test_errors_have_the_drivers_words(self):
        with driver.Device(0):
            with pytest.raises(AllocationError, match=r"^cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY \(2\), out of memory; "):
                driver.allocate(1 << 50)
            with pytest.raises(DeviceError, match=r"^cuModuleLoadData: CUDA_ERROR_INVALID_"):
                driver.load_module(b"no cubin at all, whatever it is")

    def test_a_thread_without_a_context_has_none_afterwards(self):
        found = []

        def use():
            with driver.Device(0):
                driver.free(driver.allocate(8))
            try:
                driver.allocate(8)
            except DeviceError as exc:
                found.append(str(exc))

        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
        assert found[0].startswith("cuMemAlloc: CUDA_ERROR_INVALID_CONTEXT")
