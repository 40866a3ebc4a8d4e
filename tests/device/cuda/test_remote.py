"""Kernels that reach far ranks become machine code, linked with NVSHMEM's device part; no GPU is needed."""

import re

import pytest

from nvcoll import jit_cuda
from nvcoll.jit import ENTRY
from tests.device.cuda.building import MOST_REGISTERS, building, shim
from tests.gpu.kernels import REACHING

CASES = [(name, "float32", False, "sm_90") for name in REACHING]
CASES += [
    (name, "bfloat16", deep, "sm_90")
    for name in ("nvrar/low_latency", "nvrar_one_hop/low_latency")
    for deep in (False, True)
]
CASES += [("nvrar/simple", "bfloat16", True, "sm_90"), ("recursive_doubling/low_latency", "int32", True, "sm_90")]
CASES += [
    (name, "bfloat16", False, arch) for name in ("nvrar/low_latency", "ring/simple") for arch in ("sm_80", "sm_100")
]


SYMBOLS = ENTRY, "nvshmemi_device_state_d", "nvshmemi_device_lib_version_d"  # what the host looks for


def build(name, datatype, deep, arch):
    """Compile a case; return its registers, bytes spilled, bytes of local memory, and the symbols that it lacks."""
    kernel = jit_cuda.assemble(jit_cuda.kernel_ptx(*name.split("/"), "SUM", datatype, arch, deep, shim(arch)), arch)
    lacking = [symbol for symbol in SYMBOLS if symbol.encode() not in kernel.cubin]
    return kernel.registers, kernel.spilled, kernel.local, lacking


@pytest.fixture(scope="module")
def built(request):
    """The cases that were selected."""
    with building(request, build) as cases:
        yield cases


def title(case):
    return "-".join([*case[:2], "deep" if case[2] else "shallow", case[3]])


@pytest.mark.parametrize("case", CASES, ids=title)
def test_kernels_fit_into_registers_and_are_such_as_nvshmem_takes(built, case):
    registers, spilled, local, lacking = built[case].result()
    assert registers <= MOST_REGISTERS
    assert (spilled, local) == (0, 0)
    assert not lacking


def test_text():
    """One entry, whose launch bounds still hold; no call of NVSHMEM's is left open."""
    ptx = jit_cuda.kernel_ptx("nvrar", "low_latency", "SUM", "float32", "sm_90", False, shim("sm_90"))
    assert re.findall(r"\.visible \.entry (\w+)\(", ptx) == [ENTRY]
    assert f".maxntid {jit_cuda.THREADS}" in ptx
    assert ".extern .func" not in ptx


@pytest.mark.parametrize("protocol", ["low_latency", "simple"])
def test_kernels_of_worlds_without_far_ranks_know_nothing_of_nvshmem(protocol):
    ptx = jit_cuda.kernel_ptx("nvrar", protocol, "SUM", "float32", "sm_90")
    assert "nvshmem" not in ptx
    assert "nvcoll_" not in ptx.replace(ENTRY, "")
