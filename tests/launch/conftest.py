"""A library libcuda.so.1 that only takes notes, and programs that launch on it: they find it before any other."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = r"""
#include <string.h>
#include <unistd.h>
typedef struct { unsigned grid[3], block[3], shared; void *stream; int *attributes; unsigned count; } config;
char calls[4096];               /* what was called, and with which handles */
long long arguments[256], fields;
unsigned shape[9];              /* grid, block, shared bytes, attributes, the first one's kind */
void *current, *capturing, *gone;
int how_gone = 400;
int fail, confused, slow;       /* slow: milliseconds of a launch; below 0: until it is no more */
#include <stdio.h>
static void note(const char *name, void *one, void *two) {
    size_t length = strlen(calls);
    snprintf(calls + length, sizeof(calls) - length, "%s(%lx,%lx) ", name, (long)one, (long)two);
}
int cuCtxGetCurrent(void **context) { *context = current; return 0; }
int cuCtxPushCurrent_v2(void *context) { note("push", context, 0); current = context; return 0; }
int cuCtxPopCurrent_v2(void **context) { note("pop", current, 0); *context = current; current = 0; return 0; }
int cuEventRecord(void *event, void *stream) {
    note("record", event, stream);
    return stream && stream == gone ? how_gone : 0;
}
int cuCtxSynchronize(void) { note("synchronize", 0, 0); return 0; }
int cuStreamWaitEvent(void *stream, void *event, unsigned flags) {
    note("wait", stream, event);
    if (slow) usleep(1000 * slow);
    return 0;
}
int cuStreamIsCapturing(void *stream, int *answer) {
    *answer = capturing && stream == capturing;
    return stream ? 0 : confused;
}
int cuMemcpyDtoDAsync_v2(unsigned long long to, unsigned long long source, size_t nbytes, void *stream) {
    note("copy", (void *)to, (void *)source);
    note("bytes", (void *)nbytes, stream);
    return 0;
}
int cuGetErrorString(int error, const char **text) { *text = error == 700 ? "an illegal address" : 0; return 0; }
int cuLaunchKernelEx(const config *c, void *function, void **given, void **extra) {
    note("launch", function, c->stream);
    if (slow > 0) usleep(1000 * slow);
    while (slow < 0) usleep(1000);
    memcpy(shape, c->grid, 28);
    shape[7] = c->count;
    shape[8] = c->count ? c->attributes[0] : 0;
    for (int k = 0; k < fields; k++) arguments[k] = *(long long *)given[k];
    return fail;
}
"""

PROGRAM = """
import ctypes, json
from nvcoll._plan import DEVICE_FIELDS, DevicePlan, DeviceState, StreamOrder
from nvcoll.errors import StateError

cuda = ctypes.CDLL("libcuda.so.1")
number = lambda name: ctypes.c_int.in_dll(cuda, name)
pointer = lambda name: ctypes.c_void_p.in_dll(cuda, name)
ctypes.c_longlong.in_dll(cuda, "fields").value = len(DEVICE_FIELDS)
text = (ctypes.c_char * 4096).in_dll(cuda, "calls")

def calls():
    found = text.value.decode().split()
    text.value = b""
    return found

def arguments():
    values = (ctypes.c_longlong * 256).in_dll(cuda, "arguments")
    return dict(zip(DEVICE_FIELDS, values))

def refusal(call, *args):
    try:
        call(*args)
    except StateError as error:
        return str(error)

report = (ctypes.c_int64 * 8)()
everything = {name: 1000 + k for k, name in enumerate(DEVICE_FIELDS)}
order = StreamOrder(0xC0, 0xE0)
state = DeviceState(everything, order, ctypes.addressof(report), "kept")
call = {"count": 7, "capacity": 8, "stride": 9, "stamp": 10, "ranks": 11}
plan = DevicePlan(state, 0xF0, call, 3, 64, "also kept", "told")
"""

EMULATED = """
import gc, threading, time
import numpy as np, pytest
import nvcoll
from nvcoll import kernels, world_cuda
from nvcoll.backends.emulated import on_gpu
from nvcoll.comm import Comm
from tests import fake_cuda

fake_cuda.MEMORY = 1 << 29
world_cuda.SCRATCH = 16 << 20
patch, fake = pytest.MonkeyPatch(), fake_cuda.FakeDriver(gpus=1)
fake_cuda.install(patch, fake)
patch.setattr(kernels.Kernels, "_load", lambda self, *key: 0x77)
patch.setattr(kernels.Kernels, "occupancy", lambda self, function, threads: 4)

def left():
    gc.collect()
    with on_gpu():
        pass
    idle = {stream for streams in world_cuda._idle.values() for stream in streams}
    return [*fake.taken, *fake.events, *(fake.streams - idle), *fake.wrong]

def told(call):
    try:
        return call()
    except nvcoll.Error as error:
        return type(error).__name__

def at_once(*calls):
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Where the library lies."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("driver")
    source = folder / "driver.c"
    source.write_text(DRIVER)
    command = [compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", folder / "libcuda.so.1", source]
    subprocess.run(command, check=True)
    return folder


@pytest.fixture
def see(folder, run_command):
    """Run a program on that driver; return what its last expression holds: ``see(program, facts)``."""

    def run(program, facts):
        command = [sys.executable, "-c", f"{PROGRAM}{program}\nprint(json.dumps({facts}))"]
        status, output = run_command(command, env={"LD_LIBRARY_PATH": str(folder)})
        assert status == 0, output
        return json.loads(output)

    return run


@pytest.fixture
def emulated(folder, run_command):
    """Run a program with emulated ranks on a GPU that is none; what it prints in the end says whether it was right."""

    def run(program):
        root = str(Path(__file__).parents[2])
        env = {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": root, "NVCOLL_HEAP": "96M", "NVCOLL_TIMEOUT": "20"}
        command = [sys.executable, "-X", "faulthandler", "-c", f"{EMULATED}{program}\nprint('right')"]
        status, output = run_command(command, env=env)
        assert (status, output) == (0, "right\n"), output

    return run
