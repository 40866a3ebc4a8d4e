"""Every kernel becomes machine code for the architectures there are, and works in registers alone; no GPU is needed."""

import re
from typing import NamedTuple

import pytest

from nvcoll import jit_cuda
from nvcoll._selection import LAUNCH
from nvcoll.algorithms import ALGORITHMS
from nvcoll.jit import ENTRY
from nvcoll.planning import candidates, read_rules
from tests.device.cuda.building import MOST_REGISTERS, building

MAIN = [("float32", "SUM"), ("bfloat16", "SUM"), ("int32", "MAX")]
OTHERS = [
    ("float16", "AVG"), ("float64", "SUM"), ("complex128", "PROD"), ("int8", "SUM"), ("uint8", "MAX"),
    ("float8_e4m3fn", "SUM"), ("float8_e5m2", "AVG"),
]  # fmt: skip

BEGINNING = 8000
"""Characters of PTX."""

FASTEST = "one_shot/low_latency"
"""For small messages."""

# Name, datatype, operator, whether a thread has several packs under way, the architecture that Numba compiles for, and
# those that its PTX is assembled for: what is valid for one is valid for the later ones, and assembling is quick.
CASES = [(name, *pair, True, "sm_90", ("sm_90", "sm_100")) for name in candidates() for pair in MAIN]
CASES += [(name, *MAIN[1], True, "sm_80", ("sm_80",)) for name in candidates()]
CASES += [(name, *MAIN[1], False, "sm_90", ("sm_90", "sm_100")) for name in candidates()]
CASES += [(name, *MAIN[0], False, "sm_90", ("sm_90",)) for name in (FASTEST, "two_shot/simple")]
OPENING = [
    (f"{name}/low_latency", *pair, False, "sm_90", ("sm_90",))
    for name, one in ALGORITHMS.items()
    if one.opens
    for pair in [("float16", "MIN"), ("int32", "SUM"), ("int8", "SUM"), *(OTHERS[:3] if name == "one_shot" else [])]
]
CASES += OPENING
CASES += [
    (name, *pair, True, "sm_90", ("sm_90",))
    for name in candidates()
    if name.startswith(("one_shot", "two_shot"))
    for pair in OTHERS
]


class Built(NamedTuple):
    beginning: str  # what comes after the wait for the kernel before
    shared: bool
    figures: list[tuple[int, int, int, bool]]


def build(name, datatype, op, deep, compiled_for, assembled_for):
    """Compile a case; return how it begins, and by cubin registers, bytes spilled, bytes of local memory, its entry."""
    ptx = jit_cuda.kernel_ptx(*name.split("/"), op, datatype, compiled_for, deep)
    kernels = [jit_cuda.assemble(ptx, arch) for arch in assembled_for]
    figures = [(one.registers, one.spilled, one.local, ENTRY.encode() in one.cubin) for one in kernels]
    return Built(ptx.partition("griddepcontrol.wait;")[2][:BEGINNING], ".shared" in ptx, figures)


@pytest.fixture(scope="module")
def built(request):
    """The cases that were selected."""
    with building(request, build) as cases:
        yield cases


def title(case):
    return "-".join([*case[:3], "deep" if case[3] else "shallow", case[4]])


@pytest.mark.parametrize("case", CASES, ids=title)
def test_kernels_fit_into_registers(built, case):
    one = built[case].result()
    for registers, spilled, local, has_entry in one.figures:
        assert registers <= MOST_REGISTERS
        assert (spilled, local) == (0, 0)
        assert has_entry
    assert not one.shared


@pytest.mark.parametrize("case", [case for case in CASES if case[0] == FASTEST and case[1:3] in MAIN[:2]], ids=title)
def test_two_blocks_fit_on_a_multiprocessor_with_as_many_threads_as_launch_rules_say(built, case):
    """One sends while the other waits."""
    near = [rule for rule in read_rules(None)[LAUNCH] if not rule.get("far", False)]
    threads = [rule["threads"] for rule in near if rule.get("deep", False) == case[3]]
    for registers, *_ in built[case].result().figures:
        assert 2 * max(threads) * -(-registers // 8) * 8 <= 65536


def test_every_candidate_and_every_form_of_data_is_compiled():
    assert {case[0] for case in CASES} == set(candidates())
    assert {arch for case in CASES for arch in case[5]} == {"sm_80", "sm_90", "sm_100"}


@pytest.mark.parametrize(("arch", "brought_in_early"), [("sm_80", False), ("sm_90", True)])
def test_kernels_overlap_where_gpus_can(arch, brought_in_early):
    ptx = jit_cuda.kernel_ptx("one_shot", "low_latency", "SUM", "float32", arch)
    assert re.findall(r"\.visible \.entry (\w+)\(", ptx) == [ENTRY]
    assert ("griddepcontrol" in ptx) is brought_in_early
    assert f".target {arch}" in ptx


@pytest.mark.parametrize("case", OPENING, ids=title)
def test_what_a_call_sends_first_is_loaded_before_its_epoch_is_used(built, case):
    """Else a small message takes as much longer as a load, and as what is computed in between."""
    beginning = built[case].result().beginning
    epoch = re.search(r"ld\.global\.v2\.u64 \{(%rd\d+), %rd\d+\}, \[(%rd\d+)", beginning)
    assert f"{epoch[2]}, " not in beginning[: epoch.start()], "where the epoch lies is computed after the wait"
    after = beginning[epoch.end() :]
    before_its_use = after[: re.search(rf"{epoch[1]}\b", after).start()]
    pack = re.search(r"ld\.global\.v2\.u64 \{(%rd\d+), (%rd\d+)\}", before_its_use)
    same_block = before_its_use[pack.end() :].partition("$L__")[0]
    assert pack[1] not in same_block, "a pack that was loaded whole is waited for at once"
    assert pack[2] not in same_block


@pytest.mark.parametrize("case", OPENING, ids=title)
def test_how_the_first_pack_is_loaded_is_decided_before_the_epoch_is(built, case):
    """Its load follows at once, behind a branch by what was known before the wait for the kernel before."""
    beginning = built[case].result().beginning
    lines = [line.split() for line in beginning[beginning.index("ld.global.v2.u64") :].splitlines()]
    code = [words for words in lines if words and words[0] != "//"]
    decided, branch = code[1:3]
    assert decided[0].startswith("setp.eq")
    assert decided[-1] == "0;"
    assert branch[1] == "bra"
    assert code[code.index([branch[2].replace(";", ":")]) + 1][0] == "ld.global.v2.u64"


@pytest.mark.parametrize("case", [case for case in OPENING if case[0] == FASTEST], ids=title)
def test_where_the_first_pack_goes_is_only_chosen_when_the_epoch_is_known(built, case):
    """To compute it then would take as long as some fifty instructions, with loads of constants among them."""
    before_the_store = built[case].result().beginning.partition("st.volatile.global.v2.u64 [")
    makers = {}
    for line in before_the_store[0].splitlines():
        if match := re.match(r"\s*([\w.]+)\s+(%rd\d+), (.*);", line):
            makers[match[2]] = match[1], re.findall(r"%rd\d+", match[3])
    todo, instructions = re.findall(r"^%rd\d+", before_the_store[2]), []
    while todo:
        instruction, sources = makers.get(todo.pop(), (None, []))
        instructions += [instruction] if instruction else []
        todo += sources
    assert instructions == ["selp.b64", "selp.b64"], "in which half, and whether this rank may send at all"
