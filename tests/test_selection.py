"""Rules: which one speaks of a call, what happens where it cannot be followed, and which files are refused."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import nvcoll
from nvcoll._selection import HARDWARE, LAUNCH, check_rules, choose, matches, shape_launch
from nvcoll.planning import VERBS, Planner, candidates
from nvcoll.planning_cuda import DevicePlanner

NAMES = ["one_shot/low_latency", "ring/simple", "two_shot/simple"]
FINE = dict.fromkeys(NAMES)  # candidates without a reason against them
COSTS = {"one_shot/low_latency": 3e-6, "ring/simple": 2e-6, "two_shot/simple": 4e-6}


def rule(use="ring/simple", **limits):
    return {"verb": "allreduce", "use": use, **limits}


def choice(rules, nbytes=1000, ranks=4, nodes=1, crowded=False, reasons=FINE, costs=COSTS):
    return choose(rules, "allreduce", nbytes, ranks, nodes, crowded, reasons, costs)


@pytest.mark.parametrize(
    ("limits", "call", "speaks"),
    [
        ({}, {}, True),
        ({"upto": 1000}, {"nbytes": 1000}, True),
        ({"upto": 1000}, {"nbytes": 1001}, False),
        ({"upto": 0}, {"nbytes": 0}, True),
        ({"ranks": [2, 4]}, {"ranks": 2}, True),
        ({"ranks": [2, 4]}, {"ranks": 4}, True),
        ({"ranks": [2, 4]}, {"ranks": 1}, False),
        ({"ranks": [2, 4]}, {"ranks": 5}, False),
        ({"ranks": [None, 4]}, {"ranks": 1}, True),
        ({"ranks": [None, 4]}, {"ranks": 5}, False),
        ({"ranks": [3, None]}, {"ranks": 1000}, True),
        ({"ranks": [3, None]}, {"ranks": 2}, False),
        ({"nodes": [1, 1]}, {"nodes": 1}, True),
        ({"nodes": [1, 1]}, {"nodes": 2}, False),
        ({"oversubscribed": True}, {"oversubscribed": True}, True),
        ({"oversubscribed": True}, {"oversubscribed": False}, False),
        ({"oversubscribed": False}, {"oversubscribed": True}, False),
        ({"upto": 10, "ranks": [2, 4], "nodes": [2, 2]}, {"nbytes": 10, "ranks": 3, "nodes": 2}, True),
        ({"upto": 10, "ranks": [2, 4], "nodes": [2, 2]}, {"nbytes": 10, "ranks": 3, "nodes": 1}, False),
        ({"note": "measured on a Tuesday"}, {}, True),
    ],
)
def test_limits(limits, call, speaks):
    call = {"nbytes": 500, "ranks": 4, "nodes": 1, "oversubscribed": False, **call}
    assert matches(rule(**limits), "allreduce", **call) is speaks
    assert not matches(rule(**limits), "barrier", **call)


def test_the_first_rule_that_speaks_wins():
    rules = [rule("one_shot/low_latency", upto=512), rule("two_shot/simple", upto=4096), rule("ring/simple")]
    assert choice(rules, 512)[0] == "one_shot/low_latency"
    assert choice(rules, 513) == ("two_shot/simple", "rule: two_shot/simple up to 4096 bytes")
    assert choice(rules, 4097) == ("ring/simple", "rule: ring/simple for any size")


def test_a_rule_that_cannot_be_followed_is_passed_over_and_named():
    reasons = {**FINE, "one_shot/low_latency": "it is too tired"}
    costs = {name: COSTS[name] for name in NAMES[1:]}
    rules = [rule("one_shot/low_latency"), rule("two_shot/simple")]
    assert choice(rules, reasons=reasons, costs=costs) == (
        "two_shot/simple",
        "rule: two_shot/simple for any size; passed over: one_shot/low_latency (it is too tired)",
    )
    use, why = choice(rules[:1], reasons=reasons, costs=costs)
    assert use == "ring/simple"
    assert why == "no rule: lowest expected cost, 2.0 us; passed over: one_shot/low_latency (it is too tired)"


def test_a_rule_for_an_algorithm_that_is_gone_is_passed_over():
    use, why = choice([rule("bucket/simple")])
    assert use == "ring/simple"
    assert "passed over: bucket/simple (there is no such algorithm)" in why


def test_without_a_rule_the_lowest_cost_wins_and_names_break_ties():
    assert choice([]) == ("ring/simple", "no rule: lowest expected cost, 2.0 us")
    tied = {"two_shot/simple": 1e-6, "ring/simple": 1e-6, "one_shot/low_latency": 1e-6}
    assert choice([], costs=tied)[0] == "one_shot/low_latency"
    assert choice([], costs=dict(reversed(tied.items())))[0] == "one_shot/low_latency"


def test_if_nothing_serves_that_is_an_error_with_the_reasons():
    reasons = dict.fromkeys(NAMES, "it is too tired")
    with pytest.raises(ValueError, match=r"allreduce: no algorithm serves this call: .*it is too tired"):
        choice([], reasons=reasons, costs={})


def between(lowest, highest):
    """[lowest, highest] as rules have them, either of which may be open."""
    one = st.none() | st.integers(lowest, highest)
    return st.lists(one, min_size=2, max_size=2).map(lambda pair: pair if None in pair else sorted(pair))


LIMITS = st.fixed_dictionaries(
    {},
    optional={
        "upto": st.integers(0, 5000),
        "ranks": between(1, 8),
        "nodes": between(1, 3),
        "oversubscribed": st.booleans(),
    },
)


@given(
    st.lists(st.builds(lambda use, limits: rule(use, **limits), st.sampled_from(NAMES), LIMITS), max_size=6),
    st.integers(0, 6000),
    st.integers(1, 9),
    st.integers(1, 4),
    st.booleans(),
    st.sets(st.sampled_from(NAMES), max_size=2),
)
def test_the_choice_can_always_serve_and_no_earlier_rule_could(rules, nbytes, ranks, nodes, crowded, refused):
    check_rules({"host": rules}, NAMES, VERBS)
    reasons = {name: "no" if name in refused else None for name in NAMES}
    costs = {name: COSTS[name] for name in NAMES if name not in refused}
    use, why = choice(rules, nbytes, ranks, nodes, crowded, reasons, costs)
    assert reasons[use] is None
    speaking = [one["use"] for one in rules if matches(one, "allreduce", nbytes, ranks, nodes, crowded)]
    able = [name for name in speaking if reasons[name] is None]
    assert use == (able[0] if able else min(costs, key=costs.get))
    assert why.startswith("rule: " if able else "no rule: ")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([], "expected an object of lists, one for each kind of hardware"),
        ({"host": {}}, "host: expected a list of rules"),
        ({"host": ["ring"]}, "host, rule 1: needs verb and use"),
        ({"host": [rule(), {"verb": "allreduce"}]}, "host, rule 2: needs verb and use"),
        ({"host": [{"verb": "allreduce", "usee": "ring"}]}, "host, rule 1: key usee is not known"),
        ({"host": [rule(below=3)]}, "host, rule 1: key below is not known; known are nodes, note, "),
        ({"hosts": []}, "hosts: not known; known are host, cuda, launch"),
        ({"gpu": [rule()]}, "gpu: not known; known are host, cuda, launch"),
        ({"cuda": [rule("bucket")]}, "cuda, rule 1: use is 'bucket', expected one of one_shot/low_latency, ring"),
        ({"host": [rule(upto="1K")]}, "host, rule 1: upto is '1K', expected a whole number of bytes, 0 or more"),
        ({"host": [rule(upto=1.5)]}, "host, rule 1: upto is 1.5, expected"),
        ({"host": [rule(), rule(upto=-5)]}, "host, rule 2: upto is -5, expected"),
        ({"host": [rule(upto=True)]}, "host, rule 1: upto is True, expected"),
        ({"host": [rule(upto=None)]}, "host, rule 1: upto is None, expected"),
        ({"host": [rule(oversubscribed=1)]}, "oversubscribed is 1, expected true or false"),
        ({"host": [rule(oversubscribed="yes")]}, "oversubscribed is 'yes', expected true or false"),
        ({"host": [rule(ranks=4)]}, "host, rule 1: ranks is [lowest, highest]"),
        ({"host": [rule(ranks=[4])]}, "host, rule 1: ranks is [lowest, highest]"),
        ({"host": [rule(nodes=["1", None])]}, "host, rule 1: nodes is [lowest, highest]"),
        ({"host": [rule(ranks=[3, 2])]}, "host, rule 1: ranks is [lowest, highest], and 3 is above 2"),
        ({"host": [rule(nodes=[2, 1])]}, "host, rule 1: nodes is [lowest, highest], and 2 is above 1"),
        ({"host": [rule(ranks=[0, 2])]}, "ranks is [lowest, highest], each a number of 1 or more or null, got [0, 2]"),
        ({"host": [rule(nodes=[None, -1])]}, "nodes is [lowest, highest], each a number of 1 or more or null"),
        ({"host": [rule(ranks=[True, 2])]}, "ranks is [lowest, highest], each a number of 1 or more or null"),
    ],
)
def test_wrong_rules_are_refused(rules, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_rules(rules, NAMES, VERBS)


def test_rules_are_for_what_there_are_planners_of():
    assert {Planner.kind, DevicePlanner.kind} == set(HARDWARE)
    assert LAUNCH not in HARDWARE


def test_the_package_s_rules_are_right_and_serve_every_size_on_one_node():
    rules = json.loads(Path(nvcoll.__file__).with_name("rules.json").read_text())
    names = candidates()
    check_rules(rules, names, VERBS)
    reasons, costs = dict.fromkeys(names), dict.fromkeys(names, 1e-6)
    for nbytes in (0, 1, 512, 513, 8192, 8193, 1 << 20, 1 << 40):
        for crowded in (False, True):
            assert choice(rules["host"], nbytes, crowded=crowded, reasons=reasons, costs=costs)[1].startswith("rule: ")


LAST = {"threads": 256, "deep": True}


def test_launches_are_shaped_by_the_first_rule_that_matches():
    rules = [{"upto": 100, "threads": 64}, {"far": True, "threads": 512, "blocks": 8}, LAST]
    check_rules({"launch": rules}, NAMES, VERBS)
    assert shape_launch(rules, 100, True) == (64, None, False)
    assert shape_launch(rules, 101, True) == (512, 8, False)
    assert shape_launch(rules, 101, False) == (256, None, True)
    with pytest.raises(ValueError, match="launch: no rule for 101 bytes, far False"):
        shape_launch(rules[:2], 101, False)


@pytest.mark.parametrize(
    ("rules", "problem"),
    [
        ({}, "launch: expected a list"),
        ([], "launch: needs a rule without upto, for far false"),
        ([LAST | {"far": False}], "launch: needs a rule without upto, for far true"),
        ([LAST | {"upto": 5}], "launch: needs a rule without upto"),
        ([LAST, 5], "rule 2: needs threads"),
        ([{"upto": 5}], "rule 1: needs threads"),
        ([{"treads": 64}], "rule 1: key treads is not known"),
        ([LAST | {"verb": "allreduce"}], "rule 1: key verb is not known; known are blocks, deep, "),
        ([LAST | {"threads": 100}], "threads is 100, expected one of 8, 16"),
        ([LAST | {"threads": 64.0}], "threads is 64.0, expected one of 8, 16"),
        ([LAST | {"threads": "64"}], "threads is '64', expected one of 8, 16"),
        ([LAST | {"threads": None}], "threads is None, expected one of 8, 16"),
        ([LAST | {"upto": -5}, LAST], "rule 1: upto is -5, expected a whole number of bytes, 1 or more"),
        ([LAST | {"blocks": 2.0}], "blocks is 2.0, expected a whole number, 1 or more"),
        ([LAST | {"blocks": 0}], "blocks is 0, expected"),
        ([LAST | {"upto": True}], "upto is True, expected"),
        ([LAST | {"deep": 1}], "deep is 1, expected true or false"),
    ],
)
def test_launch_rules_that_are_wrong(rules, problem):
    with pytest.raises(ValueError, match=problem):
        check_rules({"launch": rules}, NAMES, VERBS)
