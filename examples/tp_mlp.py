"""Train a tensor-parallel network on handwritten digits, and prove that splitting it changes nothing.

    nvcoll run -n 4 examples/tp_mlp.py
    mpiexec -n 4 python examples/tp_mlp.py
    torchrun --nproc-per-node 4 examples/tp_mlp.py
    python examples/tp_mlp.py                                  one rank

The network is a transformer without its attention, split over the ranks as in Megatron-LM (Shoeybi et al. 2019):

    64 pixels -> embedding -> block -> block -> readout -> 10 logits        a block: y = x + tanh(x A + a) B + b

Embedding and readout are small, and every rank holds a copy. A block's A is split by columns and its B by rows:

    rank 0   A[:, 0:64]     B[0:64, :]         tanh looks at one number at a time, so a rank goes through A, tanh and B
    rank 1   A[:, 64:128]   B[64:128, :]       with no word from the others. Two sums per block remain:
    ...
    forward    each rank's product with B is one term of y: all-reduce ("g" in Megatron-LM)
    backward   each rank's columns of A give one term of the gradient of x, and the layer in front, be it a block or the
               embedding, needs the whole of it: all-reduce ("f" in Megatron-LM)

Nothing else is communicated. All ranks see the same images in the same order, and an all-reduce leaves the same bits on
all of them, so the copies of embedding, readout and b stay equal by themselves.

In the end every rank also trains the network unsplit and compares: the program exits with 1 if a weight of any rank,
or a logit, is further off than the tolerance that it prints. Where nvcoll's ranks have GPUs, the arrays are torch's (or
CuPy's), and with torch a training step with all its sums is one CUDA graph.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

# The ranks share the machine's cores, and NumPy reads this once, when it is imported: a BLAS that starts one thread per
# core in every rank gets in its own way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import numpy as np
from array_libraries import OfNumpy, library_of
from numpy.typing import NDArray

from nvcoll import COMM_SELF, COMM_WORLD, MAX, Comm

try:
    from sklearn.datasets import load_digits
    from tqdm import tqdm
except ImportError as missing:
    sys.exit(f'tp_mlp.py needs {missing.name}: pip install "nvcoll[examples]"')

Array = NDArray[np.floating]
Labels = NDArray[np.intp]
Parameters = dict[str, Array]

WIDTH = 64
CLASSES = 10
BLOCKS = 2
MOMENTUM = 0.9
USUAL_BATCH = 64
TEST_IMAGES = 360

# A sum in parts rounds differently from a whole one, and training carries the difference on: usually 1e-6 and 2e-15.
# A forgotten all-reduce is wrong in the first digit. (With relu in place of tanh a rounding may move a number over the
# kink and switch its slope, which is a difference that grows.)
TOLERANCES = {"float32": 1e-4, "float64": 1e-12}


@dataclass(frozen=True)
class Digits:
    """8 x 8 pixels in 0..1 as rows of 64, and the digit that each row shows."""

    images: Array
    labels: Labels
    test_images: Array
    test_labels: Labels


class PartialSums:
    """Matrix products that are sums over the ranks, formed and reduced in one symmetric buffer (images, WIDTH)."""

    def __init__(self, comm: Comm, buffer: Any) -> None:
        self.comm = comm
        self.arrays = library_of(buffer)
        self.buffer = self.arrays.view(buffer)
        self.seconds, self.calls = 0.0, 0

    def product(self, left: Array, right: Array) -> Array:
        """Sum of `left @ right` over all ranks; it stands in the buffer until the next call."""
        total = self.buffer[: len(left)]
        self.arrays.library.matmul(left, right, out=total)
        start = perf_counter()
        self.comm.Allreduce(total, stream=self.arrays.stream())
        self.seconds += perf_counter() - start
        self.calls += 1
        return total


class Dense:
    """y = x W + b, whole on every rank."""

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = parameters
        self.gradients: Parameters = {}

    def forward(self, x: Array) -> Array:
        self.x = x
        return x @ self.parameters["W"] + self.parameters["b"]

    def backward(self, dy: Array) -> Array:
        self.gradients = {"W": self.x.T @ dy, "b": dy.sum(axis=0)}
        return dy @ self.parameters["W"].T


class Block:
    """y = x + tanh(x A + a) B + b; a rank holds some columns of A and a, the same rows of B, and all of b."""

    def __init__(self, parameters: Parameters, sums: PartialSums) -> None:
        self.parameters = parameters
        self.gradients: Parameters = {}
        self.sums = sums

    def forward(self, x: Array) -> Array:
        A, a, B, b = (self.parameters[name] for name in "AaBb")
        self.x = x
        self.hidden = self.sums.arrays.library.tanh(x @ A + a)
        # x and b are whole on every rank: add them after the sum, once.
        return x + self.sums.product(self.hidden, B) + b

    def backward(self, dy: Array) -> Array:
        A, B = self.parameters["A"], self.parameters["B"]
        # dy is whole on every rank: each has all it needs for the gradients of its own columns and rows.
        dhidden = (dy @ B.T) * (1 - self.hidden**2)
        self.gradients = {
            "A": self.x.T @ dhidden,
            "a": dhidden.sum(axis=0),
            "B": self.hidden.T @ dy,
            "b": dy.sum(axis=0),
        }
        return dy + self.sums.product(dhidden, A.T)


def split(block: Parameters, columns: slice) -> Parameters:
    """The part of a whole block's parameters that the rank with these hidden columns holds."""
    parts = {"A": block["A"][:, columns], "a": block["a"][columns], "B": block["B"][columns], "b": block["b"]}
    return {name: part.copy() for name, part in parts.items()}


def columns_of(rank: int, size: int, hidden: int) -> slice:
    """The hidden columns of a rank; where `size` does not divide `hidden`, some ranks hold one more than others."""
    return slice(hidden * rank // size, hidden * (rank + 1) // size)


class Network:
    """Embedding, blocks, readout. The initial weights depend on `seed` alone, not on the number of ranks."""

    def __init__(self, sums: PartialSums, hidden: int, dtype: str, seed: int) -> None:
        random = np.random.default_rng(seed)
        columns = columns_of(sums.comm.rank, sums.comm.size, hidden)

        def weights(rows: int, columns: int) -> Array:
            return random.normal(0, np.sqrt(1 / rows), (rows, columns)).astype(dtype)

        def dense(rows: int, columns: int) -> Dense:
            return Dense({"W": weights(rows, columns), "b": np.zeros(columns, dtype)})

        def block() -> Block:
            # Every rank draws the whole block and keeps its part, so that no number depends on who holds it.
            A, B = weights(WIDTH, hidden), weights(hidden, WIDTH)
            whole = {"A": A, "a": np.zeros(hidden, dtype), "B": B, "b": np.zeros(WIDTH, dtype)}
            return Block(split(whole, columns), sums)

        self.embedding = dense(WIDTH, WIDTH)
        self.blocks = [block() for _ in range(BLOCKS)]
        self.readout = dense(WIDTH, CLASSES)
        self.layers: list[Dense | Block] = [self.embedding, *self.blocks, self.readout]
        self.arrays = sums.arrays
        self.convert(self.arrays.array)

    def convert(self, function: Callable[[Any], Any]) -> None:
        """Bring all weights to another library."""
        for layer in self.layers:
            layer.parameters = {name: function(values) for name, values in layer.parameters.items()}

    def forward(self, images: Array) -> Array:
        x = images
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def backward(self, dlogits: Array) -> None:
        gradient = dlogits
        for layer in reversed(self.layers):
            gradient = layer.backward(gradient)


class Momentum:
    """Stochastic gradient descent with momentum; every rank updates the weights that it holds."""

    def __init__(self, network: Network, rate: float) -> None:
        self.layers = network.layers
        self.rate = rate
        self.velocities = [{name: 0 * w for name, w in layer.parameters.items()} for layer in self.layers]

    def step(self) -> None:
        for layer, velocity in zip(self.layers, self.velocities, strict=True):
            for name, gradient in layer.gradients.items():
                velocity[name] *= MOMENTUM
                velocity[name] -= self.rate * gradient
                layer.parameters[name] += velocity[name]


def cross_entropy(logits: Array, labels: Labels, library: Any = np) -> tuple[Any, Array]:
    """Mean loss of a batch, and its gradient with respect to the logits."""
    rows = library.arange(len(labels))
    shifted = logits - library.amax(logits, axis=1, keepdims=True)
    log_probabilities = shifted - library.log(library.exp(shifted).sum(axis=1, keepdims=True))
    gradient = library.exp(log_probabilities)
    gradient[rows, labels] -= 1
    return -log_probabilities[rows, labels].mean(), gradient / len(labels)


def hits(logits: Array, labels: Labels) -> Any:
    """How many rows have their largest logit at the label."""
    return (logits.argmax(axis=1) == labels).sum()


def batches(count: int, size: int) -> Iterator[slice]:
    """Slices that cut `count` rows into batches of `size`; the last one may be smaller."""
    return (slice(start, start + size) for start in range(0, count, size))


def load(dtype: str, seed: int) -> Digits:
    """The digits that come with scikit-learn, the same shuffle on every rank."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    images, labels = (images[order] / 16).astype(dtype), labels[order]
    return Digits(images[TEST_IMAGES:], labels[TEST_IMAGES:], images[:TEST_IMAGES], labels[:TEST_IMAGES])


@dataclass(frozen=True)
class Training:
    """What a training run leaves behind; times in seconds."""

    network: Network
    test_logits: Array
    seconds: float
    allreduce_seconds: float
    allreduce_calls: int
    arrays: OfNumpy


def train(comm: Comm, digits: Digits, options: argparse.Namespace, report: bool = False) -> Training:
    """Train over the ranks of `comm`, which call it together, and run the test images; `report`: show the progress."""
    with comm.empty((options.batch, WIDTH), options.dtype) as buffer:
        sums = PartialSums(comm, buffer)
        network, arrays = Network(sums, options.hidden, options.dtype, options.seed), sums.arrays
        # The first call compiles a kernel if the cache lacks it, and waits for the last rank to start: not training.
        sums.buffer[:] = 0
        comm.Allreduce(sums.buffer, stream=arrays.stream())
        start = perf_counter()
        train_epochs(network, digits, options, report)
        spent = perf_counter() - start, sums.seconds, sums.calls
        images = arrays.array(digits.test_images)
        parts = [arrays.numpy(network.forward(images[batch])) for batch in batches(TEST_IMAGES, options.batch)]
        network.convert(arrays.numpy)
    return Training(network, np.concatenate(parts), *spent, arrays)


def train_epochs(network: Network, digits: Digits, options: argparse.Namespace, report: bool) -> None:
    """Go through the training images `options.epochs` times, in the same random order on every rank."""
    random = np.random.default_rng(options.seed)
    # In proportion to the batch, so that other batches go the same way in more or fewer steps, within reason.
    optimizer = Momentum(network, options.lr * min(options.batch / USUAL_BATCH, 4))
    arrays = network.arrays

    def step(images: Array, labels: Labels) -> tuple[Any, Any]:
        logits = network.forward(images)
        loss, gradient = cross_entropy(logits, labels, arrays.library)
        network.backward(gradient)
        optimizer.step()
        return loss, hits(logits, labels)

    step = arrays.repeated(step)
    images, labels = arrays.array(digits.images), arrays.array(digits.labels)
    count = len(digits.labels)
    hide_bar = None if report else True  # None: show it where standard error is a terminal
    for epoch in tqdm(range(1, options.epochs + 1), unit="epoch", leave=False, mininterval=0, disable=hide_bar):
        order = arrays.array(random.permutation(count))
        loss = correct = 0.0
        for batch in batches(count, options.batch):
            rows = order[batch]
            batch_loss, batch_hits = step(images[rows], labels[rows])
            loss = loss + batch_loss * (len(rows) / count)
            correct = correct + batch_hits * (100 / count)
        loss, correct = float(loss), float(correct)  # waits for the GPU
        if report:
            # tqdm's own print does not tear the bar
            tqdm.write(f"epoch {epoch:2d}  loss {loss:.4f}  training accuracy {correct:.1f} %", file=sys.stdout)


def deviation(ours: Array, expected: Array) -> float:
    """Largest difference, relative to the largest expected value; NaN where a value is not a number."""
    scale = np.abs(expected).max(initial=np.finfo(expected.dtype).tiny)
    return float(np.abs(ours - expected).max(initial=0) / scale)


def worst_deviation(split_run: Training, whole_run: Training, columns: slice) -> float:
    """Compare the logits, and all weights that the rank with these hidden columns holds, to the unsplit run's."""
    found = [deviation(split_run.test_logits, whole_run.test_logits)]
    for ours, whole in zip(split_run.network.layers, whole_run.network.layers, strict=True):
        expected = split(whole.parameters, columns) if isinstance(whole, Block) else whole.parameters
        found += [deviation(ours.parameters[name], expected[name]) for name in expected]
    return float(np.max(found))  # unlike Python's max, it never loses a NaN


def agrees_with_unsplit(run: Training, digits: Digits, options: argparse.Namespace) -> bool:
    """Train the unsplit network on every rank and compare; all ranks come to the same verdict."""
    unsplit = train(COMM_SELF, digits, options)
    mine = columns_of(COMM_WORLD.rank, COMM_WORLD.size, options.hidden)
    worst = run.arrays.array(np.array([worst_deviation(run, unsplit, mine)]))
    COMM_WORLD.Allreduce(worst, op=MAX, stream=run.arrays.stream())
    same = bool(worst[0] <= TOLERANCES[options.dtype])  # False for NaN
    if COMM_WORLD.rank == 0:
        print(
            f"split and unsplit network differ by {worst[0]:.1e} of the largest weight or logit: "
            f"{'equal' if same else 'NOT equal'} to the tolerance of {TOLERANCES[options.dtype]:.0e}"
        )
        if not same:
            print("Either a sum is wrong, or training is unstable and blows rounding up; then a smaller --lr cures it.")
    return same


def describe(options: argparse.Namespace) -> None:
    """Print what is split, and how it will be summed."""
    columns = [columns_of(rank, COMM_WORLD.size, options.hidden) for rank in range(COMM_WORLD.size)]
    widths = " + ".join(str(part.stop - part.start) for part in columns)
    nbytes = options.batch * WIDTH * np.dtype(options.dtype).itemsize
    plan = COMM_WORLD.explain("allreduce", nbytes, options.dtype)
    print(f"hidden columns by rank: {widths}")
    chosen = f"{plan.algorithm}/{plan.protocol}" if plan.protocol else plan.algorithm
    print(f"Allreduce of {nbytes} bytes ({options.dtype}): {chosen}, because {plan.reason}")


def summarize(run: Training, digits: Digits) -> None:
    """Print where the time went, and what was learned."""
    share = f"{100 * run.allreduce_seconds / run.seconds:.0f} % of it in {run.allreduce_calls} calls of Allreduce"
    if run.arrays.in_graph:
        share = "all calls of Allreduce but the first inside CUDA graphs"
    print(f"trained in {run.seconds:.2f} s, {share} (rank 0, waiting for other ranks included)")
    print(f"test accuracy {100 * hits(run.test_logits, digits.test_labels) / TEST_IMAGES:.1f} %")


def natural(text: str, least: int = 0) -> int:
    """An argument that must be a whole number of at least zero."""
    value = int(text) if text.removeprefix("-").isdecimal() else None
    if value is None or value < least:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
    return value


def positive(text: str) -> int:
    """An argument that must be a whole number of at least one."""
    return natural(text, 1)


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; `--help` says what each option does."""
    parser = argparse.ArgumentParser(description="Train a tensor-parallel network on scikit-learn's digits.")
    parser.add_argument("--epochs", type=positive, default=10, help="passes over the training images (%(default)s)")
    parser.add_argument("--hidden", type=positive, default=256, help="hidden columns of a block (%(default)s)")
    parser.add_argument("--batch", type=positive, default=USUAL_BATCH, help="images per step (%(default)s)")
    parser.add_argument("--lr", type=float, default=0.01, help="learning rate for the usual batch (%(default)s)")
    parser.add_argument("--seed", type=natural, default=0, help="of weights and of the order of images (%(default)s)")
    parser.add_argument("--dtype", choices=TOLERANCES, default="float32", help="of weights and messages (%(default)s)")
    parser.add_argument("--device", choices=("auto", "gpu"), default="auto", help="gpu: end if nvcoll uses none")
    parser.add_argument("--no-check", action="store_true", help="do not compare with the unsplit network")
    return parser.parse_args(arguments)


def main() -> int:
    """Train, report, compare; 0 if the split network is the unsplit one."""
    options = parse_options()
    if options.device == "gpu" and COMM_WORLD.target != "cuda":
        sys.exit(f"--device gpu: nvcoll's ranks are on {COMM_WORLD.backend}, not on GPUs; set NVCOLL_BACKEND=nvshmem")
    report = COMM_WORLD.rank == 0
    digits = load(options.dtype, options.seed)
    if report:
        describe(options)
    run = train(COMM_WORLD, digits, options, report)
    if report:
        summarize(run, digits)
    return 0 if options.no_check or agrees_with_unsplit(run, digits, options) else 1


if __name__ == "__main__":
    sys.exit(main())
