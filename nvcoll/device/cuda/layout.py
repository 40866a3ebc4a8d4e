"""Where kernels find what the host has laid out for them; known to both."""

from nvcoll._plan import DEVICE_FIELDS
from nvcoll.device.common import STAMP_BITS

LINE = 64
"""Bytes of a flag with its two values: flags of neighbours do not share a line."""
BLOCKS = 320
"""Most blocks of a launch: two on each multiprocessor of the largest GPU there is."""
HISTORY = 16
"""Where in a rank's state two words stand that differ if calls do: a sum over their tags, and the same negated."""
EPOCHS = 64
"""Where in a rank's state the epochs of the blocks begin; its first word says whether a wait has failed."""
EPOCH = 16
"""Bytes for a block: its epoch, and that word again, so that whoever begins loads both at once."""
NEAR = sum(name.startswith("peer") and name != "peers" for name in DEVICE_FIELDS)
"""Ranks whose areas are arguments, so that their addresses need not be loaded."""
FAILED = -(1 << 63)
"""What says in the state that a wait was over its deadline, else 0: it makes tags negative."""
LAST = (1 << 63 - STAMP_BITS) - 1
"""The last epoch. Then comes 2, so that halves go on taking turns, and no tag is taken for memory that is empty."""


def deepens(itemsize: int) -> bool:
    """Tell whether threads can have several packs of elements of a size under way: of one byte, a pack has too many."""
    return itemsize > 1
