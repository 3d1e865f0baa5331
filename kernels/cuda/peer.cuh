// What kernels that speak with the other GPUs of a node share: the group's buffers, loads and stores that other devices see,
// waits that end, sequence numbers. CUDA only. Knows no operation.
//
// Every rank allocates one symmetric buffer and maps those of all others, so an offset means the same thing on every rank.
// It begins with `kControlBytes` of control words; the regions behind it are where `PeerGroup` says. All of it is zeroed once,
// on all ranks, before the first launch on any of them, and again (after all ranks' streams drained) before it is used after a
// failure.
//
// Invariant: a rank writes into another's memory only where that one has finished reading: regions alternate between two
// halves by a sequence number, and whoever starts exchange s + 2 has seen that all ranks started s + 1, hence finished s.
// Invariant: sequence numbers live in device memory and are advanced by the kernels, so a replayed graph goes on counting.
// Every block of a launch reads the number of its own index, and together the blocks advance all `kBlocksMax` of them: they
// stay equal whatever the grids of earlier launches were. All ranks launch the same operations with the same arguments.
// Invariant: no wait is without end: it polls the abort word and the clock, and the first that gives up leaves a record in the
// status word and sets the failed word, which ends the waits of all other blocks and of all later launches. A launch that
// failed leaves its outputs untouched or half written; the step's result counts only if the status word is zero.
#pragma once

#include "common.cuh"

constexpr u32 kWorldMax = 8;
constexpr u32 kBlocksMax = 256;   // blocks of a launch that waits
constexpr u32 kRowsMax = 8192;    // rows that have a sequence number

// Offsets of the control words, in bytes.
constexpr u64 kFailed = 0;            // u32: a wait was given up; set here, never by another rank
constexpr u64 kSeqMeet = 1024;        // u32[kBlocksMax]: exchanges of pull and staged gather
constexpr u64 kSeqScatter = 2048;     // u32[kBlocksMax]: pieces of the two-shot all-reduce
constexpr u64 kSeqGather = 3072;      // u32[kBlocksMax]: gathers of small records
constexpr u64 kFlagsMeet = 8192;      // u32[kBlocksMax][kWorldMax]: the number that a rank's block has reached
constexpr u64 kFlagsScatter = 16384;  // the same: slices have been scattered
constexpr u64 kFlagsSpread = 24576;   // the same: sums have been spread
constexpr u64 kSeqRows = 32768;       // u32[kRowsMax]: exchanges of a row
constexpr u64 kControlBytes = 65536;

// What all launches get, by value. Offsets count from a symmetric buffer's base and are multiples of 256.
struct PeerGroup {
    u64 base[kWorldMax];  // symmetric buffers by rank, as this process maps them; beyond `world` unused
    u64 abort_word;       // u32 in host-mapped memory: not zero ends all waits
    u64 status_word;      // u64 in host-mapped memory: zero, or the record of the first wait that was given up
    u64 limit_ns;         // the longest that a wait may last
    u64 inbox;            // rows:    2 x rows x world x row_bytes
    u64 gather;           // records: 2 x world x 2 * gather_bytes
    u64 staging;          // pull and staged gather: 2 x staging_bytes
    u64 scatter;          // two-shot: 2 x scatter_bytes of slices, then 2 x scatter_bytes of sums
    u32 rank;
    u32 world;
    u32 rows;           // rows that the inbox holds
    u32 row_bytes;      // most bytes of a row, a multiple of 16
    u32 gather_bytes;   // most bytes of a rank in a gather of small records, a multiple of 16
    u32 staging_bytes;  // a multiple of 16 * world
    u32 scatter_bytes;  // a multiple of 16 * world
    u32 reserved;
};

// Who waits, for the record.
constexpr u32 kOpReduceAddNorm = 1;
constexpr u32 kOpAllReducePull = 2;
constexpr u32 kOpAllReduceTwoShot = 3;
constexpr u32 kOpAllGather = 4;
constexpr u32 kOpAllGatherStaged = 5;

// Why it gave up.
constexpr u64 kTimedOut = 1;
constexpr u64 kAborted = 2;

// ---- memory that other devices see ----

// A word as it is now, wherever it was written.
__device__ __forceinline__ u32 load_now(const u32* from) {
    u32 out;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(out) : "l"(from));
    return out;
}

// Sixteen bytes as they are now. Each of the four words is whole; the four need not be of one store.
__device__ __forceinline__ uint4 load_now(const uint4* from) {
    uint4 out;
    asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out.x), "=r"(out.y), "=r"(out.z), "=r"(out.w)
                 : "l"(from));
    return out;
}

__device__ __forceinline__ void store_now(uint4* to, uint4 from) {
    asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(from.x), "r"(from.y), "r"(from.z), "r"(from.w)
                 : "memory");
}

// What was written before a `store_release` of the value read is seen after this.
__device__ __forceinline__ u32 load_acquire(const u32* from) {
    u32 out;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(out) : "l"(from) : "memory");
    return out;
}

__device__ __forceinline__ void store_release(u32* to, u32 from) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(to), "r"(from) : "memory");
}

__device__ __forceinline__ u64 clock_ns() {
    u64 out;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(out));
    return out;
}

// ---- the group ----

__device__ __forceinline__ u32* words(const PeerGroup& group, u32 rank, u64 offset) {
    return reinterpret_cast<u32*>(group.base[rank] + offset);
}

__device__ __forceinline__ uint4* vecs(const PeerGroup& group, u32 rank, u64 offset) {
    return reinterpret_cast<uint4*>(group.base[rank] + offset);
}

__device__ __forceinline__ bool has_failed(const PeerGroup& group) {
    return load_now(words(group, group.rank, kFailed)) != 0;
}

// One thread's patience. Looks at the abort word and the clock every `kSpins` calls: reading the host's memory takes as long as
// a whole exchange should.
struct Patience {
    static constexpr u32 kSpins = 1024;
    u32 spins = 0;
    u64 since = 0;

    // Whether to stop waiting for `peer` at `place` (a block or a row). The first to stop leaves the record.
    __device__ __forceinline__ bool is_over(const PeerGroup& group, u32 op, u32 peer, u32 place) {
        spins++;
        if (spins % kSpins != 0) return false;
        if (has_failed(group)) return true;
        const u64 now = clock_ns();
        u64 why = 0;
        if (load_now(reinterpret_cast<const u32*>(group.abort_word)) != 0) {
            why = kAborted;
        } else if (since == 0) {
            since = now;
        } else if (now - since > group.limit_ns) {
            why = kTimedOut;
        }
        if (why == 0) return false;
        if (atomicExch(words(group, group.rank, kFailed), 1u) == 0) {
            const u64 record = why | u64(op) << 8 | u64(group.rank) << 16 | u64(peer) << 24 | u64(place) << 32;
            *reinterpret_cast<volatile u64*>(group.status_word) = record;
            __threadfence_system();
        }
        return true;
    }
};

// ---- blocks that meet ----

// Tells this block's counterparts on all ranks that it has reached `number`, with all that its threads wrote before.
__device__ __forceinline__ void signal(const PeerGroup& group, u64 flags, u32 number) {
    __syncthreads();
    const u32 peer = threadIdx.x;
    if (peer < group.world && peer != group.rank) {
        store_release(words(group, peer, flags) + blockIdx.x * kWorldMax + group.rank, number);
    }
}

// Waits until this block's counterparts on all ranks have reached `number`; what they wrote before is seen. True, for all
// threads, if any thread of the block comes with `failed` or a wait was given up.
__device__ __forceinline__ bool await(const PeerGroup& group, u64 flags, u32 number, u32 op, bool failed) {
    const u32 peer = threadIdx.x;
    if (!failed && peer < group.world && peer != group.rank) {
        const u32* flag = words(group, group.rank, flags) + blockIdx.x * kWorldMax + peer;
        Patience patience;
        while (i32(load_acquire(flag) - number) < 0) {
            if (patience.is_over(group, op, peer, blockIdx.x)) {
                failed = true;
                break;
            }
        }
    }
    return __syncthreads_or(failed);
}

// Sets all sequence numbers of a kind, each by the one block that may read it. The block's threads have met since they read.
__device__ __forceinline__ void advance(const PeerGroup& group, u64 kind, u32 number) {
    u32* numbers = words(group, group.rank, kind);
    for (u32 i = blockIdx.x + threadIdx.x * gridDim.x; i < kBlocksMax; i += blockDim.x * gridDim.x) numbers[i] = number;
}

// ---- clusters ----

// Blocks of this block's cluster, this block's place among them, this cluster's index: 1, 0 and the block's index where no
// cluster was launched.
struct Cluster {
    u32 size;
    u32 part;
    u32 index;
    u32 count;
};

__device__ __forceinline__ Cluster own_cluster() {
    Cluster out = {1, 0, blockIdx.x, gridDim.x};
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %cluster_nctarank;" : "=r"(out.size));
    asm("mov.u32 %0, %cluster_ctarank;" : "=r"(out.part));
    out.index = blockIdx.x / out.size;
    out.count = gridDim.x / out.size;
#endif
    return out;
}

// The halves of a meeting of the cluster's blocks: after both, all of them have begun, so their shared memory may be written.
__device__ __forceinline__ void cluster_arrive(const Cluster& cluster) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (cluster.size > 1) asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait(const Cluster& cluster) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (cluster.size > 1) asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// The sum of a value that each block of the cluster holds, in the order of the blocks. `shares`: `kWorldMax` floats of shared
// memory; two calls in a row use different ones. All threads of all blocks call it.
__device__ __forceinline__ float cluster_sum(const Cluster& cluster, float value, float* shares) {
    if (cluster.size == 1) return value;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (threadIdx.x < cluster.size) {
        const u32 own = u32(__cvta_generic_to_shared(shares + cluster.part));
        u32 there;
        asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(own), "r"(threadIdx.x));
        asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there), "f"(value) : "memory");
    }
    cluster_arrive(cluster);
    cluster_wait(cluster);
    float sum = 0.0f;
    for (u32 i = 0; i < cluster.size; i++) sum += shares[i];
    return sum;
#else
    return value;
#endif
}
