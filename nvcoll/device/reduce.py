"""Operators on packs: what SUM, MIN and their kin do to two LLVM values, be they elements or vectors of elements.

The definitions stand once, for every target: both Numba's host and CUDA compilers take LLVM values. Operands come in
the schedule's order (`left` from the lower place), so that partners who compute the same pair get the same bits: the
payload of a NaN and the sign of a zero depend on the order.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir

PACK = 64
"""Bytes that the host target reduces at a time."""

EIGHT_BITS = {"float8_e4m3fn": (3, 7, 0x7F, 0x7F), "float8_e5m2": (2, 15, 0x7C, 0x7E)}
"""Float of 8 bits -> bits of its fraction, bias of its exponent, and the codes of what is too large and of a NaN."""


def element(datatype: str) -> Any:
    """Return the LLVM type of an element; a complex one is two of these, and floats that LLVM lacks are integers."""
    if datatype in EIGHT_BITS:
        return ir.IntType(8)
    if datatype.startswith(("float", "complex")):
        bits = {"float16": 16, "float32": 32, "float64": 64, "complex64": 32, "complex128": 64}[datatype]
        return {16: ir.HalfType(), 32: ir.FloatType(), 64: ir.DoubleType()}[bits]
    return ir.IntType({"bool": 8, "bfloat16": 16}.get(datatype) or int(datatype.lstrip("uint")))


def _arithmetic(integer: str, floating: str) -> Callable[..., Any]:
    def emit(builder: Any, left: Any, right: Any, datatype: str) -> Any:
        name = floating if datatype.startswith(("float", "complex")) else integer
        return getattr(builder, name)(left, right)

    return emit


def _order(sign: str) -> Callable[..., Any]:
    def emit(builder: Any, left: Any, right: Any, datatype: str) -> Any:
        if datatype.startswith("float"):
            # "Unordered or": a NaN on the left stays; one on the right is taken because it differs from itself.
            keep = builder.fcmp_unordered(sign, left, right)
            chosen = builder.select(keep, left, right)
            return builder.select(builder.fcmp_unordered("uno", right, right), _nan_of(builder, left, right), chosen)
        compare = builder.icmp_signed if datatype.startswith("int") else builder.icmp_unsigned
        return builder.select(compare(sign, left, right), left, right)

    return emit


def _nan_of(builder: Any, left: Any, right: Any) -> Any:
    """Return the left operand if it is a NaN, else the right one, which is."""
    return builder.select(builder.fcmp_unordered("uno", left, left), left, right)


def _logical(name: str) -> Callable[..., Any]:
    def emit(builder: Any, left: Any, right: Any, datatype: str) -> Any:
        zero = ir.Constant(left.type, None)
        truth = [builder.icmp_unsigned("!=", value, zero) for value in (left, right)]
        return builder.zext(getattr(builder, name)(*truth), left.type)

    return emit


def _bitwise(name: str) -> Callable[..., Any]:
    def emit(builder: Any, left: Any, right: Any, datatype: str) -> Any:
        return getattr(builder, name)(left, right)

    return emit


def _product(builder: Any, left: Any, right: Any, datatype: str) -> Any:
    if datatype.startswith("complex"):
        return complex_product(builder, left, right, builder.fmul)
    return _arithmetic("mul", "fmul")(builder, left, right, datatype)


def complex_product(builder: Any, left: Any, right: Any, multiply: Callable[[Any, Any], Any]) -> Any:
    """Multiply (a + bi)(c + di), on pairs that lie side by side: even lanes hold real parts."""
    lanes = left.type.count
    evens, odds = ([2 * (k // 2) + odd for k in range(lanes)] for odd in (0, 1))
    swapped = [k ^ 1 for k in range(lanes)]
    straight = multiply(_shuffle(builder, left, evens), right)
    crossed = multiply(_shuffle(builder, left, odds), _shuffle(builder, right, swapped))
    minus, plus = builder.fsub(straight, crossed), builder.fadd(straight, crossed)
    blend = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [k if k % 2 == 0 else lanes + k for k in range(lanes)])
    return builder.shuffle_vector(minus, plus, blend)


def _shuffle(builder: Any, value: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(value, value, ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes))


OPERATORS: dict[str, Callable[..., Any]] = {
    "SUM": _arithmetic("add", "fadd"),
    "PROD": _product,
    "MIN": _order("<"),
    "MAX": _order(">"),
    "LAND": _logical("and_"),
    "LOR": _logical("or_"),
    "LXOR": _logical("xor"),
    "BAND": _bitwise("and_"),
    "BOR": _bitwise("or_"),
    "BXOR": _bitwise("xor"),
}
"""Operator -> ``emit(builder, left, right, datatype)``. AVG is SUM, and a division when the result is stored."""


def widen(builder: Any, value: Any, source: str, lanes: int) -> Any:
    """Convert a pack of floats of 8 or 16 bits to float32."""
    wide = ir.VectorType(ir.FloatType(), lanes)
    if source in EIGHT_BITS:
        return _widen_bytes(builder, value, source, lanes)
    if source == "float16":
        return builder.fpext(value, wide)
    bits = ir.VectorType(ir.IntType(32), lanes)
    shift = ir.Constant(bits, [16] * lanes)
    return builder.bitcast(builder.shl(builder.zext(value, bits), shift), wide)


def narrow(builder: Any, value: Any, target: str, lanes: int) -> Any:
    """Round a pack of float32 to floats of 8 or 16 bits, ties to even."""
    if target in EIGHT_BITS:
        return _narrow_to_bytes(builder, value, target, lanes)
    if target == "float16":
        return builder.fptrunc(value, ir.VectorType(ir.HalfType(), lanes))
    bits = ir.VectorType(ir.IntType(32), lanes)

    def all_lanes(constant: int) -> Any:
        return ir.Constant(bits, [constant] * lanes)

    word = builder.bitcast(value, bits)
    odd = builder.and_(builder.lshr(word, all_lanes(16)), all_lanes(1))
    rounded = builder.add(word, builder.add(odd, all_lanes(0x7FFF)))
    # Rounding would carry a NaN's payload into infinity: keep NaNs quiet instead.
    quiet = builder.or_(word, all_lanes(0x400000))
    word = builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded)
    return builder.trunc(builder.lshr(word, all_lanes(16)), ir.VectorType(ir.IntType(16), lanes))


def _widen_bytes(builder: Any, value: Any, source: str, lanes: int) -> Any:
    """Convert a pack of 8-bit floats to float32, by way of float16, which holds them all but for a power of two."""
    fraction, bias, _, _ = EIGHT_BITS[source]
    bits = ir.VectorType(ir.IntType(16), lanes)

    def all_lanes(constant: int) -> Any:
        return ir.Constant(bits, [constant] * lanes)

    code = builder.zext(value, bits)
    sign = builder.shl(builder.and_(code, all_lanes(0x80)), all_lanes(8))
    magnitude = builder.and_(code, all_lanes(0x7F))
    half = builder.or_(sign, builder.shl(magnitude, all_lanes(10 - fraction)))
    wide = builder.fpext(
        builder.bitcast(half, ir.VectorType(ir.HalfType(), lanes)), ir.VectorType(ir.FloatType(), lanes)
    )
    if bias == 15:  # float16's own, and so are its infinities and NaNs
        return wide
    scale = ir.Constant(wide.type, [2.0 ** (15 - bias)] * lanes)
    words = ir.VectorType(ir.IntType(32), lanes)
    quiet = builder.or_(
        builder.shl(builder.zext(sign, words), ir.Constant(words, [16] * lanes)),
        ir.Constant(words, [0x7FC00000] * lanes),
    )
    nan = builder.icmp_unsigned("==", magnitude, all_lanes(0x7F))
    return builder.select(nan, builder.bitcast(quiet, wide.type), builder.fmul(wide, scale))


def _narrow_to_bytes(builder: Any, value: Any, target: str, lanes: int) -> Any:
    """Round a pack of float32 to 8-bit floats, ties to even; what is too large becomes infinity, or NaN without one."""
    fraction, bias, beyond, nan = EIGHT_BITS[target]
    bits = ir.VectorType(ir.IntType(32), lanes)

    def all_lanes(constant: int) -> Any:
        return ir.Constant(bits, [constant] * lanes)

    word = builder.bitcast(value, bits)
    sign = builder.and_(builder.lshr(word, all_lanes(24)), all_lanes(0x80))
    magnitude = builder.and_(word, all_lanes(0x7FFFFFFF))
    # Normal numbers: exchange the bias, and round away the bits of the fraction that are too many.
    drop = 23 - fraction
    rebased = builder.sub(magnitude, all_lanes(127 - bias << 23))
    odd = builder.and_(builder.lshr(rebased, all_lanes(drop)), all_lanes(1))
    normal = builder.lshr(builder.add(rebased, builder.add(odd, all_lanes((1 << drop - 1) - 1))), all_lanes(drop))
    normal = builder.select(builder.icmp_unsigned("<", normal, all_lanes(beyond)), normal, all_lanes(beyond))
    # Smaller ones: a sum with a number whose last bit is the smallest step has rounded to that step.
    steps = all_lanes(127 + 23 + 1 - bias - fraction << 23)
    total = builder.fadd(builder.bitcast(magnitude, value.type), builder.bitcast(steps, value.type))
    small = builder.sub(builder.bitcast(total, bits), steps)
    is_small = builder.icmp_unsigned("<", magnitude, all_lanes(128 - bias << 23))
    code = builder.select(is_small, small, normal)
    # A NaN loses its sign: four that had theirs would be what, between GPUs, is memory without data.
    code = builder.select(builder.fcmp_unordered("uno", value, value), all_lanes(nan), builder.or_(code, sign))
    return builder.trunc(code, ir.VectorType(ir.IntType(8), lanes))


def divide(builder: Any, value: Any, ranks: Any, datatype: str) -> Any:
    """Divide a pack by the number of ranks, for AVG; integers towards zero."""
    scalar, lanes = value.type.element, value.type.count
    if datatype.startswith(("float", "complex")):
        return builder.fdiv(value, _repeat(builder, builder.sitofp(ranks, scalar), lanes))
    # In 32 bits or more: 200 ranks are no int8, and 256 would divide by zero.
    wide = ir.VectorType(ir.IntType(max(32, scalar.width)), lanes)
    signed = datatype.startswith("int")
    value = (builder.sext if signed else builder.zext)(value, wide)
    divisor = _repeat(builder, builder.trunc(ranks, wide.element), lanes)
    return builder.trunc((builder.sdiv if signed else builder.udiv)(value, divisor), ir.VectorType(scalar, lanes))


def _repeat(builder: Any, value: Any, lanes: int) -> Any:
    """Return a vector of one value."""
    vector = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    for lane in range(lanes):
        vector = builder.insert_element(vector, value, ir.Constant(ir.IntType(32), lane))
    return vector
