# What a rank holds of a communicator on a GPU, and the functions of the driver, which is looked up at the first use: so
# this module loads where there is none.

cdef extern from *:
    """
    #include <dlfcn.h>
    typedef struct {
        unsigned int grid[3], block[3], shared;
        void *stream;
        void *attributes;
        unsigned int count;
    } nv_launch_config;  /* CUlaunchConfig of cuda.h, whose layout is ABI, as is CUlaunchAttribute's */
    typedef struct { int kind; char gap[4]; int value; char rest[60]; } nv_launch_attribute;
    typedef int (*nv_launch_t)(const nv_launch_config *, void *, void **, void **);
    typedef int (*nv_one_t)(void *);
    typedef int (*nv_two_t)(void *, void *);
    typedef int (*nv_wait_event_t)(void *, void *, unsigned int);
    typedef int (*nv_capturing_t)(void *, int *);
    typedef int (*nv_copy_t)(uintptr_t, uintptr_t, size_t, void *);
    typedef int (*nv_error_t)(int, const char **);
    typedef int (*nv_none_t)(void);
    static nv_launch_t nv_launch_kernel;
    static nv_one_t nv_get_context, nv_push_context, nv_pop_context;
    static nv_none_t nv_synchronize;
    static nv_two_t nv_record_event;
    static nv_wait_event_t nv_wait_event;
    static nv_capturing_t nv_is_capturing;
    static nv_copy_t nv_copy_async;
    static nv_error_t nv_error_string;
    static const char *nv_open_driver(void) {
        void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
        if (!driver) return dlerror();
        nv_get_context = (nv_one_t)dlsym(driver, "cuCtxGetCurrent");
        nv_push_context = (nv_one_t)dlsym(driver, "cuCtxPushCurrent_v2");
        nv_pop_context = (nv_one_t)dlsym(driver, "cuCtxPopCurrent_v2");
        nv_synchronize = (nv_none_t)dlsym(driver, "cuCtxSynchronize");
        nv_record_event = (nv_two_t)dlsym(driver, "cuEventRecord");
        nv_wait_event = (nv_wait_event_t)dlsym(driver, "cuStreamWaitEvent");
        nv_is_capturing = (nv_capturing_t)dlsym(driver, "cuStreamIsCapturing");
        nv_copy_async = (nv_copy_t)dlsym(driver, "cuMemcpyDtoDAsync_v2");
        nv_error_string = (nv_error_t)dlsym(driver, "cuGetErrorString");
        nv_launch_kernel = (nv_launch_t)dlsym(driver, "cuLaunchKernelEx");
        return nv_launch_kernel ? 0 : "it has no cuLaunchKernelEx: CUDA 12 or newer is needed";
    }
    """
    ctypedef struct nv_launch_config:
        unsigned int grid[3]
        unsigned int block[3]
        unsigned int shared
        void* stream
        void* attributes
        unsigned int count
    ctypedef struct nv_launch_attribute:
        int kind
        int value
    int nv_launch_kernel(const nv_launch_config*, void*, void**, void**) noexcept nogil
    int nv_get_context(void*) noexcept nogil
    int nv_push_context(void*) noexcept nogil
    int nv_pop_context(void*) noexcept nogil
    int nv_synchronize() noexcept nogil
    int nv_record_event(void*, void*) noexcept nogil
    int nv_wait_event(void*, void*, unsigned int) noexcept nogil
    int nv_is_capturing(void*, int*) noexcept nogil
    int nv_copy_async(uintptr_t, uintptr_t, size_t, void*) noexcept nogil
    int nv_error_string(int, const char**) noexcept nogil
    const char* nv_open_driver() noexcept nogil

# The arguments of every kernel, in their order. Addresses are those of this GPU's memory unless it says otherwise.
DEVICE_FIELDS = (
    "send", "recv", "count",            # of the call
    "part",                             # elements of a block
    "capacity",                         # elements of a block in one piece
    "stride",                           # bytes between a block's slots
    "stamp",                            # the low 24 bits of every tag of this call
    "ranks",                            # what AVG divides by
    "rank", "size", "nodes", "node", "local_rank", "node_size", "slices",
    "members", "owners",                # tables, as in World
    "peers",                            # table of size addresses: where each rank's area lies
    "state",                            # a word that says whether a wait failed, and the blocks' epochs
    "report",                           # a word of the host: whether a wait failed
    "timeout",                          # nanoseconds
    "board",                            # a word of my area: the tag of the latest call
    "flags", "flags_half", "flags_block",                   # offset in an area, bytes of a parity, of a block
    "cells", "lines", "data", "slots_half", "slots_block",  # offsets of the protocols' slots, and the same sizes
    "workspace", "workspace_block",     # accumulators, and how many bytes a block has
    "heap", "heap_size",                # my symmetric memory
    "peer0", "peer1", "peer2", "peer3", "peer4", "peer5", "peer6", "peer7",     # the first entries of `peers`
)
cdef enum:
    FIELDS = 42
    PROGRAMMATIC = 6        # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    PER_THREAD = 2          # CU_STREAM_PER_THREAD: means another stream in each thread
    LATEST_CAPTURED = -1    # none of the driver's: the stream of the latest call is being captured
    GONE = 400              # CUDA_ERROR_INVALID_HANDLE
    GONE_TOO = 709          # CUDA_ERROR_CONTEXT_IS_DESTROYED: what some drivers say of a stream that was destroyed
cdef double LONGER = 1e-6   # seconds by which a thread waits longer each time it has found another at work
cdef double LONGEST = 1e-3
if len(DEVICE_FIELDS) != FIELDS:
    raise ImportError("nvcoll: src/launch.pxi disagrees with itself about the arguments of kernels")


cdef class StreamOrder:
    """Lets the calls of a rank run one after another, on whatever streams, in the order in which the host makes them.

    All its communicators have it in common. The kernels of each may fill the GPU, and wait for those of other ranks: if
    on one GPU those of a first communicator had begun, and on another those of a second, none would end.

    An event is recorded when another stream has to wait, not behind each call, which would take longer than it gains in
    programs with one stream: so that stream also waits for what else was queued behind the latest call by then.

    Parameters
    ----------
    context
        Handle of the CUDA context.
    event
        Handle of an event, with which calls on different streams are put in order.
    """
    cdef void* context
    cdef void* event
    cdef uintptr_t last_stream      # of the latest call that was not captured
    cdef object last_owner          # what has that stream, which must not be destroyed yet
    cdef bint started               # whether there was such a call
    cdef bint recorded              # whether the event stands behind it already
    cdef readonly bint busy         # whether a thread changes this, for which others wait
    cdef int waiting                # threads that wait for that, or for `release`
    cdef int held                   # how often launches are held back

    def __init__(self, uintptr_t context, uintptr_t event):
        cdef const char* problem
        if nv_launch_kernel_missing():
            problem = nv_open_driver()
            if problem != NULL:
                from nvcoll.errors import StateError

                raise StateError(f"the CUDA driver cannot be used: {problem.decode()}; install or update the driver")
        self.context, self.event = <void*>context, <void*>event

    def hold(self):
        """Let no launch of the rank begin, until `release` is called as often; one may be under way, while `busy`."""
        self.held += 1

    def release(self):
        """Let launches go on."""
        self.held -= 1

    cdef int rest(self, double* pause) except -1:
        """Let other threads go on for a while, which is longer each time."""
        self.waiting += 1
        try:
            sleep(pause[0])
        finally:
            self.waiting -= 1
        pause[0] = min(pause[0] + LONGER, LONGEST)
        return 0

    cdef int precede(self, uintptr_t stream) except -1:
        """Let what is queued on a stream from now on begin after the latest call; the caller has seen it not busy."""
        cdef int error, captured = 0
        cdef bint pushed
        self.busy = True
        with nogil:
            error = self.enter(&pushed)
            if not error:
                error = self.order(stream, &captured)
            self.exit(pushed)
        self.busy = False
        if error and error != LATEST_CAPTURED:
            raise refused("to put a stream behind a call", error)
        return 0

    cdef int enter(self, bint* pushed) noexcept nogil:
        """Make the context current on this thread; tell whether it was not before, for `exit`."""
        cdef void* current = NULL
        cdef int error = 0
        nv_get_context(&current)
        if current != self.context:
            error = nv_push_context(self.context)
        pushed[0] = current != self.context and not error
        return error

    cdef void exit(self, bint pushed) noexcept nogil:
        """Make current what was before."""
        cdef void* popped
        if pushed:
            nv_pop_context(&popped)

    cdef int order(self, uintptr_t stream, int* captured) noexcept nogil:
        """Let work on a stream begin after the latest call, if that is on another one; tell whether it is captured."""
        cdef int its = 0, error
        if self.started and stream == self.last_stream and stream != PER_THREAD and not self.recorded:
            return 0  # if it is captured now, the latest work outside graphs still is on it
        error = nv_is_capturing(<void*>stream, captured)
        if error or captured[0] or not self.started:
            return error  # a graph has an order of its own; what it needs of other streams is for who captures to say
        if not self.recorded:
            error = nv_is_capturing(<void*>self.last_stream, &its)
            if not error and its:
                return LATEST_CAPTURED  # an event would become part of that graph
            if not error:
                error = nv_record_event(self.event, <void*>self.last_stream)
            if error == GONE or error == GONE_TOO:
                return nv_synchronize()  # the stream was destroyed, which does not end what was queued there
            if error:
                return error
            self.recorded = True
        return nv_wait_event(<void*>stream, self.event, 0)

    cdef int launched(self, uintptr_t stream) noexcept nogil:
        """Remember where the latest call is that was not captured."""
        cdef int error = 0
        self.started, self.last_stream, self.recorded = True, stream, False
        if stream == PER_THREAD:  # only this thread can speak of it
            error = nv_record_event(self.event, <void*>stream)
            self.recorded = not error
        return error


cdef class DeviceState:
    """What a rank holds of a communicator on a GPU: the arguments that are the same for all its kernels.

    Parameters
    ----------
    values
        Fields of `DEVICE_FIELDS` by name.
    order
        The rank's `StreamOrder`.
    report
        Address, on the host, of the word in which kernels say that a wait failed.
    keep
        Objects whose memory the addresses point to.
    """
    cdef int64_t values[FIELDS]
    cdef int64_t* report
    cdef int64_t told               # what was reported, once the memory for it is gone
    cdef bint busy                  # whether a thread is in a launch, with which another call is refused
    cdef readonly StreamOrder order
    cdef readonly int64_t sequence
    cdef int64_t ended
    cdef readonly object keep

    def __init__(self, dict values, StreamOrder order, uintptr_t report, keep):
        memset(self.values, 0, sizeof(self.values))
        for name, value in values.items():
            self.values[DEVICE_FIELDS.index(name)] = value
        self.order, self.report = order, <int64_t*>report
        self.sequence = 0
        self.ended = 0
        self.keep = keep

    @property
    def failed(self):
        """Whether a wait was over its deadline."""
        return not self.ended and self.reported

    @property
    def reported(self):
        """The same, also after the end."""
        return nv_load(self.report) != 0

    def keep_report(self):
        """Remember what kernels have reported, before the memory goes in which they do."""
        self.told = nv_load(self.report)
        self.report = &self.told

    @property
    def over(self):
        """Whether all further calls are refused."""
        return self.ended != 0

    def end(self, stream=None):
        """Refuse all further calls, and wait until none is being launched.

        What is queued on a stream, if one is given, begins after the latest of the rank's calls from then on.
        """
        cdef double pause = 0
        self.ended = 1
        while self.busy:
            sleep(0)
        if stream is not None:
            while self.order.busy:
                self.order.rest(&pause)
            self.order.precede(stream)

    def demand(self):
        """Raise StateError once the communicator has ended: before anything is planned for it."""
        self.check()

    cdef int check(self) except -1:
        if self.ended:  # before anything else: what kernels report to is gone then
            from nvcoll.errors import StateError

            raise StateError(OVER)
        return nv_load(self.report) != 0

    cdef int begin(self) except -1:
        """Begin a launch, which no other thread does meanwhile; or tell that an earlier call has failed.

        Who comes rests once if others wait: else they would see this thread in launches only, never between them.
        """
        cdef double pause = 0
        while True:
            if self.check():
                return 1
            if self.busy:
                from nvcoll.errors import StateError

                raise StateError(TAKE_TURNS)
            if not (self.order.busy or self.order.held or (self.order.waiting and pause == 0)):
                break
            self.order.rest(&pause)  # another communicator's launch, somebody's `precede`, or `hold`
        self.busy = self.order.busy = True
        return 0

    def precede(self, uintptr_t stream):
        """Let what is queued on a stream from now on begin after the latest call of any of the rank's communicators.

        A stream that is being captured has an order of its own, and so has a call that is part of a graph.
        """
        cdef double pause = 0
        while self.order.busy and not self.ended:
            self.order.rest(&pause)
        if not self.ended:
            self.order.precede(stream)


cdef extern from *:
    """
    static int nv_launch_kernel_missing(void) { return nv_launch_kernel == 0; }
    """
    int nv_launch_kernel_missing() noexcept nogil


cdef refused(str what, int error):
    """Return the exception for an error of the driver, or for `LATEST_CAPTURED`."""
    cdef const char* text = NULL
    from nvcoll.errors import StateError

    if error == LATEST_CAPTURED:
        return StateError(
            "the stream of this rank's latest call is being captured, and a call on another stream cannot be put "
            "behind it meanwhile; make this call after the capture, or before it"
        )
    nv_error_string(error, &text)
    return StateError(f"the CUDA driver refuses {what}: {text.decode() if text else error}")
