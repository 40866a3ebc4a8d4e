"""Arithmetic on packs in registers: elements become accumulators, are reduced, and become elements again.

A pack of elements is 16 bytes; the accumulators of a pack are as many words as they need, four for 16-bit floats.
Numba sees tuples of 64-bit integers, the operators see vectors of elements.
"""

from types import SimpleNamespace
from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

from nvcoll.device import reduce
from nvcoll.device.cuda.ptx import I64, PACK, assembly

BYTES = 16
"""Bytes of a pack: the most that a thread loads or stores at once."""


def _vector(datatype: str, nbytes: int) -> Any:
    scalar = reduce.element(datatype)
    bits = {ir.HalfType(): 16, ir.FloatType(): 32, ir.DoubleType(): 64}.get(scalar) or scalar.width
    return ir.VectorType(scalar, 8 * nbytes // bits)


def _gather(builder: Any, words: Any, count: int, vector: Any) -> Any:
    """Return a tuple of words as a vector of elements."""
    packed = ir.Constant(ir.VectorType(I64, count), ir.Undefined)
    for k in range(count):
        packed = builder.insert_element(packed, builder.extract_value(words, k), ir.Constant(ir.IntType(32), k))
    return builder.bitcast(packed, vector)


def _scatter(context: Any, builder: Any, value: Any, tuple_type: Any) -> Any:
    """Return a vector of elements as a tuple of words."""
    count = len(tuple_type)
    packed = builder.bitcast(value, ir.VectorType(I64, count))
    words = [builder.extract_element(packed, ir.Constant(ir.IntType(32), k)) for k in range(count)]
    return context.make_tuple(builder, tuple_type, words)


def _word(builder: Any, values: Any) -> Any:
    """Return bytes, each in 32 bits, as a word. By shifts: a vector of bytes takes more registers than there are."""
    total = ir.Constant(I64, 0)
    for k, value in enumerate(values):
        total = builder.or_(total, builder.shl(builder.zext(value, I64), ir.Constant(I64, 8 * k)))
    return total


def _bf16(builder: Any, value: Any, lanes: int) -> Any:
    """Round float32 to bfloat16 two at a time, by the instruction that GPUs from sm_80 on have for it."""
    pairs = ir.Constant(ir.VectorType(ir.IntType(32), lanes // 2), ir.Undefined)
    for k in range(lanes // 2):
        low, high = (builder.extract_element(value, ir.Constant(ir.IntType(32), 2 * k + odd)) for odd in (0, 1))
        pair = assembly(builder, "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", ir.IntType(32), [high, low])
        pairs = builder.insert_element(pairs, pair, ir.Constant(ir.IntType(32), k))
    return builder.bitcast(pairs, ir.VectorType(ir.IntType(16), lanes))


def _operator(op: str, accumulator: str) -> Any:
    """Return what reduces two values, to the same bits wherever a kernel has a copy of it.

    The compiler may arrange each copy in its own way, and that shows in two cases. Multiplications are joined with an
    addition, which rounds once less, unless they are told how to round. And sums and products of 64 bits have the
    NaN of either operand, those of 32 bits always the same one.
    """
    name = "SUM" if op == "AVG" else op
    emit = reduce.OPERATORS[name]
    if name == "PROD" and accumulator.startswith("complex"):
        emit = _complex_product
    if name not in ("SUM", "PROD") or accumulator not in ("float64", "complex128"):
        return emit

    def emit_one_nan(builder: Any, left: Any, right: Any, datatype: str) -> Any:
        value = emit(builder, left, right, datatype)
        nan = ir.Constant(value.type, [float("nan")] * value.type.count)
        return builder.select(builder.fcmp_unordered("uno", value, value), nan, value)

    return emit_one_nan


def _is_ordered(op: str, accumulator: str) -> bool:
    """Tell whether the bits of a result depend on the order of two operands: the sign of a zero, or a NaN's payload.

    Sums and products have one NaN only, and the other zeros that one would expect of either order.
    """
    return op in ("MIN", "MAX") and accumulator.startswith(("float", "complex"))


def _complex_product(builder: Any, left: Any, right: Any, datatype: str) -> Any:
    scalar = left.type.element
    bits, letter = (32, "f") if datatype == "complex64" else (64, "d")
    rounded = ir.InlineAsm(
        ir.FunctionType(scalar, [scalar] * 2), f"mul.rn.f{bits} $0, $1, $2;", f"={letter},{letter},{letter}"
    )

    def multiply(one: Any, other: Any) -> Any:
        value = ir.Constant(one.type, ir.Undefined)
        for lane in (ir.Constant(ir.IntType(32), k) for k in range(one.type.count)):
            factors = [builder.extract_element(operand, lane) for operand in (one, other)]
            value = builder.insert_element(value, builder.call(rounded, factors), lane)
        return value

    return reduce.complex_product(builder, left, right, multiply)


def arithmetic(op: str, datatype: str, accumulator: str, itemsize: int, width: int) -> SimpleNamespace:
    """Return the primitives of an operator on a datatype.

    Parameters
    ----------
    op
        Name of the operator.
    datatype, accumulator
        Names of the types of elements and of accumulators.
    itemsize, width
        Bytes of an element, and of an accumulator.

    Returns
    -------
    SimpleNamespace
        ``widen(pack)`` gives accumulators, ``reduce(left, right)`` reduces those of a pack,
        ``finish(accumulators, ranks)`` gives a pack again; ``reduce_pack(left, right)`` reduces 16 bytes of
        accumulators. Accumulators of one pack are of the type ``wide``. What is ``ordered`` has results whose bits
        depend on which operand is on the left.
    """
    words = 2 * width // itemsize
    wide = types.UniTuple(types.int64, words)
    elements, sums, narrow_sums, eight = (
        _vector(datatype, BYTES), _vector(accumulator, 8 * words), _vector(accumulator, BYTES), _vector(accumulator, 8),
    )  # fmt: skip
    operator = _operator(op, accumulator)
    lanes = elements.count
    widens = datatype != accumulator

    @intrinsic
    def widen(typing: Any, pack: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            if not widens:
                return args[0]
            value = reduce.widen(builder, _gather(builder, args[0], 2, elements), datatype, lanes)
            return _scatter(context, builder, value, wide)

        return wide(PACK), emit

    def reducer(tuple_type: Any, vector: Any) -> Any:
        @intrinsic
        def combine(typing: Any, left: Any, right: Any) -> Any:
            def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                count = len(tuple_type)
                if width > 1:
                    left, right = (_gather(builder, one, count, vector) for one in args)
                    return _scatter(context, builder, operator(builder, left, right, accumulator), tuple_type)
                words = []
                for k in range(count):  # one after the other: each byte takes a register, and there are not so many
                    left, right = (builder.bitcast(builder.extract_value(one, k), eight) for one in args)
                    words.append(builder.bitcast(operator(builder, left, right, accumulator), I64))
                return context.make_tuple(builder, tuple_type, words)

            return tuple_type(tuple_type, tuple_type), emit

        return combine

    @intrinsic
    def finish(typing: Any, acc: Any, ranks: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            if not widens and op != "AVG":
                return args[0]
            value = _gather(builder, args[0], words, sums)
            if op == "AVG":
                value = reduce.divide(builder, value, args[1], accumulator)
            if datatype == "bfloat16":
                value = _bf16(builder, value, lanes)
            elif widens:
                value = reduce.narrow(builder, value, datatype, lanes)
            return _scatter(context, builder, value, PACK)

        return PACK(wide, types.int64), emit

    return SimpleNamespace(
        op=op, datatype=datatype, accumulator=accumulator, itemsize=itemsize, width=width, words=words,
        widen=widen, reduce=reducer(wide, sums), reduce_pack=reducer(PACK, narrow_sums), finish=finish,
        finishes=widens or op == "AVG", widens=widens, unit=min(itemsize, 8), ordered=_is_ordered(op, accumulator),
    )  # fmt: skip


def unchanged(jit: Any) -> Any:
    """Return what leaves a pack as it is."""

    @jit
    def same(pack):
        return pack

    return same


def partial(unit: int) -> SimpleNamespace:
    """Return ``take`` and ``give``: packs at any address and of fewer bytes, in units of 1, 2, 4 or 8 bytes."""
    count, scalar = BYTES // unit, ir.IntType(8 * unit)
    letter = {1: "r", 2: "h", 4: "r", 8: "l"}[unit]
    register = ir.IntType(32) if unit == 1 else scalar  # bytes travel in 32-bit registers

    def loaded(builder: Any, args: Any, k: int) -> Any:
        """Load unit k, or 0 if it does not count."""
        inside = builder.icmp_signed("<", ir.Constant(I64, k * unit), args[1])
        offset = builder.select(inside, ir.Constant(I64, k * unit), ir.Constant(I64, 0))
        text, at = f"ld.global.u{8 * unit} $0, [$1];", builder.add(args[0], offset)
        got = assembly(builder, text, f"={letter},l", register, [at])
        return builder.select(inside, got, ir.Constant(register, 0))

    @intrinsic
    def take(typing: Any, address: Any, nbytes: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            got = [loaded(builder, args, k) for k in range(count)]  # all are under way before the first is used
            if unit == 1:
                return context.make_tuple(builder, PACK, [_word(builder, got[:8]), _word(builder, got[8:])])
            packed = ir.Constant(ir.VectorType(scalar, count), ir.Undefined)
            for k in range(count):
                packed = builder.insert_element(packed, got[k], ir.Constant(ir.IntType(32), k))
            return _scatter(context, builder, packed, PACK)

        return PACK(types.int64, types.int64), emit

    @intrinsic
    def give(typing: Any, address: Any, pack: Any, nbytes: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            packed = _gather(builder, args[1], 2, ir.VectorType(scalar, count))
            for k in range(count):
                inside = builder.icmp_signed("<", ir.Constant(I64, k * unit), args[2])
                with builder.if_then(inside):
                    value = builder.extract_element(packed, ir.Constant(ir.IntType(32), k))
                    value = builder.zext(value, register) if register != scalar else value
                    at = builder.add(args[0], ir.Constant(I64, k * unit))
                    assembly(builder, f"st.global.u{8 * unit} [$0], $1;", f"l,{letter}", ir.VoidType(), [at, value])
            return context.get_dummy_value()

        return types.void(types.int64, PACK, types.int64), emit

    return SimpleNamespace(take=take, give=give)
