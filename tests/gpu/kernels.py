"""Which kernels the tests of this folder use: they are compiled together, for one by one they take minutes.

``from tests.gpu.kernels import KERNELS, PAIRS``
"""

from nvcoll.jit_cuda import CubinCache
from nvcoll.planning import candidates

PAIRS = [
    ("float32", "SUM"), ("bfloat16", "AVG"), ("int32", "MAX"), ("float16", "MIN"), ("float64", "PROD"),
    ("uint8", "BXOR"), ("int64", "SUM"), ("complex64", "SUM"), ("float8_e4m3fn", "SUM"),
]  # fmt: skip
KERNELS = [(*name.split("/"), op, datatype, False) for name in candidates() for datatype, op in PAIRS]
KERNELS += [(*name.split("/"), "SUM", "int32", False) for name in candidates()]  # barriers, graphs
KERNELS += [(*name.split("/"), "SUM", "float32", True) for name in candidates()]  # messages of many bytes


def compile_one(folder, arch, kernel):
    *key, deep = kernel
    CubinCache(folder).get(*key, arch, deep)
