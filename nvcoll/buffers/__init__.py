"""Buffers: what may be passed to a verb (`specs`), and arrays on the symmetric heap (`array`)."""

from .array import Allocation, Buffer, invalidate
from .specs import IN_PLACE, InPlace, Spec, check_pair, is_in_place, parse

__all__ = ["IN_PLACE", "Allocation", "Buffer", "InPlace", "Spec", "check_pair", "invalidate", "is_in_place", "parse"]
