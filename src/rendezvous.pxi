# Meeting over TCP: a star of one server and `size` clients. Included by bootstrap.pyx.
#
# A frame is: length of the payload (4 bytes, big endian), kind (1 byte), payload. Nothing is ever unpickled.
#
#   client                                  server
#   HELLO magic, rank, size, pid, nonce ->
#                                        <- CHALLENGE nonce, HMAC(key, "server", both nonces)
#   PROOF HMAC(key, "client", HELLO, both nonces) ->
#                                        <- WELCOME, or REFUSED reason
#   DATA timeout in ms, bytes            ->
#                                        <- RESULT the bytes of every rank, or LOST / LATE and which ranks
#   BYE                                  ->    leaves; a connection that ends without it is a rank that died
#
# The n-th time that a rank joins it belongs to session n, so ranks may leave and come back at their own pace.

cdef object FRAME = struct.Struct(">IB")
cdef object GREETING = struct.Struct(">8sIIQ32s")
cdef object COUNT = struct.Struct(">I")
cdef bytes MAGIC = b"nvcoll\x00\x01"
cdef int HELLO = 1, CHALLENGE = 2, PROOF = 3, WELCOME = 4, REFUSED = 5, DATA = 6, RESULT = 7, LOST = 8, LATE = 9, BYE = 10
cdef Py_ssize_t LARGEST = 16 << 20  # bytes a rank may give to one exchange
cdef Py_ssize_t LARGEST_GREETING = 1024  # bytes of a frame from somebody who has not proved the key
cdef double GREETING_SECONDS = 10.0
cdef double GRACE = 5.0  # seconds a client waits for the server's own verdict after its deadline


def _digest(key, *parts):
    return hmac.new(key, b"".join(parts), "sha256").digest()


def _frame(int kind, payload=b""):
    return FRAME.pack(len(payload), kind) + payload


def _join_all(parts):
    return b"".join([piece for part in parts for piece in (COUNT.pack(len(part)), part)])


def _split_all(data, Py_ssize_t size):
    parts = []
    cdef Py_ssize_t at = 0, length
    for _ in range(size):
        (length,) = COUNT.unpack_from(data, at)
        parts.append(bytes(data[at + 4:at + 4 + length]))
        at += 4 + length
    if at != len(data):
        raise struct.error("trailing bytes")
    return parts


def _as_key(key):
    if key is None:
        return secrets.token_bytes(32)
    return bytes.fromhex(key) if isinstance(key, str) else bytes(key)


def _split_address(str address):
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _ranks(ranks):
    names = [str(rank) for rank in ranks]
    if len(names) > 16:
        names[16:] = [f"{len(names) - 16} more"]
    return ("rank " if len(names) == 1 else "ranks ") + ", ".join(names)


class _Refused(Exception):
    """What a peer sent is not accepted; the text is for the other side."""


class _Session:
    """The ranks that joined for the same time, and the exchange they are in."""

    def __init__(self):
        self.members = {}
        self.waiting = {}
        self.gone = {}
        self.verdict = None


class _Connection:
    """What the server knows of one socket."""

    def __init__(self, sock, deadline):
        self.sock = sock
        self.received = bytearray()
        self.to_send = bytearray()
        self.deadline = deadline
        self.nonce = secrets.token_bytes(32)
        self.hello = None
        self.rank = None
        self.session = None
        self.closing = False


class RendezvousServer:
    """The place where ranks meet: a thread that answers `size` clients.

    Parameters
    ----------
    size
        The number of ranks.
    key
        The secret that clients must prove to know, as bytes or hexadecimal text; None: a new random one.
    host, port
        Where to listen; port 0 takes a free one.

    Attributes
    ----------
    address
        ``host:port``.
    key
        The secret, as hexadecimal text.

    Raises
    ------
    OSError
        The address cannot be used.
    """

    def __init__(self, size, key=None, host="127.0.0.1", port=0):
        self.size = size
        self._key = _as_key(key)
        self.key = self._key.hex()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=max(128, size))
        self._listener.setblocking(False)
        self.address = f"{host}:{self._listener.getsockname()[1]}"
        self._wake, self._waker = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._connections = set()
        self._sessions = {}
        self._joined = [0] * size
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._serve, name="nvcoll-rendezvous", daemon=True)
        self._thread.start()

    def close(self, linger=2.0):
        """Send what is still to be sent, for at most `linger` seconds, and stop. A second call does nothing."""
        if self._pid == os.getpid() and self._thread.is_alive():
            self._linger = time.monotonic() + linger
            self._waker.send(b"x")
            self._thread.join(linger + 5.0)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def _serve(self):
        stop = False
        try:
            while not stop or (any(c.to_send for c in self._connections) and time.monotonic() < self._linger):
                for found, events in self._selector.select(0.05 if stop else self._patience()):
                    if found.fileobj is self._listener:
                        self._accept()
                    elif found.fileobj is self._wake:
                        self._selector.unregister(self._wake)
                        stop = True
                    else:
                        self._attend(found.data, events)
                self._expire(time.monotonic())
        finally:
            for connection in list(self._connections):
                connection.sock.close()
            for sock in (self._listener, self._wake, self._waker):
                sock.close()
            self._selector.close()

    def _deadlines(self):
        yield from (c.deadline for c in self._connections if c.deadline is not None)
        for session in self._sessions.values():
            yield from (deadline for deadline, _ in session.waiting.values())

    def _patience(self):
        first = min(self._deadlines(), default=None)
        return None if first is None else max(0.0, first - time.monotonic())

    def _expire(self, now):
        for connection in [c for c in self._connections if c.deadline is not None and c.deadline <= now]:
            self._drop(connection)
        for session in list(self._sessions.values()):
            if any(deadline <= now for deadline, _ in session.waiting.values()):
                self._judge(session, LATE, [rank for rank in range(self.size) if rank not in session.waiting])

    def _accept(self):
        try:
            sock, _ = self._listener.accept()
        except OSError:
            time.sleep(0.01)  # out of descriptors, or the client has given up; do not spin on it
            return
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = _Connection(sock, time.monotonic() + GREETING_SECONDS)
        self._connections.add(connection)
        self._selector.register(sock, selectors.EVENT_READ, connection)

    def _attend(self, connection, events):
        if connection not in self._connections:
            return
        try:
            if events & selectors.EVENT_WRITE:
                self._flush(connection)
            if events & selectors.EVENT_READ:
                data = connection.sock.recv(1 << 18)
                if not data:
                    self._drop(connection)
                    return
                connection.received += data
                self._consume(connection)
        except BlockingIOError:
            pass
        except OSError:
            self._drop(connection)
        except (_Refused, struct.error) as refusal:
            self._say(connection, REFUSED, str(refusal).encode())
            connection.closing = True
            self._flush(connection)

    def _consume(self, connection):
        while len(connection.received) >= FRAME.size and not connection.closing:
            length, kind = FRAME.unpack_from(connection.received)
            if length > (LARGEST + 4 if connection.session is not None else LARGEST_GREETING):
                raise _Refused(f"a message of {length} bytes is too long")
            if len(connection.received) < FRAME.size + length:
                return
            payload = bytes(connection.received[FRAME.size:FRAME.size + length])
            del connection.received[:FRAME.size + length]
            self._handle(connection, kind, payload)
            if connection not in self._connections:
                return

    def _handle(self, connection, kind, payload):
        if connection.hello is None and kind == HELLO:
            self._greet(connection, payload)
        elif connection.hello is not None and connection.session is None and kind == PROOF:
            self._admit(connection, payload)
        elif connection.session is not None and kind == DATA:
            self._collect(connection, payload)
        elif connection.session is not None and kind == BYE:
            self._drop(connection, "left")
        else:
            raise _Refused(f"a message of kind {kind} was not expected here")

    def _greet(self, connection, payload):
        if len(payload) != GREETING.size or payload[:8] != MAGIC:
            raise _Refused("this is the meeting point of nvcoll's ranks, of another version perhaps")
        connection.hello = payload
        nonce = GREETING.unpack(payload)[4]
        self._say(connection, CHALLENGE, connection.nonce + _digest(self._key, b"server", nonce, connection.nonce))

    def _admit(self, connection, payload):
        _, rank, size, pid, _ = GREETING.unpack(connection.hello)
        if not hmac.compare_digest(payload, _digest(self._key, b"client", connection.hello, connection.nonce)):
            raise _Refused("the key is wrong; is this rank of another run?")
        if size != self.size:
            raise _Refused(f"it says that there are {size} ranks, but there are {self.size}")
        if rank >= size:
            raise _Refused(f"there is no rank {rank} among {size}")
        for other in self._connections:
            if other.rank == rank:
                raise _Refused(
                    f"process {GREETING.unpack(other.hello)[3]} is rank {rank} already; a child process of a rank is "
                    "no rank itself: start it with NVCOLL_BOOTSTRAP=single"
                )
        connection.rank = rank
        connection.deadline = None
        connection.session = self._sessions.setdefault(self._joined[rank], _Session())
        connection.session.members[rank] = connection
        self._joined[rank] += 1
        self._say(connection, WELCOME)

    def _collect(self, connection, payload):
        session = connection.session
        if connection.rank in session.waiting:
            raise _Refused("it sent twice to one exchange")
        (milliseconds,) = COUNT.unpack_from(payload)
        session.waiting[connection.rank] = time.monotonic() + milliseconds / 1000.0, payload[4:]
        if session.verdict is not None:
            self._judge(session, *session.verdict)
        elif session.gone:
            self._judge(session, LOST, sorted(session.gone))
        elif len(session.waiting) == self.size:
            everything = _join_all([session.waiting[rank][1] for rank in range(self.size)])
            session.waiting.clear()
            for member in list(session.members.values()):
                self._say(member, RESULT, everything)

    def _judge(self, session, kind, ranks):
        # the verdict stays: who comes later hears the same
        session.verdict = kind, ranks
        text = "; ".join(f"{_ranks([rank])} {session.gone[rank]}" for rank in ranks if rank in session.gone)
        body = _join_all([_ranks(ranks).encode(), text.encode()])
        for rank in list(session.waiting):
            del session.waiting[rank]
            self._say(session.members[rank], kind, body)

    def _say(self, connection, kind, payload=b""):
        connection.to_send += _frame(kind, payload)
        try:
            self._flush(connection)
        except OSError:
            pass  # its end shows when the selector next reads from it

    def _flush(self, connection):
        if connection.to_send:
            try:
                sent = connection.sock.send(connection.to_send)
            except BlockingIOError:
                sent = 0
            del connection.to_send[:sent]
        if connection.closing and not connection.to_send:
            self._drop(connection)
            return
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.to_send else 0)
        if connection in self._connections:
            self._selector.modify(connection.sock, events, connection)

    def _drop(self, connection, how="has died"):
        if connection not in self._connections:
            return
        self._connections.remove(connection)
        self._selector.unregister(connection.sock)
        connection.sock.close()
        session = connection.session
        if session is None:
            return
        del session.members[connection.rank]
        session.waiting.pop(connection.rank, None)
        session.gone[connection.rank] = how
        if not session.members:
            self._sessions = {n: s for n, s in self._sessions.items() if s is not session}
        elif session.waiting:
            self._judge(session, LOST, sorted(session.gone))


class _Client:
    """One rank's connection to the server."""

    def __init__(self, address, rank, size, key, timeout):
        self.address, self.rank, self.size = address, rank, size
        self.sock = self._reach(time.monotonic() + timeout)
        try:
            self._prove(_as_key(key), min(timeout, GREETING_SECONDS))
        except BaseException:
            self.sock.close()
            raise

    def _reach(self, deadline):
        pause = 0.005
        while True:
            try:
                return socket.create_connection(_split_address(self.address), max(0.1, deadline - time.monotonic()))
            except OSError as error:
                if time.monotonic() + pause > deadline:
                    raise BootstrapError(
                        f"connect: rank {self.rank} found nobody at {self.address} ({error}); did rank 0 or the "
                        "launcher end, or does a firewall stand between?"
                    ) from error
            time.sleep(pause)
            pause = min(2 * pause, 0.25)

    def _prove(self, key, timeout):
        nonce = secrets.token_bytes(32)
        hello = GREETING.pack(MAGIC, self.rank, self.size, os.getpid(), nonce)
        deadline = time.monotonic() + timeout
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.settimeout(timeout)
        try:
            self.sock.sendall(_frame(HELLO, hello))
            kind, payload = self._read(deadline, LARGEST_GREETING)
            if kind == CHALLENGE:
                theirs, proof = payload[:32], payload[32:]
                if not hmac.compare_digest(proof, _digest(key, b"server", nonce, theirs)):
                    raise BootstrapError(
                        f"connect: {self.address} does not know the key of rank {self.rank}; it belongs to another "
                        "run, unset the variables of the old one"
                    )
                self.sock.sendall(_frame(PROOF, _digest(key, b"client", hello, theirs)))
                kind, payload = self._read(deadline, LARGEST_GREETING)
        except (OSError, EOFError) as error:
            raise BootstrapError(
                f"connect: {self.address} did not answer rank {self.rank} as nvcoll's meeting point does ({error})"
            ) from error
        if kind != WELCOME:
            reason = payload.decode(errors="replace") if kind == REFUSED else f"unexpected message {kind}"
            raise BootstrapError(f"connect: {self.address} refused rank {self.rank}: {reason}")

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

    def allgather(self, data, timeout):
        """Give `data`, return what every rank gave."""
        deadline = time.monotonic() + timeout + GRACE
        milliseconds = min(int(timeout * 1000), 0xFFFFFFFF)
        try:
            self.sock.settimeout(timeout + GRACE)
            self.sock.sendall(_frame(DATA, COUNT.pack(milliseconds) + data))
            kind, payload = self._read(deadline, (LARGEST + 8) * self.size)
        except builtins.TimeoutError as error:
            raise TimeoutError(
                f"allgather: {self.address} did not answer rank {self.rank} within {timeout:g} s; "
                "is the launcher, or the process of rank 0, stopped?"
            ) from error
        except (OSError, EOFError) as error:
            raise PeerLostError(
                f"allgather: rank {self.rank} lost {self.address} ({error}); the launcher, or rank 0, has ended"
            ) from error
        if kind == RESULT:
            return _split_all(payload, self.size)
        if kind == REFUSED:
            raise BootstrapError(f"allgather: {self.address} refused rank {self.rank}: {payload.decode()}")
        who, how = (part.decode() for part in _split_all(payload, 2))
        if kind == LATE:
            raise TimeoutError(
                f"allgather: {who} did not arrive within {timeout:g} s; all ranks must make the same calls, and "
                "NVCOLL_TIMEOUT sets a longer limit"
            )
        raise PeerLostError(f"allgather: {how} while rank {self.rank} waited; look at its own output for the cause")

    def close(self, says_bye=True):
        """Leave. In a forked child only the descriptor is closed, for the connection is the parent's."""
        if says_bye:
            try:
                self.sock.settimeout(1.0)
                self.sock.sendall(_frame(BYE))
            except OSError:
                pass
        self.sock.close()
