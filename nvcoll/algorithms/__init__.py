"""One file an algorithm: picture, what it supports, what it costs, and its kernel text."""

from nvcoll.algorithms import (
    halving_doubling,
    node_slices,
    nvrar,
    nvrar_one_hop,
    one_shot,
    recursive_doubling,
    ring,
    two_shot,
)
from nvcoll.algorithms._registry import ALGORITHMS, Algorithm, Link, Shape, Slots

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "Link",
    "Shape",
    "Slots",
    "halving_doubling",
    "node_slices",
    "nvrar",
    "nvrar_one_hop",
    "one_shot",
    "recursive_doubling",
    "ring",
    "two_shot",
]
