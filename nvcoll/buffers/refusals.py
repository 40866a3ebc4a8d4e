"""Refusals of memory that hosts and GPUs have in common.

Where a verb writes its result to the memory, the cure is one that keeps it: nobody would see it in a copy that only the
call is given.
"""

from typing import Any

from nvcoll.errors import ArgumentError, DatatypeError
from nvcoll.ops import Op, mpi_module

CONTIGUOUS = {
    "numpy": ("numpy.ascontiguousarray()", ": t = numpy.ascontiguousarray(x); ...; x[...] = t"),
    "cupy": ("cupy.ascontiguousarray()", ": t = cupy.ascontiguousarray(x); ...; x[...] = t"),
    "torch": (".contiguous()", ": t = x.contiguous(); ...; x.copy_(t)"),
}
"""Library -> its way to an array without gaps, and how to bring a result back from it."""
MAKE = "make an array first, pass that, and take the result from it"
BACK = ", and copy the result back"


def read_only(where: str, buf: object) -> ArgumentError:
    """Return the refusal of memory that nobody may write."""
    kind = "a bytearray" if isinstance(buf, bytes) else "a writable array"
    return ArgumentError(
        f"{where} is read-only, expected memory to write the result to; give {kind} as recvbuf, and take the result "
        "from there"
    )


def no_memory(where: str, buf: object) -> DatatypeError:
    """Return the refusal of what says that its elements lie at address 0, as torch's wrappers of tensors do."""
    return DatatypeError(
        f"{where} is a {type(buf).__name__} without memory of its own, expected an array with values; pass the one "
        "that has them, such as .to_local() of a DTensor, or what .wait() gives"
    )


def gaps(where: str, buf: object, writable: bool, contiguous: str) -> ArgumentError:
    """Return the refusal of memory with gaps; `contiguous` copies what is of no library in `CONTIGUOUS`."""
    libraries = [kind.__module__.partition(".")[0] for kind in type(buf).__mro__]
    copy, back = next((CONTIGUOUS[name] for name in libraries if name in CONTIGUOUS), (contiguous, ""))
    cure = f"a contiguous copy{BACK}{back}" if writable else f"{copy} of it"
    return ArgumentError(f"{where} has gaps between its elements, expected contiguous memory; pass {cure}")


def refuse_no_arrays(where: str, buf: object) -> None:
    """Refuse what is given in the place of an array by mistake, or by who knows MPI."""
    mpi = mpi_module()
    if buf is None:
        raise ArgumentError(f"{where} is None, expected an array; pass the array, or IN_PLACE as sendbuf")
    if isinstance(buf, Op) or (mpi is not None and isinstance(buf, mpi.Op)):
        raise ArgumentError(f"{where} is an operator, expected an array; pass the operator as op=")
    if mpi is not None and buf is mpi.BOTTOM:
        raise ArgumentError(f"{where} is MPI.BOTTOM, expected an array, for addresses are not taken; pass the array")


def refuse_uncomputed(where: str, tensor: Any, strided: object, writable: bool) -> None:
    """Refuse torch tensors without memory, in autograd, or whose values do not lie in memory one by one."""
    if tensor.device.type == "meta":
        raise DatatypeError(
            f"{where} is a meta tensor, which has no memory, expected a tensor with values; make one with "
            "torch.empty_like(x, device=...), and fill it"
        )
    if tensor.requires_grad:
        raise ArgumentError(f"{where} requires grad, expected a tensor outside of autograd; pass .detach() of it")
    if tensor.layout != strided:
        cure = f"a dense copy{BACK}: t = x.to_dense(); ...; x = t.to_sparse()" if writable else ".to_dense() of it"
        raise ArgumentError(f"{where} is a sparse tensor, expected a dense one; pass {cure}")
    if tensor.is_conj() or tensor.is_neg():
        copy = ".resolve_conj().resolve_neg()"
        raise ArgumentError(
            f"{where} is a conjugate or negative that torch has not computed yet, expected values in memory; "
            f"pass {f'a copy{BACK}: t = x{copy}; ...; x.copy_(t)' if writable else f'{copy} of it'}"
        )
