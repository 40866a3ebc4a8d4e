"""Buffers: what a verb takes (`specs`, `device_specs`), and arrays on the symmetric heap (`array`, `device`)."""

from .array import Allocation, Buffer, invalidate
from .device import DeviceBuffer
from .device_specs import parse_device
from .specs import IN_PLACE, IN_PLACES, InPlace, Spec, check_pair, is_in_place, parse, while_alive
from .streams import (
    as_stream,
    captured_stream,
    current_stream,
    keep_for,
    refuse_capture,
    refuse_to_miss_a_graph,
    working_stream,
)

__all__ = [
    "IN_PLACE",
    "IN_PLACES",
    "Allocation",
    "Buffer",
    "DeviceBuffer",
    "InPlace",
    "Spec",
    "as_stream",
    "captured_stream",
    "check_pair",
    "current_stream",
    "invalidate",
    "is_in_place",
    "keep_for",
    "parse",
    "parse_device",
    "refuse_capture",
    "refuse_to_miss_a_graph",
    "while_alive",
    "working_stream",
]
