"""`nvcoll tune`: who runs at which size, what is told and written, and that calls follow the rules then."""

import argparse
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import nvcoll
from nvcoll.algorithms import ALGORITHMS
from nvcoll.cli import bench, tune
from nvcoll.cli.bench import measure, options
from nvcoll.cli.tune import race
from nvcoll.errors import ArgumentError
from nvcoll.planning import Candidate, candidates, read_rules
from tests.cli.test_bench import Alone

NVCOLL = Path(sys.executable).with_name("nvcoll")
QUICK = ["--max", "4K", "--factor", "8", "--time", "0.005"]
FEW = [word for name in ("one_shot", "two_shot/simple", "ring") for word in ("--algorithm", name)]  # to compile
SPEEDS = {  # seconds of a call: to begin with, and for a byte
    "start/simple": (1e-6, 1e-9),
    "end/simple": (5e-6, 1e-12),
    "slow/simple": (50e-6, 1e-8),
    "chosen/simple": (70e-6, 1e-8),
}


class Imagined(Alone):
    """A communicator of candidates that take as long as a table says."""

    refused = "refused/simple"

    def algorithms(self, verb):
        return [*SPEEDS, self.refused]

    def explain(self, verb, nbytes, dtype, op):
        known = [Candidate(name, None, 1.0) for name in SPEEDS]
        known.append(Candidate(self.refused, "needs two nodes", None))
        return SimpleNamespace(algorithm="chosen", protocol="simple", candidates=tuple(known))


def as_told(ranks, contestants, budget):
    """A clock that never looks."""
    found = []
    for one in contestants:
        start, slope = SPEEDS[one.algorithm]
        found.append(measure.Timing(1, np.array([[start + slope * one.recv.nbytes]]), np.zeros(1)))
    return found


def parsed(*words):
    parser = argparse.ArgumentParser()
    tune.add_parser(parser.add_subparsers())
    return parser.parse_args(["tune", "allreduce", *words])


def raced(*words, comm=None):
    """A race that has been run, and its rows."""
    comm, args = comm or Imagined(), parsed(*words)
    workload = options.workload(comm, args)
    contest = argparse.Namespace(buffer=None, compare=None, eager=False)
    field = bench.enter(comm, contest, workload, comm.algorithms("allreduce"))
    found = race.Race(argparse.Namespace(**vars(field) | {"clock": as_told}), workload, "allreduce")
    return found, list(found.rows())


def emulated(tmp_path, *words, size=2, ranks_per_node=None, algorithms=FEW):
    """Exit statuses, and lines of rank 0, of ranks that are threads."""
    args, lines = parsed(*QUICK, *algorithms, "--output", str(tmp_path / "rules.json"), *words), []
    return nvcoll.emulate(size, ranks_per_node).run(lambda comm: tune.tune(comm, args, lines.append)), lines


@pytest.mark.parametrize(("text", "value"), [("3%", 0.03), ("0.03", 0.03), ("0", 0), ("12.5%", 0.125)])
def test_margins(text, value):
    assert tune.margin(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["3", "100%", "-1%", "nan", "%", "few"])
def test_margins_that_are_none(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected a fraction from 0% to below 100%, such as 3%, got"):
        tune.margin(text)


def test_help_shows_margins_that_are_taken(capsys):
    with pytest.raises(SystemExit, match="0"):
        parsed("--help")
    told = " ".join(capsys.readouterr().out.split())
    assert "--margin FRACTION what takes at most so much longer than the fastest" in told
    assert "as fast as that: 3% (default), or 0.03" in told


class TestRace:
    @pytest.mark.parametrize("number", range(1, 14))
    def test_all_run_at_the_ends_of_gaps(self, number):
        ends = race.ends(number)
        assert (ends[0], ends[-1]) == (0, number - 1)
        assert all(0 < after - before <= race.STRIDE for before, after in itertools.pairwise(ends))

    def test_who_is_far_behind(self):
        assert race.far_behind({"a": 1.0, "b": 3.9, "c": 4.1}) == {"c"}
        assert race.far_behind({}) == set()

    def test_gaps_are_without_those_that_are_far_behind_at_both_ends(self):
        found, rows = raced("--max", "64K")
        assert list(found.times) == [8 << k for k in range(14)]
        everybody = set(SPEEDS)
        for nbytes, times in found.times.items():
            at_an_end = (nbytes // 8).bit_length() - 1 in race.ends(14)
            slow = set() if at_an_end else {"slow/simple"}
            if 8 < nbytes < 128:
                slow |= {"end/simple"}
            if 2048 < nbytes < 8 << 13 and not at_an_end:
                slow -= {"start/simple"}
            assert set(times) == everybody - slow, f"{nbytes} bytes"
        assert len(rows) == sum(len(times) for times in found.times.values())

    def test_who_is_slow_at_first_may_win_at_the_end(self):
        found, _ = raced("--max", "64K")
        chosen = tune.choose(dict(sorted(found.times.items())), 0.03)
        assert (chosen[8], chosen[8 << 13]) == ("start/simple", "end/simple")

    def test_who_is_in_force_runs_everywhere_and_who_is_refused_nowhere(self):
        found, rows = raced("--max", "64K")
        assert all("chosen/simple" in times for times in found.times.values())
        assert set(found.before.values()) == {"chosen/simple"}
        assert {reason: list(names) for reason, names in found.left_out.items()} == {
            "needs two nodes": ["refused/simple"]
        }
        assert not any(row.algorithm == "refused/simple" for row in rows)

    def test_wrong_answers_have_no_time(self):
        class Wrong(Imagined):
            def Allreduce(self, sendbuf, recvbuf, op, algorithm=None):
                super().Allreduce(sendbuf, recvbuf, op)
                recvbuf[0] += algorithm == "start/simple"

        found, rows = raced("--max", "64", comm=Wrong())
        assert not any("start/simple" in times for times in found.times.values())
        assert {row.algorithm for row in rows if row.wrong} == {"start/simple"}


class TestCommand:
    def test_what_is_told(self, tmp_path):
        statuses, lines = emulated(tmp_path)
        assert statuses == [0, 0]
        measured = [line.split() for line in lines if not line.startswith("#")]
        assert {cells[0] for cells in measured} == {"8", "64", "512", "4096"}
        told = read_rules(tmp_path / "rules.json")["host"]
        new = told[: len(told) - len(read_rules(None)["host"])]
        assert new
        at = lines.index("# rules for host, allreduce, 2 ranks on 1 node, " + crowd(new) + ":")
        assert [json.loads(line.removeprefix("#")) for line in lines[at + 1 : at + 1 + len(new)]] == new
        assert lines[at + len(new) + 1].split() == ["#", "bytes", "chosen", "us", "before", "us", "before/chosen"]
        for line, nbytes in zip(lines[at + len(new) + 2 :], (8, 64, 512, 4096), strict=False):
            _, size, chosen, now, before, then, ratio = line.split()
            assert int(size) == nbytes
            assert {chosen, before} <= set(candidates())
            assert then == ratio == "-" or float(ratio) == pytest.approx(float(then) / float(now), rel=0.02)
        path = tmp_path / "rules.json"
        assert lines[-1] == f"# written to {path}; to use them: export NVCOLL_RULES={path}"

    def test_rules_speak_of_these_ranks_only(self, tmp_path):
        emulated(tmp_path, size=3)
        rules = json.loads((tmp_path / "rules.json").read_text())["host"]
        new = [rule for rule in rules if rule.get("ranks") == [3, 3]]
        assert new == rules[: len(new)]
        assert all(rule["nodes"] == [1, 1] and isinstance(rule["oversubscribed"], bool) for rule in new)
        assert ["upto" in rule for rule in new] == [True] * (len(new) - 1) + [False]
        for words in ("float32 SUM, symmetric", f"nvcoll {nvcoll.__version__}", "cores"):
            assert words in new[0]["note"]

    def test_nodes_count_and_a_second_run_keeps_the_first(self, tmp_path):
        emulated(tmp_path)
        first = json.loads((tmp_path / "rules.json").read_text())["host"]
        statuses, _ = emulated(tmp_path, size=3, ranks_per_node=[2, 1])
        assert statuses == [0, 0, 0]
        second = json.loads((tmp_path / "rules.json").read_text())["host"]
        assert second[-len(first) :] == first
        assert all((rule["nodes"], rule["ranks"]) == ([2, 2], [3, 3]) for rule in second[: -len(first)])

    def test_candidates_that_cannot_serve_are_left_out(self, tmp_path, monkeypatch):
        reason = "needs a full moon"
        monkeypatch.setattr(
            type(ALGORITHMS["ring"]), "supports", lambda one, shape: (one.name == "ring" and reason) or None
        )
        _, lines = emulated(tmp_path, "--max", "8")
        assert "# left out: ring/low_latency, ring/simple: needs a full moon" in lines
        assert not any("ring/simple" in line.split() for line in lines if not line.startswith("#"))

    def test_some_algorithms_only(self, tmp_path):
        statuses, lines = emulated(tmp_path, "--max", "8", "--algorithm", "ring", algorithms=())
        assert statuses == [0, 0]
        assert [line.split()[4] for line in lines if not line.startswith("#")] == ["ring/low_latency", "ring/simple"]
        chosen = next(line for line in lines if line.split()[:2] == ["#", "8"])
        assert chosen.split()[4:] == ["one_shot/low_latency", "-", "-"], "what is in force did not take part"

    def test_dry_run(self, tmp_path):
        statuses, lines = emulated(tmp_path, "--dry-run", "--max", "8")
        assert statuses == [0, 0]
        assert lines[-1] == "# nothing is written, as --dry-run asks for"
        assert any('"use":' in line for line in lines)
        assert not list(tmp_path.iterdir())

    def test_after_a_wrong_answer_nothing_is_written(self, tmp_path, monkeypatch, capsys):
        right = nvcoll.Comm.Allreduce

        def spoilt(comm, sendbuf, recvbuf=None, *rest, **keywords):
            right(comm, sendbuf, recvbuf, *rest, **keywords)
            if keywords.get("algorithm") == "ring/simple" and comm.rank == 1:
                recvbuf[0] += 1

        monkeypatch.setattr(nvcoll.Comm, "Allreduce", spoilt)
        statuses, lines = emulated(tmp_path, "--max", "8")
        assert statuses == [1, 1]
        assert any(line.startswith("# WRONG: nvcoll symmetric ring/simple, 8 bytes") for line in lines)
        assert lines[-1] == "# nothing is written: some answers were wrong"
        assert "nvcoll tune: rank 1: some answers were wrong" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("words", "told"),
        [
            (["--min", "8K"], "--max 4096 is below --min 8192"),
            (["--time", "0"], "--time is 0 seconds"),
            (["-n", "3"], "-n is 3, and the launcher has started 2 ranks; leave -n out"),
            (["--buffer", "torch"], "--buffer torch is for ranks on GPUs, these are on hosts; take one of symmetric"),
            (["--launch"], "--launch shapes launches on GPUs, these ranks are on hosts; leave it out"),
            (["--output", "/no/such/folder/x.json"], "--output: there is no folder /no/such/folder for x.json; make"),
        ],
    )
    def test_options_that_cannot_be_used(self, tmp_path, words, told):
        with pytest.raises(ArgumentError, match=told):
            emulated(tmp_path, *words)

    def test_one_rank_has_nothing_to_choose(self, tmp_path):
        with pytest.raises(
            ArgumentError, match="for two ranks or more, this is one; type `nvcoll tune allreduce -n 2`"
        ):
            emulated(tmp_path, size=1)

    def test_nodes_that_mpi_joins_have_nothing_to_choose(self):
        comm = SimpleNamespace(size=4, target="host", algorithms=lambda verb: ["nodes"])
        with pytest.raises(ArgumentError, match="on several nodes of hosts, which MPI joins in one way; start them"):
            tune._refuse(comm, parsed())


def crowd(rules):
    return "oversubscribed" if rules[0]["oversubscribed"] else "not oversubscribed"


def test_calls_of_real_ranks_follow_the_rules(run_command, run_ranks, tmp_path):
    path = tmp_path / "rules.json"
    status, text = run_command([NVCOLL, "tune", "allreduce", "-n", "2", *QUICK, *FEW, "--output", path])
    assert status == 0, text
    [new] = [line for line in text.splitlines() if line.startswith("# rules for ")]
    assert "2 ranks on 1 node" in new
    rules = read_rules(path)["host"]
    program = """
        from nvcoll import COMM_WORLD as comm
        for nbytes in (8, 512, 4096, 1 << 20):
            told = comm.explain("allreduce", nbytes)
            print(nbytes, f"{told.algorithm}/{told.protocol}", told.reason, sep="|")
    """
    ranks = run_ranks(program, 2, env={"NVCOLL_RULES": str(path)})
    lines = [line.split("|") for line in ranks.stdout[0].splitlines()]
    assert len(lines) == 4
    for nbytes, use, reason in lines:
        rule = next(rule for rule in rules if int(nbytes) <= rule.get("upto", int(nbytes)))
        assert rule["ranks"] == [2, 2]
        assert use == rule["use"]
        assert reason.startswith(f"rule: {use}")


def test_what_is_in_the_way_is_told_once_and_before_the_measurement(run_command, tmp_path):
    path = tmp_path / "rules.json"
    path.write_text("mine")
    status, text = run_command([NVCOLL, "tune", "allreduce", "-n", "2", "--output", path])
    assert status == 2, text
    assert text.count("nvcoll tune: --output: ") == 1
    assert "is there and is no rules file" in text
    assert "Traceback" not in text
    assert path.read_text() == "mine"
