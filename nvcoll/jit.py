"""Kernel text, protocol and target become machine code, and machine code with arguments becomes a Plan.

The only file that knows Numba's internals. Numba turns the text into LLVM code; from there llvmlite makes an object
file, which is kept on disk and loaded without Numba the next time.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from nvcoll.codecache import CodeCache, digest_of
from nvcoll.errors import ArgumentError, DatatypeError

ENTRY = "nvcoll_entry"
C_FUNCTIONS = {"memcpy", "memmove", "memset"}
"""What compiled code may call besides what it is handed."""
HALVES = {"float16", "float8_e4m3fn", "float8_e5m2"}
"""Datatypes that are converted by way of float16."""
NUMBA_SETTINGS = {
    "DISABLE_JIT": "NUMBA_DISABLE_JIT",
    "ENABLE_PROFILING": "NUMBA_ENABLE_PROFILING",
    "DEBUGINFO_DEFAULT": "NUMBA_DEBUGINFO",  # set by the one before, too
}
"""Settings of Numba with which it makes no kernels."""
VERB_SOURCES = tuple(f"device/{name}.py" for name in ("host", "common", "simple", "low_latency", "groups", "verbs"))
PACK_SOURCES = ("device/packs.py", "device/reduce.py")


class Compiler:
    """Compiles texts for the host target, and keeps the machine code.

    Parameters
    ----------
    cache_dir
        Where object files are kept between processes; None: nowhere.
    """

    def __init__(self, cache_dir: Path | None) -> None:
        self._cache = CodeCache(cache_dir)
        self._engines: list[Any] = []
        self._addresses: dict[str, int] = {}
        self._lock = threading.Lock()

    def schedule(self, name: str, protocol: str) -> int:
        """Return the address of an algorithm's kernel."""
        from nvcoll.algorithms import ALGORITHMS

        sources = (*VERB_SOURCES, *ALGORITHMS[name].sources)
        return self._address(f"{name}-{protocol}", lambda: _schedule_text(name, protocol), sources, 1)

    def reducer(self, op: str, datatype: str) -> int:
        """Return the address of ``reduce(to, also, left, right, count)``."""
        from nvcoll.device.canonical import canonical

        op, datatype = canonical(op, datatype)
        return self._address(f"reduce-{op}-{datatype}", lambda: _packs().reducer(op, datatype), PACK_SOURCES, 5)

    def widener(self, datatype: str) -> int:
        """Return the address of ``widen(to, source, count, _)``."""
        return self._address(f"widen-{datatype}", lambda: _converting(datatype).widener(datatype), PACK_SOURCES, 4)

    def finisher(self, datatype: str, accumulator: str, average: bool) -> int:
        """Return the address of ``finish(to, source, count, ranks)``."""
        name = f"finish-{datatype}-{'average' if average else 'round'}"
        text = lambda: _converting(datatype).finisher(datatype, accumulator, average)  # noqa: E731
        return self._address(name, text, PACK_SOURCES, 4)

    def _address(self, name: str, text: Callable[[], Any], sources: tuple[str, ...], arguments: int) -> int:
        with self._lock:  # ranks that are threads share a compiler
            if name not in self._addresses:
                self._addresses[name] = self._load(self._object(name, text, sources, arguments))
            return self._addresses[name]

    def _object(self, name: str, text: Callable[[], Any], sources: tuple[str, ...], arguments: int) -> bytes:
        """Return the object file of a text, from the cache if it is there."""
        digest = digest_of(_platform(), "jit.py", *sources)

        def compiled() -> bytes:
            _refuse_settings()
            return compile_host(text(), arguments)

        return self._cache.get(f"{name}-{digest}.o", compiled)

    def _load(self, code: bytes) -> int:
        llvm, machine = _llvm()
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine())
        engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        engine.finalize_object()
        self._engines.append(engine)  # the engine owns the memory of the code
        return int(engine.get_function_address(ENTRY))


def _packs() -> Any:
    from nvcoll.device import packs

    return packs


def _converting(datatype: str) -> Any:
    """Return `_packs`, if this processor converts a datatype: where it cannot, LLVM ends the process."""
    import platform

    if datatype in HALVES and platform.machine() in ("x86_64", "AMD64"):
        from numba.core import config

        llvm, _ = _llvm()
        features = config.CPU_FEATURES
        if features is None:
            features = "" if config.CPU_NAME else llvm.get_host_cpu_features().flatten()
        if "+f16c" not in features.split(","):
            raise DatatypeError(
                f"{datatype} needs instructions (F16C) which this processor lacks, or NUMBA_CPU_NAME leaves out; "
                "unset that, or pass a copy in float32 or bfloat16"
            )
    return _packs()


def _refuse_settings() -> None:
    """Raise ArgumentError where Numba was told to leave functions as they are, or to add to them."""
    from numba.core import config

    for name, variable in NUMBA_SETTINGS.items():
        if getattr(config, name, 0):
            raise ArgumentError(
                f"{variable} is set, expected it unset while nvcoll compiles its kernels; run the program once without "
                "it, and they are kept"
            )


def _schedule_text(name: str, protocol: str) -> Any:
    from nvcoll.algorithms import ALGORITHMS
    from nvcoll.device import verbs

    algorithm = ALGORITHMS[name]
    return verbs.entry(*_vocabulary(protocol), algorithm.text, algorithm.rounds)


@cache
def _vocabulary(protocol: str) -> tuple[Any, Any]:
    """Return the target's primitives and the verbs: made once, so that Numba compiles each verb once."""
    from nvcoll.device import verbs

    target, common = _common()
    return target, verbs.vocabulary(target, common, protocol)


@cache
def _common() -> tuple[Any, Any]:
    from nvcoll.device import common, host

    target = host.primitives()
    return target, common.verbs(target)


@cache
def _llvm() -> tuple[Any, Callable[[], Any]]:
    """Return llvmlite's binding and a maker of target machines for this processor."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_default_triple()
    cpu, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()

    def machine() -> Any:
        return target.create_target_machine(
            cpu=cpu, features=features, opt=3, jit=True, reloc="pic", codemodel="jitdefault"
        )

    return llvm, machine


@contextmanager
def _left_unoptimised() -> Iterator[None]:
    """Let Numba leave what it joins as it is: it would optimise every verb by itself, and all is optimised below.

    That is a fifth of the time that a kernel takes. Where Numba has no such step any more, nothing is left out.
    """
    from numba.core.codegen import CPUCodeLibrary
    from numba.core.compiler_lock import global_compiler_lock

    name = "_optimize_final_module"
    with global_compiler_lock:  # nobody else's functions are compiled meanwhile
        kept: Any = getattr(CPUCodeLibrary, name, None)
        if kept is None:
            yield
            return
        setattr(CPUCodeLibrary, name, lambda library: None)
        try:
            yield
        finally:
            setattr(CPUCodeLibrary, name, kept)


def compile_host(text: Any, arguments: int) -> bytes:
    """Compile a function of 64-bit integers to an object file whose entry point is `ENTRY`.

    Numba's functions return a status beside their result and have paths that raise. Texts here never raise, and once
    all functions but the entry are internal to the module, the optimiser sees that and removes those paths; what is
    left needs nothing of Numba when it runs.
    """
    from numba import cfunc, types

    llvm, machine = _llvm()
    with _left_unoptimised():
        compiled: Any = cfunc(types.int64(*[types.int64] * arguments), error_model="numpy")(text)
    module = llvm.parse_assembly(compiled.inspect_llvm().replace(compiled._wrapper_name, ENTRY))
    for function in module.functions:
        if not function.is_declaration and function.name != ENTRY:
            function.linkage = "internal"
    target = machine()
    builder = llvm.create_pass_builder(target, llvm.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(module, builder)
    needed = {f.name for f in module.functions if f.is_declaration and not f.name.startswith("llvm.")} - C_FUNCTIONS
    if needed:
        raise RuntimeError(f"kernel needs {sorted(needed)}: its text has a path that raises; see nvcoll.device")
    return bytes(target.emit_object(module))


@cache
def _platform() -> str:
    """Return what machine code depends on besides its text: the compilers, the processor, the structs."""
    import platform
    from importlib.metadata import version

    llvm, _ = _llvm()
    told = [platform.python_version(), version("numba"), version("llvmlite"), llvm.get_default_triple()]
    told += [llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten(), _fields()]
    return "\n".join(told)


def _fields() -> str:
    from nvcoll._plan import CALL_FIELDS, WORLD_FIELDS

    return " ".join(CALL_FIELDS + WORLD_FIELDS)
