// What kernels call of NVSHMEM, over 64-bit addresses. A block of threads makes calls together that begin to copy.
// Puts are not inlined: their many cases would stand in a kernel several times, and compilers would compute what these
// need at its start, for near ranks too.
#define __NVSHMEM_NUMBA_SUPPORT__  // device state as a constant of each module, which the host fills
#include <nvshmem.h>
#include <nvshmemx.h>

typedef long long word;

// Where a symmetric place of another rank can be stored to, or 0. `to` is my own address of the place, here and below.
extern "C" __device__ word nvcoll_mapped(word to, word rank) { return (word)nvshmem_ptr((void *)to, (int)rank); }

// Begin to copy what the block has stored to another rank.
extern "C" __device__ __noinline__ void nvcoll_put(word to, word source, word nbytes, word rank) {
    nvshmemx_putmem_nbi_block((void *)to, (const void *)source, (size_t)nbytes, (int)rank);
}

// The same, and set a flag over there after the bytes.
extern "C" __device__ __noinline__ void nvcoll_put_signal(word to, word source, word nbytes, word flag, word tag,
                                                          word rank) {
    nvshmemx_putmem_signal_nbi_block((void *)to, (const void *)source, (size_t)nbytes, (uint64_t *)flag, (uint64_t)tag,
                                     NVSHMEM_SIGNAL_SET, (int)rank);
}

// Called by one thread that has seen a flag: do what this GPU needs, so that the bytes before it can be read.
extern "C" __device__ void nvcoll_landed(word flag, word tag) {
    nvshmem_uint64_test((uint64_t *)flag, NVSHMEM_CMP_EQ, (uint64_t)tag);
}
