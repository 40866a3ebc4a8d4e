# Memory of the host, and specs, as the fast route reads them: a few fields of C structs. One attribute is looked up,
# the dtype of an array of ml_dtypes' types.

cdef extern from "Python.h":
    ctypedef struct Py_buffer:
        void* buf
        Py_ssize_t len
        Py_ssize_t itemsize
        char* format
    int PyObject_GetBuffer(object, Py_buffer*, int) except -1
    void PyBuffer_Release(Py_buffer*) noexcept
    const int PyBUF_C_CONTIGUOUS, PyBUF_FORMAT, PyBUF_WRITABLE


# Buffer formats of the struct module that the fast route knows, as datatype numbers; the itemsize tells their width.
cdef inline int64_t code_of(const char* form, Py_ssize_t itemsize) noexcept:
    """Number a datatype by kind and size, or 0 if the fast route does not know the format."""
    cdef char c
    if form == NULL:
        return ord(b"u") << 8 | itemsize
    c = form[0]
    if c == 90 and (form[1] == 102 or form[1] == 100) and form[2] == 0:       # Zf, Zd
        return ord(b"c") << 8 | itemsize
    if form[1] != 0:
        return 0
    if c == 102 or c == 100 or c == 101:                                        # f d e
        return ord(b"f") << 8 | itemsize
    if c == 98 or c == 104 or c == 105 or c == 108 or c == 113:                 # b h i l q
        return ord(b"i") << 8 | itemsize
    if c == 66 or c == 72 or c == 73 or c == 76 or c == 81:                     # B H I L Q
        return ord(b"u") << 8 | itemsize
    if c == 63:                                                                 # ?
        return ord(b"b") << 8 | itemsize
    return 0


cdef inline object bare(object spec, dict types, int64_t* code, Py_ssize_t* count):
    """Return the array of a spec ``[array, datatype]`` or ``[array, count, datatype]``, a list or a tuple.

    `code` becomes that of the datatype, `count` the number of elements, or below 0 if all are meant. Returns None for
    other specs, and if the datatype was not seen before.
    """
    cdef Py_ssize_t items = len(spec)
    if items != 2 and items != 3:
        return None
    known = types.get(<uintptr_t><void*>spec[items - 1])
    if known is None:
        return None
    code[0], count[0] = (<tuple>known)[0], -1
    if items == 3 and spec[1] is not None:
        if type(spec[1]) is not int or not 0 <= spec[1] < 1 << 48:  # in bytes, too, it is a number of 64 bits then
            return None
        count[0] = spec[1]
    return spec[0]


cdef inline int64_t hold(object buf, Py_buffer* view, int flags, dict types) except? -1:
    """Get hold of memory, and return the code of its type; 0 if it needs the long way, where it is judged with a good
    message.
    """
    cdef int64_t code, said = 0
    cdef Py_ssize_t count = -1
    try:
        if type(buf) is list or type(buf) is tuple:
            buf = bare(buf, types, &said, &count)
            if buf is None:
                return 0
        try:
            PyObject_GetBuffer(buf, view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | flags)
            code = code_of(view.format, view.itemsize)
        except ValueError:  # of NumPy, whose types that come from ml_dtypes have no format
            known = types.get(<uintptr_t><void*>buf.dtype)
            if known is None:
                return 0
            PyObject_GetBuffer(buf, view, PyBUF_C_CONTIGUOUS | flags)
            code = (<tuple>known)[0]
    except Exception:
        return 0
    if code and said in (0, code) and (count < 0 or count * view.itemsize == view.len):
        return code
    PyBuffer_Release(view)
    return 0


cdef inline bint apart(Py_buffer* send, Py_buffer* recv) noexcept:
    """Tell whether this is the common case of two buffers of one size, and disjoint."""
    return send.len == recv.len and (<char*>send.buf + send.len <= <char*>recv.buf
                                     or <char*>recv.buf + recv.len <= <char*>send.buf)


cdef inline bint among(object one, list those) noexcept:
    """Tell whether an object is one of those in a list."""
    for other in those:
        if other is one:
            return True
    return False
