"""Compiled code that is kept on disk between processes: read whole or not at all, trusted only if it is one's own."""

import contextlib
import fcntl
import hashlib
import os
import stat
import struct
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent
HEADER = len(hashlib.sha256().digest())
LOCK = struct.Struct("@hhqqi0q")
"""C's struct flock: type, whence, start, length, and a process, which is none here."""


class CodeCache:
    """Files of compiled code.

    Parameters
    ----------
    folder
        Where they are kept; made on first use. Where nothing can be kept or trusted, code is compiled anew.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, name: str, make: Callable[[], bytes]) -> bytes:
        """Return the file of that name, or what `make` gives, which is kept then. One process makes, others wait."""
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


def _private_folder(folder: Path) -> Path | None:
    """Make the cache folder; None, with a warning, where machine code could not be trusted or kept there."""
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
    """Return the contents of a cache file, or None if it is absent, damaged or of another user."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_uid != os.geteuid():  # a group may write in the folder
                return None
            stored = file.read()
    except OSError:
        return None
    digest, code = stored[:HEADER], stored[HEADER:]
    return code if digest == hashlib.sha256(code).digest() else None


def _write(path: Path, code: bytes) -> None:
    """Store a cache file: readers see all of it or nothing. A full disk costs time later, not the call."""
    with contextlib.suppress(OSError):
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(code).digest() + code)
            Path(temporary).replace(path)
        except OSError:
            Path(temporary).unlink()
            raise


@contextlib.contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    """Hold a file's lock among all that share the cache; without one where that is not possible.

    Each name has a byte of the lock file, so that processes which make different files do not wait for each other. The
    lock belongs to the open file: one of the process would not keep its threads apart, and end when any of them closes
    the lock file.
    """
    try:
        handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:
        yield
        return
    byte = zlib.crc32(name.encode())
    try:
        with contextlib.suppress(OSError):
            fcntl.fcntl(handle, fcntl.F_OFD_SETLKW, LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
        yield
    finally:
        # Closing is not enough where a child was forked meanwhile: it has the file too.
        with contextlib.suppress(OSError):
            fcntl.fcntl(handle, fcntl.F_OFD_SETLK, LOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, byte, 1, 0))
        os.close(handle)
