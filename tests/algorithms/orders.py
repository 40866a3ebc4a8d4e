"""The order in which each algorithm combines contributions, as it documents it, in NumPy and to the last bit."""

from functools import reduce

import numpy as np

from nvcoll.ops import DATATYPES
from tests.oracle import COMBINE

# Operators by kind of type whose results depend on the order; MIN and MAX do where zeros differ in sign, and in NaNs.
# Products of complex numbers do, in the signs of zeros, and NumPy's may have other signs.
DEPEND = {"bool": (), "int": (), "uint": (), "float": ("SUM", "AVG", "PROD", "MIN", "MAX"), "complex": ("SUM", "AVG")}


def exact(call, given, node_sizes):
    """The result of a call to the last bit, or None where it does not depend on the order."""
    datatype = DATATYPES[call.datatype]
    if call.op not in DEPEND[datatype.kind]:
        return None
    combine = extreme(call.op) if call.op in {"MIN", "MAX"} else COMBINE[call.op]
    working = [array.astype(datatype.accumulate) for array in given]
    total = ORDERS[call.algorithm.split("/")[0]](working, combine, node_sizes)
    if call.op == "AVG":
        reals = total.view(np.dtype(f"float{datatype.dtype.itemsize * 4}")) if datatype.kind == "complex" else total
        total = (reals / len(given)).view(total.dtype)
    return total.astype(datatype.dtype)


def extreme(op):
    """MIN or MAX as kernels define it: of equal numbers (zeros) the right one, of two NaNs the left one."""
    compare = np.less if op == "MIN" else np.greater

    def combine(left, right):
        return np.where(np.isnan(left) | (compare(left, right) & ~np.isnan(right)), left, right)

    return combine


def rank_order(arrays, combine, node_sizes=None):
    """((a0 a1) a2) a3 ..."""
    return reduce(combine, arrays)


def folded(arrays, combine):
    """The first ranks combine in pairs until their number is a power of two."""
    extra = len(arrays) - (1 << len(arrays).bit_length() - 1)
    pairs = [combine(arrays[2 * k], arrays[2 * k + 1]) for k in range(extra)]
    return pairs + arrays[2 * extra :]


def near_first(arrays, combine, node_sizes=None):
    """A tree whose leaves are neighbours: (a0 a1) (a2 a3)."""
    arrays = folded(arrays, combine)
    while len(arrays) > 1:
        arrays = [combine(left, right) for left, right in zip(arrays[::2], arrays[1::2], strict=True)]
    return arrays[0]


def far_first(arrays, combine, node_sizes=None):
    """A tree whose leaves are half of the ranks apart: (a0 a2) (a1 a3)."""
    arrays = folded(arrays, combine)
    while len(arrays) > 1:
        half = len(arrays) // 2
        arrays = [combine(left, right) for left, right in zip(arrays[:half], arrays[half:], strict=True)]
    return arrays[0]


def along_the_ring(arrays, combine, node_sizes=None):
    """Slice k begins at rank k and takes up each next rank's part."""
    size, count = len(arrays), len(arrays[0])
    each = -(-count // size) if count else 1
    slices = []
    for k in range(size):
        parts = [array[k * each : (k + 1) * each] for array in arrays]
        total = reduce(combine, parts[k:])
        if k:  # rank 0 gets the sum from the last rank, and the lower rank's operand is on the left
            total = reduce(combine, parts[1:k], combine(parts[0], total))
        slices.append(total)
    return np.concatenate(slices)


def of_nodes(arrays, combine, node_sizes):
    """Rank order in each node."""
    ends = np.cumsum(node_sizes)
    return [rank_order(arrays[end - size : end], combine) for size, end in zip(node_sizes, ends, strict=True)]


def nodes_then_tree(arrays, combine, node_sizes):
    """Rank order in each node, and a tree whose leaves are neighbouring nodes."""
    return near_first(of_nodes(arrays, combine, node_sizes), combine)


def nodes_in_order(arrays, combine, node_sizes):
    """Rank order in each node, and node order between them: (a0 a1) (a2 a3) (a4 a5)."""
    return rank_order(of_nodes(arrays, combine, node_sizes), combine)


ORDERS = {
    "one_shot": rank_order,
    "two_shot": rank_order,
    "ring": along_the_ring,
    "recursive_doubling": near_first,
    "halving_doubling": far_first,
    "nvrar": nodes_then_tree,
    "nvrar_one_hop": nodes_in_order,
}
