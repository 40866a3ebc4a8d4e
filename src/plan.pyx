# cython: language_level=3, freethreading_compatible=False
"""The hot path: find the plan of a call, fill in the pointers, drop the GIL, make ONE call.

Kernels see two C structs, both of 64-bit integers only, so that compiled text can read them by index:
`World` (one per rank and communicator) and `Call` (one per plan). `WORLD_FIELDS` and `CALL_FIELDS` name the
fields that kernels read, in order; `nvcoll.device` derives its indices from them.

Here, too, is what C structs say of memory on a GPU: spans, which the fast route reads, and DLPack.
"""
from cpython.pycapsule cimport (
    PyCapsule_Destructor, PyCapsule_GetPointer, PyCapsule_IsValid, PyCapsule_New, PyCapsule_SetName,
)
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memmove, memset

from time import sleep

include "waiting.pxi"
include "dlpack.pxi"
include "views.pxi"
include "spans.pxi"
include "plans.pxi"
include "launch.pxi"
include "device_plans.pxi"
include "queue.pxi"
