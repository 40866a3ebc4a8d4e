"""Processes with a GPU each: NVSHMEM's symmetric memory, one reservation a rank, mapped by the peers that can.

NVSHMEM starts over nvcoll's own exchange, with a unique id of rank 0, so that it needs no MPI. It counts who starts it:
where other code of the process did, its start is used, and its end is left to it. A GPU may serve several ranks;
NVSHMEM's own collectives then end the process, so that none is called here but those which do without.
"""

import contextlib
import ctypes
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nvcoll import _topology
from nvcoll import settings as settings_
from nvcoll.backends import driver
from nvcoll.backends.agreement import Facts, Start, plan, size_of
from nvcoll.backends.group import Member, agree
from nvcoll.backends.looking import within
from nvcoll.errors import AllocationError, BootstrapError, DeviceError, Error, TimeoutError

CLOSING = b"c" + bytes(8)
"""What ranks say that close; the heap's own messages have the same form, so that a rank which allocates notices."""


@dataclass(frozen=True)
class Found:
    """The parts of NVSHMEM that this process would use.

    Attributes
    ----------
    package, library, headers
        Versions of nvshmem4py, of the host library, and of what kernels are linked with; None: not installed.
    library_path, headers_path
        Where the latter two are.
    """

    package: str
    library: str
    library_path: str
    headers: str | None
    headers_path: str | None


def find() -> Found:
    """Return what there is of NVSHMEM. Needs no GPU.

    Raises
    ------
    BootstrapError
        Something is missing, or the parts do not fit each other.
    """
    try:
        from cuda.pathfinder import find_nvidia_header_directory, load_nvidia_dynamic_lib
        from nvshmem import __version__, bindings
    except ImportError as exc:
        raise BootstrapError(f'nvshmem4py is not installed ({exc}); pip install "nvcoll[cuda]"') from exc
    try:
        path = load_nvidia_dynamic_lib("nvshmem_host").abs_path
    except RuntimeError as exc:
        raise BootstrapError(f"libnvshmem_host does not load ({exc}); pip install nvidia-nvshmem-cu13") from exc
    parts = [ctypes.c_int() for _ in range(3)]
    try:
        bindings.vendor_get_version_info(*(ctypes.addressof(part) for part in parts))
    except Exception as exc:  # the bindings' own class: a library that lacks what they know
        raise BootstrapError(
            f"nvshmem4py {__version__} does not fit the host library at {path} ({type(exc).__name__}: {exc}); install "
            "both anew: pip install --upgrade --force-reinstall nvshmem4py-cu13 nvidia-nvshmem-cu13"
        ) from exc
    library = ".".join(str(part.value) for part in parts)
    folder = find_nvidia_header_directory("nvshmem")
    found = Found(str(__version__), library, str(path), _headers(folder), folder and str(folder))
    if found.headers is not None and _series(found.headers) != _series(found.library):
        raise BootstrapError(
            f"NVSHMEM {found.library} was found at {found.library_path} (host library), {found.headers} at "
            f"{found.headers_path} (device part); install one: pip install --force-reinstall nvidia-nvshmem-cu13"
        )
    return found


def _headers(folder: str | None) -> str | None:
    """Return the version that the headers tell, which lie beside the device library."""
    try:
        lines = Path(folder or "/nowhere", "non_abi/nvshmem_version.h").read_text().splitlines()
    except OSError:
        return None
    words = {name: value for _, name, value in (line.split() for line in lines if len(line.split()) == 3)}
    return ".".join(words.get(f"NVSHMEM_VENDOR_{part}_VERSION", "?") for part in ("MAJOR", "MINOR", "PATCH"))


def _series(version: str) -> list[str]:
    return version.split(".")[:2]


def usable() -> str | None:
    """Return why this process cannot use NVSHMEM, or None. Makes no context; without a driver it imports nothing."""
    reason = driver.available()
    if reason is not None:
        return reason
    try:
        find()
    except BootstrapError as exc:
        return str(exc)
    return None


class SymmetricMemory(Member):
    """One rank's view of the heaps of all ranks, on their GPUs. Collective over `exchange`.

    Parameters
    ----------
    exchange
        Byte exchange among all ranks.
    topology
        Which of them share a host.
    settings
        ``device``, ``heap`` and ``timeout`` are looked at.

    Attributes
    ----------
    device
        The GPU of this rank.
    gpus
        UUIDs of the GPUs of all ranks.
    """

    lingers = False  # NVSHMEM's end is collective, and without it there would be no new start

    def __init__(self, exchange: Any, topology: Any, settings: Any) -> None:
        self._base = 0
        self._ours = self._starting = False
        self.exchange = exchange
        self.device: driver.Device | None = None
        start = self._agree(topology, settings)
        super().__init__(exchange, tuple(range(exchange.size)), exchange.rank, start.extent, -1)
        with settings_.lend(start.variables):
            if start.stage < 2:
                self._start_together(start.stage, settings.timeout)
        try:
            self._together("NVSHMEM cannot be used", self._check_ranks)
            self._together("NVSHMEM has no memory", self._reserve, AllocationError)
        except Error:
            self._base = 0  # a rank may have none, and to free would wait for it; all goes when NVSHMEM ends
            self.close()
            raise
        self.addresses = self._addresses()

    def address(self, place: int) -> int:
        """Return where the heap of a rank begins, as seen from this GPU; 0 where it cannot be loaded from."""
        return self.addresses[place]

    def take(self, offset: int, nbytes: int) -> None:
        """Check that a range lies in the heap: its memory was taken with the reservation."""
        if not 0 <= offset <= offset + nbytes <= self.extent:
            raise ValueError(f"take: {nbytes} bytes at {offset} are not in the heap of {self.extent} bytes")

    def give(self, offset: int, nbytes: int) -> None:
        """Check that a range lies in the heap: its memory goes with the reservation."""
        self.take(offset, nbytes)

    def close(self) -> None:
        """Free the memory and end NVSHMEM, if all ranks do so. If one is gone, both are left to the process's end.

        Both are collective inside NVSHMEM, without a deadline: they would wait for the lost rank for ever.
        """
        base, ours, self._base, self._ours = self._base, self._ours, 0, False
        if not (base or ours) or self.device is None:
            return
        self.exchange.verb = "Finalize"
        try:
            together = set(self.exchange.allgather(CLOSING)) == {CLOSING}
        except Error:
            together = False
        if together:
            try:
                with self.device:
                    _end(base, ours)
            finally:
                self.device.close()

    def _agree(self, topology: Any, settings: Any) -> Start:
        """Let every rank take its GPU and tell what it finds; return how NVSHMEM starts."""

        def look() -> bytes:
            self.device = _device(settings.device, topology.host_rank)
            return json.dumps(asdict(_look(self.device))).encode()

        try:
            answers = self._together("NVSHMEM cannot be used", look)
            everyone = [Facts(**json.loads(answer)) for answer in answers]
            self.gpus = tuple(facts.gpu for facts in everyone)
            return plan(everyone, topology.host_sizes, settings.heap)
        except Error:
            if self.device is not None:
                self.device.close()  # `look` took the context
            raise

    def _together(self, what: str, act: Callable[[], bytes], kind: type[Error] = BootstrapError) -> list[bytes]:
        """Let every rank act, and return what they gave; raise on all if one failed."""
        data, problem = b"", ""
        try:
            data = act()
        except Exception as exc:  # whatever it is, the other ranks wait to hear of it
            problem = str(exc) if isinstance(exc, Error) else f"{type(exc).__name__}: {exc}"
        return agree(self.exchange, data, problem, what, kind)

    def _start_together(self, stage: int, timeout: float) -> None:
        what = "NVSHMEM gives no unique id"
        try:
            identity = self._together(what, lambda: _unique_id(self.exchange.rank, stage))[0]
            what = "NVSHMEM does not start"
            self._together(what, lambda: self._start(identity, timeout))
        except Error:
            if not self._starting and self.device is not None:  # else a thread still uses the context
                self.device.close()
            raise

    def _start(self, identity: bytes, timeout: float) -> bytes:
        """Start NVSHMEM on a thread of its own: it pins the calling thread to the CPUs near the GPU, and may hang."""

        def start() -> None:
            from cuda import core
            from nvshmem import bindings
            from nvshmem import core as nvshmem

            uid = nvshmem.get_unique_id(empty=True)
            ctypes.memmove(uid.ptr, identity, bindings.uniqueid_dtype.itemsize)
            assert self.device is not None
            with self.device:
                try:
                    nvshmem.init(
                        device=core.Device(self.device.ordinal),
                        uid=uid,
                        rank=self.exchange.rank,
                        nranks=self.exchange.size,
                        initializer_method="uid",
                    )
                except Exception as exc:  # its own class, or the bindings'
                    raise BootstrapError(f"{type(exc).__name__}: {exc}; NVSHMEM_DEBUG=INFO tells more") from exc

        self._starting = True
        try:
            within(timeout, "NVSHMEM", start)
        except Exception as exc:
            self._starting = isinstance(exc, TimeoutError)
            raise
        self._starting = False
        self._ours = True
        return b""

    def _check_ranks(self) -> bytes:
        from nvshmem import bindings

        mine, runs = (self.exchange.rank, self.exchange.size), (bindings.my_pe(), bindings.n_pes())
        if mine != runs:
            raise BootstrapError(
                f"it was started by other code, this rank being {runs[0]} of {runs[1]}, to nvcoll it is {mine[0]} of "
                f"{mine[1]}; number the ranks alike"
            )
        return b""

    def _reserve(self) -> bytes:
        from nvshmem import bindings

        assert self.device is not None
        with self.device:
            # Not `nvshmem.core.buffer`: its objects raise at the process's end if they could not be freed before.
            self._base = bindings.malloc(self.extent)
        if not self._base:
            raise AllocationError(
                f"a heap takes {self.extent} bytes; free memory of the GPU, lower NVCOLL_HEAP or raise "
                "NVSHMEM_SYMMETRIC_SIZE"
            )
        return b""

    def _addresses(self) -> list[int]:
        from nvshmem import bindings

        assert self.device is not None
        with self.device:
            return [self._base if place == self.place else bindings.ptr(self._base, place) for place in self.members]


_introduced: list[int] = []
"""Modules whose kernels use NVSHMEM as it runs."""


def introduce(module: int) -> None:
    """Let the kernels of a loaded module, which were linked with NVSHMEM's device part, use NVSHMEM as it runs."""
    from nvshmem import bindings

    try:
        status = bindings.cumodule_init(module)
    except Exception as exc:  # the bindings' own class
        raise BootstrapError(_not_introduced(f"{type(exc).__name__}: {exc}")) from exc
    if status:
        raise BootstrapError(_not_introduced(f"status {status}"))
    _introduced.append(module)


def _not_introduced(fact: str) -> str:
    return f"Init: NVSHMEM does not take kernels that reach other nodes ({fact}); NVSHMEM_DEBUG=INFO tells more"


def unfit_transport() -> str | None:
    """Return why kernels cannot use the network as NVSHMEM was told to, or None.

    NVSHMEM's headers leave out what posts to the adapter from the GPU itself when they are compiled at run time.
    """
    chosen = (settings_.foreign("NVSHMEM_REMOTE_TRANSPORT") or "").lower()
    if chosen == "gpunetio":
        return "NVSHMEM_REMOTE_TRANSPORT=gpunetio is not for kernels compiled at run time; unset it"
    if (settings_.foreign("NVSHMEM_IB_ENABLE_IBGDA") or "0").lower() not in {"0", "false", "no", "off"}:
        return "NVSHMEM_IB_ENABLE_IBGDA is not for kernels compiled at run time; unset it"
    return None


def _device(wanted: int | None, host_rank: int) -> driver.Device:
    """Return the GPU of a rank: the one it wants, else the ranks of a host take turns."""
    reason = usable()
    if reason is not None:
        raise BootstrapError(reason)
    gpus = driver.count()
    if wanted is not None and wanted >= gpus:
        raise BootstrapError(f"NVCOLL_DEVICE: there is no GPU {wanted}, this process may use {gpus}; count from 0")
    return driver.Device(host_rank % gpus if wanted is None else wanted)


def _look(device: driver.Device) -> Facts:
    from nvshmem import bindings

    found = find()
    with device:
        free, total = driver.memory_info()
    chosen = ("NVSHMEM_REMOTE_TRANSPORT", "NVSHMEM_DISABLE_P2P", "NVSHMEM_IB_ENABLE_IBGDA")
    return Facts(
        gpu=driver.uuid(device.ordinal),
        total=total,
        free=free,
        library=found.library,
        library_path=found.library_path,
        stage=min(2, bindings.init_status()),
        limit=size_of(settings_.foreign("NVSHMEM_SYMMETRIC_SIZE")),
        on_host=(settings_.foreign("NVSHMEM_HEAP_KIND") or "").upper() == "SYSMEM",
        wired=bool(_topology.nics()) or any(settings_.foreign(name) for name in chosen),
    )


def _unique_id(rank: int, stage: int) -> bytes:
    """Return the id by which the ranks find rank 0; the others, and those that know each other, need none of theirs."""
    from nvshmem import bindings
    from nvshmem import core as nvshmem

    uid = nvshmem.get_unique_id(empty=rank != 0 or stage > 0)
    return ctypes.string_at(uid.ptr, bindings.uniqueid_dtype.itemsize)


def _end(base: int, ours: bool) -> None:
    from nvshmem import bindings
    from nvshmem import core as nvshmem

    try:
        with contextlib.ExitStack() as ends:  # the last goes first, and each does, whatever another one raises
            if ours:
                ends.callback(nvshmem.finalize)
                ends.callback(_forget_modules)
            if base:
                ends.callback(bindings.free, base)
    except Exception as exc:  # its own class, or the bindings'
        raise DeviceError(
            f"Finalize: NVSHMEM does not end ({type(exc).__name__}: {exc}); NVSHMEM_DEBUG=INFO tells more"
        ) from exc


def _forget_modules() -> None:
    """Let NVSHMEM forget the kernels that were loaded: else the next start would write to where they were."""
    from nvshmem import bindings

    while _introduced:
        with contextlib.suppress(Exception):  # the bindings' own class; it may be too late for one
            bindings.cumodule_finalize(_introduced.pop())
