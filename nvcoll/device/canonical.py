"""Which compiled text serves an operator and datatype."""


def canonical(op: str, datatype: str) -> tuple[str, str]:
    """Drop what makes no difference to a reduction: AVG adds, bool is a byte, and only order knows of signs."""
    op = "SUM" if op == "AVG" else op
    if datatype == "bool":
        datatype = "uint8"
    if op not in ("MIN", "MAX") and datatype.startswith("int"):
        datatype = "u" + datatype
    return op, datatype
