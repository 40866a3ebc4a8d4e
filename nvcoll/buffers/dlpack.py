"""DLPack's numbers for devices and for types of elements."""

from nvcoll.ops import DATATYPES, Datatype

CUDA, CUDA_HOST, CUDA_MANAGED = 2, 3, 13
"""Memory of a GPU, memory of the host that GPUs can use, and memory that moves between the two."""
HOST_DEVICES = (1, CUDA_HOST, 11, CUDA_MANAGED)
"""Memory the CPU can read: its own, pinned by CUDA or ROCm, managed by CUDA."""
GPU_DEVICES = (CUDA, CUDA_HOST, CUDA_MANAGED)
"""Memory that kernels on a GPU of CUDA can read."""

_KINDS = {"int": 0, "uint": 1, "float": 2, "complex": 5, "bool": 6}
_NAMED = {"bfloat16": 4, "float8_e4m3fn": 10, "float8_e5m2": 12}
#: Name of a datatype -> (code, bits).
DLPACK_TYPES = {
    name: (_NAMED.get(name, _KINDS[datatype.kind]), 8 * datatype.itemsize) for name, datatype in DATATYPES.items()
}


def datatype_of(dtype: tuple[int, int, int]) -> Datatype | None:
    """Return the datatype of (code, bits, lanes), or None if there is none."""
    names = [name for name, numbers in DLPACK_TYPES.items() if (*numbers, 1) == dtype]
    return DATATYPES[names[0]] if names else None
