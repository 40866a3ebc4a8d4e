"""From times to rules: few ranges, none slower than the margin allows, and files that keep what was not measured."""

import itertools
import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvcoll import _selection
from nvcoll._selection import LAUNCH
from nvcoll.cli.tune import launch, rulebook
from nvcoll.cli.tune.ranges import choose, ranges
from nvcoll.cli.tune.rulebook import Scope
from nvcoll.errors import ArgumentError
from nvcoll.planning import candidates, read_rules

SCOPE = Scope("host", "allreduce", 4, 1, oversubscribed=False)
NAMES = ("a", "b", "c")
TIMES = st.dictionaries(st.sampled_from(NAMES), st.floats(1e-6, 3e-6), min_size=1)
TABLES = st.lists(TIMES, min_size=1, max_size=6).map(lambda rows: {8 << k: row for k, row in enumerate(rows)})


def table(**times):
    """Times of several names at 8, 16, 32, ... bytes; None where there is none."""
    length = len(next(iter(times.values())))
    return {8 << k: {name: row[k] for name, row in times.items() if row[k] is not None} for k in range(length)}


def changes(path):
    return sum(one != other for one, other in itertools.pairwise(path))


def loss(path, times):
    return sum(math.log(row[name]) for name, row in zip(path, times.values(), strict=True))


def a_rule(**fields):
    return {"verb": "allreduce", "use": "ring/simple"} | fields


class TestChoice:
    def test_the_fastest_of_each_size(self):
        assert choose(table(a=[1, 1, 9], b=[9, 9, 1]), 0.03) == {8: "a", 16: "a", 32: "b"}

    def test_noise_makes_no_islands(self):
        assert set(choose(table(a=[1, 1, 1.02, 1, 1], b=[9, 9, 1, 9, 9]), 0.03).values()) == {"a"}
        assert list(choose(table(a=[1, 1, 1.04, 1, 1], b=[9, 9, 1, 9, 9]), 0.03).values()) == list("aabaa")
        assert set(choose(table(a=[1, 1, 1.04, 1, 1], b=[9, 9, 1, 9, 9]), 0.05).values()) == {"a"}

    def test_a_change_comes_where_it_costs_least(self):
        chosen = choose(table(a=[1, 1.02, 1.02, 9], b=[9, 1, 1, 1]), 0.03)
        assert list(chosen.values()) == list("abbb")
        chosen = choose(table(a=[1, 1, 1, 9], b=[9, 1.02, 1.02, 1]), 0.03)
        assert list(chosen.values()) == list("aaab")

    def test_who_was_not_measured_is_not_chosen(self):
        assert list(choose(table(a=[1, None, 1], b=[1.01, 7, 1.01]), 0.03).values()) == list("bbb")
        assert list(choose(table(a=[1, None, 1], b=[2, 7, 2]), 0.03).values()) == list("aba")

    @given(TABLES, st.sampled_from([0, 0.03, 0.5]))
    def test_as_few_changes_as_the_margin_allows_and_then_the_shortest_times(self, times, margin):
        path = tuple(choose(times, margin).values())
        allowed = [
            [name for name, seconds in row.items() if seconds <= min(row.values()) * (1 + margin)]
            for row in times.values()
        ]
        assert all(name in names for name, names in zip(path, allowed, strict=True))
        fewest = min(changes(other) for other in itertools.product(*allowed))
        assert changes(path) == fewest
        best = min(loss(other, times) for other in itertools.product(*allowed) if changes(other) == fewest)
        assert loss(path, times) == pytest.approx(best)


class TestRanges:
    def test_limits_are_sizes_that_were_measured(self):
        assert ranges({8: "a", 16: "a", 64: "b", 128: "a"}) == [("a", 16), ("b", 64), ("a", None)]
        assert ranges({8: "a"}) == [("a", None)]

    @given(st.lists(st.sampled_from(NAMES), min_size=1))
    def test_rules_say_at_each_size_what_was_chosen(self, path):
        chosen = {8 << k: name for k, name in enumerate(path)}
        found = ranges(chosen)
        assert [upto is None for _, upto in found] == [False] * (len(found) - 1) + [True]
        for size, name in chosen.items():
            assert next(use for use, upto in found if upto is None or size <= upto) == name


class TestMerging:
    def test_new_rules_come_first_and_replace_those_of_exactly_the_same_ranks(self):
        same = a_rule(ranks=[4, 4], nodes=[1, 1], oversubscribed=False)
        others = [
            a_rule(ranks=[4, 4], nodes=[1, 1]),
            a_rule(ranks=[4, 4], nodes=[1, 1], oversubscribed=True),
            a_rule(ranks=[4, 4], nodes=[2, 2], oversubscribed=False),
            a_rule(ranks=[2, 4], nodes=[1, 1], oversubscribed=False),
            a_rule(),
        ]
        old = {"cuda": [same], "host": [same | {"upto": 8}, *others[:3], same | {"note": "mine"}, *others[3:]]}
        new = SCOPE.rules([("two_shot/simple", None)], "a note")
        merged = rulebook.merge(old, SCOPE, new)
        assert merged == {"cuda": [same], "host": [*new, *others]}
        assert rulebook.merge(merged, SCOPE, new) == merged, "a second time changes nothing"
        assert rulebook.merge({}, SCOPE, new) == {"host": new}

    def test_several_numbers_of_ranks_go_into_one_file(self, tmp_path):
        path = tmp_path / "rules.json"
        for ranks, use in ((2, "ring/simple"), (4, "two_shot/simple"), (2, "one_shot/simple")):
            scope = Scope("host", "allreduce", ranks, 1, oversubscribed=False)
            new = scope.rules([(use, 64), ("halving_doubling/simple", None)], "here")
            rulebook.write(path, rulebook.merge(rulebook.read(path, None), scope, new))
        found = read_rules(path)
        assert [rule["use"] for rule in found["host"][:4]] == [
            *("one_shot/simple", "halving_doubling/simple", "two_shot/simple", "halving_doubling/simple"),
        ]
        package = read_rules(None)
        assert found["host"][4:] == package["host"]
        assert found["cuda"] == package["cuda"]
        assert LAUNCH not in json.loads(path.read_text()), "the package's are used, also when they have changed"

    @given(
        st.lists(st.tuples(st.sampled_from(candidates()), st.integers(1, 1 << 30)), max_size=4),
        *(st.integers(2, 9), st.integers(1, 3), st.booleans(), st.integers(1, 1 << 31)),
    )
    def test_every_call_of_these_ranks_follows_the_new_rules(self, limited, ranks, nodes, crowded, nbytes):
        scope = Scope("host", "allreduce", ranks, nodes, crowded)
        found = [(use, upto) for (use, _), upto in zip(limited, sorted(upto for _, upto in limited), strict=True)]
        found.append(("ring/simple", None))
        whole = rulebook.merge(read_rules(None), scope, scope.rules(found, "note"))
        rulebook.check(whole)
        assert json.loads(rulebook.text(whole)) == whole
        reasons = dict.fromkeys(candidates())
        use, _ = _selection.choose(whole["host"], "allreduce", nbytes, ranks, nodes, crowded, reasons, {})
        assert use == next(use for use, upto in found if upto is None or nbytes <= upto)
        other = _selection.choose(whole["host"], "allreduce", nbytes, ranks + 1, nodes, crowded, reasons, {"x/y": 1})
        old = read_rules(None)["host"]
        assert other == _selection.choose(old, "allreduce", nbytes, ranks + 1, nodes, crowded, reasons, {"x/y": 1})

    def test_the_file_in_force_is_where_a_new_one_begins(self, tmp_path):
        mine = {"host": [a_rule()], LAUNCH: read_rules(None)[LAUNCH]}
        (tmp_path / "mine.json").write_text(json.dumps(mine))
        assert rulebook.read(tmp_path / "new.json", tmp_path / "mine.json") == mine
        (tmp_path / "new.json").write_text('{"host": []}')
        assert rulebook.read(tmp_path / "new.json", tmp_path / "mine.json") == {"host": []}

    @pytest.mark.parametrize("text", ["", "\n"])
    def test_an_empty_file_is_as_none(self, tmp_path, text):
        (tmp_path / "empty.json").write_text(text)
        assert rulebook.read(tmp_path / "empty.json", None) == rulebook.read(tmp_path / "new.json", None)

    def test_a_rule_is_a_line(self):
        first, second = a_rule(), a_rule(upto=8)
        assert rulebook.text({"host": [first, second], "cuda": []}) == (
            f'{{\n  "host": [\n    {json.dumps(first)},\n    {json.dumps(second)}\n  ],\n  "cuda": []\n}}\n'
        )


class TestFilesThatCannotBeUsed:
    @pytest.mark.parametrize(
        ("text", "fact"),
        [("{", "Expecting"), ("[1]", "expected an object"), ('{"host": [{}]}', "host, rule 1: needs verb and use")],
    )
    def test_what_is_no_rules_file_is_left_alone(self, tmp_path, text, fact):
        path = tmp_path / "rules.json"
        path.write_text(text)
        with pytest.raises(ArgumentError, match=f"rules.json is there and is no rules file .*{fact}.*; name another"):
            rulebook.read(path, None)
        assert path.read_text() == text

    def test_what_cannot_be_written(self, tmp_path):
        with pytest.raises(ArgumentError, match=r"--output: there is no folder .*/no for x.json; make it first"):
            rulebook.read(tmp_path / "no" / "x.json", None)
        with pytest.raises(ArgumentError, match=r"--output: .* is a folder; name a file in it"):
            rulebook.read(tmp_path, None)

    def test_what_would_be_read_without_end(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        for path in (tmp_path / "pipe", Path("/dev/full")):
            with pytest.raises(
                ArgumentError, match=f"--output: {path} is no ordinary file; name another one, or take --dry-run, which"
            ):
                rulebook.read(path, None)

    def test_what_turns_out_so_at_the_end(self, tmp_path):
        with pytest.raises(ArgumentError, match=r"--output: cannot write .* \(Is a directory\); the rules are above"):
            rulebook.write(tmp_path, {})


class TestLaunchRules:
    FOUND = [("64 threads", 1024), ("512 threads, deep", None)]  # noqa: RUF012

    def test_ranges_become_rules(self):
        assert launch.rules(self.FOUND, "here", False, int) == [
            {"far": False, "upto": 1024, "threads": 64, "note": "here"},
            {"far": False, "threads": 512, "deep": True},
        ]

    def test_those_of_far_gpus_speak_of_slices(self):
        found = [("64 threads", 1024), ("512 threads, deep, 16 blocks", None)]
        assert launch.rules(found, "here", True, lambda nbytes: -(-nbytes // 3)) == [
            {"far": True, "upto": 342, "threads": 64, "note": "here"},
            {"far": True, "threads": 512, "deep": True, "blocks": 16},
        ]

    @pytest.mark.parametrize("far", [False, True])
    @pytest.mark.parametrize(
        "base", [{}, {LAUNCH: [{"far": False, "threads": 32}, {"far": True, "threads": 32}, {"threads": 128}]}]
    )
    def test_what_is_left_of_the_old_ones_is_for_other_gpus(self, base, far):
        old = base.get(LAUNCH) or read_rules(None)[LAUNCH]
        merged = launch.merge(base, launch.rules(self.FOUND, "here", far, int))
        rulebook.check(merged)
        assert {"far": far, "threads": 32} not in merged[LAUNCH]
        for nbytes in (8, 1024, 1025, 1 << 24):
            shape = _selection.shape_launch(merged[LAUNCH], nbytes, far)
            assert shape == ((64, None, False) if nbytes <= 1024 else (512, None, True))
            others = [_selection.shape_launch(rules, nbytes, not far) for rules in (merged[LAUNCH], old)]
            assert others[0] == others[1]
        assert launch.merge(merged, launch.rules(self.FOUND, "here", far, int)) == merged, (
            "a second time changes nothing"
        )
