# Calls that were begun and are not waited for. They run in the order in which they were begun, one at a time, on the
# queue's own thread, or on a thread that waits for one of them and finds that none runs: it is awake already.
#
# The GIL is the lock. Code here gives it up where it says nogil, and where it calls or drops Python objects: there,
# another thread may come in, so what it would look at is made consistent before.

from collections import deque

cdef extern from "Python.h":
    unsigned long PyThread_get_thread_ident() noexcept

cdef int64_t LONG = 3_600_000_000_000     # ns; who sleeps so long is woken
cdef unsigned int MOMENT = 20             # us in which a thread that was woken takes the GIL
cdef unsigned int BETWEEN_LOOKS = 50      # us, and somewhat more by the system's timers
cdef int LOOKS = 20


cdef class Task:
    """A call in a queue, made by `Queue.begin`: done, or waited for."""
    cdef int64_t unfinished     # 1 until it has run: the word on which threads sleep that wait for it
    cdef Queue queue
    cdef object call            # a Plan, to run on `send` and `recv`, or a function
    cdef uintptr_t send, recv
    cdef object keep
    cdef object blame
    cdef object problem         # what it raised

    def done(self):
        """Tell whether it has run. If not, the queue's thread gets a chance to go on."""
        cdef bint idle
        if self.unfinished:
            idle = self.queue.current is None
            with nogil:
                if idle:
                    usleep(MOMENT)
                else:
                    sched_yield()
        return not self.unfinished

    def wait(self):
        """Wait until it has run, and raise what it raised. Ctrl-C ends the wait, and the call only if it runs here."""
        self.finish()
        if self.problem is not None:
            raise self.problem

    cdef int finish(self) except -1:
        cdef Queue queue = self.queue
        if not self.unfinished:
            return 0
        try:
            while self.unfinished:
                if queue.current is None and queue.tasks:
                    queue.run_next()
                    continue
                if queue.runner == PyThread_get_thread_ident():  # in a handler of a signal that came during the call
                    raise queue.state.refusal()
                with nogil:
                    nv_futex_wait(&self.unfinished, LONGEST_NAP)
                PyErr_CheckSignals()
        finally:
            if queue.tasks and queue.current is None:
                queue.ring()
        return 0

    cdef void end(self, problem) noexcept:
        """Let whoever waits go on, and let go of the buffers, which may run code of theirs: last of all."""
        keep, call, queue = self.keep, self.call, self.queue
        self.keep = self.call = self.blame = self.queue = None
        self.problem = problem
        nv_store(&self.unfinished, 0)
        nv_futex_wake(&self.unfinished)


cdef class Queue:
    """The nonblocking calls of a communicator.

    Parameters
    ----------
    state
        The communicator's `State`. Its blocking calls wait for those in here.
    """
    cdef State state
    cdef object tasks           # not begun
    cdef Task last
    cdef Task current           # the one that runs, on whatever thread
    cdef unsigned long runner   # that thread, or 0
    cdef int64_t ready          # 1 if there is something to do for the queue's own thread, which looks without the GIL
    cdef int64_t bell           # 1 while that thread sleeps
    cdef object worker
    cdef object closed          # why no more calls are taken

    def __init__(self, State state):
        self.state = state
        self.tasks = deque()

    def begin(self, call, uintptr_t send=0, uintptr_t recv=0, keep=None, blame=None):
        """Put a call in the queue.

        Parameters
        ----------
        call
            A `Plan`, or a function without arguments.
        send, recv
            Addresses for the plan; equal for a call in place.
        keep
            Objects that must outlive the call.
        blame
            Returns the error of a plan that failed.

        Returns
        -------
        Task
        """
        cdef State state = self.state
        cdef Task task = Task.__new__(Task)
        cdef bint alone = isinstance(call, Plan) and (<Plan>call).kernel == NULL
        task.queue, task.call, task.send, task.recv, task.keep, task.blame = self, call, send, recv, keep, blame
        if self.worker is None and not alone:
            self.start()
        # No other thread comes in from here on.
        if self.closed is not None or state.world.error:
            raise self.refusal()
        if isinstance(call, Plan) and (<Plan>call).state is not state:  # another thread finalized meanwhile
            raise self.finalized()
        if state.world.busy == CALLING:  # of a blocking call: those of the queue come with RESERVED
            raise state.refusal()
        if alone and not state.world.busy:
            (<Plan>call).launch(send, recv)  # the copy that one rank needs: there is nobody to wait for
            task.end(None)
            return task
        task.unfinished = 1
        state.world.busy |= RESERVED
        self.tasks.append(task)
        self.last = task
        self.ready = self.current is None
        self.ring()
        return task

    cdef object refusal(self):
        from nvcoll.errors import StateError

        return self.state.refusal() if self.state.world.error else StateError(self.closed)

    cdef int start(self) except -1:
        import threading

        self.state.queue = self
        self.worker = threading.Thread(target=self.serve, name="nvcoll requests", daemon=True)
        try:
            self.worker.start()
        except Exception:  # the system gives no more threads: the next call may have one, and none is to be joined
            self.worker = None
            raise
        return 0

    cdef void ring(self) noexcept:
        """Wake the queue's thread. The order is: say that it is ready, look whether it sleeps; there, the other way."""
        nv_fence()
        if self.ready and nv_load(&self.bell):
            self.bell = 0
            nv_futex_wake(&self.bell)

    def serve(self):
        """Run calls until the queue is closed: what its own thread does."""
        while True:
            while self.tasks and self.current is None:
                self.run_next()
            if self.closed is not None:
                return
            with nogil:
                while not nv_load(&self.ready):
                    self.sleep()

    cdef void sleep(self) noexcept nogil:
        """Sleep until there may be something to do.

        Often a thread that waits takes the call first: to wake this one would be in vain, and cost more than the call.
        So for a while after it has been awake, this one looks by itself now and then.
        """
        for _ in range(LOOKS):
            usleep(BETWEEN_LOOKS)
            if nv_load(&self.ready):
                return
        nv_store(&self.bell, 1)
        nv_fence()
        if not nv_load(&self.ready):
            nv_futex_wait(&self.bell, LONG)
        nv_store(&self.bell, 0)

    cdef int run_next(self) except -1:
        """Run the next call. What a signal's handler raises, which only Python's main thread runs, is raised again; all
        else is told.
        """
        cdef State state = self.state
        cdef Task task = self.tasks.popleft()
        cdef object interruption = None
        self.current = task
        self.runner = PyThread_get_thread_ident()
        self.ready = 0
        try:
            problem = self.run_plan(task) if isinstance(task.call, Plan) else self.run_function(task)
        except BaseException as exc:  # what goes wrong in a call itself is returned
            from nvcoll.errors import Error

            interruption = exc
            problem = Error("the call was interrupted while a thread waited for it or a later one; call Finalize")
        self.current = None
        self.runner = 0
        self.ready = self.closed is not None or len(self.tasks) > 0
        if not self.tasks:
            self.last = None
            state.world.busy &= ~RESERVED
        task.end(problem)
        if interruption is not None:
            raise interruption
        return 0

    cdef object run_plan(self, Task task):
        """Run a plan; return the error, or None. What a signal's handler has raised meanwhile is raised."""
        cdef State state = self.state
        cdef Plan plan = task.call
        cdef int failed
        if state.world.error:
            return state.refusal()
        state.world.busy |= CALLING
        with nogil:
            failed = plan.launch(task.send, task.recv)
        state.world.busy &= ~CALLING
        if not failed:
            return None
        if state.world.error == INTERRUPTED:
            raise task.blame(plan)
        return self.finalized() if state.world.error == FINALIZED else task.blame(plan)

    cdef object run_function(self, Task task):
        """Call a function, which may enter the communicator as a blocking call would; return the error, or None."""
        try:
            task.call()
            return None
        except Exception as exc:
            return self.finalized() if self.state.world.error == FINALIZED else exc

    cdef object finalized(self):
        from nvcoll.errors import StateError

        return StateError(
            "Iallreduce: the communicator has ended before this call was done; Wait for every request before Finalize, "
            "or before an emulated rank returns"
        )

    cdef int drain(self) except -1:
        """Wait for all calls, whatever becomes of them; but not those that the calling thread itself runs."""
        cdef Task last = self.last
        while last is not None and self.runner != PyThread_get_thread_ident():
            last.finish()
            last = self.last
        return 0

    def close(self, reason=None):
        """Take no more calls, and forget those that have not begun; the running one, if any, is left to itself.

        Parameters
        ----------
        reason
            Why, in a forked child, where nobody runs the running one any more; None where the communicator ends.
        """
        from nvcoll.errors import StateError

        tasks, self.tasks = self.tasks, deque()
        problem = self.finalized() if reason is None else StateError(reason)
        self.closed = str(problem)
        self.ready = 1
        if reason is not None and self.current is not None:
            tasks.append(self.current)
        self.state.queue = None  # two that refer to each other would wait for the garbage collector
        self.last = self.current if reason is None else None  # whoever drains waits for it alone: the others end below
        if self.current is None:
            self.state.world.busy &= ~RESERVED
        self.ring()
        for task in tasks:
            (<Task>task).end(problem)

    def join(self, double seconds):
        """Wait for the end of the queue's thread after `close`."""
        import threading

        if self.worker is not None and self.worker is not threading.current_thread():
            self.worker.join(seconds)


cdef class Held:
    """The buffers of a call that outlives the function which began it: neither freed nor resized while this lives."""
    cdef Py_buffer send         # as `recv` for a call in place
    cdef Py_buffer recv
    cdef bint both, taken
    cdef int64_t code           # of their type

    cdef bint take(self, sendbuf, recvbuf, list in_place, dict types):
        """Get hold of them; False if they need the long way."""
        self.code = hold(recvbuf, &self.recv, PyBUF_WRITABLE, types)
        self.taken = self.code != 0
        if not self.taken:
            return False
        if sendbuf is recvbuf or among(sendbuf, in_place):
            self.send.buf = self.recv.buf
            return True
        cdef int64_t its = hold(sendbuf, &self.send, 0, types)
        self.both = its != 0
        return its == self.code and apart(&self.send, &self.recv)

    def __dealloc__(self):
        if self.both:
            PyBuffer_Release(&self.send)
        if self.taken:
            PyBuffer_Release(&self.recv)
