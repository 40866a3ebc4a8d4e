"""Loops of the host target over arrays of elements: reduce, widen and finish, a pack at a time.

Kernels call them by address, so a schedule is compiled once for every datatype and operator. That costs 2 ns a call
and saves compiling some 1500 kernels. Arrays may be the same, but must not overlap otherwise.
"""

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from nvcoll.device import reduce

UNROLL = 4


def _size(datatype: str) -> int:
    digits = datatype.partition("_")[0].lstrip("uintfloacmpex")  # float8_e5m2
    return {"bool": 1, "bfloat16": 2}.get(datatype) or int(digits) // 8


def _vector(datatype: str, items: int) -> Any:
    lanes = items * (2 if datatype.startswith("complex") else 1)
    return ir.VectorType(reduce.element(datatype), lanes)


def _pointer(builder: Any, address: Any, vector: Any, offset: int) -> Any:
    at = builder.add(address, ir.Constant(address.type, offset))
    return builder.inttoptr(at, vector.as_pointer())


def _binary(op: str, datatype: str, items: int, times: int) -> Any:
    """Make the primitive that reduces `times` packs of `items` elements and stores them in two places."""
    vector, step = _vector(datatype, items), items * _size(datatype)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to, also, *operands = args
        packs = [
            [builder.load(_pointer(builder, a, vector, k * step), align=1) for a in operands] for k in range(times)
        ]
        results = [reduce.OPERATORS[op](builder, left, right, datatype) for left, right in packs]
        for k, result in enumerate(results):
            builder.store(result, _pointer(builder, to, vector, k * step), align=1)
        with builder.if_then(builder.icmp_unsigned("!=", to, also)):
            for k, result in enumerate(results):
                builder.store(result, _pointer(builder, also, vector, k * step), align=1)
        return context.get_dummy_value()

    @intrinsic
    def pack(typing: Any, to: Any, also: Any, left: Any, right: Any) -> Any:
        return types.void(*[types.int64] * 4), emit

    return pack


def reducer(op: str, datatype: str) -> Any:
    """Return the text of ``reduce(to, also, left, right, count)`` for a type that accumulates in itself.

    The result is stored twice, or once if `also` is `to`.
    """
    size = _size(datatype)
    items = max(1, reduce.PACK // size)
    unrolled = items * UNROLL
    many, one = _binary(op, datatype, items, UNROLL), _binary(op, datatype, 1, 1)
    some = _binary(op, datatype, items, 1)

    def text(to: int, also: int, left: int, right: int, count: int) -> int:
        i = 0
        while i + unrolled <= count:
            many(to + i * size, also + i * size, left + i * size, right + i * size)
            i += unrolled
        while i + items <= count:
            some(to + i * size, also + i * size, left + i * size, right + i * size)
            i += items
        while i < count:
            one(to + i * size, also + i * size, left + i * size, right + i * size)
            i += 1
        return 0

    return text


def _unary(convert: Any, source: str, target: str, items: int) -> Any:
    """Make the primitive that converts a pack; `convert(builder, value, extra)` works on vectors."""
    before, after = _vector(source, items), _vector(target, items)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = builder.load(_pointer(builder, args[1], before, 0), align=1)
        builder.store(convert(builder, value, args[2]), _pointer(builder, args[0], after, 0), align=1)
        return context.get_dummy_value()

    @intrinsic
    def pack(typing: Any, to: Any, source: Any, extra: Any) -> Any:
        return types.void(*[types.int64] * 3), emit

    return pack


def _converter(make: Any, source: str, target: str) -> Any:
    """Return the text of ``convert(to, source, count, extra)``; ``make(items)`` gives the conversion of a pack."""
    sizes = _size(source), _size(target)
    before, after = sizes
    items = reduce.PACK // max(sizes)
    many, one = (_unary(make(k), source, target, k) for k in (items, 1))

    def text(to: int, source: int, count: int, extra: int) -> int:
        i = 0
        while i + items <= count:
            many(to + i * after, source + i * before, extra)
            i += items
        while i < count:
            one(to + i * after, source + i * before, extra)
            i += 1
        return 0

    return text


def widener(datatype: str) -> Any:
    """Return the text of ``widen(to, source, count, _)``: floats of 8 or 16 bits to float32."""
    return _converter(lambda k: lambda b, value, _: reduce.widen(b, value, datatype, k), datatype, "float32")


def finisher(datatype: str, accumulator: str, average: bool) -> Any:
    """Return the text of ``finish(to, source, count, ranks)``: divide for AVG, and round where that is due."""

    def make(items: int) -> Any:
        def convert(builder: Any, value: Any, ranks: Any) -> Any:
            if average:
                value = reduce.divide(builder, value, ranks, accumulator)
            return reduce.narrow(builder, value, datatype, items) if datatype != accumulator else value

        return convert

    return _converter(make, accumulator, datatype)
