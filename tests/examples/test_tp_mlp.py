"""The tensor-parallel network: it learns, N ranks give what one gives, and the comparison sees a difference."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from nvcoll import emulate

SCRIPT = Path(__file__).parents[2] / "examples" / "tp_mlp.py"
DIFFERENCE = re.compile(r"differ by (\S+) of the largest weight or logit: (NOT )?equal to the tolerance of (\S+)")

# Runs the example with one all-reduce in two forgotten: those of the backward pass.
FORGETFUL = f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import tp_mlp

def backward(block, dy, original=tp_mlp.Block.backward):
    block.sums.comm, comm = tp_mlp.COMM_SELF, block.sums.comm
    try:
        return original(block, dy)
    finally:
        block.sums.comm = comm

tp_mlp.Block.backward = backward
sys.exit(tp_mlp.main())
"""


@pytest.fixture(scope="module")
def tp_mlp(load_example):
    return load_example("tp_mlp")


@pytest.fixture(scope="module")
def digits(tp_mlp):
    return tp_mlp.load("float64", 0)


def options_of(tp_mlp, *arguments):
    return tp_mlp.parse_options(["--dtype", "float64", "--epochs", "1", "--hidden", "7", *arguments])


def check_output(ranks, epochs):
    first, *others = ranks.stdout
    found = re.findall(r"^epoch +\d+  loss (\S+)  training accuracy \S+ %$", first, re.MULTILINE)
    losses = [float(loss) for loss in found]
    assert len(losses) == epochs, str(ranks)
    assert losses[-1] < losses[0], str(ranks)
    assert re.search(r"^Allreduce of \d+ bytes \(float\d\d\): [\w/]+, because .", first, re.MULTILINE), str(ranks)
    assert re.search(r"^trained in \S+ s, \d+ % of it in \d+ calls of Allreduce", first, re.MULTILINE), str(ranks)
    assert float(re.search(r"^test accuracy (\S+) %$", first, re.MULTILINE)[1]) > 80, str(ranks)
    difference, wrong, tolerance = DIFFERENCE.search(first).groups()
    assert not wrong, str(ranks)
    assert float(difference) <= float(tolerance), str(ranks)
    assert not "".join(others), f"ranks other than 0 print: {ranks}"
    assert "epoch" not in ranks.stderr, f"a progress bar without a terminal: {ranks}"


@pytest.mark.parametrize(
    ("size", "arguments"),
    [(1, []), (2, ["--dtype", "float64"]), (3, ["--hidden", "50", "--batch", "100"])],
)
def test_any_number_of_ranks_equals_one(size, arguments, run_ranks):
    check_output(run_ranks(SCRIPT, size, "--epochs", 3, *arguments, timeout=30), 3)


@pytest.mark.mpi
def test_under_mpiexec(run_ranks):
    check_output(run_ranks(SCRIPT, 2, "--epochs", 3, launcher="mpiexec", timeout=30), 3)


def test_without_a_launcher(run_command):
    status, output = run_command([sys.executable, SCRIPT, "--epochs", "1", "--no-check"], timeout=30)
    assert status == 0, output
    assert "hidden columns by rank: 256\n" in output
    assert "differ" not in output


def test_forgotten_allreduce_fails(run_ranks):
    ranks = run_ranks(FORGETFUL, 2, "--epochs", 1, check=False, timeout=30)
    assert ranks.returncode == 1, str(ranks)
    assert "NOT equal" in ranks.stdout[0], str(ranks)


@pytest.mark.parametrize("hidden", [2, 7])
def test_emulated_ranks_equal_one(tp_mlp, digits, hidden):
    """Two hidden columns leave a rank of three without any."""
    options = options_of(tp_mlp, "--hidden", str(hidden))
    [expected] = emulate(1).run(tp_mlp.train, digits, options)
    for rank, run in enumerate(emulate(3).run(tp_mlp.train, digits, options)):
        columns = tp_mlp.columns_of(rank, 3, hidden)
        assert tp_mlp.worst_deviation(run, expected, columns) <= tp_mlp.TOLERANCES["float64"]


def test_wrong_weight_is_seen_in_every_layer(tp_mlp, digits):
    options = options_of(tp_mlp)
    columns = tp_mlp.columns_of(1, 3, options.hidden)
    [expected] = emulate(1).run(tp_mlp.train, digits, options)
    run = emulate(3).run(tp_mlp.train, digits, options)[1]
    tolerance = tp_mlp.TOLERANCES["float64"]
    assert tp_mlp.worst_deviation(run, expected, columns) <= tolerance
    for layer in run.network.layers:
        for values in layer.parameters.values():
            right = values.flat[-1]
            for wrong in (right + 1e-6, np.nan, np.inf):
                values.flat[-1] = wrong
                assert not tp_mlp.worst_deviation(run, expected, columns) <= tolerance
            values.flat[-1] = right
    run.test_logits[0, 0] += 1e-6
    assert not tp_mlp.worst_deviation(run, expected, columns) <= tolerance


def test_verdict_is_false_for_a_wrong_weight(tp_mlp, digits, monkeypatch, capsys):
    options = options_of(tp_mlp)

    def verdict(comm, wrong):
        monkeypatch.setattr(tp_mlp, "COMM_WORLD", comm)
        monkeypatch.setattr(tp_mlp, "COMM_SELF", comm)
        run = tp_mlp.train(comm, digits, options)
        run.network.readout.parameters["b"][3] += wrong
        return tp_mlp.agrees_with_unsplit(run, digits, options)

    assert emulate(1).run(verdict, 0) == [True]
    assert "NOT" not in capsys.readouterr().out
    assert emulate(1).run(verdict, 1e-6) == [False]
    assert "NOT equal" in capsys.readouterr().out


def test_gradients_are_those_of_finite_differences(tp_mlp, digits):
    images, labels = digits.images[:5], digits.labels[:5]

    def check(comm):
        with comm.empty((5, tp_mlp.WIDTH), np.float64) as buffer:
            network = tp_mlp.Network(tp_mlp.PartialSums(comm, buffer), 7, "float64", 0)
            network.backward(tp_mlp.cross_entropy(network.forward(images), labels)[1])
            for layer in network.layers:
                for name, values in layer.parameters.items():
                    step = np.zeros_like(values)
                    step.flat[:: 1 + values.size // 50] = 1e-5
                    losses = []
                    for layer.parameters[name] in (values + step, values - step, values):
                        losses.append(tp_mlp.cross_entropy(network.forward(images), labels)[0])
                    slope = (layer.gradients[name] * step).sum()
                    assert (losses[0] - losses[1]) / 2 == pytest.approx(slope, rel=1e-6)

    emulate(1).run(check)


@pytest.mark.parametrize(("rank", "size", "hidden"), [(0, 1, 5), (2, 3, 7), (3, 4, 2)])
def test_columns_cover_all_hidden_ones_once(tp_mlp, rank, size, hidden):
    parts = [tp_mlp.columns_of(rank, size, hidden) for rank in range(size)]
    assert [column for part in parts for column in range(hidden)[part]] == list(range(hidden))
    widths = [part.stop - part.start for part in parts]
    assert max(widths) - min(widths) <= 1


@pytest.mark.parametrize("name", ["sklearn", "tqdm"])
def test_missing_package_is_named(name, tmp_path, run_command):
    (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('not here', name={name!r})")
    status, output = run_command([sys.executable, SCRIPT], timeout=30, env={"PYTHONPATH": str(tmp_path)})
    assert status == 1, output
    assert output == f'tp_mlp.py needs {name}: pip install "nvcoll[examples]"\n'


@pytest.mark.parametrize(("option", "least"), [("--epochs", 1), ("--hidden", 1), ("--batch", 1), ("--seed", 0)])
def test_numbers_that_are_too_small_are_refused(tp_mlp, option, least, capsys):
    tp_mlp.parse_options([option, str(least)])
    with pytest.raises(SystemExit):
        tp_mlp.parse_options([option, str(least - 1)])
    assert f"argument {option}: must be a whole number of at least {least}, got " in capsys.readouterr().err
