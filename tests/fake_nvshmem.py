"""NVSHMEM as nvshmem4py shows it, without a GPU: this process is one of several, and the peers' heaps are made up."""

import ctypes
import os
import sys
import types

import numpy as np

FAR = 1 << 44
"""What lies between the heaps of two peers."""


class NVSHMEMError(Exception):
    """As nvshmem4py's."""


class UniqueId:
    def __init__(self, text):
        self.memory = ctypes.create_string_buffer(text, 128)
        self.ptr = ctypes.addressof(self.memory)


class FakeNvshmem:
    """What nvcoll calls of nvshmem4py.

    Attributes
    ----------
    calls
        What was called, with what matters of it.
    stage
        As ``nvshmem_init_status``.
    rank, size
        Of this process, once it has begun.
    environ
        NVSHMEM's variables, as they were when it began.
    unreachable
        Peers whose memory cannot be mapped.
    status
        What ``nvshmemx_cumodule_init`` returns.
    """

    def __init__(self, driver, folder, version=(3, 8, 0), headers=(3, 8, 0)):
        self.driver, self.version = driver, version
        self.calls, self.stage, self.rank, self.size = [], 0, -1, -1
        self.status = 0
        self.environ, self.unreachable, self.room, self.fail = {}, set(), True, {}
        self.folder = folder
        if headers:
            (folder / "non_abi").mkdir(exist_ok=True)
            names = zip(("MAJOR", "MINOR", "PATCH"), headers, strict=True)
            text = "".join(f"#define NVSHMEM_VENDOR_{name}_VERSION {number}\n" for name, number in names)
            (folder / "non_abi/nvshmem_version.h").write_text(f"/* a comment */\n\n{text}")

    def call(self, name, *args):
        if name in self.fail:
            raise self.fail[name]
        self.calls.append((name, *args))

    def vendor_get_version_info(self, *places):
        if "vendor_get_version_info" in self.fail:
            raise self.fail["vendor_get_version_info"]
        for place, number in zip(places, self.version, strict=True):
            ctypes.c_int.from_address(place).value = number

    def get_unique_id(self, empty=False):
        self.call("get_unique_id", empty)
        return UniqueId(b"" if empty else b"the id")

    def init(self, device, uid, rank, nranks, initializer_method):
        assert self.driver.stack == [f"context of {device}"]
        self.environ = {name: text for name, text in os.environ.items() if name.startswith("NVSHMEM_")}
        self.call("init", device, ctypes.string_at(uid.ptr), initializer_method)
        self.stage, self.rank, self.size = 2, rank, nranks

    def malloc(self, nbytes):
        assert self.driver.stack
        self.call("malloc", nbytes)
        return FAR if self.room else 0

    def ptr(self, address, place):
        return 0 if place in self.unreachable else address + place * FAR

    def cumodule_init(self, module):
        self.call("cumodule_init", module)
        return self.status

    def cumodule_finalize(self, module):
        self.call("cumodule_finalize", module)
        return 0

    def free(self, address):
        assert self.driver.stack
        self.call("free", address)

    def finalize(self):
        self.call("finalize")
        self.stage = 0

    def install(self, monkeypatch, library=None):
        """Let imports find it; `library` is raised where the host library is loaded."""

        def load(name):
            if library is not None:
                raise library
            return types.SimpleNamespace(abs_path=f"/lib/lib{name}.so.3")

        bindings = module(
            "nvshmem.bindings",
            self,
            ["vendor_get_version_info", "malloc", "ptr", "free", "cumodule_init", "cumodule_finalize"],
            uniqueid_dtype=np.dtype("V128"),
            init_status=lambda: self.stage,
            my_pe=lambda: self.rank,
            n_pes=lambda: self.size,
        )
        core = module("nvshmem.core", self, ["get_unique_id", "init", "finalize"])
        cuda_core = module("cuda.core", Device=lambda ordinal: ordinal)
        pathfinder = module(
            "cuda.pathfinder",
            load_nvidia_dynamic_lib=load,
            find_nvidia_header_directory=lambda name: str(self.folder),
        )
        package = module("nvshmem", __version__="0.4.1", bindings=bindings, core=core)
        sys.modules["cuda"].core = cuda_core
        for one in (package, bindings, core, cuda_core, pathfinder):
            monkeypatch.setitem(sys.modules, one.__name__, one)


def module(name, owner=None, methods=(), **attributes):
    """A module with these attributes, and with these methods of `owner`."""
    made = types.ModuleType(name)
    for method in methods:
        setattr(made, method, getattr(owner, method))
    for attribute, value in attributes.items():
        setattr(made, attribute, value)
    return made
