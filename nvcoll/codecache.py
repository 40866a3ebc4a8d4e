"""Compiled code that is kept on disk between processes: read whole or not at all, trusted only if it is one's own."""

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
import struct
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent
HEADER = len(hashlib.sha256().digest())
LOCK = struct.Struct("@hhqqi0q")
"""C's struct flock: type, whence, start, length, and a process, which is none here."""
PATIENCE = 60.0
"""Seconds to wait for another process that makes the same file: far more than a kernel takes, so who takes longer has
been stopped, and to make the file once more is better than to wait for ever."""
LONGEST_PAUSE = 0.05
"""Seconds between two looks at a lock, at most: what a rank that waits for another one's kernel may lose."""
NOT_ELSEWHERE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""Flags to open a file of the cache, which may be something else: a link is refused, a pipe keeps nobody waiting."""


class CodeCache:
    """Files of compiled code.

    Parameters
    ----------
    folder
        Where they are kept; made on first use. Where nothing can be kept or trusted, or it is None, code is compiled
        anew.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def get(self, name: str, make: Callable[[], bytes]) -> bytes:
        """Return the file of that name, or what `make` gives, which is kept then.

        One process makes, others wait, but not for ever: then they make it too.
        """
        folder = _private_folder(self._folder)
        if folder is None:
            return make()
        path = folder / name
        found = _read(path)
        if found is None:
            with _locked(folder / "lock", name):
                found = _read(path)
                if found is None:
                    found = make()
                    _write(path, found)
        return found


@cache
def digest_of(platform: str, *sources: str) -> str:
    """Return a digest of all that code depends on: a platform, and files given by their paths in the package."""
    digest = hashlib.sha256(platform.encode())
    for source in sources:
        digest.update((PACKAGE / source).read_bytes())
    return digest.hexdigest()[:24]


def _private_folder(folder: Path | None) -> Path | None:
    """Make the cache folder; None, with a warning, where machine code could not be trusted or kept there."""
    if folder is None:
        _warn_no_cache("this user has no home directory")
        return None
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.stat()
    except OSError as exc:
        _warn_no_cache(f"{folder} cannot be made ({exc.strerror})")
        return None
    if facts.st_uid != os.geteuid() or facts.st_mode & stat.S_IWOTH:
        _warn_no_cache(f"{folder} belongs to another user, or anybody may write there")
        return None
    if not os.access(folder, os.W_OK):
        _warn_no_cache(f"{folder} is read-only")
        return None
    return folder


@cache
def _warn_no_cache(reason: str) -> None:
    warnings.warn(
        f"kernels are compiled anew in every process: {reason}; point NVCOLL_CACHE_DIR to a folder of your own",
        RuntimeWarning,
        stacklevel=2,
    )


def _read(path: Path) -> bytes | None:
    """Return the contents of a cache file, or None if it is absent, damaged, no file, or of another user."""
    try:
        with open(path, "rb", opener=lambda path, flags: os.open(path, flags | NOT_ELSEWHERE)) as file:
            facts = os.fstat(file.fileno())
            if facts.st_uid != os.geteuid() or not stat.S_ISREG(facts.st_mode):  # a group may write in the folder
                return None
            stored = file.read()
    except OSError:
        return None
    digest, code = stored[:HEADER], stored[HEADER:]
    return code if digest == _seal(path, code) else None


def _seal(path: Path, code: bytes) -> bytes:
    """Return what a file begins with, by which it is known to be whole, and to be the one of its name."""
    return hashlib.sha256(path.name.encode() + b"\0" + code).digest()


def _write(path: Path, code: bytes) -> None:
    """Store a cache file: readers see all of it or nothing. A full disk costs time later, not the call."""
    with contextlib.suppress(OSError):
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_seal(path, code) + code)
            Path(temporary).replace(path)
        except OSError:
            Path(temporary).unlink()
            raise


@contextlib.contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    """Hold a file's lock among all that share the cache; without one where that is not possible within `PATIENCE`.

    Each name has a byte of the lock file, so that processes which make different files do not wait for each other. The
    lock belongs to the open file: one of the process would not keep its threads apart, and end when any of them closes
    the lock file.
    """
    try:
        handle = os.open(path, os.O_CREAT | os.O_RDWR | NOT_ELSEWHERE, 0o600)
    except OSError:
        yield
        return
    byte = zlib.crc32(name.encode())
    try:
        with contextlib.suppress(OSError):
            _take(handle, byte)
        yield
    finally:
        # Closing is not enough where a child was forked meanwhile: it has the file too.
        with contextlib.suppress(OSError):
            fcntl.fcntl(handle, fcntl.F_OFD_SETLK, LOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, byte, 1, 0))
        os.close(handle)


def _take(handle: int, byte: int) -> None:
    """Take the lock of a byte, or raise OSError where another process holds it for longer than `PATIENCE`."""
    deadline, pause = time.monotonic() + PATIENCE, 0.001
    while True:
        try:
            fcntl.fcntl(handle, fcntl.F_OFD_SETLK, LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
            return
        except OSError as exc:
            if exc.errno not in {errno.EAGAIN, errno.EACCES} or time.monotonic() >= deadline:
                raise
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
