"""Which kernels the tests of this folder use: they are compiled together, for one by one they take minutes.

``from tests.gpu.kernels import EVERY, EVERY_KERNEL, FAR_KERNELS, FAR_PAIRS, KERNELS, LARGE_PAIRS, PAIRS``
"""

from nvcoll.jit_cuda import CubinCache
from nvcoll.ops import DATATYPES, OPS
from nvcoll.planning import candidates

PAIRS = [
    ("float32", "SUM"), ("bfloat16", "AVG"), ("int32", "MAX"), ("float16", "MIN"), ("float64", "PROD"),
    ("uint8", "BXOR"), ("int64", "SUM"), ("complex64", "SUM"), ("float8_e4m3fn", "SUM"),
]  # fmt: skip
DEEP_PAIRS = PAIRS[:4]
"""For messages of which a thread has several packs: what processes send has two million bytes and more."""
LARGE_PAIRS = DEEP_PAIRS[::2]
"""Those of emulated ranks, whose message is longer: a type for each form of low latency."""
BARRIER = ("MAX", "int64")
KERNELS = [(*name.split("/"), op, datatype, False) for name in candidates() for datatype, op in PAIRS]
KERNELS += [(*name.split("/"), "SUM", "int32", False) for name in candidates()]  # graphs
KERNELS += [(*name.split("/"), *BARRIER, False) for name in candidates() if name.endswith("/low_latency")]
KERNELS += [(*name.split("/"), op, datatype, True) for name in candidates() for datatype, op in DEEP_PAIRS]

EVERY_PAIR = [(datatype, op) for datatype, kind in DATATYPES.items() for op in OPS if OPS[op].supports(kind) is None]
NAN_PAIRS = [("float32", "MAX"), ("float64", "SUM"), ("float8_e4m3fn", "MAX"), ("complex128", "PROD")]
"""Those with which ranks could have different NaNs, or products rounded in another way."""
EVERY = {  # NVRAR with all of them, the other algorithms in turn
    name: EVERY_PAIR if name.startswith("nvrar/") else list(dict.fromkeys([*EVERY_PAIR[k % 10 :: 10], *NAN_PAIRS]))
    for k, name in enumerate(candidates())
}
EVERY_KERNEL = [(*name.split("/"), op, datatype, False) for name, pairs in EVERY.items() for datatype, op in pairs]

FAR_PAIRS = [*PAIRS[:3], ("float64", "PROD"), ("complex64", "SUM")]
REACHING = [name for name in candidates() if not name.startswith("two_shot")]  # ranks that cannot be stored to
FAR_KERNELS = [(*name.split("/"), op, kind, False) for name in REACHING for kind, op in [*FAR_PAIRS, BARRIER[::-1]]]


def compile_one(folder, arch, remote, kernel):
    *key, deep = kernel
    CubinCache(folder).get(*key, arch, deep, remote)
