"""Compile every kernel there is, and name those that registers do not suffice for.

    python3 -m tests.device.cuda.sweep [--archs sm_80,sm_90,sm_100] [--far] [--algorithms nvrar/simple,...]

The tests compile a choice, for all of them take some eight hours of one processor: run this on a larger machine after a
change to what all kernels have in common, and with new versions of the compilers. Exit status 1 if any kernel spills.
"""

import argparse
import os
import sys
import time
from concurrent.futures import as_completed

from nvcoll import jit_cuda
from nvcoll.device.cuda.layout import deepens
from nvcoll.ops import DATATYPES
from nvcoll.planning import candidates
from tests.conftest import worker_processes
from tests.device.cuda.building import shim
from tests.gpu.kernels import EVERY_PAIR, REACHING


def build(name, op, datatype, arch, deep, far):
    """Compile a kernel; return its registers, bytes spilled, bytes of local memory."""
    kernel = jit_cuda.compile_kernel(*name.split("/"), op, datatype, arch, deep, shim(arch) if far else None)
    return kernel.registers, kernel.spilled, kernel.local


def kernels(names, archs, far):
    """Return the arguments of `build` for all supported pairs of datatype and operator."""
    return [
        (name, op, datatype, arch, deep, far)
        for arch in archs
        for name in names
        for datatype, op in EVERY_PAIR
        for deep in ([True, False] if deepens(DATATYPES[datatype].itemsize) else [False])
    ]


def main(arguments):
    parser = argparse.ArgumentParser("tests.device.cuda.sweep", description=__doc__.partition("\n")[0])
    parser.add_argument("--archs", type=lambda text: text.split(","), default=["sm_80", "sm_90", "sm_100"])
    parser.add_argument("--algorithms", type=lambda text: text.split(","), help="algorithm/protocol,... (all)")
    parser.add_argument("--far", action="store_true", help="those that reach other nodes")
    options = parser.parse_args(arguments)
    names = options.algorithms or (REACHING if options.far else list(candidates()))
    todo = kernels(names, options.archs, options.far)
    start, spilled = time.monotonic(), 0
    with worker_processes(len(os.sched_getaffinity(0))) as pool:
        futures = {pool.submit(build, *kernel): kernel for kernel in todo}
        for done, future in enumerate(as_completed(futures), 1):
            registers, *memory = future.result()
            if any(memory):
                spilled += 1
                print(*futures[future], f"{registers} registers, {memory[0]} bytes spilled", flush=True)
            if done % 500 == 0:
                print(f"{done} of {len(todo)} after {time.monotonic() - start:.0f} s", flush=True)
    print(f"{len(todo)} kernels in {time.monotonic() - start:.0f} s, {spilled} spill", flush=True)
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
