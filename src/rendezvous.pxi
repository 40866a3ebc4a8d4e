# Where ranks meet: the server of the protocol in frames.pxi. Included by bootstrap.pyx.


class _Refused(Exception):
    """What a peer sent is not accepted; the text is for the other side."""


class _Session:
    """The ranks that joined a group for the same time, and the exchange they are in."""

    def __init__(self, group, number, size):
        self.group, self.number, self.size = group, number, size
        self.members = {}  # rank -> connection
        self.waiting = {}  # rank -> what it gave to the exchange that is under way
        self.deadline = math.inf  # of the one that waits least long
        self.gone = {}  # rank -> how it went
        self.verdict = None  # (LOST or LATE, ranks) once an exchange has failed


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
    """The place where ranks meet: a thread that answers the clients of `size` ranks, in every group they are in.

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
        self._listener = socket.create_server(
            (host, port), family=family, backlog=max(128, size), dualstack_ipv6=host == "::"
        )
        self._listener.setblocking(False)
        self.address = _join_address(host, self._listener.getsockname()[1])
        self._wake, self._waker = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._connections = set()
        self._strangers = {}  # those of them that have not proved the key yet, in the order in which they came -> None
        self._sessions = {}  # (group, number) -> session
        self._joined = {LAUNCH: [0] * size}  # group -> how often each of its ranks has joined
        self._ended = set()  # ranks whose processes have ended
        self._closing = False
        self._pid = os.getpid()
        _sockets.add(self)
        self._thread = threading.Thread(target=self._serve, name="nvcoll-rendezvous", daemon=True)
        self._thread.start()

    def close(self, linger=2.0):
        """Send what is still to be sent, for at most `linger` seconds, and stop. A second call does nothing."""
        if self._pid == os.getpid() and self._thread.is_alive():
            self._linger = time.monotonic() + linger
            self._closing = True
            self._rouse()
            self._thread.join(linger + 5.0)

    def tell_ended(self, rank):
        """Tell that the process of `rank` has ended: who waits for it to join, now or later, is told so."""
        self._ended.add(rank)
        self._rouse()

    def _rouse(self):
        with contextlib.suppress(OSError):  # the thread, roused by something else, has ended, and closed its sockets
            self._waker.send(b"x")

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def _serve(self):
        try:
            while not self._closing or (any(c.to_send for c in self._connections) and time.monotonic() < self._linger):
                for found, events in self._selector.select(0.05 if self._closing else self._patience()):
                    if found.fileobj is self._listener:
                        self._accept()
                    elif found.fileobj is self._wake:
                        self._wake.recv(1 << 12)
                        self._lose_ended()
                    else:
                        self._attend(found.data, events)
                self._expire(time.monotonic())
        finally:
            self._close_sockets()

    def _close_sockets(self):
        for connection in list(self._connections):
            connection.sock.close()
        for sock in (self._listener, self._wake, self._waker):
            sock.close()
        self._selector.close()

    def _patience(self):
        deadlines = [holder.deadline for holder in (*self._strangers, *self._sessions.values())]
        first = min(deadlines, default=math.inf)
        return None if first == math.inf else max(0.0, first - time.monotonic())

    def _expire(self, now):
        for connection in [c for c in self._strangers if c.deadline <= now]:
            self._drop(connection)
        for session in [s for s in self._sessions.values() if s.deadline <= now]:
            self._judge(session, LATE, [rank for rank in range(session.size) if rank not in session.waiting])

    def _accept(self):
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return  # the client has given up meanwhile
        except OSError:
            time.sleep(0.01)  # out of descriptors: do not spin on it
            return
        if len(self._strangers) >= self.size + STRANGERS:
            # not the new one: a rank greets within a moment, so who has said nothing for longest is none
            self._drop(next(iter(self._strangers)))
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = _Connection(sock, time.monotonic() + GREETING_SECONDS)
        self._connections.add(connection)
        self._strangers[connection] = None
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
            connection.closing = True
            self._say(connection, REFUSED, str(refusal).encode())

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
            self._drop(connection, "has left")
        else:
            raise _Refused(f"a message of kind {kind} was not expected here")

    def _greet(self, connection, payload):
        if len(payload) != GREETING.size or payload[:8] != MAGIC:
            raise _Refused("this is the meeting point of nvcoll's ranks, of another version perhaps")
        connection.hello = payload
        nonce = GREETING.unpack(payload)[4]
        self._say(connection, CHALLENGE, connection.nonce + _digest(self._key, b"server", nonce, connection.nonce))

    def _admit(self, connection, payload):
        _, rank, size, _, _, group = GREETING.unpack(connection.hello)
        if not hmac.compare_digest(payload, _digest(self._key, b"client", connection.hello, connection.nonce)):
            raise _Refused("the key is wrong; is this rank of another run?")
        self._check(group, rank, size)
        joined = self._joined.setdefault(group, [0] * size)
        number = joined[rank]
        joined[rank] += 1
        self._strangers.pop(connection, None)
        connection.rank = rank
        connection.session = self._sessions.setdefault((group, number), _Session(group, number, size))
        connection.session.members[rank] = connection
        self._lose_ended()
        self._say(connection, WELCOME)

    def _check(self, group, rank, size):
        """Refuse who cannot be this rank of a group of this size."""
        if size > self.size or (group == LAUNCH and size < self.size):
            raise _Refused(f"it says that there are {size} ranks, but there are {self.size}")
        if len(self._joined.get(group, range(size))) != size:
            raise _Refused(f"it says that its group has {size} ranks, but others say {len(self._joined[group])}")
        if rank >= size:
            raise _Refused(f"there is no rank {rank} among {size}")
        for session in self._sessions.values():
            if session.group == group and rank in session.members:
                raise _Refused(
                    f"process {GREETING.unpack(session.members[rank].hello)[3]} is rank {rank} already; a child "
                    "process of a rank is no rank itself: start it with NVCOLL_BOOTSTRAP=single"
                )

    def _collect(self, connection, payload):
        session = connection.session
        if connection.rank in session.waiting:
            raise _Refused("it sent twice to one exchange")
        (milliseconds,) = COUNT.unpack_from(payload)
        session.waiting[connection.rank] = payload[COUNT.size:]
        session.deadline = min(session.deadline, time.monotonic() + milliseconds / 1000.0)
        if session.verdict is not None:
            self._judge(session, *session.verdict)
        elif session.gone:
            self._judge(session, LOST, sorted(session.gone))
        elif len(session.waiting) == session.size:
            everything = _join_all([session.waiting[rank] for rank in range(session.size)])
            session.waiting.clear()
            session.deadline = math.inf
            for member in list(session.members.values()):
                self._say(member, RESULT, everything)

    def _judge(self, session, kind, ranks):
        # the verdict stays: who comes later hears the same, or that it is what the others have waited for
        session.verdict = kind, ranks
        session.deadline = math.inf
        text = "; ".join(f"{named([rank])} {session.gone[rank]}" for rank in ranks if rank in session.gone)
        body = _join_all([named(ranks).encode(), text.encode()])
        for rank in list(session.waiting):
            del session.waiting[rank]
            self._say(session.members[rank], TOO_LATE if kind == LATE and rank in ranks else kind, body)

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
        self._strangers.pop(connection, None)
        self._selector.unregister(connection.sock)
        connection.sock.close()
        session = connection.session
        if session is None:
            return
        del session.members[connection.rank]
        session.waiting.pop(connection.rank, None)
        self._lose(session, connection.rank, how)

    def _lose(self, session, rank, how):
        session.gone[rank] = how
        if session.waiting:
            self._judge(session, LOST, sorted(session.gone))
        else:
            session.deadline = math.inf
        if len(session.gone) == session.size:
            self._forget(session)

    def _forget(self, session):
        del self._sessions[session.group, session.number]
        # ranks come back to the launch, but to a part, whose name is never used again, they do not
        if session.group != LAUNCH and not any(other.group == session.group for other in self._sessions.values()):
            del self._joined[session.group]

    def _lose_ended(self):
        # what it has joined sees the end of its connection; what it has not, it never will
        for rank in list(self._ended):
            for (group, number), session in list(self._sessions.items()):
                # in a part it has another rank, which nobody has told here
                if group == LAUNCH and number >= self._joined[LAUNCH][rank] and rank not in session.gone:
                    self._lose(session, rank, "has ended")
