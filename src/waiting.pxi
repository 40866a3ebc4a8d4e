# The two structs, and what a rank does when what it waits for has not come yet: spin, yield, sleep, and find out why.

cdef extern from *:
    """
    #define _GNU_SOURCE
    #include <errno.h>
    #include <fcntl.h>
    #include <limits.h>
    #include <linux/futex.h>
    #include <sched.h>
    #include <stdint.h>
    #include <sys/syscall.h>
    #include <time.h>
    #include <unistd.h>

    static int64_t nv_now(void) {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
    }
    static int64_t nv_load(const int64_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
    static void nv_store(int64_t *p, int64_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
    static void nv_fence(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
    static void nv_pause(void) {
    #if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
    #elif defined(__aarch64__)
        __asm__ volatile("isb" ::: "memory");
    #endif
    }
    /* The low half of the doorbell is the futex word: little-endian machines only, checked at import. */
    static void nv_futex_wait(int64_t *bell, int64_t nanoseconds) {
        struct timespec t = {nanoseconds / 1000000000, nanoseconds % 1000000000};
        syscall(SYS_futex, (uint32_t *)bell, FUTEX_WAIT, 1u, &t, 0, 0);
    }
    static void nv_futex_wake(int64_t *bell) { syscall(SYS_futex, (uint32_t *)bell, FUTEX_WAKE, INT_MAX, 0, 0, 0); }
    /* Does another process hold the record lock on this byte? A process that ends loses its locks at once. */
    static int nv_byte_locked(int fd, int64_t byte) {
        struct flock l = {0};
        l.l_type = F_WRLCK; l.l_whence = SEEK_SET; l.l_start = byte; l.l_len = 1;
        return fcntl(fd, F_GETLK, &l) != 0 || l.l_type != F_UNLCK;
    }
    static int nv_little(void) { const uint32_t one = 1; return *(const unsigned char *)&one; }
    """
    int64_t nv_now() noexcept nogil
    int64_t nv_load(const int64_t*) noexcept nogil
    void nv_store(int64_t*, int64_t) noexcept nogil
    void nv_fence() noexcept nogil
    void nv_pause() noexcept nogil
    void nv_futex_wait(int64_t*, int64_t) noexcept nogil
    void nv_futex_wake(int64_t*) noexcept nogil
    int nv_byte_locked(int, int64_t) noexcept nogil
    int nv_little() noexcept nogil
    int sched_yield() noexcept nogil
    int sched_getcpu() noexcept nogil
    int usleep(unsigned int) noexcept nogil
    int PyErr_CheckSignals() except -1

WORLD_FIELDS = (
    "rank", "size", "peers", "nodes", "node", "local_rank", "node_size", "slices", "members",
    "owners", "epoch", "spin", "wait", "wake", "flags", "flags_half", "lines", "lines_half", "data", "data_half",
    "workspace", "unpacked", "blocks", "table", "heap", "heap_size", "bell", "error",
)

cdef struct World:
    # What kernels read; the order is WORLD_FIELDS'.
    int64_t rank, size
    int64_t peers           # address of size addresses: where each rank's area of this communicator lies
    int64_t nodes, node     # how many nodes, and which one is mine
    int64_t local_rank, node_size  # my place in my node, and how many ranks it has
    int64_t slices          # ranks of the smallest node: in how many slices nvrar cuts a message
    int64_t members         # address of node_size ranks: those of my node
    int64_t owners          # address of nodes ranks: those at my place in each node, where there is one
    int64_t epoch           # address of the epoch
    int64_t spin            # polls before the slow path
    int64_t wait, wake      # addresses of wait_slowly and wake_peer
    int64_t flags, flags_half, lines, lines_half, data, data_half  # offsets in an area, and sizes of a parity's half
    # Private memory: accumulators (as much as data_half), payloads taken out of their lines (as much as lines_half),
    # three blocks, and a table of 2 * size addresses.
    int64_t workspace, unpacked, blocks, table
    int64_t heap, heap_size  # my symmetric memory
    int64_t bell            # offset in an area: not 0 while the rank sleeps
    int64_t error           # 0, or one of ERRORS: the communicator is unusable from then on
    # What only this file reads.
    int64_t board           # offset in an area
    int64_t error_peer      # the rank that the error is about, or -1
    int64_t timeout         # nanoseconds
    int64_t spin_alone      # polls where the rank has its core for itself
    int64_t yields          # sched_yield calls before sleeping, likewise
    int64_t fd              # descriptor whose record locks tell who is alive, or -1
    int64_t locks           # address of size numbers: which byte each rank has locked
    int64_t sequence        # calls begun
    int64_t busy            # CALLING while a call runs, RESERVED while nonblocking ones are to run; the GIL guards it

# A rank's board: what it is doing, for its peers to read when they wonder why nothing comes. Two notes take turns:
# the one of call k is overwritten in call k + 2, which a rank begins only when every rank has ended call k.
cdef struct Note:
    int64_t sequence        # which call: the first is 1; written last
    int64_t signature       # what all ranks must agree on, packed by nvcoll.planning
    int64_t count

cdef struct Board:
    Note notes[2]
    int64_t state           # one of STATES; if it is FAILED, why: error << 8, and (the rank it is about + 1) << 16
    int64_t core            # 1 + the core it was last seen waiting on

STATES = ("running", "failed", "left")
ERRORS = ("none", "timeout", "peer lost", "peer failed", "mismatch", "interrupted", "finalized")
cdef enum:
    RUNNING = 0
    FAILED = 1
    LEFT = 2
cdef enum:
    TIMED_OUT = 1
    PEER_LOST = 2
    PEER_FAILED = 3
    MISMATCH = 4
    INTERRUPTED = 5
    FINALIZED = 6

cdef enum:
    CALLING = 1
    RESERVED = 2

cdef int64_t LOOK_AFTER = 20_000_000      # wait so long (ns) before looking for the reason, and between looks
cdef int64_t NAP = 2_000_000              # first sleep; a lost wake-up costs no more than this
cdef int64_t SPIN_SHARED = 10             # polls where ranks share a core
cdef int64_t SWITCH = 600                 # a yield that lasts longer (ns) let somebody else run
cdef int64_t VAIN_YIELDS = 3              # yields do nothing where each rank has a scheduling group of its own
cdef int64_t LONGEST_NAP = 50_000_000
STOPPED_SECONDS = 1.0                     # between looks: such a process has been stopped, and its deadline with it
cdef int64_t STOPPED = <int64_t>(1e9 * STOPPED_SECONDS)


cdef inline Board* board_of(World* w, int64_t rank) noexcept nogil:
    return <Board*>((<int64_t*>w.peers)[rank] + w.board)


cdef void fail(World* w, int64_t error, int64_t peer) noexcept nogil:
    """Make the communicator unusable, and let peers that look at the board know, with the first cause of it all."""
    cdef int64_t why = error << 8 | (peer + 1) << 16
    if error == PEER_FAILED:
        why = nv_load(&board_of(w, peer).state) & ~255
    w.error_peer = peer
    w.error = error
    nv_store(&board_of(w, w.rank).state, FAILED | why)


cdef int64_t look_around(World* w, int64_t* about) noexcept nogil:
    """Find out why nothing comes: a peer in a call that does not match, that ended, or that gave up; 0 if all is well.

    In this order, for a peer that gave up may have done so because of one of the others.
    """
    cdef int64_t turn = w.sequence & 1, found = 0
    cdef Note* mine = &board_of(w, w.rank).notes[turn]
    cdef Note* its
    cdef int64_t p, state
    for p in range(w.size):
        # A rank that has begun the next call has sent all that anybody needs of it in this one, whatever became of it.
        if p == w.rank or nv_load(&board_of(w, p).notes[turn ^ 1].sequence) > w.sequence:
            continue
        its = &board_of(w, p).notes[turn]
        state = nv_load(&board_of(w, p).state) & 255
        if nv_load(&its.sequence) == w.sequence and (its.signature != mine.signature or its.count != mine.count):
            about[0] = p
            return MISMATCH
        if found != PEER_LOST and is_lost(w, p, state, nv_load(&its.sequence)):
            about[0], found = p, PEER_LOST
        if not found and state == FAILED:
            about[0], found = p, PEER_FAILED
    return found


cdef bint is_lost(World* w, int64_t p, int64_t state, int64_t sequence) noexcept nogil:
    """Tell whether a rank takes no more part. One that left after it began this call may have sent all that we need."""
    if state == LEFT:
        return sequence < w.sequence
    return state == RUNNING and w.fd >= 0 and not nv_byte_locked(<int>w.fd, (<int64_t*>w.locks)[p])


cdef int64_t first_missing(World* w) noexcept nogil:
    """Return the first rank that has not begun this call, or -1."""
    cdef int64_t p
    for p in range(w.size):
        if nv_load(&board_of(w, p).notes[0].sequence) < w.sequence > nv_load(&board_of(w, p).notes[1].sequence):
            return p
    return -1


cdef dict caught = {}       # address of a World -> the exception that a signal handler raised during a wait


cdef bint interrupted(World* w) noexcept with gil:
    """Run the handlers of signals that came meanwhile (Ctrl-C), as a long call of Python would."""
    try:
        PyErr_CheckSignals()
        return False
    except BaseException as exc:
        caught[<uintptr_t>w] = exc
        return True


cdef bint share_core(World* w) noexcept nogil:
    """Tell whether a peer was last seen waiting on this rank's core. It cannot come while this rank spins there."""
    cdef int64_t core = 1 + sched_getcpu()
    cdef int64_t p
    board_of(w, w.rank).core = core
    for p in range(w.size):
        if p != w.rank and board_of(w, p).core == core:
            return True
    return False


cdef int64_t wait_slowly(World* w, int64_t* word, int64_t expected) noexcept nogil:
    """Wait until *word == expected. Called by kernels once spinning has not helped; returns 0, or the error."""
    cdef int64_t* bell = <int64_t*>((<int64_t*>w.peers)[w.rank] + w.bell)
    cdef int64_t started, looked, now, nap = NAP
    cdef int64_t k, error, about = -1, vain = 0
    cdef bint shared
    if w.error:
        return w.error
    shared = share_core(w)
    w.spin = min(w.spin_alone, SPIN_SHARED) if shared else w.spin_alone
    for k in range(w.yields):
        now = nv_now()
        sched_yield()
        if nv_load(word) == expected:
            return 0
        # A yield that comes back at once gave the core to nobody, though a peer wants it: only sleep lets it run.
        if shared and nv_now() - now < SWITCH:
            vain += 1
            if vain == VAIN_YIELDS:
                break
    started = looked = nv_now()
    while True:
        # Sleep. The order is: say so, look once more, sleep; a peer's is: write, look whether anybody sleeps, wake.
        nv_store(bell, 1)
        nv_fence()
        if nv_load(word) == expected:
            nv_store(bell, 0)
            return 0
        nv_futex_wait(bell, nap)
        nv_store(bell, 0)
        if nv_load(word) == expected:
            return 0
        if nv_load(&w.error):  # another thread finalizes
            return w.error
        now = nv_now()
        if now - looked < LOOK_AFTER:
            continue
        if now - looked >= STOPPED:  # a job that is suspended as a whole shall go on, not find its time over
            started += now - looked
        looked = now
        nap = min(2 * nap, LONGEST_NAP)
        error = look_around(w, &about)
        if not error and now - started >= w.timeout:
            error, about = TIMED_OUT, first_missing(w)
        if not error and interrupted(w):
            error, about = INTERRUPTED, -1
        # What arrived while we looked counts, unless it belongs to another call than ours. What a handler raised is to
        # be raised in any case: a call that returned would have swallowed it.
        if error and (error in (MISMATCH, INTERRUPTED) or nv_load(word) != expected):
            fail(w, error, about)
            return error


cdef void wake_peer(World* w, int64_t* bell) noexcept nogil:
    """Wake a peer whose doorbell says that it sleeps."""
    nv_store(bell, 0)
    nv_futex_wake(bell)
