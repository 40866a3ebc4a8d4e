# DLPack capsules, made and read. The structs are those of dlpack.h 1.0, laid out here because their layout is an ABI.

cdef extern from *:
    """
    #include <stdint.h>

    typedef struct { int32_t device_type, device_id; } nv_dl_device;
    typedef struct { uint8_t code, bits; uint16_t lanes; } nv_dl_type;
    typedef struct {
        void *data;
        nv_dl_device device;
        int32_t ndim;
        nv_dl_type dtype;
        int64_t *shape, *strides;
        uint64_t byte_offset;
    } nv_dl_tensor;
    /* Before version 1.0, and still what consumers get that do not say which version they know. */
    typedef struct nv_dl_plain {
        nv_dl_tensor tensor;
        void *context;
        void (*deleter)(struct nv_dl_plain *);
    } nv_dl_plain;
    typedef struct nv_dl_versioned {
        uint32_t major, minor;
        void *context;
        void (*deleter)(struct nv_dl_versioned *);
        uint64_t flags;
        nv_dl_tensor tensor;
    } nv_dl_versioned;
    """
    ctypedef struct nv_dl_device:
        int32_t device_type
        int32_t device_id
    ctypedef struct nv_dl_type:
        uint8_t code
        uint8_t bits
        uint16_t lanes
    ctypedef struct nv_dl_tensor:
        void* data
        nv_dl_device device
        int32_t ndim
        nv_dl_type dtype
        int64_t* shape
        int64_t* strides
        uint64_t byte_offset
    ctypedef struct nv_dl_plain:
        nv_dl_tensor tensor
        void* context
        void (*deleter)(nv_dl_plain*) noexcept
    ctypedef struct nv_dl_versioned:
        uint32_t major
        uint32_t minor
        void* context
        void (*deleter)(nv_dl_versioned*) noexcept
        uint64_t flags
        nv_dl_tensor tensor

cdef extern from "Python.h":
    int Py_IsInitialized() nogil

DLPACK_VERSION = (1, 1)     # 1.1 has the layout of 1.0 and numbers the 8-bit floats

cdef enum:
    READ_ONLY = 1           # a flag of versioned tensors

cdef const char* PLAIN = "dltensor"
cdef const char* PLAIN_TAKEN = "used_dltensor"
cdef const char* VERSIONED = "dltensor_versioned"
cdef const char* VERSIONED_TAKEN = "used_dltensor_versioned"


cdef void release(void* context) noexcept nogil:
    """Let the owner of exported memory go, on whatever thread the consumer ends; after the interpreter it has gone."""
    if Py_IsInitialized():
        with gil:
            Py_DECREF(<object>context)


cdef void delete_plain(nv_dl_plain* managed) noexcept nogil:
    release(managed.context)
    free(managed)


cdef void delete_versioned(nv_dl_versioned* managed) noexcept nogil:
    release(managed.context)
    free(managed)


cdef void drop_capsule(object capsule) noexcept:
    """Delete the tensor of a capsule that nobody took."""
    cdef nv_dl_plain* plain
    cdef nv_dl_versioned* versioned
    if PyCapsule_IsValid(capsule, PLAIN):
        plain = <nv_dl_plain*>PyCapsule_GetPointer(capsule, PLAIN)
        plain.deleter(plain)
    elif PyCapsule_IsValid(capsule, VERSIONED):
        versioned = <nv_dl_versioned*>PyCapsule_GetPointer(capsule, VERSIONED)
        versioned.deleter(versioned)


def dlpack_capsule(uintptr_t address, tuple shape, tuple dtype, tuple device, owner, bint versioned):
    """Make a capsule of memory in C order.

    Parameters
    ----------
    address
        Of the first element.
    shape
        Lengths of the axes.
    dtype
        (code, bits) of an element.
    device
        (type, id).
    owner
        Kept until the consumer is done with the memory.
    versioned
        Whether the consumer knows version 1.

    Returns
    -------
    capsule
    """
    cdef size_t head = sizeof(nv_dl_versioned) if versioned else sizeof(nv_dl_plain)
    cdef Py_ssize_t axes = len(shape)
    cdef int64_t stride = 1
    cdef int32_t device_type = device[0], device_id = device[1]
    cdef uint8_t code = dtype[0], bits = dtype[1]
    cdef list lengths = [int(length) for length in shape]
    cdef nv_dl_versioned* new
    cdef nv_dl_plain* old
    cdef nv_dl_tensor* tensor
    cdef char* memory = <char*>calloc(1, head + 2 * axes * sizeof(int64_t))
    if memory == NULL:
        raise MemoryError()
    if versioned:
        new = <nv_dl_versioned*>memory
        new.major, new.minor = DLPACK_VERSION
        new.context = <void*>owner
        new.deleter = <void (*)(nv_dl_versioned*) noexcept>delete_versioned
        tensor = &new.tensor
    else:
        old = <nv_dl_plain*>memory
        old.context = <void*>owner
        old.deleter = <void (*)(nv_dl_plain*) noexcept>delete_plain
        tensor = &old.tensor
    tensor.data = <void*>address
    tensor.device.device_type, tensor.device.device_id = device_type, device_id
    tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes = code, bits, 1
    tensor.ndim = <int32_t>axes
    tensor.shape = <int64_t*>(memory + head)
    tensor.strides = tensor.shape + axes
    for axis in range(axes - 1, -1, -1):
        tensor.shape[axis], tensor.strides[axis] = lengths[axis], stride
        stride *= tensor.shape[axis]
    Py_INCREF(owner)
    try:
        return PyCapsule_New(memory, VERSIONED if versioned else PLAIN, <PyCapsule_Destructor>drop_capsule)
    except BaseException:
        free(memory)
        Py_DECREF(owner)
        raise


cdef class DLPackTensor:
    """The tensor of a capsule, taken from it and held until this object goes.

    Parameters
    ----------
    capsule
        What ``__dlpack__`` returned.

    Raises
    ------
    BufferError
        If it is no capsule of DLPack, was taken before, or is of a version that is not known.
    """
    cdef nv_dl_plain* plain
    cdef nv_dl_versioned* versioned
    cdef nv_dl_tensor* tensor

    def __cinit__(self, capsule):
        if PyCapsule_IsValid(capsule, VERSIONED):
            versioned = <nv_dl_versioned*>PyCapsule_GetPointer(capsule, VERSIONED)
            if versioned.major != DLPACK_VERSION[0]:
                raise BufferError(f"the capsule is of DLPack {versioned.major}, {DLPACK_VERSION[0]} was asked for")
            PyCapsule_SetName(capsule, VERSIONED_TAKEN)
            self.versioned, self.tensor = versioned, &versioned.tensor
        elif PyCapsule_IsValid(capsule, PLAIN):
            plain = <nv_dl_plain*>PyCapsule_GetPointer(capsule, PLAIN)
            PyCapsule_SetName(capsule, PLAIN_TAKEN)
            self.plain, self.tensor = plain, &plain.tensor
        else:
            raise BufferError(f"a {type(capsule).__name__} is no DLPack capsule, or was taken before")

    def __dealloc__(self):
        if self.plain != NULL and self.plain.deleter != NULL:
            self.plain.deleter(self.plain)
        if self.versioned != NULL and self.versioned.deleter != NULL:
            self.versioned.deleter(self.versioned)

    @property
    def address(self):
        """Of the first element."""
        return <uintptr_t>self.tensor.data + self.tensor.byte_offset

    @property
    def shape(self):
        """Lengths of the axes."""
        return tuple([self.tensor.shape[axis] for axis in range(self.tensor.ndim)])

    @property
    def strides(self):
        """Elements between neighbours of each axis, or None for C order."""
        if self.tensor.strides == NULL:
            return None
        return tuple([self.tensor.strides[axis] for axis in range(self.tensor.ndim)])

    @property
    def dtype(self):
        """(code, bits, lanes) of an element."""
        return self.tensor.dtype.code, self.tensor.dtype.bits, self.tensor.dtype.lanes

    @property
    def device(self):
        """(type, id)."""
        return self.tensor.device.device_type, self.tensor.device.device_id

    @property
    def readonly(self):
        """Whether the exporter forbids to write; those before version 1 cannot say so."""
        return self.versioned != NULL and self.versioned.flags & READ_ONLY != 0
