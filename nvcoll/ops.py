"""Operators and datatypes: the two registries from which names, checks and tables derive.

mpi4py's handles (``MPI.SUM``, ``MPI.FLOAT``) mean the same as the constants here and are accepted
wherever these are. mpi4py is never imported for that: a handle can only exist once somebody has.
"""

import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from .errors import DatatypeError

# What the fast route makes of the buffer protocol's formats, and letters of their own for types that have no format.
_LETTERS = {"bool": "b", "int": "i", "uint": "u", "float": "f", "complex": "c"}
_LETTERS |= {"bfloat16": "B", "float8_e4m3fn": "4", "float8_e5m2": "5"}
_FROM_ML_DTYPES = {"bfloat16", "float8_e4m3fn", "float8_e5m2"}


@dataclass(frozen=True, slots=True)
class Datatype:
    """The type of one element.

    Attributes
    ----------
    name : str
        NumPy's name of the type, such as ``"float32"``; the key in `DATATYPES`.
    itemsize : int
        Bytes of one element.
    kind : str
        ``"bool"``, ``"int"``, ``"uint"``, ``"float"`` or ``"complex"``.
    accumulate : str
        Name of the type in which sums and products are kept while ranks are combined:
        ``"float32"`` for floats of 8 and 16 bits, which are rounded once at the end, else `name`.
    """

    name: str
    itemsize: int
    kind: str
    accumulate: str

    @property
    def dtype(self) -> np.dtype[Any]:
        """The NumPy dtype, in native byte order; for bfloat16 and 8-bit floats that of ml_dtypes."""
        if self.name in _FROM_ML_DTYPES:
            import ml_dtypes  # here, because `import nvcoll` needs NumPy only

            scalar: type = getattr(ml_dtypes, self.name)
            return np.dtype(scalar)
        return np.dtype(self.name)

    @property
    def code(self) -> int:
        """A number for the type, which the compiled fast route compares: a letter, shifted left, and the itemsize."""
        return ord(_LETTERS.get(self.name) or _LETTERS[self.kind]) << 8 | self.itemsize

    @property
    def size(self) -> int:
        """`itemsize`, by mpi4py's name."""
        return self.itemsize

    def Get_size(self) -> int:
        """Return the bytes of one element, as mpi4py's method of that name does.

        Returns
        -------
        int
        """
        return self.itemsize

    def Get_name(self) -> str:
        """Return `name`, for code written against mpi4py's handles.

        Returns
        -------
        str
        """
        return self.name

    def __repr__(self) -> str:
        return f"<nvcoll datatype {self.name}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return _datatype_named, (self.name,)  # one object per name, also after pickle and copy


@dataclass(frozen=True, slots=True)
class Op:
    """An operator that combines the elements of all ranks.

    Attributes
    ----------
    name : str
        MPI's name, such as ``"SUM"``; the key in `OPS`. ``"AVG"`` has no counterpart in MPI.
    kind : str
        ``"arithmetic"``, ``"order"``, ``"logical"`` or ``"bitwise"``.
    commutative : bool
        Whether operands may change places; all built-in operators allow it.
    """

    name: str
    kind: str
    commutative: bool = True

    def supports(self, datatype: Datatype) -> str | None:
        """Say why `datatype` cannot be combined by this operator, or None where it can.

        Parameters
        ----------
        datatype
            Type of the elements.

        Returns
        -------
        str or None
            A reason with its cure, ready to follow ``"Allreduce: "`` in a message.
        """
        needed, cure = _refused(self.kind, datatype.kind)
        if self.name == "PROD" and (datatype.kind, datatype.itemsize) == ("float", 1):
            needed, cure = "floats of 16 bits or more", "convert to float32 first"
        if not needed:
            return None
        return f"{self.name} is defined for {needed}, the buffers hold {datatype.name}; {cure}"

    def Is_commutative(self) -> bool:
        """Return `commutative`, as mpi4py's method of that name does.

        Returns
        -------
        bool
        """
        return self.commutative

    def __repr__(self) -> str:
        return f"<nvcoll operator {self.name}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return _op_named, (self.name,)


def _refused(op_kind: str, datatype_kind: str) -> tuple[str, str]:
    """Return what the operator is defined for and the cure, or two empty strings if all is well."""
    if op_kind == "arithmetic" and datatype_kind == "bool":
        return "numbers", "take LOR, LAND or LXOR, or count in an integer type"
    if op_kind == "order" and datatype_kind == "complex":
        return "types with an order", "reduce the absolute values or the real parts"
    if op_kind in ("logical", "bitwise") and datatype_kind in ("float", "complex"):
        view = "convert to bool first" if op_kind == "logical" else "reduce a .view() of an unsigned integer type"
        return "integers and bool", view
    return "", ""


def _table(*rows: tuple[str, int, str]) -> dict[str, Datatype]:
    """Build the registry; floats of 8 and 16 bits accumulate in float32, everything else in itself."""
    return {
        name: Datatype(name, itemsize, kind, "float32" if kind == "float" and itemsize < 4 else name)
        for name, itemsize, kind in rows
    }


#: Every datatype by its name.
DATATYPES: dict[str, Datatype] = _table(
    ("bool", 1, "bool"),
    ("int8", 1, "int"),
    ("int16", 2, "int"),
    ("int32", 4, "int"),
    ("int64", 8, "int"),
    ("uint8", 1, "uint"),
    ("uint16", 2, "uint"),
    ("uint32", 4, "uint"),
    ("uint64", 8, "uint"),
    ("float8_e4m3fn", 1, "float"),
    ("float8_e5m2", 1, "float"),
    ("float16", 2, "float"),
    ("bfloat16", 2, "float"),
    ("float32", 4, "float"),
    ("float64", 8, "float"),
    ("complex64", 8, "complex"),
    ("complex128", 16, "complex"),
)

#: Every operator by its name.
OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op("SUM", "arithmetic"),
        Op("PROD", "arithmetic"),
        Op("MIN", "order"),
        Op("MAX", "order"),
        Op("AVG", "arithmetic"),
        Op("LAND", "logical"),
        Op("LOR", "logical"),
        Op("LXOR", "logical"),
        Op("BAND", "bitwise"),
        Op("BOR", "bitwise"),
        Op("BXOR", "bitwise"),
    )
}


def _op_named(name: str) -> Op:
    return OPS[name]


def _datatype_named(name: str) -> Datatype:
    return DATATYPES[name]


def _c_type(code: str) -> Datatype:
    """Return the datatype of a C type, whose width is the platform's; `code` is NumPy's character."""
    return DATATYPES[np.dtype(code).name]


SUM, PROD = OPS["SUM"], OPS["PROD"]
MIN, MAX, AVG = OPS["MIN"], OPS["MAX"], OPS["AVG"]
LAND, LOR, LXOR = OPS["LAND"], OPS["LOR"], OPS["LXOR"]
BAND, BOR, BXOR = OPS["BAND"], OPS["BOR"], OPS["BXOR"]


# The names are mpi4py's, and so are the widths.
BOOL = C_BOOL = CXX_BOOL = DATATYPES["bool"]
INT8_T = SINT8_T = SIGNED_CHAR = CHAR = INTEGER1 = DATATYPES["int8"]
INT16_T = SINT16_T = INTEGER2 = DATATYPES["int16"]
INT32_T = SINT32_T = INTEGER4 = DATATYPES["int32"]
INT64_T = SINT64_T = INTEGER8 = DATATYPES["int64"]
UINT8_T = UNSIGNED_CHAR = BYTE = DATATYPES["uint8"]
UINT16_T = DATATYPES["uint16"]
UINT32_T = DATATYPES["uint32"]
UINT64_T = DATATYPES["uint64"]
FLOAT16 = FLOAT16_T = DATATYPES["float16"]
BFLOAT16 = BFLOAT16_T = DATATYPES["bfloat16"]
FLOAT = FLOAT32_T = REAL4 = REAL = F_FLOAT = DATATYPES["float32"]
DOUBLE = FLOAT64_T = REAL8 = DOUBLE_PRECISION = F_DOUBLE = DATATYPES["float64"]
C_COMPLEX = C_FLOAT_COMPLEX = CXX_FLOAT_COMPLEX = DATATYPES["complex64"]
COMPLEX = COMPLEX8 = F_COMPLEX = F_FLOAT_COMPLEX = DATATYPES["complex64"]
C_DOUBLE_COMPLEX = CXX_DOUBLE_COMPLEX = DATATYPES["complex128"]
DOUBLE_COMPLEX = COMPLEX16 = F_DOUBLE_COMPLEX = DATATYPES["complex128"]
SHORT = SIGNED_SHORT = _c_type("h")
INT = SIGNED_INT = INTEGER = F_INT = _c_type("i")
LONG = SIGNED_LONG = _c_type("l")
LONG_LONG = SIGNED_LONG_LONG = _c_type("q")
UNSIGNED_SHORT = _c_type("H")
UNSIGNED = UNSIGNED_INT = _c_type("I")
UNSIGNED_LONG = _c_type("L")
UNSIGNED_LONG_LONG = _c_type("Q")
AINT = OFFSET = COUNT = _c_type("p")

#: Every datatype by the names MPI gives it, ``"FLOAT"`` and the like.
MPI_NAMES: dict[str, Datatype] = {name: value for name, value in globals().items() if isinstance(value, Datatype)}

CODES: dict[int, tuple[int, object]] = {id(value): (value.code, value) for value in DATATYPES.values()}
CODES |= {id(one): (DATATYPES[one.name].code, one) for one in map(np.dtype, "?bhilqBHILQefdFD")}
"""`Datatype.code` by the identity of datatypes, and these: ours, NumPy's, and those seen of mpi4py and ml_dtypes."""


def mpi_module() -> Any:
    """Return ``mpi4py.MPI`` if somebody has imported it, else None."""
    return sys.modules.get("mpi4py.MPI")


def as_op(op: object, verb: str = "as_op") -> Op:
    """Return `op` as an `Op`.

    Parameters
    ----------
    op
        An operator of nvcoll, or the handle of the same operator in mpi4py.
    verb
        The call for which it is wanted, for the message.

    Returns
    -------
    Op
        One of `OPS`.

    Raises
    ------
    DatatypeError
        For anything else: Python functions, operators created by ``MPI.Op.Create``, MINLOC and the like.
    """
    if isinstance(op, Op):
        return op
    mpi = mpi_module()
    if mpi is not None and isinstance(op, mpi.Op):
        return _op_from_mpi(mpi, op, verb)
    given = repr(op) if isinstance(op, str | None) else f"of type {type(op).__name__}"
    raise DatatypeError(f"{verb}: op is {given}, expected one of {', '.join(OPS)}; pass for example nvcoll.SUM")


def _op_from_mpi(mpi: Any, handle: Any, verb: str) -> Op:
    """Return the counterpart of an mpi4py operator."""
    names = _names_in_mpi(mpi, mpi.Op, handle)
    for name in names:
        if name in OPS:
            return OPS[name]
    given = f"MPI.{names[0]}" if names else "an operator made by MPI.Op.Create"
    raise DatatypeError(f"{verb}: op is {given}, expected one of {', '.join(OPS)}; reduce with mpi4py")


_in_mpi: dict[int, tuple[Any, list[str]]] = {}  # constants by identity, for they cannot be hashed, and their names


def _names_in_mpi(mpi: Any, kind: type, handle: Any) -> list[str]:
    """Return mpi4py's names of a predefined handle: by comparing, for asking takes an initialised MPI."""
    _, names = _in_mpi.get(id(handle), (None, None))
    if names is None:
        names = [name for name, value in vars(mpi).items() if isinstance(value, kind) and value == handle]
        if any(getattr(mpi, name) is handle for name in names):
            _in_mpi[id(handle)] = handle, names
    return names


def as_datatype(datatype: object, verb: str = "as_datatype", name: str = "datatype") -> Datatype:
    """Return `datatype` as a `Datatype`.

    Parameters
    ----------
    datatype
        A datatype of nvcoll, a handle of mpi4py, a dtype of torch, or what ``numpy.dtype`` takes:
        ``"f"``, ``"float32"``, ``numpy.float32``, ``float``.
    verb, name
        The call and its argument, with which a message begins.

    Returns
    -------
    Datatype
        One of `DATATYPES`.

    Raises
    ------
    DatatypeError
        For types that cannot be reduced, and for byte orders other than the machine's.
    """
    if isinstance(datatype, Datatype):
        return datatype
    where = f"{verb}: {name}"
    if isinstance(datatype, np.dtype):
        return _from_dtype(datatype, where)
    if isinstance(datatype, str) and datatype in DATATYPES:
        return DATATYPES[datatype]  # NumPy knows the name "bfloat16" only once ml_dtypes is imported
    mpi = mpi_module()
    if mpi is not None and isinstance(datatype, mpi.Datatype):
        return _from_mpi(mpi, datatype, where)
    if type(datatype).__module__ == "torch":
        name = str(datatype).removeprefix("torch.")
        return _named(name, str(datatype), where, "x.dequantize()" if name.startswith("q") else "x.to(...)")
    try:
        if datatype is None:
            raise TypeError("NumPy would take None for float64")
        dtype = np.dtype(datatype)  # type: ignore[call-overload]
    except (TypeError, ValueError, SyntaxError):
        given = repr(datatype) if isinstance(datatype, str | None) else f"of type {type(datatype).__name__}"
        more = ", and a shape of several dimensions as a tuple" if isinstance(datatype, int) else ""
        raise DatatypeError(f"{where} is {given}, expected a datatype; pass for example nvcoll.FLOAT{more}") from None
    return _from_dtype(dtype, where)


@cache
def _native(dtype: np.dtype[Any]) -> Datatype | None:
    """Return the datatype of a NumPy dtype, or None; cached, for NumPy takes microseconds to name a dtype."""
    if (found := DATATYPES.get(dtype.name) if dtype.isnative else None) is not None:
        CODES[id(found.dtype)] = found.code, found.dtype  # that of arrays: there is one for each type
    return found


def _from_dtype(dtype: np.dtype[Any], where: str) -> Datatype:
    """Return the counterpart of a NumPy dtype."""
    if (found := _native(dtype)) is not None:
        return found
    if not dtype.isnative:
        native = dtype.newbyteorder("=").name
        raise DatatypeError(
            f"{where} is {dtype.str}, expected this machine's byte order; convert: x = x.astype({native!r})"
        )
    return _named("", str(dtype), where)


def _named(name: str, given: str, where: str, converted: str = "x.astype(...)") -> Datatype:
    """Return the datatype of that name, or raise with the list of those there are."""
    if name not in DATATYPES:
        raise DatatypeError(f"{where} is {given}, expected one of {', '.join(DATATYPES)}; convert: x = {converted}")
    return DATATYPES[name]


def _from_mpi(mpi: Any, handle: Any, where: str) -> Datatype:
    """Return the counterpart of an mpi4py datatype."""
    # MPI libraries without 16-bit floats give the null handle their names too.
    names = ["DATATYPE_NULL"] if handle == mpi.DATATYPE_NULL else _names_in_mpi(mpi, mpi.Datatype, handle)
    for name in names:
        if name in MPI_NAMES:
            if id(handle) in _in_mpi:
                CODES[id(handle)] = MPI_NAMES[name].code, handle
            return MPI_NAMES[name]
    if names:
        return _named("", f"MPI.{names[0]}", where)
    raise DatatypeError(
        f"{where} is a derived MPI datatype, expected the type of one element; copy the elements to a contiguous array"
    )
