"""From a call's shape to its plan: candidates, rules, what is forced, and the division of scratch memory."""

import itertools
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import nvcoll
from nvcoll.algorithms import ALGORITHMS
from nvcoll.backends.area import LINE, Layout
from nvcoll.device.common import STAMP_BITS
from nvcoll.device.low_latency import PAYLOAD
from nvcoll.device.verbs import PROTOCOLS
from nvcoll.ops import DATATYPES, FLOAT, OPS, SUM
from nvcoll.planning import PROTOCOLS as PLANNED_PROTOCOLS
from nvcoll.planning import Explanation, Planner, candidates, describe_signature, pack_signature, pack_stamp, read_rules
from tests.oracle import supported

WORLDS = [(1,), (2,), (3,), (5,), (16,), (33,), (64,), (1, 3, 4), (2, 2, 3), (8,) * 8, (1, 1)]


def planner(node_sizes, scratch=8 << 20, rules=(), crowded=False):
    """A planner for ranks that are not there: it can explain, and plan for one rank."""
    layout = Layout(sum(node_sizes), scratch)
    topology = SimpleNamespace(node_sizes=node_sizes)
    return Planner(None, layout, topology, min(node_sizes), {"host": list(rules)}, None, crowded, 1.0)


def explain(node_sizes, nbytes, algorithm=None, **options):
    return planner(node_sizes, **options).explain("allreduce", nbytes // 4, FLOAT, SUM, algorithm)


def test_candidates():
    names = [name for name, one in ALGORITHMS.items() if one.verb == "allreduce"]
    assert candidates() == [f"{name}/{protocol}" for name in names for protocol in ("low_latency", "simple")]
    assert candidates("barrier") == []


def test_what_planning_and_the_device_know_of_protocols_is_the_same():
    assert set(PLANNED_PROTOCOLS) == set(PROTOCOLS)
    assert PAYLOAD == LINE - 8


@pytest.mark.parametrize("node_sizes", [(2,), (5,), (64,)])
@pytest.mark.parametrize("crowded", [False, True])
def test_the_rules_of_the_package(node_sizes, crowded):
    rules = read_rules(None)["host"]
    told = [explain(node_sizes, nbytes, rules=rules, crowded=crowded) for nbytes in (4, 8 << 10, 8 << 20, 1 << 33)]
    assert all(one.reason.startswith("rule: ") for one in told)
    assert told[-1].algorithm == "two_shot"
    assert {f"{one.algorithm}/{one.protocol}" for one in told} <= set(candidates())


@pytest.mark.parametrize("node_sizes", WORLDS[1:])
def test_without_rules_the_cheapest_candidate_is_chosen(node_sizes):
    for nbytes in (4, 1024, 1 << 16, 1 << 24):
        told = explain(node_sizes, nbytes)
        costs = {one.name: one.seconds for one in told.candidates}
        assert costs[f"{told.algorithm}/{told.protocol}"] == min(costs.values())
        assert told.reason.startswith("no rule: lowest expected cost, ")
        assert told.order == ALGORITHMS[told.algorithm].order


@pytest.mark.parametrize("node_sizes", [(2,), (5,), (1, 1), (4, 4), (2, 3)])
@pytest.mark.parametrize("nbytes", [4, 4096, 1 << 24])
def test_one_hop_that_costs_what_nvrar_does_is_not_chosen(node_sizes, nbytes):
    told = explain(node_sizes, nbytes)
    costs = {one.name: one.seconds for one in told.candidates}
    assert costs["nvrar_one_hop/simple"] == costs["nvrar/simple"]
    assert told.algorithm != "nvrar_one_hop"


def test_an_explanation_is_for_reading():
    told = explain((4,), 400, rules=[{"verb": "allreduce", "upto": 512, "use": "one_shot/low_latency"}])
    fields = ("allreduce", 400, "float32", "SUM", "one_shot", "low_latency", "rank order")
    assert (told.verb, told.nbytes, told.datatype, told.op, told.algorithm, told.protocol, told.order) == fields
    lines = str(told).splitlines()
    assert lines[0] == "allreduce of 400 bytes, float32 SUM: one_shot/low_latency"
    assert lines[1] == "  because    rule: one_shot/low_latency up to 512 bytes"
    assert lines[2] == "  order      rank order"
    assert [line.split()[1] for line in lines[3:]] == candidates()
    assert all(re.search(r" \d+\.\d us expected$", line) for line in lines[3:])


def test_one_rank_copies():
    told = explain((1,), 400)
    assert (told.algorithm, told.protocol) == ("copy", "")
    assert told.reason == "a single rank's reduction is its contribution"
    assert str(told).startswith("allreduce of 400 bytes, float32 SUM: copy\n")


@pytest.mark.parametrize("name", candidates())
def test_a_candidate_that_is_asked_for_is_taken(name):
    told = explain((2, 3), 1 << 20, name)
    assert f"{told.algorithm}/{told.protocol}" == name
    assert told.reason == "asked for by the caller"
    assert explain((2, 3), 1 << 20, name.split("/")[0]).protocol == "simple"


@pytest.mark.parametrize("name", ["bucket", "ring/fast", "Ring", "node_scatter", "node_scatter/simple", "simple", 3])
def test_unknown_algorithms_are_refused_with_those_there_are(name):
    known = (
        "halving_doubling, nvrar, nvrar_one_hop, one_shot, recursive_doubling, ring, two_shot, alone or with a protocol"
    )
    with pytest.raises(nvcoll.ArgumentError, match=f"^Allreduce: algorithm is {name!r}, expected one of {known}"):
        explain((2,), 4, name)


@pytest.mark.parametrize("scratch", [96 << 10, 1 << 20, 8 << 20])
def test_slots_fit_scratch_memory_and_pieces_fit_slots(scratch):
    for node_sizes, count, datatype in itertools.product(
        WORLDS[1:], (1, 14, 1000, 10**6, 10**10), ("float32", "bfloat16", "int8", "complex128")
    ):
        if sum(node_sizes) > 16 and scratch < 1 << 20:
            continue
        it = planner(node_sizes, scratch)
        shape = it.shape(count, DATATYPES[datatype])
        assert shape.width == (4 if datatype == "bfloat16" else shape.itemsize)
        for one in it.explain("allreduce", count, DATATYPES[datatype], SUM).candidates:
            base, protocol = one.name.split("/")
            slots = ALGORITHMS[base].slots(shape)
            capacity, stride = it._geometry(base, protocol, shape)
            if one.reason is not None:
                assert protocol == "low_latency"
                assert capacity == 0
                continue
            half = it.layout.lines_half if protocol == "low_latency" else it.layout.data_half
            assert slots.number * stride <= half
            assert slots.number * LINE <= it.layout.flags_half
            assert stride % (2 * LINE) == 0
            piece = min(count, capacity)
            # A slice is a part of the piece, rounded up by less than a line of elements.
            slice_bytes = min(piece, -(-piece // slots.parts) + LINE // shape.itemsize - 1) * slots.width
            needed = -(-slice_bytes // PAYLOAD) * LINE if protocol == "low_latency" else slice_bytes
            assert needed <= stride
            if shape.width != shape.itemsize:  # whole pieces of accumulators lie in the workspace
                assert piece * shape.width <= it.layout.data_half


def test_signatures_tell_all_calls_apart_and_can_be_read():
    seen = set()
    for (datatype, op), name in itertools.product(supported(), candidates()):
        algorithm, protocol = name.split("/")
        told = Explanation("allreduce", 4, datatype, op, algorithm, protocol, "", "", ())
        number = pack_signature(told, DATATYPES[datatype], OPS[op])
        seen.add(number)
        assert describe_signature(number, 7) == f"Allreduce of 7 {datatype}, {op}, by {name}"
        barrier = pack_signature(replace(told, verb="barrier"), DATATYPES[datatype], OPS[op])
        seen.add(barrier)
        assert describe_signature(barrier, 1) == f"Barrier, by {name}"
    assert len(seen) == 2 * len(supported()) * len(candidates())


def test_stamps_of_calls_that_could_be_mistaken_for_each_other_differ():
    near = {(signature, count): pack_stamp(signature, count) for signature in range(64) for count in range(1, 600)}
    assert 0 <= min(near.values()) <= max(near.values()) < 1 << STAMP_BITS
    for signature in range(64):  # the same call but for the count
        assert len({near[signature, count] for count in range(1, 600)}) == 599
    for count in range(1, 600):  # and but for anything else
        assert len({near[signature, count] for signature in range(64)}) == 64
    assert len(set(near.values())) > 0.99 * len(near)


@pytest.mark.parametrize("counts", [(1, 252), (300, 49)])
@pytest.mark.parametrize("algorithm", candidates())
def test_calls_of_different_counts_are_a_mismatch(monkeypatch, algorithm, counts):
    monkeypatch.setenv("NVCOLL_TIMEOUT", "20")

    def main(comm):
        count = counts[comm.rank]
        with pytest.raises(
            nvcoll.MismatchError, match=rf"this rank calls Allreduce of {count} float32, SUM, by {algorithm}; "
        ):
            comm.Allreduce(np.ones(count, np.float32), algorithm=algorithm)
        return True

    assert nvcoll.emulate(2).run(main) == [True, True]


class TestRules:
    def write(self, tmp_path, monkeypatch, text):
        path = tmp_path / "rules.json"
        path.write_text(text if isinstance(text, str) else json.dumps(text))
        monkeypatch.setenv("NVCOLL_RULES", str(path))
        return path

    def test_a_file_of_one_s_own_is_in_force(self, tmp_path, monkeypatch):
        rules = [
            {"verb": "allreduce", "upto": 100, "ranks": [3, 3], "use": "ring/low_latency"},
            {"verb": "allreduce", "use": "nvrar/simple"},
        ]
        self.write(tmp_path, monkeypatch, {"host": rules})

        def main(comm):
            x = np.ones(25, np.float32)
            comm.Allreduce(x)
            return str(comm.explain("allreduce", 100)), str(comm.explain("allreduce", 104)), x[0]

        for small, large, total in nvcoll.emulate(3).run(main):
            assert "SUM: ring/low_latency\n  because    rule: ring/low_latency up to 100 bytes" in small
            assert "SUM: nvrar/simple\n  because    rule: nvrar/simple for any size" in large
            assert total == 3
        assert "SUM: nvrar/simple" in nvcoll.emulate(2).run(main)[0][0]

    def test_rules_for_other_hardware_leave_the_choice_to_the_costs(self, tmp_path, monkeypatch):
        self.write(tmp_path, monkeypatch, {"cuda": [{"verb": "allreduce", "use": "ring/simple"}]})
        reasons = nvcoll.emulate(2).run(lambda comm: comm.explain("allreduce", 4).reason)
        assert reasons[0].startswith("no rule: lowest expected cost")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", r"Expecting property name"),
            (
                '{"host": [{"verb": "allreduce", "use": "bucket/simple"}]}',
                r"host, rule 1: use is 'bucket/simple', expected one of",
            ),
            ('{"host": [{"verb": "allreduce"}]}', r"host, rule 1: needs verb and use"),
            ("[]", r"expected an object of lists"),
            ('{"hosts": []}', r"hosts: not known; known are host, cuda, launch"),
            ('{"host": [], "cuda": [], "host": []}', r"'host' stands twice in the same braces; make one of the two"),
            (
                '{"host": [{"verb": "allreduce", "use": "ring/simple", "upto": 1, "upto": 2}]}',
                r"'upto' stands twice in the same braces",
            ),
        ],
    )
    def test_a_wrong_file_is_named(self, tmp_path, monkeypatch, text, message):
        path = self.write(tmp_path, monkeypatch, text)
        pattern = rf"^NVCOLL_RULES: {re.escape(str(path))}: .*{message}.*; correct the file or unset the variable$"
        with pytest.raises(nvcoll.ArgumentError, match=pattern):
            nvcoll.emulate(2).run(lambda comm: comm.rank)

    def test_a_missing_file_is_named(self, monkeypatch):
        monkeypatch.setenv("NVCOLL_RULES", "/nowhere/rules.json")
        with pytest.raises(nvcoll.ArgumentError, match=r"^NVCOLL_RULES: /nowhere/rules.json: .*No such file"):
            nvcoll.emulate(2).run(lambda comm: comm.rank)
