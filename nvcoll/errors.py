"""The exception classes. Every message names the verb, what was expected, what came, and the cure."""

import builtins


class Error(Exception):
    """Base class of everything nvcoll raises on purpose."""


class TimeoutError(Error, builtins.TimeoutError):
    """A rank did not arrive before the deadline (``NVCOLL_TIMEOUT``)."""


class PeerLostError(Error, ConnectionError):
    """A rank has ended, or left, while others still waited for it."""


class MismatchError(Error, RuntimeError):
    """Ranks disagree: different verb, count, datatype, operator or algorithm."""


class ArgumentError(Error, ValueError):
    """An argument, or a variable of the environment, has a value that cannot be used."""


class DatatypeError(ArgumentError, TypeError):
    """A datatype, operator or kind of buffer that is not supported."""


class AllocationError(Error, MemoryError):
    """The symmetric heap has no room, or the system gives no more memory."""


class BootstrapError(Error, RuntimeError):
    """The ranks could not find each other, the launcher's variables contradict themselves, or a GPU cannot be used."""


class DeviceError(Error, RuntimeError):
    """There is no usable GPU, or the CUDA driver refused a call."""


class StateError(Error, RuntimeError):
    """The object cannot be used any more, or not now: finalized, freed, inherited by a forked child, in use."""


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
        f"nvcoll's compiled extensions are missing ({cause}): in a checkout type `pip install -e .` and start Python "
        "anew, or start it in another folder, if nvcoll is installed; elsewhere install nvcoll anew",
        name=module,
        path=exc.path,
    )


def missing_name(owner: str, name: str, comm: type, request: type) -> AttributeError:
    """Turn the look-up of a name that there is not into an error that says which verbs there are.

    Parameters
    ----------
    owner
        What was asked, for the message.
    name
        What it was asked for: perhaps one of mpi4py's names.
    comm
        The class of communicators, whose verbs there are.
    request
        The class of requests.

    Returns
    -------
    AttributeError
        To be raised. Python appends the closest name there is, but for that of a verb of mpi4py for pickled objects:
        ours of that name, for arrays, is not what was meant.
    """
    text = f"{owner} has no attribute {name!r}"
    if name.startswith("_"):  # Python and other libraries ask for these, and know what it means
        return AttributeError(text)
    verbs = [one for one in dir(comm) if one[0].isupper() and one[:4] not in {"Get_", "Set_"}]
    for one, what, where in ((comm, "communicators", "COMM_WORLD"), (request, "requests", request.__name__)):
        if hasattr(one, name):
            return AttributeError(f"{text}; {what} have it: {where}.{name}")
    text += (
        f"; nvcoll's verbs are {', '.join(verbs)}, and their data are arrays, which empty, zeros, full and array make, "
        "or others: take mpi4py for all else, which may be used beside nvcoll on ranks that mpiexec or srun starts"
    )
    pickled = name in {verb.lower() for verb in verbs}
    return AttributeError(text, name=name) if pickled else AttributeError(text)
