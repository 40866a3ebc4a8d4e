# What is spoken over TCP, in a star of one server (rendezvous.pxi) and its clients (channels.pxi). Included by
# bootstrap.pyx.
#
# A frame is: length of the payload (4 bytes, big endian), kind (1 byte), payload. Nothing is ever unpickled.
#
#   client                                         server
#   HELLO magic, rank, size, pid, nonce, group  ->
#                                               <- CHALLENGE nonce, HMAC(key, "server", both nonces)
#   PROOF HMAC(key, "client", HELLO, both nonces) ->
#                                               <- WELCOME, or REFUSED reason
#   DATA timeout in ms, bytes                   ->
#                                               <- RESULT the bytes of every rank, or LOST / LATE and which ranks, or
#                                                  TOO_LATE: others have given up waiting for this one
#   BYE                                         ->   leaves; a connection that ends without it is a rank that died
#
# A group is who meets under one name of 16 bytes: all ranks of the launch, or those of a part that `Exchange.split`
# made. A rank has a connection for each group that it is in; rank and size in HELLO are those in the group, and so are
# the ranks that LOST and LATE name. The n-th time that a rank joins a group it belongs to session n of the group, so
# ranks may leave and come back at their own pace.

cdef object FRAME = struct.Struct(">IB")
cdef object GREETING = struct.Struct(">8sIIQ32s16s")
cdef object COUNT = struct.Struct(">I")
cdef object LENGTH = struct.Struct(">q")
cdef bytes MAGIC = b"nvcoll\x00\x02"
cdef bytes LAUNCH = bytes(16)  # the group of all ranks of the launch; those of parts are random
cdef enum:
    HELLO = 1
    CHALLENGE
    PROOF
    WELCOME
    REFUSED
    DATA
    RESULT
    LOST
    LATE
    BYE
    TOO_LATE
cdef Py_ssize_t LARGEST = 16 << 20  # bytes a rank may give to one exchange
cdef Py_ssize_t LARGEST_GREETING = 1024  # bytes of a frame from somebody who has not proved the key
cdef Py_ssize_t STRANGERS = 64  # connections that have not proved the key, at most, beside one for each rank
GREETING_SECONDS = 5.0  # until a connection must have proved the key; the server hangs up then, and a rank comes again
ANSWER_SECONDS = 30.0  # that a rank gives the server to prove its own, on a machine that may have stalled


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


def _join_address(str host, port):
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


_sockets = weakref.WeakSet()  # servers and clients of this process


def _after_fork():
    # A child that kept these open would hide its parent's death from the others, and hold the port.
    for holder in list(_sockets):
        holder._close_sockets()


os.register_at_fork(after_in_child=_after_fork)


def named(ranks):
    """Return "rank 3", or "ranks 1, 2": of many, the first and how many more."""
    names = [str(rank) for rank in ranks]
    if len(names) > 16:
        names[16:] = [f"{len(names) - 16} more"]
    return ("rank " if len(names) == 1 else "ranks ") + ", ".join(names)
