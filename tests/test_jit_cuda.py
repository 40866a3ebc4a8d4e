"""Cubins and their cache, without a GPU; that kernels fit into registers is for tests/device/cuda."""

import re

import pytest

from nvcoll import _plan, codecache, jit_cuda
from nvcoll.algorithms import ALGORITHMS
from nvcoll.errors import ArgumentError, BootstrapError
from nvcoll.jit import ENTRY
from nvcoll.jit_cuda import SOURCES, CubinCache, Kernel

KEY = ("one_shot", "simple", "SUM", "int32", "sm_90")


@pytest.fixture(autouse=True)
def fresh_caches():
    """Forget what this process remembers of digests, before and after."""
    for function in (codecache.digest_of, jit_cuda._platform):
        function.cache_clear()
    yield
    for function in (codecache.digest_of, jit_cuda._platform):
        function.cache_clear()


@pytest.fixture
def compiled(monkeypatch):
    """What was compiled, by a compiler that only says so."""
    calls = []

    def compile_kernel(*args):
        calls.append(args)
        return Kernel(repr(args).encode(), "")

    monkeypatch.setattr(jit_cuda, "compile_kernel", compile_kernel)
    return calls


def files(folder):
    return {path.name for path in folder.iterdir() if path.suffix == ".cubin"}


class TestCache:
    def test_a_kernel_is_compiled_once_and_kept(self, tmp_path, compiled):
        first = CubinCache(tmp_path).get(*KEY)
        assert CubinCache(tmp_path).get(*KEY) == first
        assert compiled == [(*KEY, True)]
        [name] = files(tmp_path)
        assert re.fullmatch(r"one_shot-simple-SUM-int32-deep-sm_90-[0-9a-f]{24}\.cubin", name)

    @pytest.mark.parametrize("place", range(len(KEY)))
    def test_every_part_of_the_key_tells(self, tmp_path, compiled, place):
        other = list(KEY)
        other[place] = ("ring", "low_latency", "MAX", "int64", "sm_100")[place]
        cache = CubinCache(tmp_path)
        assert cache.get(*KEY) != cache.get(*other)
        assert len(files(tmp_path)) == 2

    def test_reach_tells_and_the_shim_is_compiled_once(self, tmp_path, compiled, monkeypatch):
        shims = []
        monkeypatch.setattr(jit_cuda, "compile_shim", lambda arch: shims.append(arch) or b"shim of " + arch.encode())
        cache = CubinCache(tmp_path)
        near = cache.get(*KEY)
        for op in ("SUM", "MAX"):
            assert cache.get("one_shot", "simple", op, "int32", "sm_90", True, True) != near
        assert [call[6:] for call in compiled] == [(), (b"shim of sm_90",), (b"shim of sm_90",)]
        assert shims == ["sm_90"]
        assert len(files(tmp_path)) == 3

    def test_depth_tells(self, tmp_path, compiled):
        cache = CubinCache(tmp_path)
        assert cache.get(*KEY) != cache.get(*KEY, False)

    @pytest.mark.parametrize("source", [*SOURCES, *ALGORITHMS["one_shot"].sources])
    def test_another_text_of_any_source_is_another_kernel(self, tmp_path, compiled, monkeypatch, source):
        CubinCache(tmp_path).get(*KEY)
        package = tmp_path / "package"
        for name in (*SOURCES, *ALGORITHMS["one_shot"].sources):
            copied = package / name
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.write_bytes((codecache.PACKAGE / name).read_bytes() + (b"#" if name == source else b""))
        monkeypatch.setattr(codecache, "PACKAGE", package)
        codecache.digest_of.cache_clear()
        CubinCache(tmp_path).get(*KEY)
        assert len(compiled) == len(files(tmp_path)) == 2

    def test_other_arguments_of_kernels_or_compilers_are_other_kernels(self, tmp_path, compiled, monkeypatch):
        CubinCache(tmp_path).get(*KEY)
        monkeypatch.setattr(_plan, "DEVICE_FIELDS", ("one", "other"))
        jit_cuda._platform.cache_clear()
        CubinCache(tmp_path).get(*KEY)
        monkeypatch.setattr(jit_cuda, "version", lambda package: "0.0")
        jit_cuda._platform.cache_clear()
        CubinCache(tmp_path).get(*KEY)
        assert len(files(tmp_path)) == 3


def test_sources_are_all_that_kernels_are_made_of():
    texts = {path.name for path in (codecache.PACKAGE / "device/cuda").glob("*.py")} - {"__init__.py"}
    assert texts == {name.rpartition("/")[2] for name in SOURCES if name.startswith("device/cuda/")}


def test_headers_that_are_missing(monkeypatch):
    import cuda.pathfinder

    monkeypatch.setattr(cuda.pathfinder, "find_nvidia_header_directory", {"cudart": "/somewhere"}.get)
    with pytest.raises(
        BootstrapError, match=r"^Init: kernels that reach other nodes need the headers of nvshmem, cccl; "
    ):
        jit_cuda.compile_shim("sm_90")


def test_figures_are_those_of_the_kernel_itself():
    def told(name, registers, nbytes):
        spills = f"{nbytes} bytes stack frame, {nbytes} bytes spill stores, {nbytes} bytes spill loads"
        return f"ptxas info : Function properties for {name}\n {spills}\nptxas info : Used {registers} registers\n"

    kernel = Kernel(b"", told("called", 7, 0) + told(ENTRY, 100, 12))
    assert (kernel.registers, kernel.spilled, kernel.local) == (100, 24, 12)


def test_assemblers_that_say_nothing_are_noticed():
    with pytest.raises(RuntimeError, match="the CUDA linker does not tell"):
        _ = Kernel(b"", "ptxas info : 0 bytes gmem").registers


def test_numba_is_left_as_it_was():
    from numba.cuda import compiler, dispatcher

    before = compiler.get_current_device, dispatcher.get_current_device
    with jit_cuda._architecture("sm_103"):
        assert compiler.get_current_device().compute_capability == (10, 3)
    assert (compiler.get_current_device, dispatcher.get_current_device) == before


@pytest.mark.parametrize(
    ("variable", "value"),
    [("NUMBA_CUDA_DEBUGINFO", "1"), ("NUMBA_OPT", "0"), ("NUMBA_ENABLE_CUDASIM", "1"), ("NUMBA_FORCE_CUDA_CC", "8.0")],
)
def test_what_keeps_numba_from_making_kernels(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(
        ArgumentError, match=f"^{variable} is {value}, expected it unset while nvcoll compiles its kernels; "
    ):
        jit_cuda.compile_kernel(*KEY)
