// A rank's part of rows of logits, and the records that say what is best in it.
//
// Invariant: the better of two tokens is the one of the higher logit, then the one of the lower id; neither -inf nor NaN is a
// token.
#pragma once

#include "common.cuh"

// ---- rows, records ----

// A row's parameters, as the host wrote them. A row without a slot is padding: nothing is computed or written for it.
struct Sample {
    u32 slot;
    u32 output_index;
    u32 seed_lo;
    u32 seed_hi;
    float temperature;  // 0 takes the largest logit
    u32 top_k;          // 0 is off
    float top_p;        // 1 is off
    float min_p;        // 0 is off
};

// The best token of a part of a row; -inf and kNone where there is none. 16 bytes.
struct Best {
    double value;
    u32 id;
    u32 reserved;
};

// Maps a logit to a key of the same order; -0 and 0 are one.
__device__ __forceinline__ u32 logit_key(float logit) {
    const u32 bits = __float_as_uint(logit + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float key_logit(u32 key) { return __uint_as_float(key >> 31 ? key & 0x7FFFFFFFu : ~key); }

// A logit that counts: neither -inf nor NaN.
__device__ __forceinline__ bool counts(float logit) { return logit > -infinity(); }

// Logit and id in one number: the larger is better, ties go to the lower id; 0 is none.
__device__ __forceinline__ u64 ranked(float logit, u32 id) { return u64(logit_key(logit)) << 32 | u32(~id); }

__device__ __forceinline__ u64 larger(u64 a, u64 b) { return a > b ? a : b; }

// The largest over the block, for all threads. `scratch`: kWarpsMax values; as `block_sum`.
__device__ __forceinline__ u64 block_largest(u64 value, u64* scratch) {
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) value = larger(value, shuffle_xor(value, mask));
    if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
    __syncthreads();
    const u32 lane = threadIdx.x % kWarp;
    value = lane < blockDim.x / kWarp ? scratch[lane] : 0;
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) value = larger(value, shuffle_xor(value, mask));
    return value;
}

__device__ __forceinline__ Best better(const Best& a, const Best& b) {
    return b.value > a.value || (b.value == a.value && b.id < a.id) ? b : a;
}

__device__ __forceinline__ Best no_best() { return {-double(infinity()), kNone, 0}; }

__device__ __forceinline__ Best warp_best(Best best) {
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
        best = better(best, {shuffle_xor(best.value, mask), shuffle_xor(best.id, mask), 0});
    }
    return best;
}

// ---- a row's own logits, by fours of ids ----

// This rank's part of one row. A quad is the four ids that share a Philox block: 4q to 4q + 3.
struct Row {
    const float* logits;  // of first_id
    u32 first_id;
    u32 end_id;
    bool aligned;         // quads are 16-byte aligned
};

__device__ __forceinline__ Row own_row(const float* logits, u32 width, u32 lead, u32 owned, u32 first_id, u32 row) {
    const float* at = logits + u64(row) * width + lead;
    return {at, first_id, first_id + owned, (u64(at) / 4 - first_id) % 4 == 0};
}

__device__ __forceinline__ u32 first_quad(const Row& row) { return row.first_id / 4; }
__device__ __forceinline__ u32 end_quad(const Row& row) {
    return row.end_id > row.first_id ? (row.end_id + 3) / 4 : first_quad(row);
}

__device__ __forceinline__ float logit_of(const Row& row, u32 id) {
    return id >= row.first_id && id < row.end_id ? row.logits[id - row.first_id] : -infinity();
}

// The sixteen bytes of an aligned row's quad; some may be another's columns.
__device__ __forceinline__ float4 load_aligned(const Row& row, u32 quad) {
    return *reinterpret_cast<const float4*>(row.logits + (i64(quad) * 4 - i64(row.first_id)));
}

// Calls `body(quad, logits)` for this thread's quads of [begin, end), ascending; -inf stands where there is no own token. In
// aligned rows four loads are under way together.
template <typename Body> __device__ __forceinline__ void for_quads(const Row& row, u32 begin, u32 end, Body body) {
    if (!row.aligned) {
        for (u32 quad = begin + threadIdx.x; quad < end; quad += blockDim.x) {
            const u32 id = quad * 4;
            const float logits[4] = {logit_of(row, id), logit_of(row, id + 1), logit_of(row, id + 2), logit_of(row, id + 3)};
            body(quad, logits);
        }
        return;
    }
    for (u32 quad = begin + threadIdx.x; quad < end; quad += 4 * blockDim.x) {
        float4 loaded[4];
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            const u32 at = quad + i * blockDim.x;
            loaded[i] = at < end ? load_aligned(row, at) : make_float4(0, 0, 0, 0);
        }
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            const u32 at = quad + i * blockDim.x;
            if (at >= end) continue;
            float logits[4] = {loaded[i].x, loaded[i].y, loaded[i].z, loaded[i].w};
            if (at * 4 < row.first_id || at * 4 + 4 > row.end_id) {
#pragma unroll
                for (u32 j = 0; j < 4; j++) {
                    if (at * 4 + j < row.first_id || at * 4 + j >= row.end_id) logits[j] = -infinity();
                }
            }
            body(at, logits);
        }
    }
}

// The quads of split blockIdx.x of gridDim.x.
__device__ __forceinline__ void own_quads(const Row& row, u32& begin, u32& end) {
    const u32 last = end_quad(row), share = (last - first_quad(row) + gridDim.x - 1) / gridDim.x;
    begin = first_quad(row) + blockIdx.x * share;
    end = begin + share < last ? begin + share : last;
}
