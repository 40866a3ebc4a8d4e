# Memory of a GPU as the fast route reads it: a few fields of a C struct, no attribute looked up.


cdef class DeviceMemory:
    """An allocation on a GPU, shared by an array and its views: when it ends, it has ended for all of them.

    Parameters
    ----------
    address
        Of its first byte.
    nbytes
        Its size.
    device
        Ordinal of the GPU.
    """
    cdef uintptr_t start
    cdef readonly Py_ssize_t nbytes
    cdef readonly int device
    cdef readonly bint freed

    def __cinit__(self, uintptr_t address, Py_ssize_t nbytes, int device):
        self.start = address
        self.nbytes = nbytes
        self.device = device

    def end(self):
        """Make freed arrays of those that lie here."""
        self.freed = True


cdef class DeviceSpan:
    """Elements in the memory of a GPU, one after the other.

    Parameters
    ----------
    memory
        Where they lie.
    offset
        Bytes from its beginning to the first element.
    count
        Number of elements.
    itemsize
        Bytes of an element.
    code
        `Datatype.code` of their type.
    """
    cdef readonly DeviceMemory memory
    cdef readonly Py_ssize_t offset
    cdef readonly Py_ssize_t count
    cdef readonly Py_ssize_t itemsize
    cdef readonly int64_t code

    def __cinit__(self, DeviceMemory memory not None, Py_ssize_t offset, Py_ssize_t count, Py_ssize_t itemsize,
                  int64_t code):
        if offset < 0 or count < 0 or itemsize < 1 or count > (memory.nbytes - offset) // itemsize:
            raise ValueError(f"{count} elements of {itemsize} bytes at {offset} leave memory of {memory.nbytes} bytes")
        self.memory = memory
        self.offset = offset
        self.count = count
        self.itemsize = itemsize
        self.code = code

    cdef inline uintptr_t at(self) noexcept:
        """Return the address of the first element; 0 once the memory was freed: calls look at it and at nothing else.
        """
        return 0 if self.memory.freed else self.memory.start + self.offset

    @property
    def address(self):
        """Of the first element; 0 once the memory was freed."""
        return self.at()

    @property
    def nbytes(self):
        """Size in bytes."""
        return self.count * self.itemsize


cdef inline DeviceSpan span_of(object buf, dict types):
    """Return elements, given as they are or in a spec that says of them what is so; None for what needs the long way.
    """
    cdef int64_t code = 0
    cdef Py_ssize_t count = -1
    if isinstance(buf, DeviceSpan):
        return <DeviceSpan>buf
    if type(buf) is list or type(buf) is tuple:
        buf = bare(buf, types, &code, &count)
        if isinstance(buf, DeviceSpan) and (<DeviceSpan>buf).code == code and count in (-1, (<DeviceSpan>buf).count):
            return <DeviceSpan>buf
    return None
