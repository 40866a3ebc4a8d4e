"""Primitives of the CUDA target: memory, clocks and barriers as inline PTX.

Numba has no vector types on GPUs: 16 bytes in registers, a pack, are a tuple of two 64-bit integers here. Addresses
are 64-bit integers and mean global memory, of this GPU, of a peer, or of the host.
"""

from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

I64 = ir.IntType(64)
VOID = ir.VoidType()
PACK = types.UniTuple(types.int64, 2)
"""16 bytes in registers."""


def assembly(builder: Any, text: str, constraints: str, result: Any, args: Any) -> Any:
    """Emit one PTX instruction, or a few, that stay where they are: barriers must not be moved behind branches."""
    signature = ir.FunctionType(result, [a.type for a in args])
    clobbers = f"{constraints},~{{memory}}".lstrip(",")
    return builder.call(ir.InlineAsm(signature, text, clobbers, side_effect=True), args, attrs=("convergent",))


def _effect(text: str) -> Any:
    """Return what emits PTX that gives nothing back; its operands are the words that the primitive takes."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        assembly(builder, text, ",".join("l" * len(args)), VOID, args)
        return context.get_dummy_value()

    return emit


def _loader(text: str, doc: str) -> Any:
    """Make a primitive that loads a pack."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pair = assembly(builder, f"{text} {{$0, $1}}, [$2];", "=l,=l,l", ir.LiteralStructType([I64, I64]), args)
        words = [builder.extract_value(pair, k) for k in range(2)]
        return context.make_tuple(builder, signature.return_type, words)

    @intrinsic
    def load(typing: Any, address: Any) -> Any:
        return PACK(types.int64), emit

    load.__doc__ = doc
    return load


def _storer(text: str, doc: str) -> Any:
    """Make a primitive that stores a pack."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        words = [builder.extract_value(args[1], k) for k in range(2)]
        assembly(builder, f"{text} [$0], {{$1, $2}};", "l,l,l", VOID, [args[0], *words])
        return context.get_dummy_value()

    @intrinsic
    def store(typing: Any, address: Any, pack: Any) -> Any:
        return types.void(types.int64, PACK), emit

    store.__doc__ = doc
    return store


load_pack = _loader("ld.global.v2.u64", "Load a pack of data that nobody writes meanwhile.")
load_shared = _loader("ld.volatile.global.v2.u64", "Load a pack that another GPU may be writing; each word is whole.")
store_pack = _storer("st.global.v2.u64", "Store a pack.")
store_shared = _storer("st.volatile.global.v2.u64", "Store a pack that another GPU may be reading; each word is whole.")


def _word_loader(text: str, doc: str) -> Any:
    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return assembly(builder, f"{text} $0, [$1];", "=l,l", I64, args)

    @intrinsic
    def load(typing: Any, address: Any) -> Any:
        return types.int64(types.int64), emit

    load.__doc__ = doc
    return load


def _word_storer(text: str, doc: str) -> Any:
    @intrinsic
    def store(typing: Any, address: Any, value: Any) -> Any:
        return types.void(types.int64, types.int64), _effect(f"{text} [$0], $1;")

    store.__doc__ = doc
    return store


load = _word_loader("ld.global.u64", "Load 8 bytes.")
load_acquire = _word_loader(
    "ld.acquire.sys.global.u64", "Load 8 bytes; what the writer stored before its release is visible from here on."
)
load_relaxed = _word_loader("ld.relaxed.sys.global.u64", "Load 8 bytes that others may be writing.")
store = _word_storer("st.global.u64", "Store 8 bytes.")
add = _word_storer(
    "red.relaxed.gpu.global.add.u64", "Add to 8 bytes of this GPU's memory, without waiting for the sum."
)
store_relaxed = _word_storer("st.relaxed.sys.global.u64", "Store 8 bytes that others may be reading.")


@intrinsic
def store_all(typing: Any, address: Any, end: Any, step: Any, value: Any) -> Any:
    """Store 8 bytes at every so many bytes until an end. A loop that no compiler unrolls: it is for what is rare."""
    return types.void(*[types.int64] * 4), _effect(
        "{.reg .pred more; .reg .u64 at; mov.u64 at, $0; .pragma \\22nounroll\\22;"
        " next: st.relaxed.sys.global.u64 [at], $3; add.u64 at, at, $2; setp.lt.u64 more, at, $1; @more bra next;}"
    )


@intrinsic
def prefetch(typing: Any, address: Any) -> Any:
    """Bring a line into the cache of the GPU, and its page into the tables of the multiprocessor."""
    return types.void(types.int64), _effect("prefetch.global.L2 [$0];")


def _action(text: str, doc: str) -> Any:
    @intrinsic
    def act(typing: Any) -> Any:
        return types.void(), _effect(text)

    act.__doc__ = doc
    return act


fence = _action(
    "fence.acq_rel.sys;", "Order this thread's stores before it against its stores after it, for everybody."
)
sync = _action("bar.sync 0;", "Wait for all threads of the block; what they stored is visible from here on.")


@intrinsic
def any_of(typing: Any, flag: Any) -> Any:
    """Wait for all threads of the block, like `sync`, and tell all of them whether the flag of any is set."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        text = (
            "{.reg .pred mine, some; setp.ne.u32 mine, $1, 0; bar.red.or.pred some, 0, mine; selp.u32 $0, 1, 0, some;}"
        )
        word = ir.IntType(32)
        found = assembly(builder, text, "=r,r", word, [builder.zext(args[0], word)])
        return builder.icmp_unsigned("!=", found, ir.Constant(word, 0))

    return types.boolean(types.boolean), emit


@intrinsic
def meet(typing: Any, e: Any) -> Any:
    """Wait for all threads of the block, like `sync`; end, if any of them has ended, or any tag is negative."""
    return types.void(types.int64), _effect(
        "{.reg .pred here, full; .reg .u32 n, most; setp.ge.s64 here, $0, 0; bar.red.popc.u32 n, 0, here;"
        " mov.u32 most, %ntid.x; setp.eq.u32 full, n, most; @!full exit;}"
    )


leave = _action("exit;", "End this thread; barriers of the block do not wait for it.")

let_successor = _action("griddepcontrol.launch_dependents;", "Let the next kernel of the stream be brought in.")
await_predecessor = _action("griddepcontrol.wait;", "Wait until the kernels before have ended and stored all.")


def _register(text: str, doc: str, *, wide: bool) -> Any:
    """Make a primitive that reads a special register."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if wide:
            return assembly(builder, f"mov.u64 $0, {text};", "=l", I64, [])
        read = ir.InlineAsm(ir.FunctionType(ir.IntType(32), []), f"mov.u32 $0, {text};", "=r", side_effect=False)
        return builder.zext(builder.call(read, []), I64)

    @intrinsic
    def read(typing: Any) -> Any:
        return types.int64(), emit

    read.__doc__ = doc
    return read


thread = _register("%tid.x", "Number of this thread in its block.", wide=False)
threads = _register("%ntid.x", "Threads of a block.", wide=False)
block = _register("%ctaid.x", "Number of this block.", wide=False)
clock = _register("%globaltimer", "Nanoseconds.", wide=True)


@intrinsic
def settled(typing: Any, value: Any) -> Any:
    """Return a value that is computed here, and not later, where it is used: compilers move what they may."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return assembly(builder, "mov.u64 $0, $1;", "=l,l", I64, args)

    return types.int64(types.int64), emit


@intrinsic
def pinned(typing: Any, value: Any) -> Any:
    """Return a value that is in a register from here on: the threads of a warp hand it to themselves.

    The assembler looks through a move, and loads what is constant, and computes what follows from it, where it is used.
    It looks through this as well if the value is the same for all threads. For where those of a warp come together.
    """

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        text = (
            "{.reg .u32 low, high, me, all; mov.b64 {low, high}, $1; mov.u32 me, %laneid; activemask.b32 all;"
            " shfl.sync.idx.b32 low, low, me, 31, all; shfl.sync.idx.b32 high, high, me, 31, all;"
            " mov.b64 $0, {low, high};}"
        )
        return assembly(builder, text, "=l,l", I64, args)

    return types.int64(types.int64), emit


@intrinsic
def log2(typing: Any, n: Any) -> Any:
    """Return how often n, at least 1, can be halved; not in a loop, for compilers do not move those to the front."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        zeros = builder.ctlz(args[0], ir.Constant(ir.IntType(1), 0))
        return builder.sub(ir.Constant(I64, 63), zeros)

    return types.int64(types.int64), emit


def field(index: int) -> Any:
    """Make ``read(c)``: the argument of that number of a call."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.extract_value(args[0], index)

    @intrinsic
    def read(typing: Any, c: Any) -> Any:
        return types.int64(c), emit

    return read


def chosen(indices: list[int]) -> Any:
    """Make ``read(c, k)``: the k-th of some arguments of a call, a power of two of them, chosen without a branch."""

    @intrinsic
    def read(typing: Any, c: Any, k: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            def bit(place: int) -> Any:
                return builder.trunc(builder.lshr(args[1], ir.Constant(I64, place)), ir.IntType(1))

            values = [builder.extract_value(args[0], index) for index in indices]
            return pick(values, [bit(place) for place in range(len(indices).bit_length() - 1)], builder.select)

        return types.int64(c, types.int64), emit

    return read


def pick(values: list[Any], bits: list[Any], select: Any) -> Any:
    """Return the value whose index has these bits, the lowest first; ``select(bit, one, other)`` chooses among two.

    As a tree, in which few choices wait for another.
    """
    for bit in bits:
        values = [select(bit, upper, lower) for lower, upper in zip(values[::2], values[1::2], strict=True)]
    [value] = values
    return value
