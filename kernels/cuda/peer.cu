// Collectives between the GPUs of one node over peer memory (see peer.cuh for the protocol).
//
// Invariant: sums are formed in f32 in rank order, beginning with +0, and rounded once: all ranks hold the same bits, and
// push, pull and two-shot the same bits as each other.
// Invariant: the grids hold only blocks that are resident at once: at most `kBlocksMax`, and at most what the device holds of
// the kernel (512 threads, up to 128 registers: one block an SM always fits).
//
// Common arguments: `group`: PeerGroup by value. Every pointer is 16-byte aligned. All ranks launch the same kernel with the
// same grid, block and sizes; only `group.rank`, `group.base` and the data pointers differ. Shared memory: static only.
#include "peer.cuh"

// Adds the values of 16 bytes of T.
template <typename T> __device__ __forceinline__ void accumulate(uint4 bits, float (&sum)[Vec<T>::kLen]) {
    Vec<T> values;
    *reinterpret_cast<uint4*>(&values) = bits;
#pragma unroll
    for (int i = 0; i < Vec<T>::kLen; i++) sum[i] += to_float(values.at[i]);
}

// Rounds a sum to 16 bytes of T.
template <typename T> __device__ __forceinline__ uint4 rounded(const float (&sum)[Vec<T>::kLen]) {
    const Vec<T> values = pack<T>(sum);
    return *reinterpret_cast<const uint4*>(&values);
}

// Copies this block's vectors among `count`, four of a thread in flight: those with (v / blockDim.x) % gridDim.x == blockIdx.x.
__device__ __forceinline__ void copy_own(uint4* to, const uint4* from, u64 count) {
    constexpr int kAhead = 4;
    const u64 stride = u64(gridDim.x) * blockDim.x;
    for (u64 v = u64(blockIdx.x) * blockDim.x + threadIdx.x; v < count; v += kAhead * stride) {
        uint4 held[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; i++) {
            if (v + i * stride < count) held[i] = __ldcg(from + v + i * stride);
        }
#pragma unroll
        for (int i = 0; i < kAhead; i++) {
            if (v + i * stride < count) to[v + i * stride] = held[i];
        }
    }
}

// ---- reduce, add, norm: push, the data is its own flag ----
//
// A word that has not come is 0 in the inbox. On the way every word has its top bit flipped, and the one word that would become
// 0 (0x80000000: -0.0, or a 16-bit -0.0 above +0.0) travels as +0, which no sum in f32 that begins with +0 can tell apart. The
// reader puts the zeros back as it reads.

__device__ __forceinline__ u32 wire(u32 word) { return word == 0x80000000u ? 0x80000000u : word ^ 0x80000000u; }

__device__ __forceinline__ uint4 to_wire(uint4 v) { return make_uint4(wire(v.x), wire(v.y), wire(v.z), wire(v.w)); }

__device__ __forceinline__ uint4 from_wire(uint4 v) {
    return make_uint4(v.x ^ 0x80000000u, v.y ^ 0x80000000u, v.z ^ 0x80000000u, v.w ^ 0x80000000u);
}

__device__ __forceinline__ bool has_come(uint4 v) { return v.x != 0 && v.y != 0 && v.z != 0 && v.w != 0; }

// Where `rank`'s row lies in every inbox.
__device__ __forceinline__ u64 inbox_row(const PeerGroup& group, u32 row, u32 rank) {
    const u32 half = words(group, group.rank, kSeqRows)[row] & 1;
    return group.inbox + ((u64(half) * group.rows + row) * group.world + rank) * group.row_bytes;
}

// Reads one vector of every other rank from the own inbox and empties it; `got[r]` is what rank r sent, as it travelled, and
// means nothing where r is this rank. False if the wait was given up.
template <int kWorld>
__device__ __forceinline__ bool take(const PeerGroup& group, u64 offset, u32 row, uint4 (&got)[kWorld]) {
    uint4* slot = vecs(group, group.rank, offset);
    const u32 step = group.row_bytes / 16;
    Patience patience;
    u32 missing;
    do {
        missing = kNone;
#pragma unroll
        for (int r = 0; r < kWorld; r++) {
            got[r] = make_uint4(1, 1, 1, 1);
            if (r < group.world && r != group.rank) got[r] = load_now(slot + r * step);
        }
#pragma unroll
        for (int r = 0; r < kWorld; r++) {
            if (!has_come(got[r])) missing = r;
        }
    } while (missing != kNone && !patience.is_over(group, kOpReduceAddNorm, missing, row));
#pragma unroll
    for (int r = 0; r < kWorld; r++) {
        if (r < group.world && r != group.rank) store_now(slot + r * step, make_uint4(0, 0, 0, 0));
    }
    return missing == kNone;
}

// The sums over the block, for all threads, and whether any thread failed. `scratch`, `faults`: not used by the call before.
__device__ __forceinline__ float block_sum_or_fail(float value, bool& failed, float* scratch, u32* faults) {
    value = warp_sum(value);
    const bool any = __any_sync(0xFFFFFFFFu, failed);
    if (threadIdx.x % kWarp == 0) {
        scratch[threadIdx.x / kWarp] = value;
        faults[threadIdx.x / kWarp] = any;
    }
    __syncthreads();
    const u32 lane = threadIdx.x % kWarp;
    const bool counts = lane < blockDim.x / kWarp;
    failed = __any_sync(0xFFFFFFFFu, counts && faults[lane] != 0);
    return warp_sum(counts ? scratch[lane] : 0.0f);
}

// Brings a vector of floats into the L2 cache: it is no kernel's output, so this needs no wait.
__device__ __forceinline__ void prefetch(const float* from, u32 length) {
    const u32 line = (blockIdx.x * blockDim.x + threadIdx.x) * 32;
    if (line < length) asm volatile("prefetch.global.L2 [%0];" ::"l"(from + line));
}

template <typename T, int kWorld, int kVecs>
__device__ __forceinline__ void reduce_add_norm(const PeerGroup& group, const T* partial, float* residual, const float* weight,
                                                T* out, u32 rows, u32 hidden, float eps) {
    constexpr int kLen = Vec<T>::kLen;
    __shared__ float scratch[2][kWarpsMax];
    __shared__ u32 faults[2][kWarpsMax];
    __shared__ float shares[2][kWorldMax];
    const Cluster cluster = own_cluster();
    cluster_arrive(cluster);
    const u32 num_vecs = hidden / kLen;
    const u32 first = cluster.part * blockDim.x + threadIdx.x;
    const u32 stride = cluster.size * blockDim.x;
    bool failed = has_failed(group);

    for (u32 row = cluster.index; row < rows; row += cluster.count) {
        const u64 there = inbox_row(group, row, group.rank);
        uint4 bits[kVecs];
#pragma unroll
        for (int i = 0; i < kVecs; i++) {
            const u32 v = first + i * stride;
            if (v < num_vecs) bits[i] = reinterpret_cast<const uint4*>(partial + u64(row) * hidden)[v];
        }
#pragma unroll
        for (int i = 0; i < kVecs; i++) {
            const u32 v = first + i * stride;
            if (v >= num_vecs || failed) continue;
            bits[i] = to_wire(bits[i]);
#pragma unroll
            for (int r = 1; r < kWorld; r++) {
                const u32 peer = group.rank + r < group.world ? group.rank + r : group.rank + r - group.world;
                if (r < group.world) store_now(vecs(group, peer, there) + v, bits[i]);
            }
        }
    }
    pdl_launch();
    cluster_wait(cluster);

    u32 turn = 0;
    for (u32 row = cluster.index; row < rows; row += cluster.count, turn ^= 1) {
        const u64 here = inbox_row(group, row, 0);
        float values[kVecs][kLen];
        uint4 own[kVecs];
        float squares = 0.0f;
#pragma unroll
        for (int i = 0; i < kVecs; i++) {
            const u32 v = first + i * stride;
            if (v >= num_vecs) continue;
            own[i] = reinterpret_cast<const uint4*>(partial + u64(row) * hidden)[v];
            const float4* from = reinterpret_cast<const float4*>(residual + u64(row) * hidden + v * kLen);
#pragma unroll
            for (int j = 0; j < kLen / 4; j++) *reinterpret_cast<float4*>(&values[i][4 * j]) = from[j];
        }
#pragma unroll
        for (int i = 0; i < kVecs; i++) {
            const u32 v = first + i * stride;
            if (v >= num_vecs || failed) continue;
            uint4 got[kWorld];
            failed = !take<kWorld>(group, here + u64(v) * 16, row, got);
            float sum[kLen] = {};
#pragma unroll
            for (int r = 0; r < kWorld; r++) {
                const uint4 term = r == group.rank ? own[i] : from_wire(got[r]);
                if (r < group.world) accumulate<T>(term, sum);
            }
#pragma unroll
            for (int j = 0; j < kLen; j++) {
                values[i][j] += sum[j];
                squares += values[i][j] * values[i][j];
            }
        }
        squares = block_sum_or_fail(squares, failed, scratch[turn], faults[turn]);
        squares = cluster_sum(cluster, squares, shares[turn]);
        if (failed) continue;
        const float scale = rsqrtf(squares / float(hidden) + eps);
#pragma unroll
        for (int i = 0; i < kVecs; i++) {
            const u32 v = first + i * stride;
            if (v >= num_vecs) continue;
            float4* to = reinterpret_cast<float4*>(residual + u64(row) * hidden + v * kLen);
            float normed[kLen];
#pragma unroll
            for (int j = 0; j < kLen / 4; j++) {
                to[j] = *reinterpret_cast<const float4*>(&values[i][4 * j]);
                const float4 w = __ldg(reinterpret_cast<const float4*>(weight + v * kLen) + j);
                normed[4 * j] = values[i][4 * j] * scale * w.x;
                normed[4 * j + 1] = values[i][4 * j + 1] * scale * w.y;
                normed[4 * j + 2] = values[i][4 * j + 2] * scale * w.z;
                normed[4 * j + 3] = values[i][4 * j + 3] * scale * w.w;
            }
            reinterpret_cast<uint4*>(out + u64(row) * hidden)[v] = rounded<T>(normed);
        }
        if (cluster.part == 0 && threadIdx.x == 0) words(group, group.rank, kSeqRows)[row] += 1;
    }
}

// residual[rows, hidden] += the ranks' sum of partial[rows, hidden]; out = residual * rsqrt(mean(residual^2) + eps) * weight.
//
// Arguments: PeerGroup group, const T* partial, float* residual, const float* weight [hidden], T* out, u32 rows, u32 hidden,
//   float eps. `out` may be `partial`. rows <= group.rows; hidden is a multiple of 8; hidden * sizeof(T) <= group.row_bytes.
// Cluster (sm_90 and newer; a launch attribute): c = 1, 2, 4 or 8 blocks share a row; without the attribute c is 1.
// Block: the multiple of 32 at or above hidden * sizeof(T) / 16 / c, 512 at most. hidden <= 8192 * c.
// Grid: c * min(rows, blocks that are resident / c). Blocks take rows in turns.
// A row's result depends on block and cluster size (the order of the sum of squares), not on the other rows.
#define PEER_REDUCE_ADD_NORM(NAME, T, VECS)                                                                                  \
    extern "C" __global__ void __launch_bounds__(512, 1)                                                                        \
        peer_reduce_add_norm_##NAME(const __grid_constant__ PeerGroup group, const T* partial, float* residual,              \
                                    const float* weight, T* out, u32 rows, u32 hidden, float eps) {                          \
        prefetch(weight, hidden);                                                                                            \
        pdl_wait();                                                                                                          \
        if (group.world <= 2) {                                                                                              \
            reduce_add_norm<T, 2, VECS>(group, partial, residual, weight, out, rows, hidden, eps);                           \
        } else if (group.world <= 4) {                                                                                       \
            reduce_add_norm<T, 4, VECS>(group, partial, residual, weight, out, rows, hidden, eps);                           \
        } else {                                                                                                             \
            reduce_add_norm<T, 8, VECS>(group, partial, residual, weight, out, rows, hidden, eps);                           \
        }                                                                                                                    \
    }
PEER_REDUCE_ADD_NORM(f32, float, 4)
PEER_REDUCE_ADD_NORM(f16, f16, 2)
PEER_REDUCE_ADD_NORM(bf16, bf16, 2)

// ---- all-reduce, one shot: every rank reads all ---

template <typename T> __device__ __forceinline__ void all_reduce_pull(const PeerGroup& group, const T* in, T* out, u64 length) {
    constexpr int kLen = Vec<T>::kLen;
    const uint4* from = reinterpret_cast<const uint4*>(in);
    uint4* to = reinterpret_cast<uint4*>(out);
    const u64 total = length / kLen;
    const u64 capacity = group.staging_bytes / 16;
    const u64 first = u64(blockIdx.x) * blockDim.x + threadIdx.x;
    const u64 stride = u64(gridDim.x) * blockDim.x;
    u32 number = words(group, group.rank, kSeqMeet)[blockIdx.x];
    bool failed = has_failed(group);
    for (u64 begin = 0; begin < total; begin += capacity) {
        const u64 count = total - begin < capacity ? total - begin : capacity;
        const u64 staged = group.staging + u64(number & 1) * group.staging_bytes;
        number++;
        if (!failed) copy_own(vecs(group, group.rank, staged), from + begin, count);
        if (__syncthreads_or(failed)) return;
        signal(group, kFlagsMeet, number);
        failed = await(group, kFlagsMeet, number, kOpAllReducePull, failed);
        if (failed) return;
        for (u64 v = first; v < count; v += stride) {
            uint4 got[kWorldMax];
#pragma unroll
            for (u32 r = 0; r < kWorldMax; r++) {
                if (r < group.world) got[r] = load_now(vecs(group, r, staged) + v);
            }
            float sum[kLen] = {};
#pragma unroll
            for (u32 r = 0; r < kWorldMax; r++) {
                if (r < group.world) accumulate<T>(got[r], sum);
            }
            to[begin + v] = rounded<T>(sum);
        }
    }
    advance(group, kSeqMeet, number);
}

// out = the ranks' sum of `in`, rounded once.
//
// Arguments: PeerGroup group, const T* in, T* out, u64 length (elements, a multiple of 8). `out` may be `in`. A length above
//   group.staging_bytes goes in pieces.
// Block: 512. Grid: at most kBlocksMax and what is resident; on all ranks the same.
#define PEER_ALL_REDUCE_PULL(NAME, T)                                                                            \
    extern "C" __global__ void __launch_bounds__(512, 1)                                                            \
        peer_all_reduce_pull_##NAME(const __grid_constant__ PeerGroup group, const T* in, T* out, u64 length) {  \
        pdl_wait();                                                                                              \
        pdl_launch();                                                                                            \
        all_reduce_pull<T>(group, in, out, length);                                                              \
    }
PEER_ALL_REDUCE_PULL(f32, float)
PEER_ALL_REDUCE_PULL(f16, f16)
PEER_ALL_REDUCE_PULL(bf16, bf16)

// ---- all-reduce, two shots: every rank sums a slice and spreads it ----
//
// A piece has `world` slices of `slice` vectors. Within a slice a vector belongs to the block (v / blockDim.x) % gridDim.x, on
// all ranks: a block waits for its counterparts only. The slices of the next piece are on their way while one is summed.
// A slice's half is written again two pieces later: by then the writer has seen the sums of this piece (kFlagsSpread), so they
// were formed. A half of sums is written again after the scatter flag of that piece, which its reader sends after copying out.

struct TwoShot {
    const uint4* from;
    uint4* to;
    u64 total;   // vectors
    u32 slice;   // vectors of a slice in a full piece
    u32 number;  // of piece 0
};

// Vectors of slice `owner` in a piece that begins at `begin`.
__device__ __forceinline__ u32 slice_length(const TwoShot& work, u64 begin, u32 owner) {
    const u64 at = begin + u64(owner) * work.slice;
    if (at >= work.total) return 0;
    return u32(work.total - at < work.slice ? work.total - at : work.slice);
}

// Where rank `from`'s term (of the sums: slice `from`) of a piece lies.
__device__ __forceinline__ u64 scatter_slot(const PeerGroup& group, const TwoShot& work, u32 piece, u32 from, bool sums) {
    const u64 half = (work.number + piece) & 1;
    return group.scatter + ((sums ? 2 : 0) + half) * group.scatter_bytes + u64(from) * work.slice * 16;
}

// Sends every rank its slice of a piece.
__device__ __forceinline__ void scatter(const PeerGroup& group, const TwoShot& work, u32 piece) {
    const u64 begin = u64(piece) * work.slice * group.world;
    for (u32 step = 1; step < group.world; step++) {
        const u32 peer = group.rank + step < group.world ? group.rank + step : group.rank + step - group.world;
        const uint4* from = work.from + begin + u64(peer) * work.slice;
        uint4* to = vecs(group, peer, scatter_slot(group, work, piece, group.rank, false));
        copy_own(to, from, slice_length(work, begin, peer));
    }
    signal(group, kFlagsScatter, work.number + piece + 1);
}

// Sums the own slice of a piece, in rank order, and spreads it.
template <typename T, int kWorld>
__device__ __forceinline__ void sum_and_spread(const PeerGroup& group, const TwoShot& work, u32 piece) {
    const u64 begin = (u64(piece) * group.world + group.rank) * work.slice;
    const u64 slot = scatter_slot(group, work, piece, group.rank, true);
    const u32 count = slice_length(work, u64(piece) * group.world * work.slice, group.rank);
    const u32 stride = gridDim.x * blockDim.x;
    constexpr int kAhead = kWorld <= 2 ? 4 : kWorld <= 4 ? 2 : 1;
    for (u32 v = blockIdx.x * blockDim.x + threadIdx.x; v < count; v += kAhead * stride) {
        uint4 got[kAhead][kWorld];
#pragma unroll
        for (int i = 0; i < kAhead; i++) {
            const u32 at = v + i * stride;
#pragma unroll
            for (int r = 0; r < kWorld; r++) {
                if (r >= group.world || at >= count) continue;
                const uint4* term = vecs(group, group.rank, scatter_slot(group, work, piece, r, false));
                got[i][r] = __ldcg((r == group.rank ? work.from + begin : term) + at);
            }
        }
#pragma unroll
        for (int i = 0; i < kAhead; i++) {
            const u32 at = v + i * stride;
            if (at >= count) continue;
            float sum[Vec<T>::kLen] = {};
#pragma unroll
            for (int r = 0; r < kWorld; r++) {
                if (r < group.world) accumulate<T>(got[i][r], sum);
            }
            const uint4 bits = rounded<T>(sum);
            work.to[begin + at] = bits;
#pragma unroll
            for (int r = 1; r < kWorld; r++) {
                const u32 peer = group.rank + r < group.world ? group.rank + r : group.rank + r - group.world;
                if (r < group.world) vecs(group, peer, slot)[at] = bits;
            }
        }
    }
    signal(group, kFlagsSpread, work.number + piece + 1);
}

// Copies what the other ranks have summed to the output.
__device__ __forceinline__ void collect(const PeerGroup& group, const TwoShot& work, u32 piece) {
    const u64 begin = u64(piece) * work.slice * group.world;
    for (u32 step = 1; step < group.world; step++) {
        const u32 owner = group.rank + step < group.world ? group.rank + step : group.rank + step - group.world;
        const uint4* from = vecs(group, group.rank, scatter_slot(group, work, piece, owner, true));
        uint4* to = work.to + begin + u64(owner) * work.slice;
        copy_own(to, from, slice_length(work, begin, owner));
    }
}

template <typename T, int kWorld>
__device__ __forceinline__ void all_reduce_two_shot(const PeerGroup& group, const T* in, T* out, u64 length) {
    TwoShot work;
    work.from = reinterpret_cast<const uint4*>(in);
    work.to = reinterpret_cast<uint4*>(out);
    work.total = length / Vec<T>::kLen;
    work.number = words(group, group.rank, kSeqScatter)[blockIdx.x];
    const u64 whole = (work.total + group.world - 1) / group.world;
    const u32 most = group.scatter_bytes / 16 / group.world;
    const u32 pieces = u32((whole + most - 1) / most);
    work.slice = u32((whole + pieces - 1) / pieces);
    bool failed = __syncthreads_or(has_failed(group));
    if (failed) return;
    for (u32 piece = 0; piece < 2 && piece < pieces; piece++) scatter(group, work, piece);
    for (u32 piece = 0; piece < pieces; piece++) {
        const u32 reached = work.number + piece + 1;
        failed = await(group, kFlagsScatter, reached, kOpAllReduceTwoShot, failed);
        if (failed) return;
        sum_and_spread<T, kWorld>(group, work, piece);
        failed = await(group, kFlagsSpread, reached, kOpAllReduceTwoShot, failed);
        if (failed) return;
        collect(group, work, piece);
        if (piece + 2 < pieces) scatter(group, work, piece + 2);
    }
    advance(group, kSeqScatter, work.number + pieces);
}

// out = the ranks' sum of `in`, rounded once.
//
// Arguments: PeerGroup group, const T* in, T* out, u64 length (elements, a multiple of 8, not 0). `out` may be `in`. A length
//   above group.scatter_bytes goes in pieces of equal size, so group.scatter_bytes bounds memory, not length.
// Block: 512. Grid: at most kBlocksMax and what is resident; on all ranks the same.
#define PEER_ALL_REDUCE_TWO_SHOT(NAME, T)                                                                           \
    extern "C" __global__ void __launch_bounds__(512, 1)                                                               \
        peer_all_reduce_two_shot_##NAME(const __grid_constant__ PeerGroup group, const T* in, T* out, u64 length) { \
        pdl_wait();                                                                                                 \
        pdl_launch();                                                                                               \
        if (group.world <= 2) {                                                                                     \
            all_reduce_two_shot<T, 2>(group, in, out, length);                                                      \
        } else if (group.world <= 4) {                                                                              \
            all_reduce_two_shot<T, 4>(group, in, out, length);                                                      \
        } else {                                                                                                    \
            all_reduce_two_shot<T, 8>(group, in, out, length);                                                      \
        }                                                                                                           \
    }
PEER_ALL_REDUCE_TWO_SHOT(f32, float)
PEER_ALL_REDUCE_TWO_SHOT(f16, f16)
PEER_ALL_REDUCE_TWO_SHOT(bf16, bf16)

// ---- all-gather of small records: push, a flag in every eight bytes ----
//
// A store carries two words of data, each with the exchange's number beside it, so no store needs to be whole beyond eight
// bytes. The reader puts zeros back: a number never meets an old one. 2 follows the highest number: 0 means that nothing has
// come, and odd and even must go on in turns.

// out[world][bytes] = every rank's in[bytes].
//
// Arguments: PeerGroup group, const void* in, void* out, u32 bytes. bytes is a multiple of 8 and at most group.gather_bytes;
//   pointers are 8-byte aligned; `in` and `out` do not overlap.
// Block: 256. Grid: at most kBlocksMax and what is resident; bytes / 8 * world / 256, rounded up, is enough. On all ranks the
//   same.
extern "C" __global__ void __launch_bounds__(256)
    peer_all_gather(const __grid_constant__ PeerGroup group, const uint2* in, uint2* out, u32 bytes) {
    pdl_wait();
    const u32 units = bytes / 8;
    const u32 first = blockIdx.x * blockDim.x + threadIdx.x;
    const u32 stride = gridDim.x * blockDim.x;
    const u32 before = words(group, group.rank, kSeqGather)[blockIdx.x];
    const u32 number = before == kNone ? 2 : before + 1;
    const u64 half = group.gather + u64(number & 1) * group.world * group.gather_bytes * 2;
    bool failed = has_failed(group);
    for (u32 i = first; i < units * group.world && !failed; i += stride) {
        const u32 peer = i / units;
        const u32 unit = i % units;
        const uint2 data = in[unit];
        if (peer == group.rank) {
            out[u64(peer) * units + unit] = data;
        } else {
            uint4* to = vecs(group, peer, half + u64(group.rank) * group.gather_bytes * 2) + unit;
            store_now(to, make_uint4(data.x, number, data.y, number));
        }
    }
    pdl_launch();
    for (u32 i = first; i < units * group.world && !failed; i += stride) {
        const u32 peer = i / units;
        const u32 unit = i % units;
        if (peer == group.rank) continue;
        uint4* slot = vecs(group, group.rank, half + u64(peer) * group.gather_bytes * 2) + unit;
        Patience patience;
        uint4 got = load_now(slot);
        while (!failed && (got.y != number || got.w != number)) {
            failed = patience.is_over(group, kOpAllGather, peer, blockIdx.x);
            got = load_now(slot);
        }
        if (failed) break;
        store_now(slot, make_uint4(0, 0, 0, 0));
        out[u64(peer) * units + unit] = make_uint2(got.x, got.z);
    }
    if (!__syncthreads_or(failed)) advance(group, kSeqGather, number);
}

// ---- all-gather of larger records: push, a flag for each block ----

// out[world][bytes] = every rank's in[bytes].
//
// Arguments: PeerGroup group, const void* in, void* out, u64 bytes, a multiple of 16; `in` and `out` do not overlap. A piece is
//   group.staging_bytes / world, so that bounds memory, not bytes.
// Block: 512. Grid: at most kBlocksMax and what is resident; on all ranks the same.
extern "C" __global__ void __launch_bounds__(512, 1)
    peer_all_gather_staged(const __grid_constant__ PeerGroup group, const uint4* in, uint4* out, u64 bytes) {
    pdl_wait();
    pdl_launch();
    const u64 total = bytes / 16;
    const u64 capacity = group.staging_bytes / 16 / group.world;
    const u64 first = u64(blockIdx.x) * blockDim.x + threadIdx.x;
    const u64 stride = u64(gridDim.x) * blockDim.x;
    u32 number = words(group, group.rank, kSeqMeet)[blockIdx.x];
    bool failed = has_failed(group);
    for (u64 begin = 0; begin < total; begin += capacity) {
        const u64 count = total - begin < capacity ? total - begin : capacity;
        const u64 staged = group.staging + u64(number & 1) * group.staging_bytes;
        number++;
        for (u64 v = first; v < count && !failed; v += stride) {
            const uint4 bits = in[begin + v];
            out[group.rank * total + begin + v] = bits;
            for (u32 step = 1; step < group.world; step++) {
                const u32 peer = group.rank + step < group.world ? group.rank + step : group.rank + step - group.world;
                vecs(group, peer, staged + group.rank * capacity * 16)[v] = bits;
            }
        }
        if (__syncthreads_or(failed)) return;
        signal(group, kFlagsMeet, number);
        failed = await(group, kFlagsMeet, number, kOpAllGatherStaged, failed);
        if (failed) return;
        for (u32 step = 1; step < group.world; step++) {
            const u32 peer = group.rank + step < group.world ? group.rank + step : group.rank + step - group.world;
            copy_own(out + peer * total + begin, vecs(group, group.rank, staged + peer * capacity * 16), count);
        }
    }
    advance(group, kSeqMeet, number);
}
