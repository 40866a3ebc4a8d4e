# Which ranks share a host. Included by bootstrap.pyx.


def host_identity() -> bytes:
    """Return bytes that are equal exactly on ranks that can map each other's POSIX shared memory.

    They are the boot of the kernel, the file system behind ``/dev/shm``, the host's name and the user.

    Raises
    ------
    OSError
        ENOENT, EACCES, ...: there is no such memory here.
    """
    try:
        shm = os.stat("/dev/shm")
    except OSError as error:
        _fail(error.errno, "/dev/shm, in which ranks share memory; mount a tmpfs there")
    try:
        with open("/proc/sys/kernel/random/boot_id", "rb") as file:
            boot = file.read().strip()
    except OSError:
        boot = b"unknown"
    facts = f"{shm.st_dev}:{shm.st_ino}:{os.geteuid()}:{socket.gethostname()}"
    return boot + b":" + facts.encode()
