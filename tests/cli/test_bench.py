"""`nvcoll bench`: what it prints and writes, and that no wrong answer is ever timed."""

import argparse
import errno
import importlib.util
import json
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from nvcoll.buffers import IN_PLACE
from nvcoll.cli import bench
from nvcoll.cli.bench import contestants, measure, options, plot, report, run
from nvcoll.cli.bench.check import Verdict
from nvcoll.errors import ArgumentError

NVCOLL = Path(sys.executable).with_name("nvcoll")
MPIEXEC = Path(sys.executable).with_name("mpiexec")
QUICK = ["--max", "4K", "--factor", "16", "--time", "0.01"]


class Heap(np.ndarray):
    """An array that can be freed."""

    def free(self):
        pass


class Alone:
    """A communicator of one rank: what the benchmark uses of one, and no more."""

    rank, size, target, bootstrap = 0, 1, "host", "single"
    refuse = ()

    def Barrier(self):
        pass

    def Allreduce(self, sendbuf, recvbuf, op, algorithm=None):
        if algorithm in self.refuse:
            raise ArgumentError(f"Allreduce: {algorithm} needs two nodes")
        if sendbuf is not IN_PLACE:
            recvbuf[...] = sendbuf

    def zeros(self, count, dtype):
        return np.zeros(count, dtype).view(Heap)

    def algorithms(self, verb):
        return ["ring/low_latency", "ring/simple", "tree/simple"]

    def explain(self, verb, nbytes, dtype, op):
        return argparse.Namespace(algorithm="ring", protocol="simple")


class Broken:
    """A peer that is wrong in one element from 1 KiB on."""

    name, version = "broken", "0"

    def __init__(self, comm, arrays, op):
        self.arrays = arrays

    def prepare(self, count):
        self.send = self.recv = self.arrays.plain()[:count]
        self.call = partial(self.spoil, count)

    def spoil(self, count):
        assert self.recv.any() or count < 256, "a wrong answer was timed"
        if count >= 256:
            self.recv[7] += 1


def parsed(*options):
    parser = argparse.ArgumentParser()
    bench.add_parser(parser.add_subparsers())
    return parser.parse_args(["bench", "allreduce", *options])


def output(comm, *options):
    """Exit status and lines of a benchmark in this process."""
    lines = []
    return bench.bench(comm, parsed(*QUICK, *options), lines.append), lines


def table(lines):
    """Lines of the table, split in cells."""
    return [line.split() for line in lines if not line.startswith("#")]


def timing(*ranks, calls=10):
    batches = np.array(ranks, dtype=float)
    return measure.Timing(calls, batches, batches.max(axis=1))


def row(nbytes=1 << 20, seconds=1e-3, ranks=4, requested=None, peers=None):
    outcome = report.Outcome(Verdict(0.0, 0), timing([seconds] * 3))
    return report.Row(
        nbytes, nbytes // 4, "float32", "SUM", ranks, "numpy", requested, "ring/simple", outcome, peers or {}
    )


@pytest.mark.parametrize(
    ("text", "nbytes"), [("8", 8), ("64K", 1 << 16), ("64KiB", 1 << 16), ("3m", 3 << 20), ("1G", 1 << 30)]
)
def test_sizes(text, nbytes):
    assert options.size(text) == nbytes


@pytest.mark.parametrize("text", ["", "0", "-8", "K", "8T", "1.5M", "8 K"])
def test_sizes_that_are_none(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected a number of bytes, with K, M or G"):
        options.size(text)


@pytest.mark.parametrize("text", ["0", "-1", "x"])
def test_numbers_of_ranks_that_are_none(capsys, text):
    with pytest.raises(SystemExit, match="2"):
        parsed("-n", text)
    told = capsys.readouterr().err
    assert f"argument -n: expected a whole number of 1 or more, got '{text}'" in told
    assert "usage: nvcoll run" not in told


def test_counts():
    assert run.counts(8, 64, 2, 4) == [2, 4, 8, 16]
    assert run.counts(8, 100, 10, 4) == [2, 20]
    assert run.counts(1, 8, 2, 4) == [1, 2], "at least one element, each count once"
    assert run.counts(1000, 4000, 1.5, 8) == [125, 187, 281, 421]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--min", "1M"], "--max 4096 is below --min 1048576"),
        (["--factor", "1"], "--factor 1 does not grow"),
        (["--factor", "nan"], "--factor nan does not grow"),
        (["--time", "0"], "--time is 0 seconds; give a number above 0"),
        (["--iters", "0"], "--iters is 0; give 1 call or more"),
        (["--op", "BXOR"], "--op BXOR --dtype float32: BXOR is defined for integers"),
        (["--plot", "x.jpx"], "--plot x.jpx has no suffix of a picture; end it in .png, .pdf, .svg"),
        (["-n", "3"], "-n is 3, and the launcher has started 1 rank; leave -n out"),
        (
            ["--algorithm", "rign"],
            "--algorithm rign is unknown; take all or one of ring, tree, or one as in tree/simple",
        ),
        (["--json", "/no/such/folder/x.json"], "--json: there is no folder /no/such/folder for x.json; make it first"),
        (["--json", "/"], "--json: / is a folder; name a file in it"),
        (["--plot", "."], "--plot: . is a folder; name a file in it"),
    ],
)
def test_options_that_cannot_be_used(options, words):
    with pytest.raises(ArgumentError, match=words):
        output(Alone(), *options)


def test_statistics():
    found = timing([1.0, 2.0, 9.0], [3.0, 3.0, 1.0])
    assert found.seconds == 3, "the median of the slower rank"
    assert found.p99 == 9
    assert measure.geometric_mean([1, 4, 16]) == pytest.approx(4)
    assert np.isnan(measure.geometric_mean([]))
    some = row(nbytes=4_000_000, seconds=1e-3, ranks=4)
    assert some.algbw == pytest.approx(4.0)
    assert some.busbw == pytest.approx(6.0)
    assert row(ranks=1).busbw == 0


def test_ratio_and_its_means():
    right, wrong = Verdict(0.0, 0), Verdict(1.0, 1)
    rows = [
        row(seconds=1.0, peers={"mpi": report.Outcome(right, timing([2.0]))}),
        row(seconds=1.0, peers={"mpi": report.Outcome(right, timing([8.0]))}),
        row(seconds=1.0, peers={"mpi": report.Outcome(wrong, None)}),
        row(seconds=1.0, requested="ring", peers={"mpi": report.Outcome(right, timing([3.0]))}),
    ]
    assert [some.ratio("mpi") for some in rows] == [2, 8, None, 3]
    assert report.means(rows) == {"mpi": {"numpy": pytest.approx(4), "numpy ring": pytest.approx(3)}}
    assert [some.wrong for some in rows] == [False, False, True, False]
    assert any("WRONG: mpi, 1048576 bytes: 1 element," in text for text in report.notes(rows))


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.1234, "0.123"), (1.234, "1.23"), (99.994, "99.99"), (345.67, "345.7"), (12345.6, "12346")],
)
def test_numbers(value, text):
    assert report.number(value) == text


def test_table():
    status, lines = output(Alone(), "--buffer", "numpy", "--buffer", "out-of-place")
    assert status == 0
    heading = next(line for line in lines if "busbw" in line)
    assert heading.split()[:5] == ["#", "bytes", "count", "type", "buffer"]
    for head in ("allreduce, SUM: 1 rank, bootstrap single", "date: ", "command: ", "machine: ", "versions: python "):
        assert any(line.startswith(f"# {head}") for line in lines), head
    cells = table(lines)
    assert [line[:5] for line in cells[:2]] == [
        ["8", "2", "float32", kind, "ring/simple"] for kind in ("numpy", "out-of-place")
    ]
    assert [line[0] for line in cells[::2]] == ["8", "128", "2048"]
    assert all(float(line[5]) > 0 and line[-1] == "0" for line in cells)
    assert len({len(line) for line in lines if not line.startswith("# ")}) == 1, "columns stand below each other"


def test_algorithms_are_lines_and_refusals_have_reasons():
    comm = Alone()
    comm.refuse = ("tree/simple",)
    status, lines = output(comm, "--algorithm", "ring/simple", "--algorithm", "ring", "--algorithm", "all")
    assert status == 0
    assert [line[4] for line in table(lines)[:3]] == ["ring/simple", "ring/low_latency", "tree/simple"]
    assert table(lines)[2][-1] == "refused"
    assert "# refused: Allreduce: tree/simple needs two nodes" in lines


def test_wrong_answers_are_told_and_never_timed(monkeypatch, tmp_path):
    monkeypatch.setitem(contestants.PEERS, "broken", Broken)
    status, lines = output(Alone(), "--compare", "broken", "--json", str(tmp_path / "x.json"))
    assert status == 1
    small, _, large = table(lines)
    assert float(small[-1]) > 0
    assert large[-4:] == ["-", "-", "WRONG", "-"]
    assert float(large[5]) > 0, "nvcoll was right, and is timed"
    assert any("WRONG: broken, 2048 bytes: 4 elements" in line for line in lines), "one in each of four checks"
    last = json.loads((tmp_path / "x.json").read_text())["rows"][-1]["peers"]["broken"]
    assert last["wrong"] == 4
    assert last["time_us"] is last["batches_us"] is last["ratio"] is None


def test_nvcoll_itself_is_checked():
    class Wrong(Alone):
        def Allreduce(self, sendbuf, recvbuf, op, algorithm=None):
            if sendbuf is IN_PLACE:
                recvbuf[0] = np.nan
            else:
                recvbuf[...] = sendbuf

    status, lines = output(Wrong())
    assert status == 1
    assert all(line[5:] == ["-", "-", "-", "-", "WRONG"] for line in table(lines))


def test_json_schema(tmp_path):
    path = tmp_path / "x.json"
    _, lines = output(Alone(), "--buffer", "numpy", "--iters", "3", "--json", str(path))
    document = json.loads(path.read_text())
    assert set(document) == {
        *("schema", "verb", "op", "ranks", "bootstrap", "date", "command", "settings", "machine", "versions"),
        *("explanation", "rows", "geometric_means"),
    }
    assert document["schema"] == report.SCHEMA
    assert document["settings"]["iters"] == 3
    assert {"cpu_model", "physical_cores", "usable_cpus", "load"} <= set(document["machine"])
    assert {"python", "numpy", "nvcoll", "numba"} <= set(document["versions"])
    assert len(document["rows"]) == len(table(lines))
    first = document["rows"][0]
    assert set(first) == {
        *(
            "bytes",
            "count",
            "datatype",
            "op",
            "buffer",
            "requested",
            "algorithm",
            "time_us",
            "p99_us",
            "error",
            "wrong",
        ),
        *("refused", "calls", "batches_us", "algbw_gbs", "busbw_gbs", "peers"),
    }
    [batches] = first["batches_us"]
    assert first["time_us"] == pytest.approx(np.median(batches))
    assert first["calls"] == 3


@pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason='needs matplotlib: pip install "nvcoll[bench]"'
)
@pytest.mark.filterwarnings("default")  # matplotlib's own, of its dependencies
def test_plot(monkeypatch, tmp_path):
    path = tmp_path / "x.png"
    peers = {"mpi": report.Outcome(Verdict(0.0, 0), timing([2e-6]))}
    refused = report.Outcome(None, None, "no")
    rows = [row(1 << shift, 1e-9 * (1000 + (1 << shift)), peers=peers) for shift in range(3, 27)]
    rows.append(report.Row(1 << 27, 1 << 25, "float32", "SUM", 4, "numpy", "ring", "ring", refused, peers))
    plot.save(path, rows, "a title")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000
    plot.save(tmp_path / "x.SVG", [row()], "no peers")
    assert b"<svg" in (tmp_path / "x.SVG").read_bytes()
    assert plot.size_text(65536) == "64 KiB"


def test_a_file_that_cannot_be_written_after_all_leaves_the_table_and_what_was_there(monkeypatch, tmp_path):
    def fill(path, text, encoding):
        path.open("w").close()
        raise OSError(errno.ENOSPC, "No space left on device")

    lines, path = [], tmp_path / "x.json"
    path.write_text("old")
    monkeypatch.setattr(Path, "write_text", fill)
    for file in (Path("/dev/full"), path):
        with pytest.raises(ArgumentError, match=rf"--json: cannot write {file} \(No space left on device\); the table"):
            bench.bench(Alone(), parsed(*QUICK, "--json", str(file)), lines.append)
    assert len(table(lines)) == 6
    assert path.read_text() == "old"


@pytest.mark.parametrize("name", ["x.png", "X.PNG", "x.Svg"])
def test_plot_without_matplotlib_is_refused_before_the_measurement(monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ArgumentError, match=r'--plot needs matplotlib; pip install "nvcoll\[bench\]"'):
        output(Alone(), "--plot", name)


@pytest.mark.parametrize(
    "command", [[NVCOLL, "run", "-n", "2", "--", NVCOLL, "bench", "allreduce"], [NVCOLL, "bench", "allreduce"]]
)
def test_ranks_of_nvcoll_run(run_command, tmp_path, command):
    path = tmp_path / "x.json"
    status, text = run_command([*command, *QUICK, "--buffer", "symmetric", "--buffer", "numpy", "--json", path])
    assert status == 0, text
    document = json.loads(path.read_text())
    assert document["ranks"] == (2 if "run" in command else 1)
    assert len(document["rows"]) == 6
    assert all(row["wrong"] == 0 and row["time_us"] > 0 for row in document["rows"])
    assert all(len(row["batches_us"]) == document["ranks"] for row in document["rows"])


def test_ranks_started_by_itself(run_command):
    status, text = run_command([NVCOLL, "bench", "allreduce", "-n", "2", "--dtype", "bfloat16", "--max", "8"])
    assert status == 0, text
    assert "allreduce, SUM: 2 ranks, bootstrap run" in text


def test_a_file_that_cannot_be_written_is_told_once_and_by_no_traceback(run_command):
    command = [NVCOLL, "bench", "allreduce", "-n", "2", "--max", "8", "--time", "0.01", "--json", "/dev/full"]
    status, text = run_command(command)
    assert status == 2, text
    assert text.count("nvcoll bench: --json: cannot write /dev/full (No space left on device); the table is above") == 1
    assert "Traceback" not in text


def test_an_answer_that_is_wrong_on_one_rank_is_wrong(run_ranks, tmp_path):
    program = """
        import sys
        from nvcoll import Comm
        from nvcoll.cli import main

        right = Comm.Allreduce

        def spoilt(comm, sendbuf, recvbuf=None, *rest, **keywords):
            right(comm, sendbuf, recvbuf, *rest, **keywords)
            if comm.rank == 1 and recvbuf is not None and recvbuf.size == 32:
                recvbuf[31] += 1

        Comm.Allreduce = spoilt
        sys.exit(main(sys.argv[1:]))
    """
    path = tmp_path / "x.json"
    ranks = run_ranks(program, 2, "bench", "allreduce", *QUICK, "--json", path, check=False)
    assert ranks.returncode == 1, str(ranks)
    assert re.search(r"^# WRONG: nvcoll symmetric \S+, 128 bytes: 4 elements", ranks.stdout[0], re.MULTILINE)
    assert "nvcoll bench: rank 1: some answers were wrong" in ranks.stderr
    assert [row["time_us"] is None for row in json.loads(path.read_text())["rows"]] == [False, True, False]


@pytest.mark.mpi
def test_ranks_of_mpiexec_beside_mpi(run_command):
    command = [MPIEXEC, "-n", "2", NVCOLL, "bench", "allreduce", "--compare", "mpi", *QUICK]
    status, text = run_command(command)
    assert status == 0, text
    assert "2 ranks, bootstrap mpi" in text
    assert "mpi/nvcoll" in text
    assert "# geometric mean of mpi/nvcoll, symmetric: " in text


@pytest.mark.mpi
def test_types_that_mpi_lacks_are_told_with_a_cure(run_command):
    command = [MPIEXEC, "-n", "2", NVCOLL, "bench", "allreduce", "--compare", "mpi", "--dtype", "bfloat16", *QUICK]
    status, text = run_command(command)
    assert status == 2, text
    refusal = (
        r"nvcoll bench: --compare mpi cannot reduce bfloat16 with SUM \(.*\); leave --compare out or take another --"
    )
    assert len(re.findall(refusal, text)) == 1, text


@pytest.mark.mpi
def test_comparison_with_mpi_needs_ranks_of_mpi(run_command):
    status, text = run_command([NVCOLL, "bench", "allreduce", "-n", "2", "--compare", "mpi", *QUICK])
    assert status == 2, text
    assert text.count("type `mpiexec -n 2 nvcoll bench allreduce --compare mpi`") == 1
    assert "Traceback" not in text
