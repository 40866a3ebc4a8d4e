"""Kernel text, protocol, operator and datatype become a cubin for a GPU architecture; no GPU is needed for that.

What `nvcoll.jit` is for the host. Numba turns the text into PTX, the linker of the CUDA toolkit turns that into
machine code, which is kept on disk.
"""

import platform
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

from nvcoll import settings
from nvcoll.codecache import PACKAGE, CodeCache, digest_of
from nvcoll.errors import ArgumentError, BootstrapError
from nvcoll.jit import ENTRY
from nvcoll.ops import DATATYPES

TEXTS = (
    "common", "reduce", "groups", "cuda/layout", "cuda/ptx", "cuda/packs", "cuda/common", "cuda/simple",
    "cuda/low_latency", "cuda/opening", "cuda/remote", "cuda/together", "cuda/verbs",
)  # fmt: skip
SOURCES = ("jit_cuda.py", *(f"device/{name}.py" for name in TEXTS))
"""Files that every kernel depends on."""
SHIM = "device/cuda/shim.cu"
"""What kernels that reach far ranks are linked with."""
THREADS = 512
"""Most threads of a block: kernels are compiled so that their registers suffice for as many."""
OVERLAPS = (9, 0)
"""First compute capability on which a kernel can be brought in while the one before it runs."""
NUMBA_SETTINGS = {
    "NUMBA_CUDA_DEBUGINFO": ("0",),
    "NUMBA_ENABLE_CUDASIM": ("0",),
    "NUMBA_FORCE_CUDA_CC": (),
    "NUMBA_OPT": ("1", "2", "3", "max"),
}
"""Settings of Numba with which it makes no kernels, or none for the GPU that there is -> values that do no harm."""
_numba = threading.Lock()


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel. Figures are those of the kernel itself, without the functions that it calls.

    Attributes
    ----------
    cubin : bytes
        Machine code, whose entry point is `ENTRY`.
    log : str
        What the linker says of it.
    """

    cubin: bytes
    log: str

    @property
    def registers(self) -> int:
        """Registers of a thread."""
        return self._figure(r"Used (\d+) registers")

    @property
    def spilled(self) -> int:
        """Bytes of local memory that a thread stores and loads because registers do not suffice."""
        return self._figure(r"(\d+) bytes spill stores") + self._figure(r"(\d+) bytes spill loads")

    @property
    def local(self) -> int:
        """Bytes of local memory of a thread, spilled or not."""
        return self._figure(r"(\d+) bytes stack frame")

    def _figure(self, pattern: str) -> int:
        own = self.log.partition(f"Function properties for {ENTRY}\n")[2]  # after those of functions that it calls
        found = re.search(pattern, own)
        if found is None:
            raise RuntimeError(f"the CUDA linker does not tell {pattern!r}:\n{self.log}")
        return int(found[1])


class CubinCache:
    """Kernels by name, compiled once and kept on disk.

    Parameters
    ----------
    folder
        Where; None: nowhere.
    """

    def __init__(self, folder: Path | None) -> None:
        self._files = CodeCache(folder)

    def get(
        self, algorithm: str, protocol: str, op: str, datatype: str, arch: str, deep: bool = True, remote: bool = False
    ) -> bytes:
        """Return a kernel's cubin."""
        from nvcoll.algorithms import ALGORITHMS

        key = (algorithm, protocol, op, datatype, arch, deep)
        sources = (*SOURCES, *ALGORITHMS[algorithm].sources)
        start = f"{algorithm}-{protocol}-{op}-{datatype}-{'deep' if deep else 'shallow'}"
        if not remote:
            return self._files.get(
                f"{start}-{arch}-{digest_of(_platform(), *sources)}.cubin", lambda: compile_kernel(*key).cubin
            )
        return self._files.get(
            f"{start}-remote-{arch}-{digest_of(_far_platform(), *sources, SHIM)}.cubin",
            lambda: compile_kernel(*key, self._shim(arch)).cubin,
        )

    def _shim(self, arch: str) -> bytes:
        """Return what kernels that reach far ranks are linked with; nobody needs it whose kernels are kept."""
        return self._files.get(f"shim-{arch}-{digest_of(_far_platform(), SHIM)}.ltoir", lambda: compile_shim(arch))


def text_digest() -> str:
    """Return a number that changes with the text of any kernel."""
    from nvcoll.algorithms import ALGORITHMS

    return digest_of("", *SOURCES, *chain.from_iterable(one.sources for one in ALGORITHMS.values()))


def toolchain() -> dict[str, str]:
    """Return the versions of what makes machine code of text, by name; empty for what is not installed."""
    packages = ("numba-cuda", "numba", "llvmlite", "cuda-core", "nvidia-nvjitlink", "nvidia-cuda-nvcc", "nvidia-nvvm")
    return {"Python": platform.python_version()} | {package: _version(package) for package in packages}


@cache
def _platform() -> str:
    """Return what machine code depends on besides its text and the architecture: the compilers, the arguments."""
    from nvcoll._plan import DEVICE_FIELDS

    return "\n".join([*map(" ".join, toolchain().items()), " ".join(DEVICE_FIELDS)])


def _far_platform() -> str:
    """Return the same for what is linked with NVSHMEM's device part."""
    return f"{_platform()}\n{_version('nvidia-nvshmem-cu13')}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def compile_kernel(
    algorithm: str, protocol: str, op: str, datatype: str, arch: str, deep: bool = True, shim: bytes | None = None
) -> Kernel:
    """Compile an algorithm's kernel.

    Parameters
    ----------
    algorithm, protocol, op, datatype
        Names.
    arch
        Architecture, ``"sm_90"`` for one.
    deep
        Whether a thread may have several packs under way at a time; types of one byte never do, nor does what would
        need more registers than there are. The ranks of a world have the same compilers, and so the same kernels.
    shim
        What `compile_shim` gives, for a kernel that reaches far ranks.
    """
    _refuse_settings()
    kernel = assemble(kernel_ptx(algorithm, protocol, op, datatype, arch, deep, shim), arch)
    if deep and kernel.spilled:
        return compile_kernel(algorithm, protocol, op, datatype, arch, False, shim)
    return kernel


def compile_shim(arch: str) -> bytes:
    """Compile what kernels call of NVSHMEM, for an architecture, to what the linker can inline. Takes seconds."""
    from cuda.core import Program, ProgramOptions
    from cuda.pathfinder import find_nvidia_header_directory

    folders = {name: find_nvidia_header_directory(name) for name in ("nvshmem", "cudart", "cccl")}
    missing = [name for name, folder in folders.items() if folder is None]
    if missing:
        raise BootstrapError(
            f"Init: kernels that reach other nodes need the headers of {', '.join(missing)}; "
            'pip install "nvcoll[cuda]" "cuda-toolkit[cccl,cudart]"'
        )
    options = ProgramOptions(
        arch=arch, std="c++17", include_path=list(folders.values()), relocatable_device_code=True,
        link_time_optimization=True,
    )  # fmt: skip
    return bytes(Program((PACKAGE / SHIM).read_text(), "c++", options).compile("ltoir").code)


def _refuse_settings() -> None:
    """Raise ArgumentError where Numba was told to make no kernels for GPUs, or other ones."""
    for variable, harmless in NUMBA_SETTINGS.items():
        value = settings.foreign(variable)
        if value is not None and value not in harmless:
            raise ArgumentError(
                f"{variable} is {value}, expected it unset while nvcoll compiles its kernels; run the program once "
                "without it, and they are kept"
            )


def assemble(ptx: str, arch: str) -> Kernel:
    """Turn PTX of this architecture, or of an older one, into machine code."""
    from cuda.core import Linker, LinkerOptions, ObjectCode

    # What comes from the driver's own cache has no figures.
    options = LinkerOptions(arch=arch, ptxas_options=["-v"], no_cache=True)
    linker = Linker(ObjectCode.from_ptx(ptx.encode()), options=options)
    return Kernel(bytes(linker.link("cubin").code), linker.get_info_log() or "")


def kernel_ptx(
    algorithm: str, protocol: str, op: str, datatype: str, arch: str, deep: bool = True, shim: bytes | None = None
) -> str:
    """Return the PTX of an algorithm's kernel, whose entry point is `ENTRY`."""
    from numba import cuda

    from nvcoll.algorithms import ALGORITHMS
    from nvcoll.device.cuda import packs, verbs
    from nvcoll.device.cuda.layout import deepens

    kind = DATATYPES[datatype]
    accumulator = DATATYPES[kind.accumulate]
    with _numba, _architecture(arch):
        jit = cuda.jit(device=True)
        a = packs.arithmetic(op, datatype, accumulator.name, kind.itemsize, accumulator.itemsize)
        schedule = ALGORITHMS[algorithm]
        v = verbs.vocabulary(jit, a, protocol, deep and deepens(kind.itemsize), remote=shim is not None)
        text = schedule.text_for("cuda")
        kernel = verbs.entry(jit, v, a, text, schedule.rounds, overlaps(arch), schedule.opens)
        return ptx_of(f"{algorithm}/{protocol}", kernel, arch, shim)


def ptx_of(name: str, text: Any, arch: str, shim: bytes | None = None) -> str:
    """Return the PTX of a kernel whose parameters are the fields of a call; its entry point is `ENTRY`."""
    from numba import cuda
    from numba.cuda import types

    from nvcoll._plan import DEVICE_FIELDS

    signature = types.void(*[types.int64] * len(DEVICE_FIELDS))
    code, _ = cuda.compile(
        text, signature, device=False, abi="numba", cc=_capability(arch), output="ltoir" if shim else "ptx",
        launch_bounds=THREADS,
    )  # fmt: skip
    ptx = str(code) if shim is None else _merge(code, shim, arch)
    entry = re.search(r"\.visible \.entry (\w+)\(", ptx)
    if entry is None:
        raise RuntimeError(f"Numba made no kernel of {name}")
    return ptx.replace(entry[1], ENTRY)


def _merge(kernel: bytes, shim: bytes, arch: str) -> str:
    """Optimise a kernel and the shim as one; PTX, not a cubin, since a kernel has a name of Numba's until then."""
    from cuda.core import Linker, LinkerOptions, ObjectCode

    options = LinkerOptions(arch=arch, link_time_optimization=True, ptx=True)
    linked = Linker(ObjectCode.from_ltoir(kernel), ObjectCode.from_ltoir(shim), options=options).link("ptx")
    return bytes(linked.code).decode().rstrip("\0")


def overlaps(arch: str) -> bool:
    """Tell whether GPUs of an architecture can bring a kernel in while the one before it runs."""
    return _capability(arch) >= OVERLAPS


def _capability(arch: str) -> tuple[int, int]:
    return divmod(int(re.sub(r"\D", "", arch)), 10)


@contextmanager
def _architecture(arch: str) -> Iterator[None]:
    """Let Numba compile for an architecture: it would ask the current device, of which there may be none."""
    from numba.cuda import compiler, dispatcher

    class Device:
        compute_capability = _capability(arch)

    kept = {module: module.get_current_device for module in (compiler, dispatcher)}
    for module in kept:
        module.get_current_device = Device
    try:
        yield
    finally:
        for module, original in kept.items():
            module.get_current_device = original
