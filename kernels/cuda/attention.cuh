// What all attention kernels share: the work list, the arguments, the address of a tile in the paged cache, the mask.
//
// Invariant: an item names all that its result depends on besides the tensors; a kernel never looks at other items, so the
// order of items and the number of blocks change no bit of the result.
//
// Work list, made on the host once per step (src/cuda/attention_plan.rs), u32 words:
//   items   8 words each: decode items first, then prefill items.
//   merges  4 words each: {query_row, partial, num_splits, split_stride}, a query row whose context was split.
//   header  words 3, 4, 5: number of decode items, of prefill items, of merges.
// A unit of work is one item and one KV head. Partial results are vectors of head_dim f32 with one f32 log-sum-exp (base 2)
// each; the vector of an item's query i (of n), KV head k, head g of the group is `partial + (k * n + i) * group + g`, and
// the same vector of the next split lies `split_stride = num_kv_heads * n * group` further.
#pragma once

#include "common.cuh"

constexpr int kHeaderDecode = 3;
constexpr int kHeaderPrefill = 4;
constexpr int kHeaderMerge = 5;

// Consecutive positions of one head of one block that lie together in every cache: block sizes are multiples of it.
constexpr u32 kSlots = 16;

constexpr float kLog2e = 1.4426950408889634f;

// Consecutive queries of one sequence over a part of its context.
struct alignas(16) Item {
    u32 query_row;      // of the first query, in the batch
    u32 num_queries;    // decode: num_queries * group <= 16; prefill: <= 128
    u32 first_position; // of the first query
    u32 kv_begin;       // first position looked at, a multiple of 16
    u32 kv_end;         // behind the last one: 64 n from kv_begin, or behind the last query; every slot below it is stored
    u32 table_start;    // of the sequence's block table
    u32 partial;        // first vector of the partial result, kNone: the result goes to `out`
    u32 unused;
};

struct alignas(16) Merge {
    u32 query_row;
    u32 partial;
    u32 num_splits;
    u32 split_stride;
};

// Arguments of attend_decode_*, attend_prefill_* and attend_generic_*, in this order:
//  0 q           T [rows, q_stride]: head h of row t at `t * q_stride + h * head_dim`, rotated; 16-byte aligned
//  1 kv          T, the layer's cache (K and V interleaved by block); 16-byte aligned
//  2 items, 3 tables, 4 header    u32, device memory
//  5 out         T [rows, out_width]: head h of row t at `t * out_width + out_column + h * head_dim`
//  6 partial_out f32 [partials_max, head_dim], 7 partial_lse f32 [partials_max]
//  8 q_stride, 9 block_stride (elements between blocks, a multiple of 8), 10 block_size (a multiple of 16),
// 11 num_kv_heads, 12 group, 13 num_heads_owned (nothing is written for heads from it on), 14 out_width, 15 out_column,
// 16 window (0: none)    u32
// 17 scale, 18 soft_cap (0: none; else scores become cap * tanh(score / cap))    f32
// attend_generic_* has a last one: 19 head_dim u32. Strides and columns are multiples of 8.
template <typename T> struct Attend {
    const T* q;
    const T* kv;
    const u32* items;
    const u32* tables;
    const u32* header;
    T* out;
    float* partial_out;
    float* partial_lse;
    u32 q_stride;
    u32 block_stride;
    u32 block_size;
    u32 num_kv_heads;
    u32 group;
    u32 num_heads_owned;
    u32 out_width;
    u32 out_column;
    u32 window;
    float scale;
    float soft_cap;
};

#define ATTEND_PARAMETERS(T)                                                                                                 \
    const T *q, const T *kv, const u32 *items, const u32 *tables, const u32 *header, T *out, float *partial_out,             \
        float *partial_lse, u32 q_stride, u32 block_stride, u32 block_size, u32 num_kv_heads, u32 group,                     \
        u32 num_heads_owned, u32 out_width, u32 out_column, u32 window, float scale, float soft_cap
#define ATTEND_VALUES                                                                                                        \
    {                                                                                                                        \
        q, kv, items, tables, header, out, partial_out, partial_lse, q_stride, block_stride, block_size, num_kv_heads,       \
            group, num_heads_owned, out_width, out_column, window, scale, soft_cap                                           \
    }

__device__ __forceinline__ Item load_item(const u32* items, u32 index) {
    const uint4* from = reinterpret_cast<const uint4*>(items) + 2 * u64(index);
    const uint4 a = from[0], b = from[1];
    Item item = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
    return item;
}

// Elements from the cache's base to K of the 16 positions `16 * tile ..` in head 0.
template <typename T>
__device__ __forceinline__ u64 tile_offset(const Attend<T>& a, u32 table_start, u32 tile, u32 head_dim) {
    const u32 tiles_per_block = a.block_size / kSlots;
    const u32 block = tile / tiles_per_block;
    return u64(a.tables[table_start + block]) * a.block_stride + u64(tile - block * tiles_per_block) * kSlots * head_dim;
}

// A window that hides nothing where there is none: positions are less than 2^31.
__device__ __forceinline__ u32 window_or_all(u32 window) { return window == 0 ? 0x80000000u : window; }

// Whether the query at `position` sees `key`; `window` from `window_or_all`. No branches.
__device__ __forceinline__ bool sees(u32 position, u32 key, u32 window) {
    return bool(u32(key <= position) & u32(key + window > position));
}

// Whether all queries from `first` to `last` see all keys from `begin` to `end`, ends included; `window` as in `sees`.
__device__ __forceinline__ bool all_seen(u32 first, u32 last, u32 begin, u32 end, u32 window) {
    return end <= first && begin + window > last;
}

// `score` is the plain product q . k. What comes out, times `exponent_factor`, is the exponent to base 2.
template <typename T> __device__ __forceinline__ float exponent_factor(const Attend<T>& a) {
    return a.soft_cap > 0.0f ? kLog2e : a.scale * kLog2e;
}
