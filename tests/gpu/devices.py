"""How many GPUs this host has, asked of no driver: what collects tests must not touch one.

``from tests.gpu.devices import GPUS``
"""

from pathlib import Path

GPUS = len(list(Path("/dev").glob("nvidia[0-9]*")))
