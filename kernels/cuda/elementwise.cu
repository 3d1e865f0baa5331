// Kernels that move rows or work on them one by one: the step's inputs, embedding, norms, rotary embedding with the store into
// the paged cache, the gated activation, gathers and conversions.
//
// Suffix `_f32`, `_f16`, `_bf16`: the type T of activations. Rows are contiguous, bases 16-byte aligned, widths multiples of 8:
// a thread works on eight values at a time. All kernels may be launched with programmatic dependent launch.
//
// Invariant: arithmetic is f32, rounded to T once; a row's result depends on no other row.
#include "common.cuh"

// ---- eight values ----

// Loads eight values; `kConst`: nothing ever writes there.
template <bool kConst = false, typename T> __device__ __forceinline__ void load8(const T* from, float (&to)[8]) {
#pragma unroll
    for (int part = 0; part < 8 / Vec<T>::kLen; part++) {
        const T* at = from + part * Vec<T>::kLen;
        const Vec<T> vec = kConst ? load_vec_const(at) : load_vec(at);
#pragma unroll
        for (int i = 0; i < Vec<T>::kLen; i++) to[part * Vec<T>::kLen + i] = to_float(vec.at[i]);
    }
}

template <typename T> __device__ __forceinline__ void store8(T* to, const float (&from)[8]) {
#pragma unroll
    for (int part = 0; part < 8 / Vec<T>::kLen; part++) {
        Vec<T> vec;
#pragma unroll
        for (int i = 0; i < Vec<T>::kLen; i++) vec.at[i] = from_float<T>(from[part * Vec<T>::kLen + i]);
        store_vec(to + part * Vec<T>::kLen, vec);
    }
}

// ---- the step's inputs ----

// One array of the step: `len` words at word `offset` of the blob (a multiple of 4) go to `to`, then padding up to `padded`.
// Word i of the padding is `pad` where `(i & pad_mask) == 0`, else 0. All in u32 words, but `first_unit`: how many units of
// four words the sections before this one have, each `(padded + 3) / 4`. 32 bytes.
struct Section {
    u32* to;
    u32 offset;
    u32 len;
    u32 padded;
    u32 first_unit;
    u32 pad;
    u32 pad_mask;
};

constexpr int kSectionsMax = 16;

// 544 bytes.
struct LoadStep {
    const u32* blob;        // device address of host memory, 16-byte aligned, its length rounded up to 4 words
    const u32* last_token;  // [num_slots]
    u32 num_slots;
    u32 num_sections;       // at most kSectionsMax
    u32 num_units;          // of all sections
    u32 reserved;           // 0
    Section sections[kSectionsMax];  // section 0 is token_ids: its words with bit 31 set are resolved
};

// Puts a step's inputs in place. Launch: grid ceil(num_units / 256), block 256, no dynamic shared memory; one argument, the
// struct by value. `to` 16-byte aligned. The host checks that `padded` fits each array and that `len <= padded`. The blob is
// read before the stream's earlier kernels are done: it may be written again only after this kernel has ended.
// Padding: token_ids 0, positions 0, kv_slots kNone, logit_rows 0, samples `pad = kNone, pad_mask = 7`; header, seqs, tables
// and work lists need none (`padded == len`).
extern "C" __global__ void __launch_bounds__(256) load_step(const LoadStep step) {
    pdl_launch();
    const u32 unit = blockIdx.x * 256 + threadIdx.x;
    const bool inside = unit < step.num_units;
    u32 index = 0;
    for (u32 i = 1; i < step.num_sections; i++) index += u32(unit >= step.sections[i].first_unit);
    const Section& section = step.sections[index];
    const u32 at = (unit - section.first_unit) * 4;
    uint4 words = make_uint4(0, 0, 0, 0);
    if (inside && at < section.len) {
        const uint4* from = reinterpret_cast<const uint4*>(step.blob + section.offset + at);
#if PHALANX_HIP
        words = *from;
#else
        words = __ldcv(from);
#endif
    }
    pdl_wait();
    if (!inside) return;
    u32 word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        if (at + i >= section.len) {
            word[i] = ((at + i) & section.pad_mask) == 0 ? section.pad : 0;
        } else if (index == 0 && word[i] >> 31 == 1) {
            const u32 slot = word[i] & 0x7FFFFFFFu;
            word[i] = slot < step.num_slots ? step.last_token[slot] : 0;
        }
    }
    if (at + 4 <= section.padded) {
        *reinterpret_cast<uint4*>(section.to + at) = make_uint4(word[0], word[1], word[2], word[3]);
        return;
    }
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        if (at + i < section.padded) section.to[at + i] = word[i];
    }
}

// ---- embedding ----

template <typename T, typename Out>
__device__ __forceinline__ void embed(const u32* ids, const T* table, u32 first_id, u32 num_rows, Out* out, u32 hidden) {
    pdl_launch();
    pdl_wait();
    const u32 row = ids[blockIdx.x] - first_id;
    const bool inside = row < num_rows;
    const T* from = table + u64(inside ? row : 0) * hidden;
    Out* to = out + u64(blockIdx.x) * hidden;
    for (u32 at = threadIdx.x * 8; at < hidden; at += blockDim.x * 8) {
        float values[8] = {};
        if (inside) load8<true>(from + at, values);
        store8(to + at, values);
    }
}

// ---- norms ----

// Most eights of a row that one thread holds: hidden is at most 2 * 1024 * 8.
constexpr int kEights = 2;

// One block a row: eight values per thread, twice where hidden is above 8192. The row's values stay in registers. `load` gives
// eight values of the residual stream at a column and is called after `pdl_wait`.
template <typename T, typename Load>
__device__ __forceinline__ void norm_row(const float* weight, float eps, T* out, u32 hidden, Load load) {
    __shared__ float scratch[kWarpsMax];
    float scale[kEights][8], x[kEights][8];
    pdl_launch();
#pragma unroll
    for (int i = 0; i < kEights; i++) {
        const u32 at = (threadIdx.x + i * blockDim.x) * 8;
        if (at < hidden) load8<true>(weight + at, scale[i]);
    }
    pdl_wait();
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kEights; i++) {
        const u32 at = (threadIdx.x + i * blockDim.x) * 8;
        if (at < hidden) load(at, x[i]);
    }
#pragma unroll
    for (int i = 0; i < kEights; i++) {
        const u32 at = (threadIdx.x + i * blockDim.x) * 8;
        if (at >= hidden) continue;
#pragma unroll
        for (int j = 0; j < 8; j++) sum += x[i][j] * x[i][j];
    }
    const float rate = rsqrtf(block_sum(sum, scratch) / float(hidden) + eps);
#pragma unroll
    for (int i = 0; i < kEights; i++) {
        const u32 at = (threadIdx.x + i * blockDim.x) * 8;
        if (at >= hidden) continue;
#pragma unroll
        for (int j = 0; j < 8; j++) x[i][j] *= rate * scale[i][j];
        store8(out + u64(blockIdx.x) * hidden + at, x[i]);
    }
}

template <typename T>
__device__ __forceinline__ void rms_norm(const float* x, const float* weight, float eps, T* out, u32 hidden) {
    const float* row = x + u64(blockIdx.x) * hidden;
    norm_row(weight, eps, out, hidden, [=](u32 at, float(&to)[8]) { load8(row + at, to); });
}

template <typename T>
__device__ __forceinline__ void add_norm(
    const T* partial, float* residual, const float* weight, float eps, T* out, u32 hidden
) {
    const T* term = partial + u64(blockIdx.x) * hidden;
    float* stream = residual + u64(blockIdx.x) * hidden;
    norm_row(weight, eps, out, hidden, [=](u32 at, float(&to)[8]) {
        float added[8];
        load8(term + at, added);
        load8(stream + at, to);
#pragma unroll
        for (int j = 0; j < 8; j++) to[j] += added[j];
        store8(stream + at, to);
    });
}

// ---- rotary embedding and the store of K and V ----

struct RopeShape {
    u32 block_stride;
    u32 num_kv_heads;
    u32 group;
    u32 head_dim;
    u32 block_size;
};

// kLen values at column d of a head and kLen at d + head_dim / 2: both halves of a rotation.
template <typename T, typename Kv, int kLen>
__device__ __forceinline__ void rope_unit(
    T* row, const float* bias, const float* cos, const float* sin, u32 position, u32 slot, Kv* kv, const RopeShape& shape,
    u32 head, u32 d
) {
    const u32 half = shape.head_dim / 2;
    const u32 column = head * shape.head_dim + d;
    float a[kLen], b[kLen], c[kLen], s[kLen];
    const u64 angle = u64(position) * half + d;
    const u32 num_q = shape.num_kv_heads * shape.group;
    const bool rotated = head < num_q + shape.num_kv_heads;
    if constexpr (kLen == 8) {
        load8(row + column, a);
        load8(row + column + half, b);
        if (rotated) {
            load8<true>(cos + angle, c);
            load8<true>(sin + angle, s);
        }
    } else {
        a[0] = to_float(row[column]);
        b[0] = to_float(row[column + half]);
        if (rotated) {
            c[0] = cos[angle];
            s[0] = sin[angle];
        }
    }
#pragma unroll
    for (int i = 0; i < kLen; i++) {
        const float low = bias ? a[i] + bias[column + i] : a[i];
        const float high = bias ? b[i] + bias[column + half + i] : b[i];
        a[i] = rotated ? low * c[i] - high * s[i] : low;
        b[i] = rotated ? high * c[i] + low * s[i] : high;
    }
    if (head < num_q) {
        if constexpr (kLen == 8) {
            store8(row + column, a);
            store8(row + column + half, b);
        } else {
            row[column] = from_float<T>(a[0]);
            row[column + half] = from_float<T>(b[0]);
        }
        return;
    }
    if (slot == kNone) return;
    // Head index among K's heads, then V's: just the place in the cache's block.
    const u32 place = (head - num_q) * shape.block_size + slot % shape.block_size;
    Kv* to = kv + u64(slot / shape.block_size) * shape.block_stride + u64(place) * shape.head_dim + d;
    if constexpr (kLen == 8) {
        store8(to, a);
        store8(to + half, b);
    } else {
        to[0] = from_float<Kv>(a[0]);
        to[half] = from_float<Kv>(b[0]);
    }
}

template <typename T, typename Kv>
__device__ __forceinline__ void rope_store(
    T* qkv, const float* bias, const float* cos, const float* sin, const u32* positions, const u32* kv_slots, Kv* kv,
    const RopeShape& shape
) {
    pdl_launch();
    pdl_wait();
    const u32 half = shape.head_dim / 2, num_heads = shape.num_kv_heads * (shape.group + 2);
    const u32 unit = blockIdx.y * blockDim.x + threadIdx.x;
    const u32 position = positions[blockIdx.x], slot = kv_slots[blockIdx.x];
    T* row = qkv + u64(blockIdx.x) * num_heads * shape.head_dim;
    if (half % 8 == 0) {
        const u32 head = unit / (half / 8), d = unit % (half / 8) * 8;
        if (head < num_heads) rope_unit<T, Kv, 8>(row, bias, cos, sin, position, slot, kv, shape, head, d);
    } else {
        const u32 head = unit / half, d = unit % half;
        if (head < num_heads) rope_unit<T, Kv, 1>(row, bias, cos, sin, position, slot, kv, shape, head, d);
    }
}

// ---- the gated activation ----

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

// The form with tanh, as x times the sigmoid that it is: no digits are lost where x is far below 0. Source: arXiv:1606.08415.
__device__ __forceinline__ float gelu(float x) {
    return x / (1.0f + expf(-1.5957691216057308f * (x + 0.044715f * x * x * x)));
}

template <bool kGelu, typename T> __device__ __forceinline__ void act_mul(const T* in, T* out, u32 inner) {
    pdl_launch();
    pdl_wait();
    const u32 at = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
    if (at >= inner) return;
    const T* gate_at = in + u64(blockIdx.x) * inner * 2 + at / 16 * 32 + at % 16;
    float gate[8], up[8];
    load8(gate_at, gate);
    load8(gate_at + 16, up);
#pragma unroll
    for (int i = 0; i < 8; i++) gate[i] = (kGelu ? gelu(gate[i]) : silu(gate[i])) * up[i];
    store8(out + u64(blockIdx.x) * inner + at, gate);
}

// ---- gathers and conversions ----

template <typename T> __device__ __forceinline__ void gather_rows(const T* x, const u32* rows, T* out, u32 width) {
    pdl_launch();
    pdl_wait();
    const T* from = x + u64(rows[blockIdx.x]) * width;
    T* to = out + u64(blockIdx.x) * width;
    for (u32 at = threadIdx.x * Vec<T>::kLen; at < width; at += blockDim.x * Vec<T>::kLen) {
        store_vec(to + at, load_vec(from + at));
    }
}

template <typename From, typename To> __device__ __forceinline__ void convert(const From* from, To* to, u64 num_eights) {
    pdl_launch();
    pdl_wait();
    const u64 eight = u64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (eight >= num_eights) return;
    float values[8];
    load8(from + eight * 8, values);
    store8(to + eight * 8, values);
}

template <typename T> __device__ __forceinline__ void add(const T* y, float* x, u64 num_eights) {
    pdl_launch();
    pdl_wait();
    const u64 eight = u64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (eight >= num_eights) return;
    float sum[8], added[8];
    load8(x + eight * 8, sum);
    load8(y + eight * 8, added);
#pragma unroll
    for (int i = 0; i < 8; i++) sum[i] += added[i];
    store8(x + eight * 8, sum);
}

// ---- entry points; no kernel here takes dynamic shared memory ----
//
// rows: rows of the (padded) batch. ROW(w) below is the block of kernels that have one block a row:
// min(1024, 32 * ceil(w / 256)) threads.
//
// embed_T(ids u32*, table T*, first_id u32, num_rows u32, out T*, hidden u32)
//   grid rows, block ROW(hidden) (any multiple of 32 works). A row of zeros where the id is outside the table.
// embed_residual_T(ids u32*, table T*, first_id u32, num_rows u32, residual f32*, hidden u32)
//   the same, into the residual stream.
// rms_norm_T(x f32*, weight f32*, eps f32, out T*, hidden u32)
//   grid rows, block exactly ROW(hidden); hidden up to 16384.
// add_norm_T(partial T*, residual f32*, weight f32*, eps f32, out T*, hidden u32)
//   as rms_norm_T, after residual += partial (in place).
// rope_store_T(qkv T*, bias f32* or null, cos f32*, sin f32*, positions u32*, kv_slots u32*, kv T*, block_stride u32 [values],
//              num_kv_heads u32, group u32, head_dim u32, block_size u32)
//   grid (rows, ceil(units / 128)), block 128; units = num_kv_heads * (group + 2) * head_dim / 16 where head_dim is a multiple
//   of 16, else * head_dim / 2 (head_dim even; a head and the cache's base 16-byte aligned in the first case). q is rotated in
//   place; rotated k, and v, go to the cache only: those columns of qkv keep what they held. bias is added before rotation.
// act_mul_silu_T, act_mul_gelu_T(in T*, out T*, inner u32)
//   grid (rows, ceil(inner / 1024)), block 128; inner a multiple of 16.
// gather_rows_T(x T*, rows u32*, out T*, width u32)
//   grid gathered rows, block ROW(width).
// to_residual_T(partial T*, residual f32*, num_eights u64), from_residual_T(x f32*, out T*, num_eights u64)
//   conversions; grid ceil(num_eights / 256), block 256; num_eights = rows * width / 8.
// add_T(y T*, x f32*, num_eights u64)
//   x += y; launched as to_residual_T.
#define PHALANX_KERNELS(T, suffix) \
    extern "C" __global__ void __launch_bounds__(1024) \
        embed_##suffix(const u32* ids, const T* table, u32 first_id, u32 num_rows, T* out, u32 hidden) { \
        embed(ids, table, first_id, num_rows, out, hidden); \
    } \
    extern "C" __global__ void __launch_bounds__(1024) \
        embed_residual_##suffix(const u32* ids, const T* table, u32 first_id, u32 num_rows, float* residual, u32 hidden) { \
        embed(ids, table, first_id, num_rows, residual, hidden); \
    } \
    extern "C" __global__ void __launch_bounds__(1024) \
        rms_norm_##suffix(const float* x, const float* weight, float eps, T* out, u32 hidden) { \
        rms_norm(x, weight, eps, out, hidden); \
    } \
    extern "C" __global__ void __launch_bounds__(1024) \
        add_norm_##suffix(const T* partial, float* residual, const float* weight, float eps, T* out, u32 hidden) { \
        add_norm(partial, residual, weight, eps, out, hidden); \
    } \
    extern "C" __global__ void __launch_bounds__(128) rope_store_##suffix( \
        T* qkv, const float* bias, const float* cos, const float* sin, const u32* positions, const u32* kv_slots, T* kv, \
        u32 block_stride, u32 num_kv_heads, u32 group, u32 head_dim, u32 block_size \
    ) { \
        const RopeShape shape = {block_stride, num_kv_heads, group, head_dim, block_size}; \
        rope_store(qkv, bias, cos, sin, positions, kv_slots, kv, shape); \
    } \
    extern "C" __global__ void __launch_bounds__(128) act_mul_silu_##suffix(const T* in, T* out, u32 inner) { \
        act_mul<false>(in, out, inner); \
    } \
    extern "C" __global__ void __launch_bounds__(128) act_mul_gelu_##suffix(const T* in, T* out, u32 inner) { \
        act_mul<true>(in, out, inner); \
    } \
    extern "C" __global__ void __launch_bounds__(1024) \
        gather_rows_##suffix(const T* x, const u32* rows, T* out, u32 width) { \
        gather_rows(x, rows, out, width); \
    } \
    extern "C" __global__ void __launch_bounds__(256) \
        to_residual_##suffix(const T* partial, float* residual, u64 num_eights) { \
        convert(partial, residual, num_eights); \
    } \
    extern "C" __global__ void __launch_bounds__(256) \
        from_residual_##suffix(const float* x, T* out, u64 num_eights) { \
        convert(x, out, num_eights); \
    } \
    extern "C" __global__ void __launch_bounds__(256) add_##suffix(const T* y, float* x, u64 num_eights) { \
        add(y, x, num_eights); \
    }

PHALANX_KERNELS(float, f32)
PHALANX_KERNELS(f16, f16)
PHALANX_KERNELS(bf16, bf16)
