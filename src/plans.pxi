# Plans, and the table in which a communicator finds them.

CALL_FIELDS = (
    "world", "send", "recv", "count", "itemsize", "width", "reduce", "widen", "finish", "stamp", "stride", "capacity",
    "ranks",
)

cdef struct Call:
    int64_t world
    int64_t send, recv, count
    int64_t itemsize        # bytes of an element as users see it
    int64_t width           # bytes of an accumulator
    int64_t reduce          # address of reduce(dst, left, right, n): accumulators
    int64_t widen           # address of widen(dst, src, n): elements to accumulators, or 0 where they are the same
    int64_t finish          # address of finish(dst, src, n, ranks): accumulators to elements, or 0 likewise
    int64_t stamp           # the low 24 bits of every flag of this call: tells calls that do not match apart
    int64_t stride          # bytes between slots
    int64_t capacity        # elements in one round
    int64_t ranks           # what AVG divides by

ctypedef int64_t (*kernel_t)(int64_t) noexcept nogil

# Why a call is refused, on hosts and on GPUs.
OVER = "this communicator was freed or finalized; make a new one, or call Init, and make persistent requests anew"
BROKEN = "an earlier call on this communicator failed; it can only be ended: call Free or Finalize"
TAKE_TURNS = "another thread is in a call on this communicator; calls on one communicator take turns"

if not nv_little():
    raise ImportError("nvcoll: needs a little-endian machine")


cdef class Queue
cdef class Held


cdef class Plan:
    """A compiled kernel with its arguments, ready to run on any pair of addresses.

    Parameters
    ----------
    state
        The communicator's `State`.
    kernel
        Address of the compiled kernel; 0 for the copy that one rank needs.
    call
        Values of the fields of `Call` by name; pointers and `world` are filled in here.
    signature
        What all ranks must agree on, as one number for the board.
    keep
        Objects that must outlive the plan.
    """
    cdef Call call
    cdef kernel_t kernel
    cdef int64_t signature
    cdef State state
    cdef readonly object keep
    cdef readonly object describe

    def __init__(self, State state, kernel, dict call, signature, keep=None, describe=None):
        self.state = state
        self.kernel = <kernel_t><uintptr_t>kernel
        self.signature = signature
        self.keep = keep
        self.describe = describe
        memset(&self.call, 0, sizeof(Call))
        self.call.world = <int64_t><uintptr_t>&state.world
        cdef int64_t* field = <int64_t*>&self.call
        for name, value in call.items():
            field[CALL_FIELDS.index(name)] = value

    cdef int launch(self, uintptr_t send, uintptr_t recv) noexcept nogil:
        cdef World* w = &self.state.world
        cdef Note* note
        self.call.send = <int64_t>send
        self.call.recv = <int64_t>recv
        if not self.kernel:
            if send != recv:
                memmove(<void*>recv, <const void*>send, self.call.count * self.call.itemsize)
            return 0
        w.sequence += 1
        note = &board_of(w, w.rank).notes[w.sequence & 1]
        note.signature = self.signature
        note.count = self.call.count
        nv_store(&note.sequence, w.sequence)
        self.kernel(<int64_t>&self.call)
        return w.error != 0

    def run(self, uintptr_t send, uintptr_t recv):
        """Run on two addresses; they are equal for a call in place.

        Returns
        -------
        bool
            False if the call failed: `State.failure` says why.
        """
        cdef int failed
        self.state.enter()
        with nogil:
            failed = self.launch(send, recv)
        self.state.world.busy &= ~CALLING
        return not failed


cdef class State:
    """What a rank holds of a communicator: the World that its kernels read.

    Parameters
    ----------
    values
        Fields of `World` by name, addresses included.
    private
        The same for the fields that only the waiting code reads: ``board``, ``timeout``, ``yields``, ``fd``
        and ``locks``.
    keep
        Objects whose memory the addresses point to.
    """
    cdef World world
    cdef readonly object keep
    cdef Queue queue            # once a nonblocking call was begun, until it is closed

    def __init__(self, dict values, dict private, keep):
        memset(&self.world, 0, sizeof(World))
        cdef int64_t* field = <int64_t*>&self.world
        for name, value in values.items():
            field[WORLD_FIELDS.index(name)] = value
        self.world.wait = <int64_t><uintptr_t>&wait_slowly
        self.world.wake = <int64_t><uintptr_t>&wake_peer
        self.world.board = private["board"]
        self.world.timeout = private["timeout"]
        self.world.spin_alone = self.world.spin
        self.world.yields = private["yields"]
        self.world.fd = private["fd"]
        self.world.locks = private["locks"]
        self.keep = keep

    cdef int enter(self) except -1:
        if self.world.busy or self.world.error:
            return self.take_turn()
        self.world.busy = CALLING
        return 0

    cdef int take_turn(self) except -1:
        self.drain()
        if self.world.error or self.world.busy & CALLING:
            raise self.refusal()
        self.world.busy |= CALLING  # a call of the queue may be made of several
        return 0

    def drain(self):
        """Wait for the nonblocking calls that were begun, unless this thread runs one of them."""
        if self.queue is not None:
            self.queue.drain()

    def demand(self):
        """Raise StateError once a call has failed or the communicator has ended: before anything is allocated on it."""
        if self.world.error:
            raise self.refusal()

    cdef object refusal(self):
        """Return the error of a call that cannot be: of the communicator's state, or of two calls at once."""
        from nvcoll.errors import StateError

        if self.world.error == FINALIZED:
            return StateError(OVER)
        if self.world.error:
            return StateError(BROKEN)
        return StateError(TAKE_TURNS)

    @property
    def heap(self):
        """(address, size) of this rank's symmetric memory."""
        return self.world.heap, self.world.heap_size

    @property
    def failure(self):
        """(kind, rank) of the failure: one of ERRORS, and the rank that it is about or -1; None if there is none."""
        return (ERRORS[self.world.error], self.world.error_peer) if self.world.error else None

    @property
    def sequence(self):
        """Number of the current or last call, from 1."""
        return self.world.sequence

    def interruption(self):
        """Return the exception that a signal handler raised during a wait, once, or None."""
        return caught.pop(<uintptr_t>&self.world, None)

    def boards(self):
        """Return (sequence, signature, count, state, (error, rank)) of every rank: latest call, and why it failed."""
        found = []
        cdef Board* board
        cdef Note* its
        cdef int64_t state
        for p in range(self.world.size):
            board = board_of(&self.world, p)
            its = &board.notes[nv_load(&board.notes[1].sequence) > nv_load(&board.notes[0].sequence)]
            state = nv_load(&board.state)
            why = ERRORS[state >> 8 & 255], (state >> 16) - 1
            found.append((nv_load(&its.sequence), its.signature, its.count, STATES[state & 255], why))
        return found

    def leave(self):
        """Take no more part, tell the peers, and end the call that another thread is in.

        Returns
        -------
        bool
            Whether no call uses the memory any more. A long reduction may not end within a second.
        """
        if self.world.busy & CALLING and not self.world.error:
            fail(&self.world, FINALIZED, -1)
        elif not self.world.error:  # one that failed has told them already
            nv_store(&board_of(&self.world, self.world.rank).state, LEFT)
            self.world.error = FINALIZED
        for _ in range(1000):
            if not self.world.busy & CALLING:
                return True
            with nogil:
                usleep(1000)
        return False

    def fail(self, error):
        """Make the communicator unusable for a reason that is not in a kernel: one of ERRORS."""
        fail(&self.world, ERRORS.index(error), -1)


cdef enum:
    MOST = 16384            # plans kept; a program whose sizes never repeat begins anew then
    ENTRIES = 256           # of the direct-mapped front of the table: the plans of a program's inner loop
MOST_KEPT = MOST


cdef struct Entry:
    int64_t code
    int64_t nbytes
    void* op
    void* plan


cdef class Plans:
    """The plans of one communicator, found by datatype, size and operator.

    `run` serves what has the buffer protocol, in C order, also in a spec that names its datatype; everything else takes
    the long way, in nvcoll.comm.

    Parameters
    ----------
    in_place
        Objects that stand for the receive buffer in place of a send buffer.
    types
        Codes of datatypes, as `nvcoll.ops.CODES`.
    """
    cdef Entry entries[ENTRIES]
    cdef dict table
    cdef list in_place
    cdef dict types

    def __init__(self, list in_place, dict types):
        memset(self.entries, 0, sizeof(self.entries))
        self.table = {}
        self.in_place = in_place
        self.types = types

    def add(self, int64_t code, int64_t nbytes, op, Plan plan):
        """Keep a plan for `run`, where `op` is known by identity: mpi4py's handles cannot be hashed."""
        if len(self.table) >= MOST:
            self.table.clear()
            memset(self.entries, 0, sizeof(self.entries))
        self.table[code, nbytes, <uintptr_t><void*>op] = (plan, op)
        self.front(code, nbytes, op, plan)

    cdef void front(self, int64_t code, int64_t nbytes, op, Plan plan) noexcept:
        cdef Entry* e = &self.entries[self.slot(code, nbytes, <void*>op)]
        e.code = code
        e.nbytes = nbytes
        e.op = <void*>op
        e.plan = <void*>plan

    cdef inline int64_t slot(self, int64_t code, int64_t nbytes, void* op) noexcept nogil:
        cdef uint64_t key = <uint64_t>nbytes ^ (<uint64_t>code << 32) ^ (<uint64_t><uintptr_t>op << 8)
        return <int64_t>((key * 0x9E3779B97F4A7C15ULL) >> 56)

    def run(self, sendbuf, recvbuf, op):
        """Run the call if its plan is known.

        Returns
        -------
        Plan, True or None
            True if done; None if there is no such plan or the buffers need the long way; the Plan if it failed.
        """
        cdef Py_buffer send
        cdef Py_buffer recv
        cdef int64_t code, its
        if recvbuf is None:
            recvbuf = sendbuf
        code = hold(recvbuf, &recv, PyBUF_WRITABLE, self.types)
        if not code:
            return None
        try:
            if sendbuf is recvbuf or among(sendbuf, self.in_place):
                return self.go(code, &recv, <uintptr_t>recv.buf, op)
            its = hold(sendbuf, &send, 0, self.types)
            if not its:
                return None
            try:
                return self.go(code, &recv, <uintptr_t>send.buf, op) if its == code and apart(&send, &recv) else None
            finally:
                PyBuffer_Release(&send)
        finally:
            PyBuffer_Release(&recv)

    cdef object go(self, int64_t code, Py_buffer* recv, uintptr_t send, op):
        cdef void* found = self.find(code, recv.len, op)
        cdef Plan plan
        cdef State state
        cdef int failed
        if not found:
            return None
        plan = <Plan>found
        state = plan.state
        state.enter()
        if plan.kernel == NULL:
            failed = plan.launch(send, <uintptr_t>recv.buf)
        else:
            with nogil:
                failed = plan.launch(send, <uintptr_t>recv.buf)
        state.world.busy = 0  # not RESERVED either: the queue takes no calls meanwhile
        return plan if failed else True

    cdef inline void* find(self, int64_t code, int64_t nbytes, op) except? NULL:
        """Return the plan for a type and a size, which the table keeps alive, or NULL."""
        cdef Entry* e = &self.entries[self.slot(code, nbytes, <void*>op)]
        if e.code == code and e.nbytes == nbytes and e.op == <void*>op:
            return e.plan
        kept = self.table.get((code, nbytes, <uintptr_t><void*>op))
        if kept is None:
            return NULL
        self.front(code, nbytes, op, kept[0])
        return <void*>kept[0]

    def begin(self, Queue queue, sendbuf, recvbuf, op, blame):
        """Put the call in a queue if its plan is known.

        Returns
        -------
        Task or None
            None if there is no such plan or the buffers need the long way.
        """
        cdef Held held = Held.__new__(Held)
        cdef void* plan
        if not held.take(sendbuf, sendbuf if recvbuf is None else recvbuf, self.in_place, self.types):
            return None
        plan = self.find(held.code, held.recv.len, op)
        if not plan:
            return None
        return queue.begin(<Plan>plan, <uintptr_t>held.send.buf, <uintptr_t>held.recv.buf, held, blame)
