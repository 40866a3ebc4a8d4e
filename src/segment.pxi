# Memory: a node's shared segment, and the private stand-in for emulated ranks. Included by bootstrap.pyx.
#
# Liveness is a POSIX record lock: the kernel drops it when its process ends, however that happens, and a
# forked child does not inherit it. Closing ANY descriptor of the file would drop the lock too, hence a process
# holds exactly one descriptor per segment, and _opened refuses a second one.

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <errno.h>
    #include <fcntl.h>
    #include <stdint.h>
    #include <string.h>
    #include <sys/mman.h>
    #include <sys/stat.h>
    #include <unistd.h>
    #ifndef MADV_POPULATE_WRITE
    #define MADV_POPULATE_WRITE 23
    #endif

    /* A core dump would read every page of the address space, and so take memory for those that have none; a kernel
       that cannot leave them out is no reason to fail. */
    static void *nvcoll_map(int fd, size_t size) {
        int flags = MAP_NORESERVE | (fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED);
        void *address = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, fd, 0);
        if (address == MAP_FAILED) return NULL;
        madvise(address, size, MADV_DONTDUMP);
        return address;
    }

    /* The kernel may lack populate (before 5.14): then pages come at the first touch. */
    static int nvcoll_populate(void *address, size_t size) {
        if (size == 0 || madvise(address, size, MADV_POPULATE_WRITE) == 0 || errno == EINVAL) return 0;
        return -1;
    }

    static int nvcoll_lock(int fd, int command, int64_t index, short *type) {
        struct flock lock;
        memset(&lock, 0, sizeof lock);
        lock.l_type = F_WRLCK;
        lock.l_whence = SEEK_SET;
        lock.l_start = (off_t)index;
        lock.l_len = 1;
        int status = fcntl(fd, command, &lock);
        *type = lock.l_type;
        return status;
    }
    """
    ctypedef long long off_t
    int errno
    const int EINTR, EINVAL, EAGAIN, EACCES, EEXIST, EPERM, ENOMEM, EMFILE, ENFILE
    const int O_CREAT, O_EXCL, O_RDWR
    const int F_SETLK, F_GETLK
    const short F_UNLCK
    const int FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
    const int MADV_DONTNEED
    int shm_open(const char *name, int flags, unsigned int mode) nogil
    int shm_unlink(const char *name) nogil
    int ftruncate(int fd, off_t length) nogil
    int fallocate(int fd, int mode, off_t offset, off_t length) nogil
    int munmap(void *address, size_t size) nogil
    int madvise(void *address, size_t size, int advice) nogil
    int c_close "close"(int fd) nogil
    void *nvcoll_map(int fd, size_t size) nogil
    int nvcoll_populate(void *address, size_t size) nogil
    int nvcoll_lock(int fd, int command, int64_t index, short *type) nogil


cdef Py_ssize_t PAGE = os.sysconf("SC_PAGESIZE")
_opened = set()  # (device, inode) of the segments this process has mapped


def _fail(int code, str what):
    raise OSError(code, f"{os.strerror(code)}: {what}")


def _fail_to_map(int code, size):
    _fail(code, f"cannot map {size} bytes of memory; a smaller NVCOLL_HEAP may fit")


cdef Py_ssize_t _addressable(size) except? -1:
    """Return a size as a number of C's; what is none is refused as what is just less, and no memory has, would be."""
    if size > sys.maxsize:
        _fail_to_map(ENOMEM, size)
    return size


cdef class Anonymous:
    """Private memory with `Segment`'s interface, less names and locks: for ranks that are threads."""

    cdef readonly size_t address
    cdef readonly Py_ssize_t size
    cdef readonly int fd
    cdef readonly str name

    def __cinit__(self):
        self.fd = -1

    cdef int _map(self) except -1:
        cdef void *address
        cdef size_t size = self.size
        cdef int fd = self.fd
        with nogil:
            address = nvcoll_map(fd, size)
        if address == NULL:
            _fail_to_map(errno, self.size)
        self.address = <size_t>address
        return 0

    cdef int _check(self, Py_ssize_t offset, Py_ssize_t nbytes) except -1:
        if self.address == 0:
            raise StateError(f"{self!r} is closed")
        if offset < 0 or nbytes < 0 or offset > self.size - nbytes:
            raise ValueError(f"bytes {offset} to {offset + nbytes} are outside of {self!r}")
        return 0

    def reserve(self, Py_ssize_t offset, Py_ssize_t nbytes):
        """Make the pages of ``[offset, offset + nbytes)`` exist, so that no later store can fail for want of memory.

        Raises
        ------
        OSError
            ENOSPC or ENOMEM: there is not enough memory. What was there before still is.
        """
        self._check(offset, nbytes)
        if nbytes:
            self._allocate(offset, nbytes)
            self._populate(offset, nbytes)

    cdef int _allocate(self, Py_ssize_t offset, Py_ssize_t nbytes) except -1:
        return 0

    cdef int _populate(self, Py_ssize_t offset, Py_ssize_t nbytes) except -1:
        cdef size_t first = (self.address + offset) & ~<size_t>(PAGE - 1)
        cdef size_t end = self.address + offset + nbytes
        cdef int status, code
        while True:
            with nogil:
                status = nvcoll_populate(<void *>first, end - first)
                code = errno
            if status == 0:
                return 0
            if code != EINTR and code != EAGAIN:
                _fail(code, f"cannot populate {nbytes} bytes of {self!r}")
            PyErr_CheckSignals()

    def release(self, Py_ssize_t offset, Py_ssize_t nbytes):
        """Give the whole pages inside ``[offset, offset + nbytes)`` back; they read as zeros afterwards."""
        self._check(offset, nbytes)
        cdef Py_ssize_t first = (offset + PAGE - 1) // PAGE * PAGE
        cdef Py_ssize_t end = (offset + nbytes) // PAGE * PAGE
        if offset + nbytes == self.size:
            end = (self.size + PAGE - 1) // PAGE * PAGE
        if end > first:
            self._discard(first, end - first)

    cdef int _discard(self, Py_ssize_t offset, Py_ssize_t nbytes) except -1:
        cdef int status
        with nogil:
            status = madvise(<void *>(self.address + offset), nbytes, MADV_DONTNEED)
        if status != 0:
            _fail(errno, f"cannot release {nbytes} bytes of {self!r}")
        return 0

    def unlink(self):
        """Remove the name; here there is none."""

    def close(self):
        """Unmap. Nothing may use the memory any more; a second call does nothing."""
        self._unmap()

    cdef void _unmap(self) noexcept:
        if self.address:
            munmap(<void *>self.address, self.size)
            self.address = 0

    def __dealloc__(self):
        self._unmap()

    def __repr__(self):
        return f"<{type(self).__name__} {self.name or 'memory'} of {self.size} bytes>"


cdef class Segment(Anonymous):
    """Shared memory of a node: a sparse POSIX segment, mapped whole.

    Made by `create` on one rank and `open` on the others. The address space is reserved; memory is used only
    where `reserve` was called (or a page was touched).
    """

    cdef set _locks
    cdef bint _counted
    cdef uint64_t _device, _inode  # plain numbers: the garbage collector may clear objects before __dealloc__
    cdef Py_ssize_t _pid

    @staticmethod
    def create(str name, size):
        """Create a segment that must not exist yet, of `size` bytes, readable by this user only.

        Parameters
        ----------
        name
            As for ``shm_open``, with or without the leading slash.
        size
            Bytes; no memory is used for them yet.

        Raises
        ------
        OSError
            EEXIST, EMFILE, ENOMEM, ...; nothing is left behind.
        """
        cdef Segment self = Segment.__new__(Segment)
        self._open(name, _addressable(size), O_CREAT | O_EXCL | O_RDWR)
        return self

    @staticmethod
    def open(str name, size):
        """Map a segment that another rank of this node created with the same size.

        Raises
        ------
        OSError
            ENOENT: no such segment; EINVAL: it has another size; EEXIST: this process has it open already; EPERM: it
            belongs to another user, or others may use it.
        """
        cdef Segment self = Segment.__new__(Segment)
        self._open(name, _addressable(size), O_RDWR)
        return self

    cdef int _open(self, str name, Py_ssize_t size, int flags) except -1:
        if size < 1 or not name.strip("/"):
            raise ValueError(f"a segment needs a name and a size of 1 or more, got {name!r} and {size}")
        self.name = "/" + name.strip("/")
        self.size = size
        self._locks = set()
        self._pid = os.getpid()
        self._refuse_second(flags)
        cdef bytes encoded = os.fsencode(self.name)
        cdef const char *c_name = encoded
        cdef int fd
        with nogil:
            fd = shm_open(c_name, flags, 0o600)
        if fd < 0:
            _fail(errno, f"cannot {'create' if flags & O_CREAT else 'open'} shared memory {self.name}")
        self.fd = fd
        try:
            self._size_and_map(bool(flags & O_CREAT))
        except BaseException:
            if flags & O_CREAT:
                shm_unlink(c_name)
            self._unmap()
            raise
        return 0

    cdef int _refuse_second(self, int flags) except -1:
        # before it is opened: closing the second descriptor would drop the locks of the first
        try:
            facts = os.stat("/dev/shm" + self.name)
        except OSError:
            return 0
        if not flags & O_CREAT and (facts.st_dev, facts.st_ino) in _opened:
            _fail(EEXIST, f"shared memory {self.name} is already open in this process")
        return 0

    cdef int _size_and_map(self, bint new) except -1:
        cdef int status, fd = self.fd
        cdef off_t size = self.size
        if new:
            with nogil:
                status = ftruncate(fd, size)
            if status != 0:
                _fail(errno, f"cannot give shared memory {self.name} {self.size} bytes")
        facts = os.fstat(fd)
        if facts.st_uid != os.geteuid() or facts.st_mode & 0o077:
            _fail(EPERM, f"shared memory {self.name} is of user {facts.st_uid} with mode {facts.st_mode & 0o777:o}, "
                  f"expected user {os.geteuid()} with mode 600; start the ranks anew, and ask who put it there")
        if facts.st_size != self.size:
            _fail(EINVAL, f"shared memory {self.name} has {facts.st_size} bytes, expected {self.size}")
        self._map()
        self._device, self._inode, self._counted = facts.st_dev, facts.st_ino, True
        _opened.add((facts.st_dev, facts.st_ino))
        return 0

    cdef int _allocate(self, Py_ssize_t offset, Py_ssize_t nbytes) except -1:
        # tmpfs takes back what an interrupted call had allocated, so trying again is safe
        cdef int status, code, fd = self.fd
        while True:
            with nogil:
                status = fallocate(fd, FALLOC_FL_KEEP_SIZE, offset, nbytes)
                code = errno
            if status == 0:
                return 0
            if code != EINTR:
                _fail(code, f"cannot reserve {nbytes} bytes of shared memory; "
                      "make /dev/shm larger (in a container: --shm-size) or use smaller buffers")
            PyErr_CheckSignals()

    cdef int _discard(self, Py_ssize_t offset, Py_ssize_t nbytes) except -1:
        cdef int status, code, fd = self.fd
        while True:
            with nogil:
                status = fallocate(fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, offset, nbytes)
                code = errno
            if status == 0:
                return 0
            if code != EINTR:
                _fail(code, f"cannot release {nbytes} bytes of {self!r}")
            PyErr_CheckSignals()

    def unlink(self):
        """Remove the name, so that nothing stays when the ranks end; the mappings live on.

        Raises
        ------
        OSError
            ENOENT: it is gone already.
        """
        cdef bytes encoded = os.fsencode(self.name)
        cdef const char *c_name = encoded
        cdef int status
        with nogil:
            status = shm_unlink(c_name)
        if status != 0:
            _fail(errno, f"cannot unlink shared memory {self.name}")

    def lock(self, int64_t index):
        """Lock byte `index`: the sign that this rank lives, held until its process ends or closes the segment.

        Raises
        ------
        OSError
            EAGAIN or EACCES: another process holds it.
        """
        cdef short kind
        cdef int status, fd = self.fd
        self._check(0, 0)
        with nogil:
            status = nvcoll_lock(fd, F_SETLK, index, &kind)
        if status != 0:
            _fail(errno, f"cannot take lock {index} of {self!r}; another process holds it")
        self._locks.add(index)

    def is_alive(self, int64_t index):
        """Return whether a process holds lock `index` (this one included)."""
        cdef short kind
        cdef int status, fd = self.fd
        self._check(0, 0)
        # the kernel reports only others' locks as conflicts
        if index in self._locks and self._pid == os.getpid():
            return True
        with nogil:
            status = nvcoll_lock(fd, F_GETLK, index, &kind)
        if status != 0:
            _fail(errno, f"cannot ask for lock {index} of {self!r}")
        return kind != F_UNLCK

    cdef void _unmap(self) noexcept:
        if self.address:
            munmap(<void *>self.address, self.size)
            self.address = 0
        if self.fd >= 0:
            c_close(self.fd)
            self.fd = -1
        if self._counted and _opened is not None:  # None: the interpreter ends, and the module has
            _opened.discard((self._device, self._inode))
            self._counted = False


def anonymous(size):
    """Return private zeroed memory of `size` bytes with `Segment`'s interface, less names and locks.

    Raises
    ------
    OSError
        ENOMEM: the address space cannot be reserved.
    """
    if size < 1:
        raise ValueError(f"memory needs a size of 1 or more, got {size}")
    cdef Anonymous self = Anonymous.__new__(Anonymous)
    self.size = _addressable(size)
    self._map()
    return self
