"""Machine code and its cache: cold, warm, damaged, in folders that cannot be used, for other versions of anything."""

import ctypes
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import nvcoll
from nvcoll import codecache, jit
from nvcoll.algorithms import ALGORITHMS
from nvcoll.planning import candidates

FUNCTION = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 4)
REDUCER = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 5)


@pytest.fixture(autouse=True)
def fresh_caches():
    """Forget what this process remembers of digests and warnings, before and after."""
    remembered = (codecache.digest_of, jit._platform, codecache._warn_no_cache)
    for function in remembered:
        function.cache_clear()
    yield
    for function in remembered:
        function.cache_clear()


@pytest.fixture
def compiled(monkeypatch):
    """What was compiled, rather than found: grows with every compilation."""
    calls, compile_host = [], jit.compile_host

    def counted(text, arguments):
        calls.append(text)
        return compile_host(text, arguments)

    monkeypatch.setattr(jit, "compile_host", counted)
    return calls


def reduces(compiler):
    """Whether the compiler gives a kernel that ANDs bytes."""
    left, right = np.arange(100, dtype=np.uint8), np.full(100, 0x55, np.uint8)
    result = np.zeros_like(left)
    REDUCER(compiler.reducer("BAND", "uint8"))(
        result.ctypes.data, result.ctypes.data, left.ctypes.data, right.ctypes.data, 100
    )
    return (result == left & right).all()


def objects(folder):
    return sorted(path for path in folder.iterdir() if path.suffix == ".o")


class TestCache:
    def test_cold_it_compiles_and_keeps_a_file_for_the_owner_only(self, tmp_path, compiled):
        folder = tmp_path / "some" / "where"
        assert reduces(jit.Compiler(folder))
        assert len(compiled) == 1
        [path] = objects(folder)
        assert path.name.startswith("reduce-BAND-uint8-")
        assert folder.stat().st_mode & 0o777 == 0o700
        assert path.stat().st_mode & 0o777 == 0o600
        assert {entry.name for entry in folder.iterdir()} == {path.name, "lock"}

    def test_warm_it_does_not(self, tmp_path, compiled):
        assert reduces(jit.Compiler(tmp_path))
        assert reduces(jit.Compiler(tmp_path))
        assert len(compiled) == 1

    def test_a_compiler_loads_each_kernel_once(self, tmp_path, monkeypatch):
        compiler = jit.Compiler(tmp_path)
        address = compiler.reducer("BAND", "uint8")
        monkeypatch.setattr(codecache, "_read", None)  # nobody looks at files any more
        assert compiler.reducer("BAND", "uint8") == compiler.reducer("BAND", "int8") == compiler.reducer("BAND", "bool")
        assert compiler.reducer("BAND", "uint8") == address

    def test_threads_compile_once(self, tmp_path, compiled):
        compiler, found = jit.Compiler(tmp_path), []
        threads = [threading.Thread(target=lambda: found.append(compiler.reducer("BAND", "uint8"))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(compiled) == 1
        assert len(found) == 4
        assert len(set(found)) == 1

    def test_threads_with_caches_of_their_own_make_a_file_once(self, tmp_path):
        """Also when another of them lets go of its lock, on another file, meanwhile."""

        def make():
            made.append(threading.get_ident())
            begun.set()
            time.sleep(0.3)
            return b"code"

        def get():
            found.append(codecache.CodeCache(tmp_path).get("one.o", make))

        made, found, begun = [], [], threading.Event()
        threads = [threading.Thread(target=get) for _ in range(3)]
        threads[0].start()
        assert begun.wait(10)
        codecache.CodeCache(tmp_path).get("other.o", lambda: b"other")
        for thread in threads[1:]:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [b"code"] * 3
        assert len(made) == 1

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Python 3.12: the tests have threads
    def test_a_child_that_was_forked_meanwhile_keeps_nobody_waiting(self, tmp_path):
        def make():
            child.append(os.fork())
            if not child[0]:
                time.sleep(10)
                os._exit(0)
            return b"code"

        child, begun = [], time.monotonic()
        try:
            codecache.CodeCache(tmp_path).get("one.o", make)
            (tmp_path / "one.o").unlink()
            assert codecache.CodeCache(tmp_path).get("one.o", lambda: b"again") == b"again"
            assert time.monotonic() - begun < 8
        finally:
            os.kill(child[0], signal.SIGKILL)
            os.waitpid(child[0], 0)

    @pytest.mark.parametrize(
        "damage",
        [
            lambda code: b"",
            lambda code: code[:20],
            lambda code: code[: codecache.HEADER],
            lambda code: code[:-1],
            lambda code: code + b"\0",
            lambda code: code[:200] + bytes([code[200] ^ 1]) + code[201:],
            lambda code: bytes([code[0] ^ 1]) + code[1:],
            lambda code: bytes(len(code)),
        ],
    )
    def test_a_damaged_file_is_compiled_anew_and_replaced(self, tmp_path, compiled, damage):
        assert reduces(jit.Compiler(tmp_path))
        [path] = objects(tmp_path)
        good = path.read_bytes()
        path.write_bytes(damage(good))
        assert reduces(jit.Compiler(tmp_path))
        assert len(compiled) == 2
        assert codecache._read(path) is not None
        assert reduces(jit.Compiler(tmp_path))
        assert len(compiled) == 2

    def test_a_file_that_cannot_be_written_costs_time_only(self, tmp_path, compiled, monkeypatch):
        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", full)
        for _ in range(2):
            assert reduces(jit.Compiler(tmp_path))
        assert len(compiled) == 2
        assert [entry.name for entry in tmp_path.iterdir()] == ["lock"]  # and no half-written file

    def test_without_a_lock_it_goes_on(self, tmp_path, compiled):
        (tmp_path / "lock").mkdir()
        for _ in range(2):
            assert reduces(jit.Compiler(tmp_path))
        assert len(compiled) == 1


def test_numba_optimises_for_others_as_before(tmp_path):
    from numba import njit
    from numba.core.codegen import CPUCodeLibrary

    before = CPUCodeLibrary._optimize_final_module
    jit.Compiler(tmp_path).schedule("one_shot", "simple")
    assert CPUCodeLibrary._optimize_final_module is before
    assert njit(lambda x: 2 * x + 1)(20) == 41


class TestFoldersThatCannotBeUsed:
    """Kernels are compiled all the same, and one warning says why that takes time."""

    def check(self, folder, compiled, reason):
        why = rf"^kernels are compiled anew in every process: .*{reason}.*; point NVCOLL_CACHE_DIR to a folder of"
        with pytest.warns(RuntimeWarning, match=why) as told:
            assert [reduces(jit.Compiler(folder)) for _ in range(2)] == [True, True]
        assert len(told) == 1
        assert len(compiled) == 2
        assert not folder.is_dir() or not objects(folder)

    def test_a_file_where_the_folder_should_be(self, tmp_path, compiled):
        (tmp_path / "cache").write_text("")
        self.check(tmp_path / "cache", compiled, "cannot be made")

    def test_a_folder_below_a_file(self, tmp_path, compiled):
        (tmp_path / "file").write_text("")
        self.check(tmp_path / "file" / "cache", compiled, "cannot be made")

    def test_a_folder_of_another_user(self, tmp_path, compiled, monkeypatch):
        monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
        self.check(tmp_path, compiled, "belongs to another user")

    def test_a_folder_in_which_anybody_may_write(self, tmp_path, compiled):
        tmp_path.chmod(0o777)
        self.check(tmp_path, compiled, "anybody may write there")

    def test_a_read_only_folder(self, tmp_path, compiled, monkeypatch):
        monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
        self.check(tmp_path, compiled, "is read-only")

    def test_code_that_another_user_left_is_not_run(self, tmp_path, compiled, monkeypatch):
        assert reduces(jit.Compiler(tmp_path))
        monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
        with pytest.warns(RuntimeWarning, match="belongs to another user"):
            assert reduces(jit.Compiler(tmp_path))
        assert len(compiled) == 2

    def test_code_that_another_of_the_group_left_is_not_run(self, tmp_path, compiled, monkeypatch):
        tmp_path.chmod(0o770)
        assert reduces(jit.Compiler(tmp_path))
        with monkeypatch.context() as patched:
            patched.setattr(os, "fstat", lambda _: SimpleNamespace(st_uid=os.geteuid() + 1))
            assert reduces(jit.Compiler(tmp_path))
        assert len(compiled) == 2
        assert reduces(jit.Compiler(tmp_path))
        assert len(compiled) == 2


class TestKeys:
    """A file is found only by the very sources, compilers and processor that it was made with."""

    def digest(self, *sources):
        return codecache.digest_of(jit._platform(), "jit.py", *sources)

    def digests(self):
        codecache.digest_of.cache_clear()
        jit._platform.cache_clear()
        schedules = {name: self.digest(*jit.VERB_SOURCES, *ALGORITHMS[name].sources) for name in ("ring", "nvrar")}
        return schedules | {"packs": self.digest(*jit.PACK_SOURCES)}

    @pytest.mark.parametrize(
        ("source", "changed"),
        [
            ("jit.py", {"ring", "nvrar", "packs"}),
            ("algorithms/ring.py", {"ring"}),
            ("algorithms/_registry.py", {"ring", "nvrar"}),
            ("algorithms/_inside_nodes.py", {"ring", "nvrar"}),
            ("device/common.py", {"ring", "nvrar"}),
            ("device/host.py", {"ring", "nvrar"}),
            ("device/low_latency.py", {"ring", "nvrar"}),
            ("device/simple.py", {"ring", "nvrar"}),
            ("device/verbs.py", {"ring", "nvrar"}),
            ("device/packs.py", {"packs"}),
            ("device/reduce.py", {"packs"}),
            ("comm.py", set()),
        ],
    )
    def test_sources(self, tmp_path, monkeypatch, source, changed):
        before = self.digests()
        shutil.copytree(codecache.PACKAGE, tmp_path / "nvcoll", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        monkeypatch.setattr(codecache, "PACKAGE", tmp_path / "nvcoll")
        assert self.digests() == before
        with (tmp_path / "nvcoll" / source).open("a") as file:
            file.write("\n")
        after = self.digests()
        assert {name for name in before if before[name] != after[name]} == changed

    def test_no_source_is_forgotten(self):
        known = {Path(name).name for name in (*jit.VERB_SOURCES, *jit.PACK_SOURCES)}
        named = {"canonical.py"}  # decides under which name a kernel is kept, and is in that name
        assert {path.name for path in (codecache.PACKAGE / "device").glob("*.py")} == known | named | {"__init__.py"}
        shared = {path.name for path in (codecache.PACKAGE / "algorithms").glob("_*.py")} - {"__init__.py"}
        for one in ALGORITHMS.values():
            assert {Path(name).name for name in one.sources} == shared | {Path(one.file).name}
            assert all((codecache.PACKAGE / name).is_file() for name in one.sources)

    @pytest.mark.parametrize("package", ["numba", "llvmlite"])
    def test_compilers(self, monkeypatch, package):
        before = self.digests()
        import importlib.metadata

        version = importlib.metadata.version
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0" if name == package else version(name))
        after = self.digests()
        assert all(before[name] != after[name] for name in before)

    @pytest.mark.parametrize("fact", ["get_host_cpu_name", "get_default_triple"])
    def test_processor(self, monkeypatch, fact):
        before = self.digests()
        llvm, _ = jit._llvm()
        monkeypatch.setattr(llvm, fact, lambda: "another")
        after = self.digests()
        assert all(before[name] != after[name] for name in before)

    def test_the_structs_that_kernels_read(self, monkeypatch):
        before = self.digests()
        monkeypatch.setattr(jit, "_fields", lambda: "rank size")
        after = self.digests()
        assert all(before[name] != after[name] for name in before)

    def test_every_kernel_has_a_name_of_its_own(self, tmp_path, monkeypatch):
        monkeypatch.setattr(jit, "compile_host", lambda text, arguments: repr(arguments).encode())
        monkeypatch.setattr(jit.Compiler, "_load", lambda self, code: len(self._addresses) + 1)
        compiler = jit.Compiler(tmp_path)
        names = [name.split("/") for name in candidates()]
        addresses = [compiler.schedule(*name) for name in names]
        addresses += [compiler.reducer(op, "float32") for op in ("SUM", "PROD", "MIN", "MAX")]
        addresses += [compiler.reducer("SUM", name) for name in ("float64", "uint8", "uint64", "complex64")]
        addresses += [compiler.widener(name) for name in ("float16", "bfloat16", "float8_e5m2")]
        addresses += [compiler.finisher(n, "float32", avg) for n in ("float16", "bfloat16") for avg in (False, True)]
        addresses += [compiler.finisher(name, name, True) for name in ("int8", "uint8", "float32")]
        assert addresses == list(range(1, len(addresses) + 1))
        assert len(objects(tmp_path)) == len(addresses)


class TestCompile:
    def test_a_text_that_could_raise_is_refused(self):
        def text(a):
            if a > 3:
                raise ValueError("too large")
            return a

        with pytest.raises(
            RuntimeError, match=r"^kernel needs \[.*\]: its text has a path that raises; see nvcoll.device"
        ):
            jit.compile_host(text, 1)

    def test_a_text_is_a_function_of_integers(self, tmp_path):
        def text(a, b, c, d):
            return a * 1000 + b * 100 + c * 10 + d

        compiler = jit.Compiler(tmp_path)
        assert FUNCTION(compiler._load(jit.compile_host(text, 4)))(1, 2, 3, 4) == 1234


PROGRAM = """
import sys
import numpy as np
from nvcoll import AVG, COMM_WORLD, emulate

def main(comm):
    for dtype in ("float32", "float16"):
        x = np.full(1000, comm.rank + 1).astype(dtype)
        comm.Allreduce(x, op=AVG)
        comm.Allreduce(comm.array(x))
        comm.Allreduce(x, algorithm="ring/low_latency")
    return x[0]

print(emulate(2).run(main), *sorted({"numba", "llvmlite"} & set(sys.modules)))
"""


def test_on_a_warm_cache_nobody_imports_numba(tmp_path, run_command):
    for loaded in ("llvmlite numba", "llvmlite"):
        status, output = run_command(
            [sys.executable, "-W", "error", "-c", PROGRAM], env={"NVCOLL_CACHE_DIR": str(tmp_path)}
        )
        assert status == 0, output
        assert output.split()[-len(loaded.split()) :] == loaded.split()
        assert output.startswith("[np.float16(3.0), np.float16(3.0)]")


def test_processes_that_share_a_cache_wait_for_each_other_s_files(tmp_path, run_ranks):
    program = """
    import sys, numpy as np, nvcoll
    x = np.ones(5, np.int16)
    nvcoll.COMM_WORLD.Allreduce(x, op=nvcoll.MAX, algorithm="one_shot/simple")
    print(*x, "numba" in sys.modules)
    """
    ranks = run_ranks(program, 3, env={"NVCOLL_CACHE_DIR": str(tmp_path)})
    assert [text.split()[:5] for text in ranks.stdout] == [["1"] * 5] * 3
    assert len(objects(tmp_path)) == 2
    ranks = run_ranks(program, 3, env={"NVCOLL_CACHE_DIR": str(tmp_path)})
    assert [text.split() for text in ranks.stdout] == [[*["1"] * 5, "False"]] * 3


def test_the_cache_folder_follows_the_setting(tmp_path, monkeypatch):
    monkeypatch.setenv("NVCOLL_CACHE_DIR", str(tmp_path / "mine"))

    def main(comm):
        comm.Allreduce(np.zeros(3, np.uint16), op=nvcoll.BXOR, algorithm="one_shot/simple")

    nvcoll.emulate(2).run(main)
    assert [path.name.rsplit("-", 1)[0] for path in objects(tmp_path / "mine")] == [
        "one_shot-simple",
        "reduce-BXOR-uint16",
    ]
