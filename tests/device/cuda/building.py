"""Kernels that a module's tests look at, compiled ahead of them: one by one they take minutes.

``from tests.device.cuda.building import MOST_REGISTERS, building, shim``
"""

import os
from contextlib import contextmanager
from functools import cache

from nvcoll import jit_cuda
from tests.conftest import worker_processes

MOST_REGISTERS = 65536 // jit_cuda.THREADS


@cache
def shim(arch):
    return jit_cuda.compile_shim(arch)


@contextmanager
def building(request, build):
    """Give ``case -> Future of build(*case)`` for the selected tests of a module that use its fixture ``built``.

    As many are made at a time as there are processors, in the order in which they are awaited.
    """
    items = [item for item in request.session.items if item.module is request.module and "built" in item.fixturenames]
    selected = dict.fromkeys(item.callspec.params["case"] for item in items)
    with worker_processes(min(len(selected), len(os.sched_getaffinity(0)))) as pool:
        yield {case: pool.submit(build, *case) for case in selected}
