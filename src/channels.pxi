# What carries bytes between ranks: allgather(data, timeout, verb), close(orderly, together), and
# part(members, place, token, timeout, verb), which returns the channel of a part. Included by bootstrap.pyx.
#
# Messages begin with `verb`: what the user called.
# Every rank calls part, right after an allgather: members are those ranks that come into its part, by their rank there,
# place which of them it is, and token is the part's name; who comes into none gives (), None, b"" and gets None.
# orderly is false after a failed call and in a forked child: then what belongs to all ranks is left alone. together is
# false then too, and where the ranks are out of step for another reason: then nothing is done that may wait for them.


def _split_address(str address):
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _patience(timeout):
    """Return for how many seconds to wait for rank 0 or the server, which tells who is late when the time is over."""
    return timeout + min(timeout, 5.0)


def late(verb, ranks, timeout):
    """Return the message of a `TimeoutError`: which ranks did not come to what the user called."""
    who = ranks if isinstance(ranks, str) else named(ranks)
    return (
        f"{verb}: {who} did not arrive within {timeout:g} s; all ranks must make the same calls, and NVCOLL_TIMEOUT "
        "sets a longer limit"
    )


def _poll(test, deadline):
    """Call `test` until it is true; return False if the time is over before."""
    # without yielding for a moment, then leave the core to ranks that may share it
    pause = 0.0
    while not test():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(pause + 1e-6, 1e-3)
    return True


class _Alone:
    """One rank."""

    def allgather(self, data, timeout, verb):
        return [data]

    def part(self, members, place, token, timeout, verb):
        return _Alone() if members else None

    def close(self, orderly, together):
        pass


class _Client:
    """A connection to a `RendezvousServer`, for one group; it may start up to `patience` seconds later."""

    def __init__(self, address, rank, size, key, patience, group=LAUNCH, verb="Init"):
        self.address, self.rank, self.size = address, rank, size
        self.key, self.group, self.verb = _as_key(key), group, verb
        deadline, pause = time.monotonic() + patience, 0.005
        while not self._join(deadline):
            time.sleep(pause)
            pause = min(2 * pause, 0.25)
        _sockets.add(self)

    def _join(self, deadline):
        """Connect and prove the key; return False if that may go well later."""
        left = deadline - time.monotonic()
        try:
            self.sock = socket.create_connection(_split_address(self.address), max(0.1, left))
        except OSError as error:
            if error.errno in (EMFILE, ENFILE):
                raise BootstrapError(
                    f"{self.verb}: rank {self.rank} gets no more descriptors from the system ({error}); free what "
                    "communicators and files are not needed, or raise the limit (ulimit -n)"
                ) from error
            if left > 0:
                return False
            # whoever splits has met the server before
            raise (BootstrapError if self.group == LAUNCH else PeerLostError)(
                f"{self.verb}: rank {self.rank} found nobody at {self.address} ({error}); has the launcher, or rank 0, "
                "ended, or does a firewall stand between?"
            ) from error
        try:
            self._prove(time.monotonic() + (ANSWER_SECONDS if self.group == LAUNCH else max(1.0, left)))
        except (OSError, EOFError) as error:
            self.sock.close()
            # one that hangs up may be a server that is crowded, or is ending before the next one starts
            if left > 0 and not isinstance(error, builtins.TimeoutError):
                return False
            raise BootstrapError(
                f"{self.verb}: {self.address} did not answer rank {self.rank} as nvcoll's meeting point does "
                f"({error}); another program may listen there: choose a free port"
            ) from error
        except BaseException:
            self.sock.close()
            raise
        return True

    def _prove(self, deadline):
        nonce = secrets.token_bytes(32)
        hello = GREETING.pack(MAGIC, self.rank, self.size, os.getpid(), nonce, self.group)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.settimeout(ANSWER_SECONDS)
        self.sock.sendall(_frame(HELLO, hello))
        challenge = self._expect(CHALLENGE, deadline)
        theirs, proof = challenge[:32], challenge[32:]
        if not hmac.compare_digest(proof, _digest(self.key, b"server", nonce, theirs)):
            raise BootstrapError(
                f"{self.verb}: {self.address} does not know the key of rank {self.rank}; it belongs to another run: "
                "unset the variables of the old one, or set NVCOLL_KEY to the same digits on all ranks"
            )
        self.sock.sendall(_frame(PROOF, _digest(self.key, b"client", hello, theirs)))
        self._expect(WELCOME, deadline)

    def _expect(self, int wanted, deadline):
        kind, payload = self._read(deadline, LARGEST_GREETING)
        if kind == REFUSED:
            reason = payload.decode(errors="replace")
            raise BootstrapError(f"{self.verb}: {self.address} refused rank {self.rank}: {reason}")
        if kind != wanted:
            raise BootstrapError(
                f"{self.verb}: {self.address} sent rank {self.rank} message {kind} instead of {wanted}"
            )
        return payload

    def _read(self, deadline, most):
        length, kind = FRAME.unpack(self._read_exactly(FRAME.size, deadline))
        if length > most:
            raise EOFError(f"a message of {length} bytes is too long")
        return kind, self._read_exactly(length, deadline)

    def _read_exactly(self, Py_ssize_t count, deadline):
        data = bytearray()
        while len(data) < count:
            self.sock.settimeout(max(0.001, deadline - time.monotonic()))
            piece = self.sock.recv(min(count - len(data), 1 << 20))
            if not piece:
                raise EOFError("the connection ended")
            data += piece
        return bytes(data)

    def allgather(self, data, timeout, verb):
        """Give `data`, return what every rank gave."""
        deadline = time.monotonic() + _patience(timeout)
        milliseconds = min(int(timeout * 1000), 0xFFFFFFFF)
        try:
            self.sock.settimeout(_patience(timeout))
            self.sock.sendall(_frame(DATA, COUNT.pack(milliseconds) + data))
            kind, payload = self._read(deadline, (LARGEST + 8) * self.size)
        except builtins.TimeoutError as error:
            raise TimeoutError(
                f"{verb}: {self.address} did not answer rank {self.rank} within {timeout:g} s; "
                "is the launcher, or the process of rank 0, stopped?"
            ) from error
        except (OSError, EOFError) as error:
            raise PeerLostError(
                f"{verb}: rank {self.rank} lost {self.address} ({error}); the launcher, or rank 0, has ended"
            ) from error
        if kind == RESULT:
            return _split_all(payload, self.size)
        if kind == REFUSED:
            raise BootstrapError(f"{verb}: {self.address} refused rank {self.rank}: {payload.decode()}")
        if kind == TOO_LATE:
            raise TimeoutError(
                f"{verb}: rank {self.rank} came too late: the others have given up, in this call or an earlier one; "
                "all ranks must make the same calls, and NVCOLL_TIMEOUT sets how long they wait"
            )
        who, how = (part.decode() for part in _split_all(payload, 2))
        if kind == LATE:
            raise TimeoutError(late(verb, who, timeout))
        raise PeerLostError(f"{verb}: {how} while rank {self.rank} waited; look at its own output for the cause")

    def part(self, members, place, token, timeout, verb):
        """Connect once more, as one of the part's ranks."""
        if not members:
            return None
        # the server is there, and at most crowded
        patience = min(timeout, LAUNCHER_SECONDS)
        return _Client(self.address, place, len(members), self.key, patience, token, verb)

    def close(self, orderly, together):
        if orderly:
            try:
                self.sock.settimeout(1.0)
                self.sock.sendall(_frame(BYE))
            except OSError:
                pass
        self.sock.close()

    def _close_sockets(self):
        self.sock.close()


_interrupted = []  # requests that were waited for in vain, and their memory: MPI may write there until the process ends


class _OverMPI:
    """A communicator of mpi4py's: rank 0 learns the lengths and tells them, then one Allgatherv carries the bytes.

    MPI cannot say who is missing from a collective; so that a deadline can name ranks, they first report to rank 0.
    Making a part has no deadline: MPI splits in no other way. But all ranks have just been there.
    """

    TAG = 32001

    def __init__(self, MPI, comm, whole=True):
        self.MPI, self.comm, self.whole = MPI, comm, whole  # whole: of all ranks of the launch, no part
        self.rank, self.size = comm.Get_rank(), comm.Get_size()

    def allgather(self, data, timeout, verb):
        self._refuse_finalized(verb)
        now = time.monotonic()
        if self.rank == 0:
            lengths = self._gather(len(data), now + timeout)
        else:
            lengths = self._report(len(data), now + _patience(timeout))
        missing = [rank for rank, length in enumerate(lengths) if length < 0]
        if missing:
            raise TimeoutError(late(verb, missing, timeout))
        everything = bytearray(sum(lengths))
        request = self.comm.Iallgatherv([data, self.MPI.BYTE], [everything, lengths, self.MPI.BYTE])
        if not self._wait([request], now + _patience(timeout), (data, everything)):
            # a rank that had come was stopped, or interrupted, since; MPI takes no collective back
            _interrupted.append(([request], (data, everything)))
            raise TimeoutError(late(verb, "a rank", timeout))
        ends = list(itertools.accumulate(lengths, initial=0))
        return [bytes(everything[first:last]) for first, last in itertools.pairwise(ends)]

    def _refuse_finalized(self, verb):
        if self.MPI.Is_finalized():
            raise StateError(
                f"{verb}: MPI is finalized, and the ranks agree through it; finalize it after the last call"
            )

    def _gather(self, length, deadline):
        parts = [bytearray(LENGTH.pack(-1)) for _ in range(self.size)]
        parts[0][:] = LENGTH.pack(length)
        requests = [self._receive(parts[rank], rank) for rank in range(1, self.size)]
        self._wait(requests, deadline, parts)
        told = b"".join(parts)
        for rank, request in enumerate(requests, 1):
            if request:  # not arrived
                request.Cancel()
                request.Wait()
            else:
                self.comm.Send([told, self.MPI.BYTE], rank, self.TAG)
        return [length for (length,) in LENGTH.iter_unpack(told)]

    def _report(self, length, deadline):
        self.comm.Send([LENGTH.pack(length), self.MPI.BYTE], 0, self.TAG)
        told = bytearray(LENGTH.pack(-1) + (self.size - 1) * LENGTH.pack(0))  # what holds if rank 0 is silent
        request = self._receive(told, 0)
        if not self._wait([request], deadline, told):
            request.Cancel()
            request.Wait()
        return [length for (length,) in LENGTH.iter_unpack(told)]

    def _receive(self, part, rank):
        return self.comm.Irecv([part, self.MPI.BYTE], rank, self.TAG)

    def _wait(self, requests, deadline, memory):
        try:
            done = _poll(lambda: self.MPI.Request.Testall(requests), deadline)
        except BaseException:  # Ctrl-C: what others send still arrives
            _interrupted.append((requests, memory))
            raise
        if not done:
            self.MPI.Request.Testsome(requests)
        return done

    def part(self, members, place, token, timeout, verb):
        """Split MPI's communicator, as all ranks do now: those of a part have the color of its first member."""
        self._refuse_finalized(verb)
        try:
            comm = self.comm.Split(members[0] if members else self.MPI.UNDEFINED, place or 0)
        except self.MPI.Exception as error:
            raise AllocationError(
                f"{verb}: MPI makes no more communicators ({error}); Free those that are not needed"
            ) from error
        return _OverMPI(self.MPI, comm, whole=False) if members else None

    def close(self, orderly, together):
        global _in_step
        if self.whole:  # the end of MPI waits for all ranks, whatever became of a part
            _in_step = together
        if together and not self.MPI.Is_finalized():
            self.comm.Free()


class _OverStore:
    """A key-value store of torch.distributed's; every call has keys of its own."""

    def __init__(self, store, prefix, rank, size):
        self.store, self.prefix, self.rank, self.size = store, prefix, rank, size
        self.calls = 0

    def _key(self, rank):
        return f"{self.prefix}/{self.calls}/{rank}"

    def allgather(self, data, timeout, verb):
        deadline, pause = time.monotonic() + timeout, 0.0005
        previous = self._key(self.rank)
        self.calls += 1
        try:
            self.store.set(self._key(self.rank), data)
            awaited = list(range(self.size))
            while awaited and not self.store.check([self._key(rank) for rank in awaited]):
                if time.monotonic() > deadline:
                    awaited = [rank for rank in awaited if not self.store.check([self._key(rank)])]
                    raise TimeoutError(late(verb, awaited, timeout))
                time.sleep(pause)
                pause = min(2 * pause, 0.05)
            everything = [self.store.get(self._key(rank)) for rank in range(self.size)]
            # all ranks have set their keys of this call, so they have read those of the call before
            self.store.delete_key(previous)
        except RuntimeError as error:  # torch's DistNetworkError and DistStoreError
            raise PeerLostError(f"{verb}: torch's store does not answer ({error}); has torchrun ended?") from error
        return everything

    def part(self, members, place, token, timeout, verb):
        return _OverStore(self.store, f"{self.prefix}/{token.hex()}", place, len(members)) if members else None

    def close(self, orderly, together):
        pass
