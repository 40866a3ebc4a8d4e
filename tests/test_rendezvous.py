"""The meeting point of the ranks: a server, and clients that are threads here."""

import contextlib
import operator
import os
import pickle
import socket
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nvcoll import _bootstrap
from nvcoll._bootstrap import RendezvousServer
from nvcoll.errors import BootstrapError, PeerLostError, StateError, TimeoutError
from tests.conftest import eventually
from tests.meeting import gather, join, together

LAUNCH = bytes(16)  # the group of all ranks


@pytest.fixture
def server():
    with RendezvousServer(3) as server:
        yield server


@pytest.fixture
def ranks(server):
    """Three ranks that have joined."""
    joined = [join(server, rank) for rank in range(3)]
    yield joined
    for exchange in joined:
        exchange.close()


class TestAllgather:
    def test_everybody_gets_what_all_gave_in_the_order_of_ranks(self, ranks):
        for data in [(b"a", b"", b"ccc"), (b"", b"", b""), (b"\0" * 5, b"\xff", os.urandom(100))]:
            assert gather(ranks, *data) == [list(data)] * 3

    def test_bytes_like_objects_come_back_as_bytes(self, ranks):
        assert gather(ranks, bytearray(b"a"), memoryview(b"b"), b"c")[2] == [b"a", b"b", b"c"]

    def test_large_messages(self, ranks):
        data = [os.urandom(3 << 20), b"", os.urandom(1 << 20)]
        assert gather(ranks, *data) == [data] * 3

    def test_more_than_is_carried_is_refused_and_harms_nothing(self, ranks):
        with pytest.raises(ValueError, match="16777217 bytes were given, at most 16777216"):
            ranks[0].allgather(bytes((16 << 20) + 1))
        assert gather(ranks, b"a", b"b", b"c")[0] == [b"a", b"b", b"c"]

    def test_facts_of_the_exchange(self, ranks):
        assert [(e.kind, e.rank, e.size, e.mpi_comm) for e in ranks] == [("run", rank, 3, None) for rank in range(3)]
        assert repr(ranks[1]) == "<Exchange run: rank 1 of 3>"


class TestLeaving:
    def test_ranks_leave_and_come_back_at_their_own_pace(self, server, ranks):
        for again in range(3):
            ranks[0].close()
            ranks[0] = join(server, 0)  # the others are still in the session before
            ranks[1].close()
            ranks[2].close()
            ranks[2], ranks[1] = join(server, 2), join(server, 1)
            assert gather(ranks, b"a", b"b", bytes([again]))[1] == [b"a", b"b", bytes([again])]

    def test_closed(self, ranks):
        ranks[1].close()
        ranks[1].close()
        with pytest.raises(StateError, match="the exchange is closed; connect anew"):
            ranks[1].allgather(b"")

    def test_one_that_left_is_named_to_those_who_wait(self, ranks):
        ranks[1].close()
        for error in together(lambda: ranks[0].allgather(b""), lambda: ranks[2].allgather(b"")):
            assert isinstance(error, PeerLostError)
            assert "rank 1 has left" in str(error)

    def test_messages_begin_with_the_call_of_the_user(self, ranks):
        ranks[0].verb = "free"
        ranks[1].close()
        with pytest.raises(PeerLostError, match=r"^free: rank 1 has left while rank 0 waited"):
            ranks[0].allgather(b"")
        with pytest.raises(StateError, match=r"^free: an earlier call failed"):
            ranks[0].allgather(b"")
        with pytest.raises(StateError, match=r"^Init: the exchange is closed"):
            ranks[1].allgather(b"")

    def test_one_that_left_before_others_joined_is_named_too(self, server):
        join(server, 0).close()
        with contextlib.closing(join(server, 1)) as late, pytest.raises(PeerLostError, match="rank 0 has left"):
            late.allgather(b"")

    def test_one_whose_process_ended_is_not_waited_for(self, server):
        early, late = join(server, 0), join(server, 2)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(early.allgather, b"")
            time.sleep(0.1)
            assert not waiting.done()
            server.tell_ended(1)
            assert "rank 1 has ended while rank 0 waited" in str(waiting.exception(5))
        with pytest.raises(PeerLostError, match="rank 1 has ended"):
            late.allgather(b"")
        early.close()
        late.close()

    def test_one_whose_process_ended_takes_part_in_nothing_new(self, server, ranks):
        server.tell_ended(1)
        assert gather(ranks, b"a", b"b", b"c")[1] == [b"a", b"b", b"c"]  # what it has joined has an end of its own
        ranks[0].close()
        with contextlib.closing(join(server, 0)) as again, pytest.raises(PeerLostError, match="rank 1 has ended"):
            again.allgather(b"")

    def test_after_a_failure_the_exchange_is_unusable(self, ranks):
        ranks[1].close()
        with pytest.raises(PeerLostError):
            ranks[0].allgather(b"")
        with pytest.raises(StateError, match="an earlier call failed"):
            ranks[0].allgather(b"")

    def test_the_end_of_the_server(self, server, ranks):
        server.close()
        with pytest.raises(PeerLostError, match=f"rank 2 lost {server.address}"):
            ranks[2].allgather(b"")
        with pytest.raises(BootstrapError, match="rank 0 found nobody at"):
            join(server, 0, timeout=0.2)


class TestDeadline:
    def test_those_who_did_not_come_are_named(self, server):
        with contextlib.closing(join(server, 1, timeout=0.3)) as early:
            start = time.monotonic()
            with pytest.raises(TimeoutError, match=r"ranks 0, 2 did not arrive within 0\.3 s; .*NVCOLL_TIMEOUT"):
                early.allgather(b"")
            assert 0.3 <= time.monotonic() - start < 10

    def test_the_shortest_counts_and_a_latecomer_hears_that_it_is_one(self, server):
        ranks = [join(server, rank, timeout=timeout) for rank, timeout in enumerate([60, 0.3, 60])]
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(ranks[0].allgather, b"")
            eventually(lambda: server._sessions[LAUNCH, 0].waiting)
            found = [*together(lambda: ranks[1].allgather(b"")), first.exception()]
        assert all("rank 2 did not arrive" in str(error) for error in found)
        found += together(lambda: ranks[2].allgather(b""))
        assert [type(error) for error in found] == [TimeoutError] * 3
        assert "rank 2 came too late" in str(found[2])
        for exchange in ranks:
            exchange.close()

    def test_of_one_that_died_meanwhile_does_not_count(self, server):
        ranks = [join(server, rank, timeout=timeout) for rank, timeout in enumerate([1, 10, 10])]
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(ranks[0].allgather, b"")
            eventually(lambda: server._sessions[LAUNCH, 0].waiting)
            ranks[0]._channel.sock.shutdown(socket.SHUT_RDWR)
            assert isinstance(waiting.exception(), PeerLostError)
            time.sleep(1.1)
        with pytest.raises(PeerLostError, match="rank 0 has died"):
            ranks[1].allgather(b"")
        for exchange in ranks:
            exchange.close()

    def test_a_server_that_is_stuck(self, monkeypatch):
        monkeypatch.setattr(_bootstrap, "ANSWER_SECONDS", 0.3)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            server = RendezvousServer(1)
            address = f"127.0.0.1:{silent.getsockname()[1]}"
            server.close()
            server.address = address
            with pytest.raises(BootstrapError, match="did not answer rank 0 as nvcoll's meeting point does"):
                join(server, 0)

    def test_a_server_that_stalls_is_waited_for_and_met_again(self, monkeypatch):
        stalls, greet = [0.5], RendezvousServer._greet

        def stall(server, *given):
            time.sleep(stalls.pop() if stalls else 0)  # by then its own clock tells it to hang up
            greet(server, *given)

        monkeypatch.setattr(_bootstrap, "GREETING_SECONDS", 0.2)
        monkeypatch.setattr(RendezvousServer, "_greet", stall)
        with RendezvousServer(1) as server, contextlib.closing(join(server, 0)) as exchange:
            assert exchange.allgather(b"x") == [b"x"]


class TestRefusals:
    @pytest.mark.parametrize(
        ("rank", "size", "message"),
        [(1, 4, "says that there are 4 ranks, but there are 3"), (1, 2, "says that there are 2 ranks")],
    )
    def test_wrong_size(self, server, rank, size, message):
        with pytest.raises(BootstrapError, match=f"refused rank {rank}: it {message}"):
            join(server, rank, size)

    def test_wrong_rank(self, server):
        with pytest.raises(BootstrapError, match="Init: NVCOLL_RANK=3 is not below NVCOLL_SIZE=3"):
            join(server, 3)

    def test_wrong_key_is_seen_by_the_client(self, server):
        with pytest.raises(BootstrapError, match="does not know the key of rank 0; it belongs to another run"):
            join(server, 0, key="ab" * 32)

    def test_duplicate(self, server, ranks):
        with pytest.raises(BootstrapError, match=f"process {os.getpid()} is rank 1 already; a child process of a rank"):
            join(server, 1)
        assert gather(ranks, b"a", b"b", b"c")[1] == [b"a", b"b", b"c"]


def frame(kind, payload):
    return struct.pack(">IB", len(payload), kind) + payload


def hello(rank=0, size=3, magic=b"nvcoll\0\2"):
    return frame(1, struct.pack(">8sIIQ32s16s", magic, rank, size, 0, bytes(32), LAUNCH))


def answers(server, *messages):
    """What the server answers to a stranger's bytes, until it hangs up."""
    host, port = server.address.split(":")
    with socket.create_connection((host, int(port)), timeout=5) as sock:
        received = b""
        for message in messages:
            sock.sendall(message)
            time.sleep(0.02)
        with contextlib.suppress(ConnectionResetError):
            while piece := sock.recv(4096):
                received += piece
    return received


# Connects again and again, and says nothing. The end of it is that of its input.
FLOOD = """
import collections, socket, sys, threading, time
first, last = [], collections.deque(maxlen=200)
def flood():
    while True:
        try:
            (first if len(first) < 500 else last).append(socket.create_connection((sys.argv[1], int(sys.argv[2]))))
        except OSError:
            time.sleep(0.01)
threading.Thread(target=flood, daemon=True).start()
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def flooded(server, monkeypatch):
    """A server to which silent connections come all the time, and that waits long for them to say something."""
    monkeypatch.setattr(_bootstrap, "GREETING_SECONDS", 60.0)
    with subprocess.Popen(
        [sys.executable, "-c", FLOOD, *server.address.split(":")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"ready\n"
        eventually(lambda: len(server._strangers) > server.size + 60)
        yield server
        process.stdin.close()


class TestStrangers:
    @pytest.mark.parametrize(
        ("messages", "reason"),
        [
            ([b"GET / HTTP/1.1\r\n\r\n"], b"is too long"),
            ([struct.pack(">IB", 0xFFFFFFFF, 6)], b"a message of 4294967295 bytes is too long"),
            ([frame(6, bytes(8))], b"message of kind 6 was not expected"),
            ([frame(1, b"short")], b"of another version perhaps"),
            ([hello(magic=b"nvcoll\0\1")], b"of another version perhaps"),
            ([hello(), hello()], b"message of kind 1 was not expected"),
            ([hello(), frame(3, bytes(32))], b"the key is wrong"),
            ([hello(), frame(3, b"")], b"the key is wrong"),
            ([hello(), frame(6, bytes(8))], b"message of kind 6 was not expected"),
            ([hello(rank=7), frame(3, bytes(32))], b"the key is wrong"),
            ([frame(200, pickle.dumps(print))], b"message of kind 200 was not expected"),
        ],
    )
    def test_are_refused_and_harm_nobody(self, server, ranks, messages, reason):
        assert reason in answers(server, *messages)
        assert gather(ranks, b"a", b"b", b"c") == [[b"a", b"b", b"c"]] * 3

    def test_who_says_nothing_does_not_keep_ranks_out(self, monkeypatch):
        monkeypatch.setattr(_bootstrap, "GREETING_SECONDS", 0.5)
        with RendezvousServer(1) as server, contextlib.ExitStack() as stack:
            host, port = server.address.split(":")
            for _ in range(100):  # more than may wait
                stack.enter_context(socket.create_connection((host, int(port))))
            exchange = stack.enter_context(contextlib.closing(join(server, 0)))
            assert exchange.allgather(b"x") == [b"x"]

    def test_a_flood_of_those_who_say_nothing_does_not_keep_ranks_out(self, flooded):
        with ThreadPoolExecutor(3) as pool:
            ranks = list(pool.map(lambda rank: join(flooded, rank), range(3)))
        assert gather(ranks, b"a", b"b", b"c") == [[b"a", b"b", b"c"]] * 3
        assert len(flooded._strangers) <= flooded.size + 64
        for exchange in ranks:
            exchange.close()

    def test_the_server_proves_the_key_first(self, server):
        """A client gives nothing away to a server that only claims to know the key."""
        with socket.create_server(("127.0.0.1", 0)) as impostor, ThreadPoolExecutor(1) as pool:
            address, server.address = server.address, f"127.0.0.1:{impostor.getsockname()[1]}"
            future = pool.submit(join, server, 0)
            sock, _ = impostor.accept()
            with sock:
                sock.recv(4096)
                sock.sendall(frame(4, b""))  # welcome, without a challenge
                with pytest.raises(BootstrapError, match="sent rank 0 message 4 instead of 2"):
                    future.result(10)
                assert sock.recv(4096) == b""
            server.address = address


def held():
    """How many descriptors and threads this process has."""
    return [len(list(Path("/proc/self", name).iterdir())) for name in ("fd", "task")]


class TestServer:
    def test_listens_on_the_loopback_interface_with_a_new_key(self, server):
        assert server.address.startswith("127.0.0.1:")
        assert len(server.key) == 64
        with RendezvousServer(1) as other:
            assert other.key != server.key

    def test_takes_a_key_as_bytes_or_text(self):
        for key in (b"\x01\x02", "0102"):
            with RendezvousServer(1, key) as server, contextlib.closing(join(server, 0, key="0102")) as exchange:
                assert exchange.allgather(b"x") == [b"x"]

    def test_ipv6(self):
        with RendezvousServer(1, host="::1") as server, contextlib.closing(join(server, 0)) as exchange:
            assert server.address.startswith("[::1]:")
            assert exchange.allgather(b"x") == [b"x"]

    def test_a_port_in_use_is_an_error(self, server):
        with pytest.raises(OSError, match="in use"):
            RendezvousServer(1, port=int(server.address.split(":")[1]))

    def test_closing_leaves_no_descriptor_and_no_thread(self):
        before = held()
        server = RendezvousServer(1)
        exchange = join(server, 0)
        exchange.close()
        server.close()
        server.close()
        # The system takes a moment to bury a thread that was joined, one of an earlier test too.
        eventually(lambda: not any(map(operator.gt, held(), before)))

    def test_closing_sends_what_is_due(self, server, ranks):
        data = [os.urandom(4 << 20)] * 3
        with ThreadPoolExecutor(3) as pool:
            futures = [pool.submit(e.allgather, d) for e, d in zip(ranks, data, strict=True)]
            assert futures[0].result(10) == data
            server.close(10)
            assert [future.result(10) for future in futures] == [data] * 3

    def test_nobody_needs_to_hear_of_ranks_after_the_end(self, server):
        server.close()
        server.tell_ended(1)
        server.close()

    def test_many_ranks(self):
        with RendezvousServer(40) as server, ThreadPoolExecutor(40) as pool:
            ranks = list(pool.map(lambda rank: join(server, rank), range(40)))
            everything = [bytes([rank]) * rank for rank in range(40)]
            assert all(found == everything for found in pool.map(lambda e: e.allgather(everything[e.rank]), ranks))
            for exchange in ranks:
                exchange.close()
