"""What comes closest to needing more registers than there are; `tests.device.cuda.sweep` compiles all that there is."""

import pytest

from nvcoll import jit_cuda
from tests.device.cuda.building import MOST_REGISTERS, building
from tests.device.cuda.sweep import build, kernels

# Bytes, and integers that are divided, in the two longest schedules. What divides has packs one by one, in the end.
CASES = [
    (f"{name}/simple", *what, False)
    for name in ("nvrar", "nvrar_one_hop")
    for what in [
        ("PROD", "int8", "sm_80", False), ("PROD", "int8", "sm_90", False), ("AVG", "uint8", "sm_100", False),
        ("AVG", "int16", "sm_80", True), ("AVG", "uint16", "sm_90", True),
    ]
]  # fmt: skip


@pytest.fixture(scope="module")
def built(request):
    """The cases that were selected."""
    with building(request, build) as cases:
        yield cases


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[:4])))
def test_kernels_fit_into_registers(built, case):
    registers, spilled, local = built[case].result()
    assert registers <= MOST_REGISTERS
    assert (spilled, local) == (0, 0)


def test_a_deep_kernel_that_spills_is_made_shallow(monkeypatch):
    class Made:
        def __init__(self, deep):
            self.deep, self.spilled = deep, 16 * deep

    monkeypatch.setattr(jit_cuda, "kernel_ptx", lambda *key: key[5])
    monkeypatch.setattr(jit_cuda, "assemble", lambda deep, arch: Made(deep))
    kernel = ("nvrar", "simple", "AVG", "int16", "sm_80")
    assert not jit_cuda.compile_kernel(*kernel, True).deep
    monkeypatch.setattr(Made, "spilled", property(lambda self: 0, lambda self, value: None), raising=False)
    assert jit_cuda.compile_kernel(*kernel, True).deep


def test_the_sweep_has_all_kernels():
    swept = kernels(["nvrar/simple"], ["sm_90"], True)
    assert ("nvrar/simple", "SUM", "float32", "sm_90", True, True) in swept
    assert ("nvrar/simple", "BXOR", "uint8", "sm_90", False, True) in swept
    assert not any(kernel[2] == "uint8" and kernel[4] for kernel in swept), "bytes are never deep"
    assert not any(kernel[1:3] == ("BXOR", "float32") for kernel in swept)
    assert len(set(swept)) == len(swept) == 222
