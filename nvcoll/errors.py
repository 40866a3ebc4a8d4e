"""The exception classes. Every message names the verb, what was expected, what came, and the cure."""

import builtins


class Error(Exception):
    """Base class of everything nvcoll raises on purpose."""


class TimeoutError(Error, builtins.TimeoutError):
    """A rank did not arrive before the deadline (``NVCOLL_TIMEOUT``)."""


class PeerLostError(Error, ConnectionError):
    """A rank has ended, or left, while others still waited for it."""


class MismatchError(Error, RuntimeError):
    """Ranks disagree: different verb, count, datatype, operator or settings."""


class ArgumentError(Error, ValueError):
    """An argument, or a variable of the environment, has a value that cannot be used."""


class DatatypeError(ArgumentError, TypeError):
    """A datatype, operator or kind of buffer that is not supported."""


class AllocationError(Error, MemoryError):
    """The symmetric heap has no room, or the system gives no more memory."""


class BootstrapError(Error, RuntimeError):
    """The ranks could not find each other, or the launcher's variables contradict themselves."""


class DeviceError(Error, RuntimeError):
    """There is no usable GPU, or the CUDA driver refused a call."""


class StateError(Error, RuntimeError):
    """The object cannot be used any more: finalized, freed, or inherited by a forked child."""


class BuildError(Error, ImportError):
    """The compiled extension modules are missing or do not load."""


def missing_extension(exc: ImportError) -> BuildError:
    """Turn the import error of a compiled module into one that says what to type.

    Parameters
    ----------
    exc
        What ``import nvcoll._plan`` (or a sibling) raised.

    Returns
    -------
    BuildError
        To be raised ``from exc``; keeps `exc`'s ``name`` and ``path``.
    """
    module = exc.name or "nvcoll._plan"
    cause = f"no module {module}" if isinstance(exc, ModuleNotFoundError) else f"{module}: {exc}"
    return BuildError(
        f"nvcoll's compiled extensions are missing ({cause}): in a checkout type `pip install -e .` "
        "and start Python anew; elsewhere `pip install --force-reinstall nvcoll`",
        name=module,
        path=exc.path,
    )
