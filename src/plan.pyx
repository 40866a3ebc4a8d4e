# cython: language_level=3, freethreading_compatible=False
"""The hot path: find the plan of a call, fill in the pointers, drop the GIL, make ONE call.

Kernels see two C structs, both of 64-bit integers only, so that compiled text can read them by index:
`World` (one per rank and communicator) and `Call` (one per plan). `WORLD_FIELDS` and `CALL_FIELDS` name the
fields that kernels read, in order; `nvcoll.device` derives its indices from them.
"""
from libc.stdint cimport int64_t, uint64_t, uintptr_t
from libc.string cimport memcpy, memmove, memset

include "waiting.pxi"
include "plans.pxi"
include "launch.pxi"
