// Attention for every head dim divisible by 8, up to 256, and the merge of split contexts. No instruction of one vendor:
// compiles for AMD too.
//
// Launch: attend_generic_<f32|f16|bf16>; block 128, static shared memory; grid: 4 x multiprocessors (any grid is right);
//   arguments as in attention.cuh, then head_dim; decode and prefill items alike.
// Launch: attend_merge_<f32|f16|bf16>; block 128, static shared memory; grid: 4 x multiprocessors (any grid is right);
//   after the kernels that wrote the partial results, whatever their kind; arguments:
//   0 partial_out f32 [partials_max, head_dim], 1 partial_lse f32 [partials_max], 2 merges, 3 header (u32, device),
//   4 out T [rows, out_width]; 5 num_kv_heads, 6 group, 7 num_heads_owned, 8 out_width, 9 out_column, 10 head_dim (u32).
#include "attention.cuh"

constexpr u32 kThreads = 128;
constexpr u32 kWarps = kThreads / kWarp;
constexpr u32 kRows = 4;       // query rows of one warp at a time: every K and V element read serves them all
constexpr u32 kHeadDimMax = 256;
constexpr u32 kDimsPerLane = kHeadDimMax / kWarp;

__device__ __forceinline__ float capped(float score, float scale, float cap) { return cap * tanhf(score * scale / cap); }

// Scores of one key for the warp's rows, `key` at the key's first element.
template <typename T>
__device__ __forceinline__ void score_key(const T* key, const float (&queries)[kRows][kHeadDimMax], u32 head_dim,
                                          float (&scores)[kRows]) {
#pragma unroll 2
    for (u32 dim = 0; dim < head_dim; dim += Vec<T>::kLen) {
        float k[Vec<T>::kLen];
        unpack(load_vec(key + dim), k);
#pragma unroll
        for (u32 r = 0; r < kRows; r++)
#pragma unroll
            for (int i = 0; i < Vec<T>::kLen; i++) scores[r] += queries[r][dim + i] * k[i];
    }
}

// A warp's online softmax over `kRows` rows: a lane scores one key at a time, and owns every kWarp-th dim of the output.
template <typename T> struct GenericRows {
    float out[kRows][kDimsPerLane];
    float max[kRows], sum[kRows];
    u32 position[kRows];

    // Rows `first ..` of the item, whose q is in `queries`.
    __device__ __forceinline__ void run(const Attend<T>& a, const Item& item, u32 head, u32 first,
                                        const float (&queries)[kRows][kHeadDimMax], u32 head_dim, u32 lane) {
        const u32 window = window_or_all(a.window);
        const float factor = exponent_factor(a);
        u32 last = 0;
#pragma unroll
        for (u32 r = 0; r < kRows; r++) {
            const u32 query = (first + r) / a.group;
            // Rows behind the item's look at what its last query sees; nobody writes them.
            position[r] = item.first_position + (query < item.num_queries ? query : item.num_queries - 1);
            last = position[r] > last ? position[r] : last;
            max[r] = -infinity();
            sum[r] = 0.0f;
#pragma unroll
            for (u32 i = 0; i < kDimsPerLane; i++) out[r][i] = 0.0f;
        }
        const u32 end = item.kv_end < last + 1 ? item.kv_end : last + 1;
        const u64 to_values = u64(a.num_kv_heads) * a.block_size * head_dim;
        for (u32 begin = item.kv_begin; begin < end; begin += u32(kWarp)) {
            const u32 key = begin + lane;
            u64 at = 0;
            float scores[kRows] = {};
            if (key < end) {
                at = tile_offset(a, item.table_start, key / kSlots, head_dim) +
                     (u64(head) * a.block_size + key % kSlots) * head_dim;
                score_key(a.kv + at, queries, head_dim, scores);
            }
#pragma unroll
            for (u32 r = 0; r < kRows; r++) {
                float s = a.soft_cap > 0.0f ? capped(scores[r], a.scale, a.soft_cap) : scores[r];
                s = key < end && sees(position[r], key, window) ? s : -infinity();
                const float now = fmaxf(max[r], warp_max(s));
                const float zero = now == -infinity() ? 0.0f : now * factor;
                const float scale = exp2f(max[r] * factor - zero);
                scores[r] = exp2f(s * factor - zero);
                max[r] = now;
                sum[r] = sum[r] * scale + warp_sum(scores[r]);
#pragma unroll
                for (u32 i = 0; i < kDimsPerLane; i++) out[r][i] *= scale;
            }
            const u32 count = end - begin < u32(kWarp) ? end - begin : u32(kWarp);
            for (u32 j = 0; j < count; j++) {
                const T* value = a.kv + shuffle(at, int(j)) + to_values;
                float weight[kRows];
#pragma unroll
                for (u32 r = 0; r < kRows; r++) weight[r] = shuffle(scores[r], int(j));
#pragma unroll
                for (u32 i = 0; i < kDimsPerLane; i++) {
                    const u32 dim = i * kWarp + lane;
                    const float v = dim < head_dim ? to_float(value[dim]) : 0.0f;
#pragma unroll
                    for (u32 r = 0; r < kRows; r++) out[r][i] += weight[r] * v;
                }
            }
        }
    }

    __device__ __forceinline__ void finish(const Attend<T>& a, const Item& item, u32 head, u32 first, u32 head_dim,
                                           u32 lane) {
        const u32 num_rows = item.num_queries * a.group;
        const float factor = exponent_factor(a);
#pragma unroll
        for (u32 r = 0; r < kRows; r++) {
            const u32 row = first + r;
            if (row >= num_rows) continue;
            const float inverse = sum[r] > 0.0f ? 1.0f / sum[r] : 0.0f;
            const u32 query = row / a.group, query_head = head * a.group + row - query * a.group;
            const u64 vector = u64(item.partial) + u64(head) * num_rows + row;
            T* to = a.out + u64(item.query_row + query) * a.out_width + a.out_column + u64(query_head) * head_dim;
#pragma unroll
            for (u32 i = 0; i < kDimsPerLane; i++) {
                const u32 dim = i * kWarp + lane;
                if (dim >= head_dim) continue;
                if (item.partial != kNone)
                    a.partial_out[vector * head_dim + dim] = out[r][i] * inverse;
                else if (query_head < a.num_heads_owned)
                    to[dim] = from_float<T>(out[r][i] * inverse);
            }
            if (item.partial != kNone && lane == 0)
                a.partial_lse[vector] = sum[r] > 0.0f ? max[r] * factor + log2f(sum[r]) : -infinity();
        }
    }
};

template <typename T> __device__ __forceinline__ void attend_generic(const Attend<T>& a, u32 head_dim) {
    __shared__ float queries[kWarps][kRows][kHeadDimMax];
    pdl_wait();
    pdl_launch();
    const u32 warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const u32 num_units = (a.header[kHeaderDecode] + a.header[kHeaderPrefill]) * a.num_kv_heads;
    for (u32 unit = blockIdx.x; unit < num_units; unit += gridDim.x) {
        const Item item = load_item(a.items, unit / a.num_kv_heads);
        const u32 head = unit % a.num_kv_heads;
        const u32 num_rows = item.num_queries * a.group;
        for (u32 begin = 0; begin < num_rows; begin += kWarps * kRows) {
            const u32 first = begin + warp * kRows;
            __syncthreads();
            for (u32 i = lane; i < kRows * head_dim; i += u32(kWarp)) {
                const u32 r = i / head_dim, dim = i - r * head_dim, row = first + r, query = row / a.group;
                const T* from = a.q + u64(item.query_row + query) * a.q_stride +
                                u64(head * a.group + row - query * a.group) * head_dim + dim;
                queries[warp][r][dim] = row < num_rows ? to_float(*from) : 0.0f;
            }
            __syncthreads();
            if (first >= num_rows) continue;
            GenericRows<T> rows;
            rows.run(a, item, head, first, queries[warp], head_dim, lane);
            rows.finish(a, item, head, first, head_dim, lane);
        }
    }
}

// One block sums up one query row and head: warps take splits in turn, then are added in warp order.
template <typename T>
__device__ __forceinline__ void attend_merge(const float* partial_out, const float* partial_lse, const u32* merges,
                                             const u32* header, T* out, u32 num_kv_heads, u32 group, u32 num_heads_owned,
                                             u32 out_width, u32 out_column, u32 head_dim) {
    __shared__ float sums[kWarps][kHeadDimMax];
    __shared__ float weights[kWarps];
    pdl_wait();
    pdl_launch();
    const u32 warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const u32 num_units = header[kHeaderMerge] * num_heads_owned;
    for (u32 unit = blockIdx.x; unit < num_units; unit += gridDim.x) {
        const u32 head = unit % num_heads_owned;
        const uint4 words = reinterpret_cast<const uint4*>(merges)[unit / num_heads_owned];
        const Merge merge = {words.x, words.y, words.z, words.w};
        const u32 head_stride = merge.split_stride / num_kv_heads;
        const u64 first = u64(merge.partial) + u64(head / group) * head_stride + head % group;
        float max = -infinity();
        for (u32 split = lane; split < merge.num_splits; split += u32(kWarp))
            max = fmaxf(max, partial_lse[first + u64(split) * merge.split_stride]);
        max = warp_max(max);
        const float zero = max == -infinity() ? 0.0f : max;
        float total = 0.0f, mine[kDimsPerLane] = {};
#pragma unroll 4
        for (u32 split = warp; split < merge.num_splits; split += kWarps) {
            const u64 vector = first + u64(split) * merge.split_stride;
            const float weight = exp2f(partial_lse[vector] - zero);
            total += weight;
#pragma unroll
            for (u32 i = 0; i < kDimsPerLane; i++) {
                const u32 dim = i * kWarp + lane;
                if (dim < head_dim) mine[i] += weight * partial_out[vector * head_dim + dim];
            }
        }
#pragma unroll
        for (u32 i = 0; i < kDimsPerLane; i++)
            if (i * kWarp + lane < head_dim) sums[warp][i * kWarp + lane] = mine[i];
        if (lane == 0) weights[warp] = total;
        __syncthreads();
        float weight = 0.0f;
        for (u32 w = 0; w < kWarps; w++) weight += weights[w];
        const float inverse = weight > 0.0f ? 1.0f / weight : 0.0f;
        for (u32 dim = threadIdx.x; dim < head_dim; dim += kThreads) {
            float value = 0.0f;
            for (u32 w = 0; w < kWarps; w++) value += sums[w][dim];
            out[u64(merge.query_row) * out_width + out_column + u64(head) * head_dim + dim] = from_float<T>(value * inverse);
        }
        __syncthreads();
    }
}

#define PORTABLE(NAME, T)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(128) attend_generic_##NAME(ATTEND_PARAMETERS(T), u32 head_dim) {            \
        const Attend<T> a = ATTEND_VALUES;                                                                                   \
        attend_generic<T>(a, head_dim);                                                                                      \
    }                                                                                                                        \
    extern "C" __global__ void __launch_bounds__(128)                                                                        \
        attend_merge_##NAME(const float* partial_out, const float* partial_lse, const u32* merges, const u32* header,        \
                            T* out, u32 num_kv_heads, u32 group, u32 num_heads_owned, u32 out_width, u32 out_column,         \
                            u32 head_dim) {                                                                                  \
        attend_merge<T>(partial_out, partial_lse, merges, header, out, num_kv_heads, group, num_heads_owned, out_width,      \
                        out_column, head_dim);                                                                               \
    }

PORTABLE(f32, float)
PORTABLE(f16, f16)
PORTABLE(bf16, bf16)
