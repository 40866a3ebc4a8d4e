"""Where kernels find what the host has laid out for them; known to both."""

from nvcoll._plan import DEVICE_FIELDS

LINE = 64
"""Bytes of a flag with its two values: flags of neighbours do not share a line."""
BLOCKS = 320
"""Most blocks of a launch: two on each multiprocessor of the largest GPU there is."""
TAGS = 64
"""Where in a rank's area, which begins with its board, the tags begin that others have told it, and its own."""
TAGS_RANK = 16
"""Bytes for a rank: two tags, by the parity of their epochs."""
EPOCHS = 64
"""Where in a rank's state the epochs of the blocks begin; its first word says whether a wait has failed."""
EPOCH = 16
"""Bytes for a block: its epoch, and that word again, so that whoever begins loads both at once."""
NEAR = sum(name.startswith("peer") and name != "peers" for name in DEVICE_FIELDS)
"""Ranks whose areas are arguments, so that their addresses need not be loaded."""


def deepens(itemsize: int) -> bool:
    """Tell whether threads can have several packs of elements of a size under way: of one byte, a pack has too many."""
    return itemsize > 1
