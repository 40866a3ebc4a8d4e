"""The fast route of a communicator on GPUs: which calls it launches, on a driver that only takes notes."""

import pytest

FAST = """
from types import SimpleNamespace
from nvcoll._plan import DeviceMemory, DevicePlans, DeviceSpan
pointer("current").value = 0xC0
memory = DeviceMemory(0x10000, 4096, 0)
x, y = DeviceSpan(memory, 0, 7, 4, 11), DeviceSpan(memory, 1024, 7, 4, 11)
in_place, op, kind = "in place", object(), "its type"
captured = []
plans = DevicePlans([None, in_place], {id(kind): (11, kind)}, 0x99, lambda: captured[-1] if captured else None, 0)
plans.add(11, 28, op, plan)

def tried(*args):
    done = plans.run(*args)
    sent = arguments() if done else {}
    return [done, sent.get("send"), sent.get("recv"), *calls()]
"""


def test_the_fast_route(see):
    told = see(
        FAST,
        "[tried(x, y, op, None), tried(x, None, op, 0x50), tried(in_place, y, op, SimpleNamespace(cuda_stream=0x50))]",
    )
    assert told[0] == [True, 0x10000, 0x10400, "launch(f0,99)"]
    assert told[1] == [True, 0x10000, 0x10000, "record(e0,99)", "wait(50,e0)", "launch(f0,50)"]
    assert told[2] == [True, 0x10400, 0x10400, "launch(f0,50)"]


def test_specs_that_say_what_is_so(see):
    told = see(FAST, "[tried([x, kind], (y, 7, kind), op, None), tried(in_place, [y, None, kind], op, None)]")
    assert told == [[True, 0x10000, 0x10400, "launch(f0,99)"], [True, 0x10400, 0x10400, "launch(f0,99)"]]


@pytest.mark.parametrize(
    "args",
    [
        "x, y, object(), None",  # another operator
        "x, DeviceSpan(memory, 1024, 6, 4, 11), op, None",
        "DeviceSpan(memory, 0, 6, 4, 11), None, op, None",  # another count
        "DeviceSpan(memory, 0, 7, 4, 12), None, op, None",  # another type
        "x, DeviceSpan(memory, 4, 7, 4, 11), op, None",  # overlap
        "x, y, op, -1",
        "x, y, op, 'stream'",
        "[x, 7], y, op, None",
        "[x, 6, kind], y, op, None",
        "[x, 1 << 70, kind], y, op, None",
        "[x, object()], y, op, None",
        "[DeviceSpan(memory, 0, 7, 4, 12), kind], None, op, None",
        "[[x, kind], kind], None, op, None",
        "in_place, None, op, None",
        "DeviceSpan(DeviceMemory(0x10000, 4096, 1), 0, 7, 4, 11), None, op, None",  # another GPU
        "x, DeviceSpan(DeviceMemory(0x20000, 4096, 1), 0, 7, 4, 11), op, None",
    ],
)
def test_all_else_takes_the_long_way(see, args):
    assert see(FAST, f"tried({args})") == [None, None, None]


def test_where_a_library_captures_a_graph_a_call_must_name_its_stream(see):
    told = see(f"{FAST}\ncaptured.append('stream')", "[tried(x, y, op, None), tried(x, y, op, 0x50)]")
    assert told == [[None, None, None], [True, 0x10000, 0x10400, "launch(f0,50)"]]


def test_the_fast_route_ends_with_the_memory(see):
    assert see(f"{FAST}\nmemory.end()", "tried(x, y, op, None)") == [None, None, None]


def test_the_fast_route_tells_of_failures(see):
    assert see(f"{FAST}\nreport[0] = 1", "tried(x, y, op, None)") == [False, None, None]
