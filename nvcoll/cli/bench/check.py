"""Random data for a run, and the verdict on what came back.

Every rank can draw the data of every other rank (the seed holds the rank), so that each checks its own result against a
reference in float64 without a message. The data are drawn in chunks: the check of 64 MiB needs a few MiB.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from nvcoll.ops import Datatype, Op

CHUNK = 1 << 18  # elements
COMBINE: dict[str, np.ufunc] = {
    "SUM": np.add,
    "AVG": np.add,
    "PROD": np.multiply,
    "MIN": np.minimum,
    "MAX": np.maximum,
    "LAND": np.logical_and,
    "LOR": np.logical_or,
    "LXOR": np.logical_xor,
    "BAND": np.bitwise_and,
    "BOR": np.bitwise_or,
    "BXOR": np.bitwise_xor,
}
INEXACT = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
INEXACT |= {"float8_e4m3fn": 2.0**-3, "float8_e5m2": 2.0**-2}
INEXACT |= {"complex64": INEXACT["float32"], "complex128": INEXACT["float64"]}
"""Datatype -> the distance from 1 to the next number it can hold (of each part, for complex ones)."""

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Verdict:
    """What a check found on one rank.

    Attributes
    ----------
    error
        Largest error: of inexact datatypes relative to the sum (PROD: product) of the magnitudes that were reduced, of
        exact ones absolute.
    wrong
        How many elements are wrong: beyond `tolerance`, or not a number.
    """

    error: float
    wrong: int


@dataclass(frozen=True)
class Data:
    """The random data of all ranks for one reduction.

    Parameters
    ----------
    op, datatype
        What is reduced.
    size
        Number of ranks.
    seed
        A seed equal on all ranks; another one gives other data.
    """

    op: Op
    datatype: Datatype
    size: int
    seed: int = 0

    def fill(self, array: Array, rank: int) -> None:
        """Write the data of `rank` into `array`, a flat array of `datatype`."""
        for start, count in _chunks(array.size):
            array[start : start + count] = self._draw(rank, start, count)

    def check(self, result: Array) -> Verdict:
        """Compare `result`, what this rank received, with the reference."""
        error, wrong = 0.0, 0
        tolerance = self.tolerance()
        for start, count in _chunks(result.size):
            with np.errstate(invalid="ignore", over="ignore"):  # what came back may be anything
                found = self._errors(start, result[start : start + count])
            found = np.where(np.isnan(found), np.inf, found)
            error = max(error, float(found.max()))
            wrong += int(np.count_nonzero(found > tolerance))
        return Verdict(error, wrong)

    def tolerance(self) -> float:
        """Largest error of a right answer, in the unit of `Verdict.error`.

        Rounding once per rank is right; 16-bit floats, for which that would pass anything on many ranks, get four units
        at most (a sum's random errors cancel, a product's do not), and 8-bit floats one.
        """
        epsilon = INEXACT.get(self.datatype.name, 0.0)
        if self.op.kind == "order":
            return 0.0
        most = 1 if self.datatype.itemsize == 1 else 4
        units = self.size if self.op.name == "PROD" else min(self.size, most)
        return 2.0 * units * epsilon if self.datatype.kind == "complex" else units * epsilon

    def _draw(self, rank: int, start: int, count: int) -> Array:
        random = np.random.default_rng([self.seed, rank, start])
        if self.datatype.name in INEXACT:
            return self._draw_inexact(random, count)
        dtype = self.datatype.dtype
        if self.datatype.kind == "bool":
            return random.integers(0, 2, count).astype(dtype)
        limits = np.iinfo(dtype)
        signed = self.datatype.kind == "int"
        if self.op.kind == "logical":
            return random.integers(0, 3, count).astype(dtype)
        if self.op.name == "PROD":  # odd factors: a product that wraps round never becomes 0 and stays so
            return random.choice(np.array([1, 3, -3, -1] if signed else [1, 3], dtype), count)
        if self.op.name in ("SUM", "AVG"):  # the sum fits
            limit = max(1, limits.max // self.size)
            return random.integers(-limit if signed else 0, limit, count, dtype, endpoint=True)
        return random.integers(limits.min, limits.max, count, dtype, endpoint=True)

    def _draw_inexact(self, random: np.random.Generator, count: int) -> Array:
        parts = 2 if self.datatype.kind == "complex" else 1
        dtype = np.float64 if self.datatype.name in ("float64", "complex128") else np.float32
        values = random.random(count * parts, dtype) * 2 - 1
        if self.op.name == "PROD":
            # Magnitudes from 1 to 1 + 1 / size: a product of all ranks is at most e, and fits in float16.
            values = np.copysign(1 + np.abs(values) / dtype(self.size), values) / dtype(np.sqrt(parts))
        if self.datatype.itemsize == 1:  # away from zero, around which these have steps as large as their numbers
            values = np.copysign((1 + np.abs(values)) / 2, values)
        if parts == 2:
            return values.view(self.datatype.dtype)
        return values.astype(self.datatype.dtype)

    def _errors(self, start: int, result: Array) -> Array:
        inexact = self.datatype.name in INEXACT
        reference, scale = self._reference(start, result.size, inexact)
        if not inexact:  # unsigned differences wrap round: compare first
            wide = np.abs(result.astype(np.float64) - reference.astype(np.float64))
            return np.where(result == reference, 0.0, np.maximum(wide, 1.0))
        difference: Array = np.abs(result.astype(reference.dtype) - reference)
        return difference if self.op.kind == "order" else difference / np.maximum(scale, 1e-300)

    def _reference(self, start: int, count: int, inexact: bool) -> tuple[Array, Array]:
        wide: np.dtype[Any] = self.datatype.dtype
        if inexact:
            wide = np.dtype(np.complex128 if self.datatype.kind == "complex" else np.float64)
        combine = COMBINE[self.op.name]
        reference = self._draw(0, start, count).astype(wide)
        if self.op.kind == "logical":
            reference = reference.astype(bool)
        scale = np.abs(reference)
        for rank in range(1, self.size):
            values = self._draw(rank, start, count).astype(wide)
            reference = combine(reference, values)
            if inexact:
                scale = combine(scale, np.abs(values))
        if self.op.name == "AVG":
            reference = reference / self.size if inexact else _divide(reference, self.size)
            scale = scale / self.size
        return reference.astype(wide), scale


def _chunks(total: int) -> Iterator[tuple[int, int]]:
    for start in range(0, total, CHUNK):
        yield start, min(CHUNK, total - start)


def _divide(total: Array, size: int) -> Array:
    """Divide integers towards zero, which NumPy's ``//`` does not."""
    wide = total.astype(np.int64) if total.itemsize < 8 else total  # `size` need not fit in int8
    quotient = wide // size
    quotient += (quotient < 0) & (quotient * size != wide)
    return np.asarray(quotient, total.dtype)
