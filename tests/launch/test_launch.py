"""Launches, on a driver that only takes notes."""

import sys

import pytest

from nvcoll._plan import DEVICE_FIELDS

OVER = "this communicator was freed or finalized; make a new one, or call Init, and make persistent requests anew"


def test_arguments_are_packed_in_the_order_of_the_fields(see):
    told = see("plan.run(20, 30, 40)", "{'arguments': arguments(), 'kept': [state.keep, plan.keep, plan.describe]}")
    expected = {name: 1000 + k for k, name in enumerate(DEVICE_FIELDS)}
    expected |= {"send": 20, "recv": 30, "count": 7, "capacity": 8, "stride": 9, "stamp": 10, "ranks": 11}
    assert told["arguments"] == expected
    assert told["kept"] == ["kept", "also kept", "told"]


def test_a_launch_in_the_context_of_the_communicator(see):
    told = see(
        "plan.run(1, 2, 0x50); outside = calls(); pointer('current').value = 0xC0; plan.run(1, 2, 0x50)",
        "{'outside': outside, 'inside': calls(), 'shape': list((ctypes.c_uint * 9).in_dll(cuda, 'shape'))}",
    )
    assert told["outside"] == ["push(c0,0)", "launch(f0,50)", "pop(c0,0)"]
    assert told["inside"] == ["launch(f0,50)"]
    assert told["shape"] == [3, 1, 1, 64, 1, 1, 0, 0, 0]


def test_a_kernel_may_be_brought_in_early(see):
    told = see(
        "DevicePlan(state, 0xF0, call, 3, 64, None, None, True).run(1, 2, 0x50)",
        "{'shape': list((ctypes.c_uint * 9).in_dll(cuda, 'shape'))}",
    )
    assert told["shape"][7:] == [1, 6]  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


def test_calls_on_different_streams_are_put_in_order(see):
    program = """
pointer("current").value = 0xC0
plan.run(1, 2, 0x50); first = calls()
plan.run(1, 2, 0x60); other = calls()
plan.run(1, 2, 0x60); same = calls()
pointer("capturing").value = 0x70
plan.run(1, 2, 0x70); captured = calls()
pointer("capturing").value = 0
plan.run(1, 2, 0x80); after = calls()
"""
    told = see(
        program,
        "{'first': first, 'other': other, 'same': same, 'captured': captured, 'after': after, 'n': state.sequence}",
    )
    assert told["first"] == ["launch(f0,50)"]
    assert told["other"] == ["record(e0,50)", "wait(60,e0)", "launch(f0,60)"]
    assert told["same"] == ["launch(f0,60)"]
    assert told["captured"] == ["launch(f0,70)"]  # a graph has an order of its own
    assert told["after"] == ["record(e0,60)", "wait(80,e0)", "launch(f0,80)"]  # that it was captured moves nothing
    assert told["n"] == 5


def test_a_stream_that_is_captured_has_the_latest_call(see):
    program = """
pointer("current").value = 0xC0
plan.run(1, 2, 0x50)
pointer("capturing").value = 0x50
plan.run(1, 2, 0x50); captured = calls()
refused = refusal(plan.run, 1, 2, 0x60)
pointer("capturing").value = 0
plan.run(1, 2, 0x60)
"""
    told = see(program, "[captured, refused, calls(), state.sequence]")
    assert told[0] == ["launch(f0,50)"] * 2
    assert told[1] == (  # an event would become part of the graph
        "the stream of this rank's latest call is being captured, and a call on another stream cannot be put behind it "
        "meanwhile; make this call after the capture, or before it"
    )
    assert told[3] == 3  # what was refused is no call
    assert told[2] == ["record(e0,50)", "wait(60,e0)", "launch(f0,60)"]


def test_a_capture_that_the_driver_does_not_tell_of(see):
    program = """
pointer("current").value = 0xC0
number("confused").value = 906
refused = refusal(plan.run, 1, 2, 0)
number("confused").value = 0
"""
    assert see(program, "[refused, calls()]") == ["the CUDA driver refuses the launch: 906", []]


def test_a_capture_elsewhere_that_keeps_the_latest_stream_from_being_looked_at(see):
    program = """
pointer("current").value = 0xC0
plan.run(1, 2, 0); calls()
number("confused").value = 906
refused = refusal(plan.run, 1, 2, 0x60)
"""
    told = see(program, "[refused, calls()]")
    assert told == ["the CUDA driver refuses the launch: 906", []]  # to wait for all would spoil the capture


def test_a_launch_that_fails_after_its_stream_was_put_in_order(see):
    program = """
pointer("current").value = 0xC0
plan.run(1, 2, 0x50); calls()
number("fail").value = 700
refusal(plan.run, 1, 2, 0x60); failed = calls()
number("fail").value = 0
pointer("capturing").value = 0x50
plan.run(1, 2, 0x50); calls()
plan.run(1, 2, 0x60)
"""
    told = see(program, "[failed, calls()]")
    assert told == [["record(e0,50)", "wait(60,e0)", "launch(f0,60)"], ["wait(60,e0)", "launch(f0,60)"]]


def test_the_stream_of_a_thread_is_another_in_each(see):
    told = see("pointer('current').value = 0xC0\nfor stream in (2, 2, 0x50): plan.run(1, 2, stream)", "calls()")
    assert told[:2] == ["launch(f0,2)", "record(e0,2)"]  # at once: nobody else can
    assert told[2:5] == ["wait(2,e0)", "launch(f0,2)", "record(e0,2)"]
    assert told[5:] == ["wait(50,e0)", "launch(f0,50)"]


@pytest.mark.parametrize("error", [400, 709])  # drivers differ
def test_a_stream_that_is_gone(see, error):
    program = f"""
pointer("current").value = 0xC0
number("how_gone").value = {error}
plan.run(1, 2, 0x50); calls()
pointer("gone").value = 0x50
plan.run(1, 2, 0x60)
"""
    assert see(program, "calls()") == ["record(e0,50)", "synchronize(0,0)", "launch(f0,60)"]


def test_who_has_the_latest_stream_is_kept(see):
    program = """
import sys
class Stream: pass
first, second = Stream(), Stream()
counts = lambda: [sys.getrefcount(first), sys.getrefcount(second)]
none = counts()
plan.run(1, 2, 0x50, first); one = counts()
plan.run(1, 2, 0x50); plan.run(1, 2, 0x50, 0x50); still = counts()
plan.run(1, 2, 0x60, second)
"""
    none, one, still, other = see(program, "[none, one, still, counts()]")
    assert one == still == [none[0] + 1, none[1]]
    assert other == [none[0], none[1] + 1]


def test_one_rank_copies_where_places_differ(see):
    program = """
pointer("current").value = 0xC0
one = DevicePlan(state, 0, {"count": 256}, 1, 1)
one.run(0x1000, 0x2000, 0x50); one.run(0x1000, 0x1000, 0x50)
"""
    assert see(program, "calls()") == ["copy(2000,1000)", "bytes(100,50)"]


def test_errors_of_the_driver_are_told_in_its_words(see):
    program = """
number("fail").value = 700
known = refusal(plan.run, 1, 2, 3)
number("fail").value = 12345
"""
    told = see(program, "[known, refusal(plan.run, 1, 2, 3)]")
    assert told == [f"the CUDA driver refuses the launch: {words}" for words in ("an illegal address", "12345")]


def test_what_a_kernel_reported_is_seen_before_the_next_launch(see):
    program = """
plan.run(1, 2, 3); calls(); before = state.failed
report[0] = -(1 << 63)
"""
    told = see(program, "[before, plan.run(1, 2, 3), calls(), state.failed]")
    assert told == [False, False, [], True]


def test_after_the_end_nothing_is_launched(see):
    told = see("state.demand(); state.end()", "[refusal(plan.run, 1, 2, 3), refusal(state.demand), calls()]")
    assert told == [*[OVER] * 2, []]


def test_threads_take_turns(see):
    program = """
import threading
number("slow").value = -1
other = threading.Thread(target=plan.run, args=(1, 2, 0x50))
other.start()
while not text.value: pass
refused = refusal(plan.run, 1, 2, 0x60)
number("slow").value = 0
other.join()
calls(); plan.run(1, 2, 0x50)
"""
    told = see(program, "[refused, state.sequence]")
    assert told == ["another thread is in a call on this communicator; calls on one communicator take turns", 2]


SECOND = """
report_of_second = (ctypes.c_int64 * 8)()
second = DeviceState(everything, order, ctypes.addressof(report_of_second), None)
other_plan = DevicePlan(second, 0xF1, call, 3, 64)
"""


def test_communicators_of_a_rank_are_put_in_order(see):
    """Across streams; on one, the stream's own order does."""
    program = f"""{SECOND}
pointer("current").value = 0xC0
plan.run(1, 2, 0x50); other_plan.run(1, 2, 0x50); plan.run(1, 2, 0x60); other_plan.run(1, 2, 0x70)
"""
    told = see(program, "calls()")
    assert told == [
        "launch(f0,50)", "launch(f1,50)", "record(e0,50)", "wait(60,e0)", "launch(f0,60)", "record(e0,60)",
        "wait(70,e0)", "launch(f1,70)",
    ]  # fmt: skip


def test_communicators_of_a_rank_take_turns_without_a_word(see):
    """While a thread launches for one, another waits that launches for the other, and is refused if that ends."""
    program = f"""{SECOND}
import threading
pointer("current").value = 0xC0
number("slow").value = 300
busy = threading.Thread(target=plan.run, args=(1, 2, 0x50))
busy.start()
while not text.value: pass
done = other_plan.run(1, 2, 0x50)
busy.join()
number("slow").value = -1
text.value = b""
busy = threading.Thread(target=plan.run, args=(1, 2, 0x50))
busy.start()
while not text.value: pass
waits = threading.Thread(target=lambda: ended.append(refusal(other_plan.run, 1, 2, 0x50)))
ended = []
waits.start()
second.end()
waits.join(5)
still = busy.is_alive()
number("slow").value = 0
busy.join()
"""
    done, order, ended, still = see(program, "[done, calls(), ended, still]")
    assert (done, still) == (True, True)
    assert order == ["launch(f0,50)"]
    assert ended == [OVER]


def test_a_failure_is_of_one_communicator(see):
    program = f"{SECOND}\nreport[0] = -(1 << 63)"
    assert see(program, "[plan.run(1, 2, 3), other_plan.run(1, 2, 3), state.failed, second.failed]") == [
        False, True, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("first", "second"),
    [("plan.run(1, 2, 0x50)", "state.precede(0x60)"), ("state.precede(0x60)", "plan.run(1, 2, 0x60)")],
)
def test_streams_are_put_in_order_between_launches(see, first, second):
    program = f"""
import threading
pointer("current").value = 0xC0
plan.run(1, 2, 0x50); calls()
number("slow").value = 300
other = threading.Thread(target=lambda: {first})
other.start()
while not text.value: pass
{second}
other.join()
"""
    told = see(program, "calls()")
    if first.startswith("plan"):
        assert told[-3:] == ["launch(f0,50)", "record(e0,50)", "wait(60,e0)"]
    else:
        assert told[-4:] == ["record(e0,50)", "wait(60,e0)", "wait(60,e0)", "launch(f0,60)"]


@pytest.mark.parametrize(
    ("before", "calls"),
    [
        ("", []),
        ("plan.run(1, 2, 0x50)", ["record(e0,50)", "wait(60,e0)"]),
        ("plan.run(1, 2, 0x60)", []),
        ("plan.run(1, 2, 0x50); pointer('capturing').value = 0x60", []),  # a graph has an order of its own
        ("plan.run(1, 2, 0x50); pointer('capturing').value = 0x50", []),
        ("plan.run(1, 2, 0x50); state.end()", []),
    ],
)
def test_a_stream_behind_the_latest_call(see, before, calls):
    program = f"{before}\ncalls(); state.precede(0x60)"
    assert see(f"pointer('current').value = 0xC0\n{program}", "calls()") == calls
    assert see(program, "[one for one in calls() if one[:3] not in ('pus', 'pop')]") == calls


def test_after_the_end_nothing_is_put_in_order(see):
    program = f"""
{SECOND}
import threading
number("slow").value = -1
busy = threading.Thread(target=other_plan.run, args=(1, 2, 0x50))
busy.start()
while not text.value: pass
waits = threading.Thread(target=state.precede, args=(0x60,))
waits.start()
waits.join(0.2)
state.end()
waits.join(5)
number("slow").value = 0
busy.join()
"""
    assert see(program, "[waits.is_alive(), [one for one in calls() if one[:3] not in ('pus', 'pop')]]") == [
        False, ["launch(f1,50)"],
    ]  # fmt: skip


def test_launches_are_held_back_and_nothing_else_is(see):
    program = f"""
{SECOND}
import threading
plan.run(1, 2, 0x50); calls()
order.hold(); order.hold()
ended = []
held = threading.Thread(target=plan.run, args=(1, 2, 0x50))
ends = threading.Thread(target=lambda: ended.append(refusal(other_plan.run, 1, 2, 0x50)))
held.start(); ends.start()
state.precede(0x60)
second.end(0x70)
ends.join(5)
order.release()
held.join(0.2)
seen = [held.is_alive(), order.busy, [one for one in calls() if one[:3] not in ("pus", "pop")], ended]
order.release()
held.join(5)
"""
    alive, busy, called, ended = see(program, "seen")
    assert (alive, busy) == (True, False)
    assert called == ["record(e0,50)", "wait(60,e0)", "wait(70,e0)"]
    assert ended == [OVER]
    assert "launch(f0,50)" in see(program, "calls()")


def test_communicators_take_turns(see):
    """A thread that launches all the time lets another one in, which could see it in launches only."""
    program = f"""
{SECOND}
import threading, time
done, turns = threading.Event(), 0

def run():
    while not done.is_set():
        text.value = b""
        plan.run(1, 2, 0x50)

hot = threading.Thread(target=run)
hot.start()
latest = time.monotonic() + 10
while turns < 20 and time.monotonic() < latest:
    other_plan.run(1, 2, 0x50)
    state.precede(0x50)
    turns += 1
done.set()
hot.join()
"""
    assert see(program, "turns") == 20


def test_a_stream_that_cannot_be_put_behind_a_call(see):
    told = see('plan.run(1, 2, 0x50); number("confused").value = 700', "refusal(state.precede, 0)")
    assert told == "the CUDA driver refuses to put a stream behind a call: an illegal address"


def test_without_a_driver(run_command, tmp_path):
    library = tmp_path / "libcuda.so.1"
    library.write_text("no library")
    program = """
from nvcoll._plan import StreamOrder
try:
    StreamOrder(0, 0)
except Exception as error:
    print(type(error).__name__, error)
"""
    status, output = run_command([sys.executable, "-c", program], env={"LD_LIBRARY_PATH": str(tmp_path)})
    assert status == 0, output
    assert output.startswith("StateError the CUDA driver cannot be used: ")
    assert output.endswith("; install or update the driver\n")
