"""Primitives of the host target: memory, atomics and calls as LLVM instructions.

A block is one rank's thread here. Addresses are 64-bit integers; `Call` and `World` are read by index.
"""

from types import SimpleNamespace
from typing import Any

from llvmlite import ir
from numba import njit
from numba.core import types
from numba.extending import intrinsic

from nvcoll._plan import CALL_FIELDS, WORLD_FIELDS

I64 = ir.IntType(64)
POINTER = I64.as_pointer()
LINE = 64
"""Bytes of a cache line."""


def _at(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, POINTER)


@intrinsic
def load(typing: Any, address: Any) -> Any:
    """Load 8 bytes."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_at(builder, args[0]), align=8)

    return types.int64(types.int64), emit


@intrinsic
def store(typing: Any, address: Any, value: Any) -> Any:
    """Store 8 bytes."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[1], _at(builder, args[0]), align=8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


@intrinsic
def load_acquire(typing: Any, address: Any) -> Any:
    """Load 8 bytes; what the writer stored before its release is visible from here on."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_at(builder, args[0]), "acquire", 8)

    return types.int64(types.int64), emit


@intrinsic
def store_release(typing: Any, address: Any, value: Any) -> Any:
    """Store 8 bytes after everything that was stored before."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[1], _at(builder, args[0]), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


@intrinsic
def fence(typing: Any) -> Any:
    """Order all stores before it against all loads after it."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def copy(typing: Any, to: Any, source: Any, nbytes: Any) -> Any:
    """Copy bytes between memories that do not overlap."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        memcpy = builder.module.declare_intrinsic("llvm.memcpy", [byte, byte, I64])
        to, source = (builder.inttoptr(a, byte) for a in args[:2])
        builder.call(memcpy, [to, source, args[2], ir.Constant(ir.IntType(1), 0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), emit


@intrinsic
def copy_line(typing: Any, to: Any, source: Any) -> Any:
    """Copy the 56 bytes of payload of a line."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for offset, words in ((0, 4), (32, 2), (48, 1)):
            pack = ir.VectorType(I64, words).as_pointer()
            at = ir.Constant(I64, offset)
            value = builder.load(builder.inttoptr(builder.add(args[1], at), pack), align=1)
            builder.store(value, builder.inttoptr(builder.add(args[0], at), pack), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


def _caller(count: int) -> Any:
    """Make the primitive that calls a C function of `count` 64-bit arguments at an address."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function = ir.FunctionType(I64, [I64] * count).as_pointer()
        return builder.call(builder.inttoptr(args[0], function), args[1:])

    if count == 2:

        @intrinsic
        def call(typing: Any, function: Any, a: Any, b: Any) -> Any:
            return types.int64(*[types.int64] * 3), emit
    elif count == 3:

        @intrinsic
        def call(typing: Any, function: Any, a: Any, b: Any, c: Any) -> Any:
            return types.int64(*[types.int64] * 4), emit
    elif count == 4:

        @intrinsic
        def call(typing: Any, function: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
            return types.int64(*[types.int64] * 5), emit
    else:

        @intrinsic
        def call(typing: Any, function: Any, a: Any, b: Any, c: Any, d: Any, e: Any) -> Any:
            return types.int64(*[types.int64] * 6), emit

    return call


@intrinsic
def pause(typing: Any) -> Any:
    """Tell the core that this is a spin loop."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if builder.module.triple.startswith("x86_64"):
            builder.call(
                builder.module.declare_intrinsic("llvm.x86.sse2.pause", (), ir.FunctionType(ir.VoidType(), [])), []
            )
        return context.get_dummy_value()

    return types.void(), emit


def _reader(fields: tuple[str, ...], name: str, *, through_world: bool) -> Any:
    """Make ``name(c)``, which reads a field of the call, or of its world. An intrinsic compiles faster than text."""
    offset = ir.Constant(I64, 8 * fields.index(name))

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base = builder.load(_at(builder, args[0]), align=8) if through_world else args[0]
        return builder.load(_at(builder, builder.add(base, offset)), align=8)

    @intrinsic
    def read(typing: Any, c: Any) -> Any:
        return types.int64(types.int64), emit

    return read


def primitives() -> SimpleNamespace:
    """Return the target: primitives by name, a reader for every field, and ``jit`` for functions built on them.

    Fields of `Call` are read by their name, fields of `World` likewise; where both have one, `Call`'s wins.
    """
    named = {name: _reader(WORLD_FIELDS, name, through_world=True) for name in WORLD_FIELDS}
    named |= {name: _reader(CALL_FIELDS, name, through_world=False) for name in CALL_FIELDS}
    return SimpleNamespace(
        name="host",
        jit=njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True),
        field=SimpleNamespace(**named),
        load=load,
        store=store,
        load_acquire=load_acquire,
        store_release=store_release,
        fence=fence,
        copy=copy,
        copy_line=copy_line,
        pause=pause,
        call2=_caller(2),
        call3=_caller(3),
        call4=_caller(4),
        call5=_caller(5),
        line=LINE,
    )
