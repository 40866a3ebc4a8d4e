# How ranks split into parts: what each tells all others, and what all conclude from it. Included by bootstrap.pyx.

# What ranks exchange begins with a letter for what they do: so those that do something else are told apart.
cdef object WISH = struct.Struct(">c?qq16s16s")  # s, whether there is a color, color, key, token, verb


def wish(verb, color, key):
    """Return what a rank tells the others when they split.

    Parameters
    ----------
    verb
        What the user called, of which 16 bytes are told.
    color
        Ranks of equal color come into one part; None: this rank comes into none.
    key
        Ranks of a part are in the order of their keys.

    Returns
    -------
    bytes

    Raises
    ------
    ValueError
        A number is none, or does not fit into 64 bits.
    """
    # the token of a part's first member is its name, so that no two parts of a launch ever have the same
    token = secrets.token_bytes(16)
    name = verb.encode()
    if color is None:
        return WISH.pack(b"s", False, 0, 0, token, name)
    try:
        return WISH.pack(b"s", True, color, key, token, name)
    except struct.error as error:
        raise ValueError(
            f"{verb}: color is {color!r} and key is {key!r}, expected whole numbers of 64 bits with a sign; "
            "a color of None leaves this rank out"
        ) from error


def part_of(verb, rank, wishes):
    """Tell which part a rank comes into.

    Parameters
    ----------
    verb
        What the user called, for messages.
    rank
        The rank.
    wishes
        What all ranks told, by rank.

    Returns
    -------
    members : tuple of int
        Ranks of its part, in their order there; empty if it comes into none.
    token : bytes
        The name of the part, 16 bytes; empty if there is none.

    Raises
    ------
    MismatchError
        A rank does something else, or calls another verb. All ranks find this, and agree on it.
    """
    for other, each in enumerate(wishes):
        if len(each) != WISH.size or each[:1] != b"s":
            raise MismatchError(
                f"{verb}: rank {rank} makes communicators, rank {other} calls something else; make the same calls in "
                "the same order on all ranks"
            )
    told = [WISH.unpack(each)[1:] for each in wishes]
    defined, color, _, _, name = told[rank]
    # color and key of one verb mean nothing to another: ranks that Dup would come into a part of Split's
    for other, (*_, its) in enumerate(told):
        if its != name:
            raise MismatchError(
                f"{verb}: rank {rank} calls {_verb(name)}, rank {other} calls {_verb(its)}; make the same calls in the "
                "same order on all ranks"
            )
    if not defined:
        return (), b""
    keys = [(key, other) for other, (takes, its, key, *_) in enumerate(told) if takes and its == color]
    members = tuple(other for _, other in sorted(keys))
    return members, told[members[0]][3]


def _verb(name):
    return name.rstrip(b"\0").decode(errors="replace")
