# Plans on a GPU: arguments packed once, one call of the driver; and the table in which a communicator finds them.

cdef class DevicePlan:
    """A kernel with its arguments, ready to be launched on any pair of addresses and any stream.

    Parameters
    ----------
    state
        The communicator's `DeviceState`.
    function
        Handle of the kernel; 0 for the copy of `count` bytes that one rank needs.
    call
        Values of the fields of the call by name.
    blocks, threads
        Shape of the launch.
    overlap
        Whether the kernel may be brought in while the one before it on the stream still runs.
    keep
        Objects that must outlive the plan.
    describe
        What the call is, for messages.
    """
    cdef int64_t values[FIELDS]
    cdef nv_launch_config shape
    cdef nv_launch_attribute attribute
    cdef void* function
    cdef readonly DeviceState state
    cdef readonly object keep
    cdef readonly object describe

    def __init__(self, DeviceState state, uintptr_t function, dict call, int blocks, int threads, keep=None,
                 describe=None, bint overlap=False):
        self.state = state
        self.function = <void*>function
        self.keep = keep
        self.describe = describe
        self.values = state.values
        for name, value in call.items():
            self.values[DEVICE_FIELDS.index(name)] = value
        memset(&self.shape, 0, sizeof(self.shape))
        self.shape.grid[0], self.shape.grid[1], self.shape.grid[2] = blocks, 1, 1
        self.shape.block[0], self.shape.block[1], self.shape.block[2] = threads, 1, 1
        if overlap:
            memset(&self.attribute, 0, sizeof(self.attribute))
            self.attribute.kind, self.attribute.value = PROGRAMMATIC, 1
            self.shape.attributes, self.shape.count = &self.attribute, 1

    cdef int launch(self, uintptr_t send, uintptr_t recv, uintptr_t stream) noexcept nogil:
        cdef int64_t values[FIELDS]
        cdef void* arguments[FIELDS]
        cdef nv_launch_config shape = self.shape
        cdef int k, error, captured = 0
        cdef bint pushed
        memcpy(values, self.values, sizeof(values))
        values[0], values[1] = <int64_t>send, <int64_t>recv
        for k in range(FIELDS):
            arguments[k] = &values[k]
        shape.stream = <void*>stream
        error = self.state.order.enter(&pushed)
        if not error:
            error = self.state.order.order(stream, &captured)
        if not error and self.function:
            error = nv_launch_kernel(&shape, self.function, arguments, NULL)
        elif not error and send != recv:
            error = nv_copy_async(recv, send, <size_t>self.values[2], <void*>stream)
        if not error and not captured:
            error = self.state.order.launched(stream)
        self.state.order.exit(pushed)
        if not error:
            self.state.sequence += 1
        return error

    def run(self, uintptr_t send, uintptr_t recv, uintptr_t stream, owner=None):
        """Launch on two addresses; they are equal for a call in place. `owner` is what has the stream, if known.

        Returns
        -------
        bool
            False if an earlier call has failed.
        """
        cdef int error
        cdef StreamOrder order = self.state.order
        if self.state.begin():
            return False
        cdef bint moved = stream != order.last_stream
        with nogil:
            error = self.launch(send, recv, stream)
        self.state.busy = order.busy = False
        if error:
            raise refused("the launch", error)
        if stream == order.last_stream and (moved or not (owner is None or type(owner) is int)):
            order.last_owner = owner  # a number keeps nothing alive
        return True


cdef class DevicePlans:
    """The plans of one communicator on a GPU for an algorithm, found by datatype, size and operator.

    `run` serves arrays of the symmetric heap, also in a spec that names their datatype, and streams that are numbers or
    tell theirs; everything else takes the long way, in nvcoll.device_calls.

    Parameters
    ----------
    in_place
        Objects that stand for the receive buffer in place of a send buffer.
    types
        Codes of datatypes, as `nvcoll.ops.CODES`.
    stream
        Where calls go that name no stream.
    captured
        Returns the stream that a library captures into a graph, or None.
    device
        Ordinal of the communicator's GPU: what lies on another one takes the long way, to be refused.
    """
    cdef dict table
    cdef list in_place
    cdef dict types
    cdef uintptr_t stream
    cdef object captured
    cdef int device

    def __init__(self, list in_place, dict types, uintptr_t stream, captured, int device):
        self.table = {}
        self.in_place = in_place
        self.types = types
        self.stream = stream
        self.captured = captured
        self.device = device

    def add(self, int64_t code, int64_t nbytes, op, DevicePlan plan):
        """Keep a plan for `run`, where `op` is known by identity: mpi4py's handles cannot be hashed."""
        if len(self.table) >= MOST:
            self.table.clear()
        self.table[code, nbytes, <uintptr_t><void*>op] = (plan, op)

    def run(self, sendbuf, recvbuf, op, stream):
        """Launch the call if its plan is known.

        Returns
        -------
        bool or None
            True if launched; None if there is no such plan or the arguments need the long way; False if an earlier
            call has failed.
        """
        cdef DeviceSpan send, recv
        cdef uintptr_t from_, to, queue = self.stream
        if recvbuf is None or among(sendbuf, self.in_place):
            recvbuf = sendbuf if recvbuf is None else recvbuf
            sendbuf = recvbuf
        recv = span_of(recvbuf, self.types)
        send = recv if sendbuf is recvbuf else span_of(sendbuf, self.types)
        if recv is None or send is None or recv.memory.device != self.device or send.memory.device != self.device:
            return None
        from_, to = send.at(), recv.at()
        if send is not recv and (send.count != recv.count or send.code != recv.code
                                 or (from_ < to + recv.count * recv.itemsize
                                     and to < from_ + send.count * send.itemsize)):
            return None
        if stream is not None:
            number = stream
            if type(number) is not int:
                number = getattr(stream, "cuda_stream", None)  # torch's
                if type(number) is not int:
                    return None
            if number < 0 or number >> 64:
                return None
            queue = number
        elif self.captured() is not None:
            return None
        kept = self.table.get((recv.code, recv.count * recv.itemsize, <uintptr_t><void*>op))
        if kept is None or not from_ or not to:
            return None
        return (<DevicePlan>(<tuple>kept)[0]).run(from_, to, queue, stream)
