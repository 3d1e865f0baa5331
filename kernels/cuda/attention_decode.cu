// Attention of few queries over a long context: bound by reading K and V once.
//
// All queries of an item and all heads of the group form one 16-row tile of q, so K and V are read once per KV head. Every
// warp has its own ring of 16-position tiles (every fourth of the unit's) and waits for nobody until the unit ends; its
// copies run ahead across units, so that memory stays busy while a unit is finished. Online softmax as in arXiv:2205.14135;
// the context is split over items as in flash-decoding.
//
// Launch: attend_decode_<head_dim>_<f16|bf16>, head_dim 64, 96, 128, 256; block 128;
//   dynamic shared memory, bytes: 115200 (64), 111104 (96), 115200 (128), 156160 (256);
//   grid: 2 x SMs (64, 96, 128), 1 x SMs (256), or fewer: any grid is right, units are dealt round;
//   arguments as in attention.cuh; decode items only.
#include "attention_tensor.cuh"

constexpr int kDecodeWarps = 4;

template <int D> struct DecodeShape {
    static constexpr int kStages = D == 64 ? 6 : D == 96 ? 4 : D == 128 ? 3 : 2;
    static constexpr int kTileBytes = int(kSlots) * D * 2;
    static constexpr int kRingBytes = kStages * 2 * kTileBytes; // of one warp: K and V
    static constexpr int kPart = D % 64 == 0 ? 64 : 48;         // dims that warps sum up at a time
    static constexpr int kSumBytes = kDecodeWarps * 16 * kPart * 4;
    static constexpr bool kQueriesShared = D == 256;            // else every warp has them in registers
    static constexpr int kQueryBytes = kQueriesShared ? 16 * D * 2 : 0;
    static constexpr int kStateBytes = kDecodeWarps * 16 * 8;
    static constexpr int kBytes = kDecodeWarps * kRingBytes + kSumBytes + kStateBytes + kQueryBytes;
};

static_assert(DecodeShape<64>::kBytes == 115200 && DecodeShape<96>::kBytes == 111104, "as the launch comment says");
static_assert(DecodeShape<128>::kBytes == 115200 && DecodeShape<256>::kBytes == 156160, "as the launch comment says");

// The warp's copies: which of its tiles goes next, over all units of the block.
template <typename T, int D> struct TileLoader {
    u32 unit, num_units, index; // `index`: the unit's item
    u32 next, count;    // of the warp's tiles in the unit
    const T* lane_keys; // K of tile `next / 32 * 32 + lane`

    __device__ __forceinline__ void open(const Attend<T>& a) {
        index = unit / a.num_kv_heads;
        const Item item = load_item(a.items, index);
        const u32 end = (item.kv_end + kSlots - 1) / kSlots, first = item.kv_begin / kSlots + threadIdx.x / 32;
        next = 0;
        count = end > first ? (end - first + kDecodeWarps - 1) / kDecodeWarps : 0;
    }

    __device__ __forceinline__ void begin(const Attend<T>& a, u32 units) {
        unit = blockIdx.x;
        num_units = units;
        index = next = count = 0;
        lane_keys = a.kv;
        if (unit < num_units) open(a);
    }

    // Starts the next tile's copy into the stage at `to`; nothing where there is none left.
    __device__ __forceinline__ void issue(const Attend<T>& a, u32 to) {
        while (next == count) {
            if (unit >= num_units) return;
            unit += gridDim.x;
            if (unit >= num_units) return;
            open(a);
        }
        // The item is read again rather than kept: registers are short.
        const Item item = load_item(a.items, index);
        const u32 thread = thread_again(), lane = thread % 32, first = item.kv_begin / kSlots + thread / 32;
        if (next % 32 == 0) {
            const u32 mine = next + lane;
            lane_keys = a.kv + u64(unit % a.num_kv_heads) * a.block_size * D;
            if (mine < count) lane_keys += tile_offset(a, item.table_start, first + mine * kDecodeWarps, D);
        }
        const u32 valid = item.kv_end - (first + next * kDecodeWarps) * kSlots;
        const T* k = reinterpret_cast<const T*>(shuffle(reinterpret_cast<u64>(lane_keys), int(next % 32)));
        const T* v = k + u64(a.num_kv_heads) * a.block_size * D;
        copy_tile<T, D, 32>(to, k, valid, lane);
        copy_tile<T, D, 32>(to + DecodeShape<D>::kTileBytes, v, valid, lane);
        next++;
    }
};

// A warp's online softmax over its tiles: rows lane / 4 and lane / 4 + 8 of the query tile.
template <typename T, int D> struct DecodeRows {
    static constexpr bool kShared = DecodeShape<D>::kQueriesShared;
    u32 q[kShared ? 1 : D / 16][4];
    float out[D / 8][4];
    float max[2], sum[2];

    // The lane's fragment of dims 16 k .. of the query tile, where the block shares them.
    __device__ __forceinline__ static uint4* shared_query(int k, u32 lane) {
        using Shape = DecodeShape<D>;
        constexpr int kBegin = kDecodeWarps * Shape::kRingBytes + Shape::kSumBytes + Shape::kStateBytes;
        return reinterpret_cast<uint4*>(shared_bytes + kBegin) + k * 32 + lane;
    }

    // All threads of the block.
    __device__ __forceinline__ void begin(const Attend<T>& a, const Item& item, u32 head, u32 lane) {
        const u32 num_rows = item.num_queries * a.group;
        const T* from[2];
        bool valid[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const u32 row = lane / 4 + 8 * half, query = row / a.group;
            from[half] = a.q + u64(item.query_row + query) * a.q_stride +
                         u64(head * a.group + row - query * a.group) * D + lane % 4 * 2;
            valid[half] = row < num_rows;
            max[half] = -infinity();
            sum[half] = 0.0f;
        }
        constexpr int kOwn = kShared ? D / 16 / kDecodeWarps : D / 16;
        const int first = kShared ? int(threadIdx.x / 32) * kOwn : 0;
#pragma unroll
        for (int k = 0; k < kOwn; k++) {
            u32 words[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                words[i] = valid[i % 2] ? *reinterpret_cast<const u32*>(from[i % 2] + (first + k) * 16 + i / 2 * 8) : 0;
            if (kShared) *shared_query(first + k, lane) = make_uint4(words[0], words[1], words[2], words[3]);
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (!kShared) q[kShared ? 0 : k][i] = words[i];
        }
#pragma unroll
        for (int j = 0; j < D / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) out[j][i] = 0.0f;
        if (kShared) __syncthreads();
    }

    // Scores of the 16 keys at `at`: s[j] has keys 8 j + lane % 4 * 2, + 1 of both rows.
    __device__ __forceinline__ void scores(float (&s)[2][4], u32 at, u32 lane) const {
        // Two sums per tile, so that products do not wait for each other.
        float odd[2][4];
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) s[j][i] = odd[j][i] = 0.0f;
        const u32 k_at = at + 2 * swizzled<D>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            u32 b[4];
            load_fragments(b, stepped<D>(k_at, k));
            u32 query[4];
            if (kShared) {
                const uint4 words = *shared_query(k, lane);
                query[0] = words.x, query[1] = words.y, query[2] = words.z, query[3] = words.w;
            } else {
#pragma unroll
                for (int i = 0; i < 4; i++) query[i] = q[kShared ? 0 : k][i];
            }
            multiply_add<T>(k % 2 ? odd[0] : s[0], query, b[0], b[1]);
            multiply_add<T>(k % 2 ? odd[1] : s[1], query, b[2], b[3]);
        }
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                s[j][i] += odd[j][i];
    }

    // Takes in the tile whose K and V lie at `at`, its first key `key`.
    __device__ __forceinline__ void take(const Attend<T>& a, const Item& item, u32 at, u32 key, float factor) {
        const u32 lane = thread_again() % 32;
        float s[2][4];
        scores(s, at, lane);
        if (a.soft_cap > 0.0f) {
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) s[j][i] = capped(s[j][i], a.scale, a.soft_cap);
        }
        const u32 last = item.first_position + item.num_queries - 1, window = window_or_all(a.window);
        if (!all_seen(item.first_position, last, key, key + kSlots - 1, window)) {
            const u32 position[2] = {item.first_position + lane / 4 / a.group,
                                     item.first_position + (lane / 4 + 8) / a.group};
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (!sees(position[i / 2], key + 8 * j + lane % 4 * 2 + i % 2, window)) s[j][i] = -infinity();
        }
        float scale[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float here = fmaxf(fmaxf(s[0][2 * half], s[0][2 * half + 1]), fmaxf(s[1][2 * half], s[1][2 * half + 1]));
            const float now = fmaxf(max[half], row_max(here));
            const float zero = finite_max(now) * factor;
            scale[half] = exp2_fast(max[half] * factor - zero);
            max[half] = now;
            float added = 0.0f;
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; i++) {
                    s[j][i] = exp2_fast(s[j][i] * factor - zero);
                    added += s[j][i];
                }
            sum[half] = sum[half] * scale[half] + added;
        }
        const u32 p[4] = {pair<T>(s[0][0], s[0][1]), pair<T>(s[0][2], s[0][3]), pair<T>(s[1][0], s[1][1]),
                          pair<T>(s[1][2], s[1][3])};
        const u32 v_at = at + DecodeShape<D>::kTileBytes + 2 * swizzled<D>(lane % 16, lane / 16);
#pragma unroll
        for (int j = 0; j < D / 16; j++) {
            u32 b[4];
            load_fragments_transposed(b, stepped<D>(v_at, j));
#pragma unroll
            for (int i = 0; i < 4; i++) {
                out[2 * j][i] *= scale[i / 2];
                out[2 * j + 1][i] *= scale[i / 2];
            }
            multiply_add<T>(out[2 * j], p, b[0], b[1]);
            multiply_add<T>(out[2 * j + 1], p, b[2], b[3]);
        }
    }
};

// Sums up the four warps' rows, in warp order, and writes them. All threads of the block.
template <typename T, int D>
__device__ __forceinline__ void finish_unit(const Attend<T>& a, const Item& item, u32 head, DecodeRows<T, D>& rows,
                                            float factor, float* sums, float2* states) {
    using Shape = DecodeShape<D>;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 num_rows = item.num_queries * a.group;
    float scale[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float sum = row_sum(rows.sum[half]);
        if (lane % 4 == 0) states[warp * 16 + lane / 4 + 8 * half] = make_float2(rows.max[half], sum);
    }
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const u32 row = lane / 4 + 8 * half;
        float max = -infinity(), sum = 0.0f;
#pragma unroll
        for (int w = 0; w < kDecodeWarps; w++) max = fmaxf(max, states[w * 16 + row].x);
        const float zero = finite_max(max) * factor;
#pragma unroll
        for (int w = 0; w < kDecodeWarps; w++)
            sum += states[w * 16 + row].y * exp2_fast(states[w * 16 + row].x * factor - zero);
        scale[half] = sum > 0.0f ? exp2_fast(rows.max[half] * factor - zero) / sum : 0.0f;
        if (item.partial != kNone && warp == 0 && lane % 4 == 0 && row < num_rows) {
            const u64 vector = u64(item.partial) + u64(head) * num_rows + row;
            a.partial_lse[vector] = sum > 0.0f ? zero + log2f(sum) : -infinity();
        }
    }
    constexpr int kEights = Shape::kPart / 8;
    constexpr u32 kFours = Shape::kPart / 4;
#pragma unroll
    for (int part = 0; part < D / Shape::kPart; part++) {
#pragma unroll
        for (int j = 0; j < kEights; j++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const u32 row = lane / 4 + 8 * half;
                const float* from = &rows.out[part * kEights + j][2 * half];
                // Eights rotate with the row, against bank conflicts.
                const u32 at = (warp * 16 + row) * Shape::kPart + (j + row) % kEights * 8 + lane % 4 * 2;
                if (row < num_rows)
                    *reinterpret_cast<float2*>(sums + at) = make_float2(from[0] * scale[half], from[1] * scale[half]);
            }
        __syncthreads();
        for (u32 i = threadIdx.x; i < num_rows * kFours; i += kDecodeWarps * 32) {
            const u32 row = i / kFours, four = i % kFours;
            const u32 at = row * Shape::kPart + (four / 2 + row) % kEights * 8 + four % 2 * 4;
            float4 total = *reinterpret_cast<const float4*>(sums + at);
#pragma unroll
            for (int w = 1; w < kDecodeWarps; w++) {
                const float4 more = *reinterpret_cast<const float4*>(sums + w * 16 * Shape::kPart + at);
                total.x += more.x;
                total.y += more.y;
                total.z += more.z;
                total.w += more.w;
            }
            const u32 query = row / a.group, query_head = head * a.group + row - query * a.group;
            const u32 dim = part * Shape::kPart + four * 4;
            if (item.partial != kNone) {
                const u64 vector = u64(item.partial) + u64(head) * num_rows + row;
                *reinterpret_cast<float4*>(a.partial_out + vector * D + dim) = total;
            } else if (query_head < a.num_heads_owned) {
                T* to = a.out + u64(item.query_row + query) * a.out_width + a.out_column + u64(query_head) * D + dim;
                *reinterpret_cast<uint2*>(to) = make_uint2(pair<T>(total.x, total.y), pair<T>(total.z, total.w));
            }
        }
        __syncthreads();
    }
}

template <typename T, int D> __device__ __forceinline__ void attend_decode(const Attend<T>& a) {
    using Shape = DecodeShape<D>;
    pdl_wait();
    pdl_launch();
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 num_units = a.header[kHeaderDecode] * a.num_kv_heads;
    const u32 ring = shared_address(shared_bytes) + warp * Shape::kRingBytes;
    float* sums = reinterpret_cast<float*>(shared_bytes + kDecodeWarps * Shape::kRingBytes);
    float2* states = reinterpret_cast<float2*>(shared_bytes + kDecodeWarps * Shape::kRingBytes + Shape::kSumBytes);
    const float factor = exponent_factor(a);

    TileLoader<T, D> loader;
    loader.begin(a, num_units);
#pragma unroll
    for (int stage = 0; stage < Shape::kStages - 1; stage++) {
        loader.issue(a, ring + stage * 2 * Shape::kTileBytes);
        copy_commit();
    }
    u32 stage = 0;
    DecodeRows<T, D> rows;
    for (u32 unit = blockIdx.x; unit < num_units; unit += gridDim.x) {
        const Item item = load_item(a.items, unit / a.num_kv_heads);
        const u32 head = unit % a.num_kv_heads;
        rows.begin(a, item, head, lane);
        const u32 end = (item.kv_end + kSlots - 1) / kSlots;
        for (u32 tile = item.kv_begin / kSlots + warp; tile < end; tile += kDecodeWarps) {
            copy_wait<Shape::kStages - 2>();
            __syncwarp();
            const u32 free = stage == 0 ? Shape::kStages - 1 : stage - 1;
            loader.issue(a, ring + free * 2 * Shape::kTileBytes);
            copy_commit();
            rows.take(a, item, ring + stage * 2 * Shape::kTileBytes, tile * kSlots, factor);
            stage = stage + 1 == Shape::kStages ? 0 : stage + 1;
        }
        // Read again rather than kept in registers.
        const Item done = load_item(a.items, unit / a.num_kv_heads);
        finish_unit<T, D>(a, done, unit % a.num_kv_heads, rows, factor, sums, states);
    }
    copy_wait<0>();
}

#define DECODE(D, NAME, T, BLOCKS)                                                                                           \
    extern "C" __global__ void __launch_bounds__(128, BLOCKS) attend_decode_##D##_##NAME(ATTEND_PARAMETERS(T)) {             \
        const Attend<T> a = ATTEND_VALUES;                                                                                   \
        attend_decode<T, D>(a);                                                                                              \
    }

DECODE(64, f16, f16, 2)
DECODE(64, bf16, bf16, 2)
DECODE(96, f16, f16, 2)
DECODE(96, bf16, bf16, 2)
DECODE(128, f16, f16, 2)
DECODE(128, bf16, bf16, 2)
DECODE(256, f16, f16, 1)
DECODE(256, bf16, bf16, 1)
