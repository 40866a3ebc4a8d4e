// What kernels call of NVSHMEM, over 64-bit addresses. A block of threads makes each call together, but for the last.
#define __NVSHMEM_NUMBA_SUPPORT__  // device state as a constant of each module, which the host fills
#include <nvshmem.h>
#include <nvshmemx.h>

typedef long long word;

// Let what all threads of the block have stored be seen by a network, which is to read it. Other GPUs do not read it.
static __device__ void show(word to, word rank) {
    if (nvshmem_ptr((void *)to, (int)rank) == nullptr) {
        __syncthreads();
        if (threadIdx.x == 0) __threadfence_system();
    }
}

// Begin to copy what the block has stored to another rank. `to` is my own address of the symmetric place.
extern "C" __device__ void nvcoll_put(word to, word source, word nbytes, word rank) {
    show(to, rank);
    nvshmemx_putmem_nbi_block((void *)to, (const void *)source, (size_t)nbytes, (int)rank);
}

// The same, and set a flag over there after the bytes.
extern "C" __device__ void nvcoll_put_signal(word to, word source, word nbytes, word flag, word tag, word rank) {
    show(to, rank);
    nvshmemx_putmem_signal_nbi_block((void *)to, (const void *)source, (size_t)nbytes, (uint64_t *)flag, (uint64_t)tag,
                                     NVSHMEM_SIGNAL_SET, (int)rank);
}

// Called by one thread that has seen a flag: do what this GPU needs, so that the bytes before it can be read.
extern "C" __device__ void nvcoll_landed(word flag, word tag) {
    nvshmem_uint64_test((uint64_t *)flag, NVSHMEM_CMP_EQ, (uint64_t)tag);
}
