// Attention of many queries: tiles of 128 query rows (queries x heads of the group) against 64 keys at a time.
//
// Every warp keeps its rows' scores and outputs in registers, K and V come through a ring of two stages, copied while the
// stage before is multiplied; tiles that no query sees are never visited. Source: arXiv:2307.08691.
//
// Launch: attend_prefill_<head_dim>_<f16|bf16>, head_dim 64, 96, 128, 256; block 128 (256 for head_dim 256);
//   dynamic shared memory, bytes: 51712 (64), 76288 (96), 100864 (128), 199168 (256: not on devices with less, as sm_80);
//   grid: 2 x SMs (64, 96, 128), 1 x SMs (256), or fewer: any grid is right, units are dealt round;
//   arguments as in attention.cuh; prefill items only, num_queries * group <= 128.
#include "attention_tensor.cuh"

constexpr int kPrefillRows = 128;
constexpr int kPrefillKeys = 64;

// `Tiles`: 16-row tiles of one warp. A fragment of K or V serves all of them.
template <int D> struct PrefillShape {
    static constexpr int kTiles = D == 256 ? 1 : 2;
    static constexpr int kThreads = kPrefillRows / 16 / kTiles * 32;
    static constexpr int kQueryBytes = kPrefillRows * D * 2;
    static constexpr int kKeyBytes = kPrefillKeys * D * 2;
    // And the rows' positions, and every thread's sums.
    static constexpr int kBytes = kQueryBytes + 2 * 2 * kKeyBytes + kPrefillRows * 4 + kThreads * kTiles * 8;
};

static_assert(PrefillShape<64>::kBytes == 51712 && PrefillShape<96>::kBytes == 76288, "as the launch comment says");
static_assert(PrefillShape<128>::kBytes == 100864 && PrefillShape<256>::kBytes == 199168, "as the launch comment says");

// Where a warp's things are, worked out anew in every turn: registers are short.
template <int D> struct WarpPlace {
    static constexpr u32 kRows = PrefillShape<D>::kTiles * 16;
    u32 lane, first_row;

    __device__ __forceinline__ WarpPlace() {
        const u32 thread = thread_again();
        lane = thread % 32;
        first_row = thread / 32 * kRows;
    }
    // The warp's own rows of q, in bytes from the start of shared memory: nobody else looks at them.
    __device__ __forceinline__ u32 queries() const { return first_row * D * 2; }
    // The positions of its rows.
    __device__ __forceinline__ u32* positions() const {
        return reinterpret_cast<u32*>(shared_bytes + PrefillShape<D>::kQueryBytes + 4 * PrefillShape<D>::kKeyBytes) + first_row;
    }
    // The lane's sums of weights, for its two rows of tile `tile`. Here because registers are short.
    __device__ __forceinline__ float2* sums(int tile) const {
        constexpr int kBegin = PrefillShape<D>::kQueryBytes + 4 * PrefillShape<D>::kKeyBytes + kPrefillRows * 4;
        return reinterpret_cast<float2*>(shared_bytes + kBegin) + first_row * 2 + tile * 32 + lane;
    }
    // K of a step, V behind it, in bytes from the start.
    __device__ __forceinline__ static u32 stage(u32 step) {
        return PrefillShape<D>::kQueryBytes + step % 2 * 2 * PrefillShape<D>::kKeyBytes;
    }
};

// The block's copies of K and V.
template <typename T, int D> struct KeyLoader {
    const T* lane_keys; // K of the 16-position tile `first + step / 8 * 32 + lane`

    // Starts the copy of the keys from `kv_begin + 64 * step` on. Steps come in order, from 0.
    __device__ __forceinline__ void issue(const Attend<T>& a, u32 index, u32 head, u32 step) {
        using Shape = PrefillShape<D>;
        const Item item = load_item(a.items, index); // Read again rather than kept in registers.
        constexpr u32 kPerStep = kPrefillKeys / kSlots;
        const u32 first = item.kv_begin / kSlots, thread = thread_again();
        if (step % (32 / kPerStep) == 0) {
            const u32 mine = first + step * kPerStep + thread % 32;
            lane_keys = a.kv + u64(head) * a.block_size * D;
            if (mine * kSlots < item.kv_end) lane_keys += tile_offset(a, item.table_start, mine, D);
        }
        const u64 to_values = u64(a.num_kv_heads) * a.block_size * D;
#pragma unroll
        for (u32 i = 0; i < kPerStep; i++) {
            const T* k = reinterpret_cast<const T*>(shuffle(reinterpret_cast<u64>(lane_keys), int(step * kPerStep % 32 + i)));
            const u32 key = (first + step * kPerStep + i) * kSlots;
            const u32 valid = key < item.kv_end ? item.kv_end - key : 0;
            const u32 to = shared_address(shared_bytes) + WarpPlace<D>::stage(step) + i * kSlots * D * 2;
            copy_tile<T, D, Shape::kThreads>(to, k, valid, thread);
            copy_tile<T, D, Shape::kThreads>(to + Shape::kKeyBytes, k + to_values, valid, thread);
        }
    }
};

// One warp's rows: tile t has rows lane / 4 and lane / 4 + 8.
template <typename T, int D> struct PrefillRowsState {
    static constexpr int kTiles = PrefillShape<D>::kTiles;
    float out[kTiles][D / 8][4];
    float max[kTiles][2];

    // Takes in the 64 keys from `key` on, which are in the stage of `step`.
    __device__ __forceinline__ void take(const Attend<T>& a, u32 step, u32 key, bool masked, float factor) {
        const WarpPlace<D> place;
        const u32 lane = place.lane, start = shared_address(shared_bytes), keys = start + place.stage(step);
        float s[kTiles][kPrefillKeys / 8][4];
#pragma unroll
        for (int t = 0; t < kTiles; t++)
#pragma unroll
            for (int j = 0; j < kPrefillKeys / 8; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) s[t][j][i] = 0.0f;
        const u32 q_at = start + place.queries() + 2 * swizzled<D>(lane % 16, lane / 16);
        const u32 k_at = keys + 2 * swizzled<D>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll 4
        for (int k = 0; k < D / 16; k++) {
            u32 q[kTiles][4];
#pragma unroll
            for (int t = 0; t < kTiles; t++)
                load_fragments(q[t], stepped<D>(q_at, k) + t * 16 * D * 2);
#pragma unroll
            for (int j = 0; j < kPrefillKeys / 16; j++) {
                u32 b[4];
                load_fragments(b, stepped<D>(k_at, k) + j * 16 * D * 2);
#pragma unroll
                for (int t = 0; t < kTiles; t++) {
                    multiply_add<T>(s[t][2 * j], q[t], b[0], b[1]);
                    multiply_add<T>(s[t][2 * j + 1], q[t], b[2], b[3]);
                }
            }
        }
        u32 p[kTiles][kPrefillKeys / 16][4];
#pragma unroll
        for (int t = 0; t < kTiles; t++) weights(a, s[t], p[t], t, key, masked, factor, place);
        const u32 v_at = keys + PrefillShape<D>::kKeyBytes + 2 * swizzled<D>(lane % 16, lane / 16);
#pragma unroll
        for (int k = 0; k < kPrefillKeys / 16; k++)
#pragma unroll
            for (int j = 0; j < D / 16; j++) {
                u32 b[4];
                load_fragments_transposed(b, stepped<D>(v_at, j) + k * 16 * D * 2);
#pragma unroll
                for (int t = 0; t < kTiles; t++) {
                    multiply_add<T>(out[t][2 * j], p[t][k], b[0], b[1]);
                    multiply_add<T>(out[t][2 * j + 1], p[t][k], b[2], b[3]);
                }
            }
    }

    // Scores of tile `t` become weights; maximum, sum and output follow.
    __device__ __forceinline__ void weights(const Attend<T>& a, float (&s)[kPrefillKeys / 8][4],
                                            u32 (&p)[kPrefillKeys / 16][4], int t, u32 key, bool masked,
                                            float factor, const WarpPlace<D>& place) {
        const u32 lane = place.lane;
        if (a.soft_cap > 0.0f) {
#pragma unroll
            for (int j = 0; j < kPrefillKeys / 8; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) s[j][i] = capped(s[j][i], a.scale, a.soft_cap);
        }
        if (masked) {
            const u32* positions = place.positions();
            const u32 window = window_or_all(a.window);
            const u32 position[2] = {positions[t * 16 + lane / 4], positions[t * 16 + lane / 4 + 8]};
#pragma unroll
            for (int j = 0; j < kPrefillKeys / 8; j++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (!sees(position[i / 2], key + 8 * j + lane % 4 * 2 + i % 2, window)) s[j][i] = -infinity();
        }
        float2* kept = place.sums(t);
        float sums[2] = {kept->x, kept->y};
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float here = -infinity();
#pragma unroll
            for (int j = 0; j < kPrefillKeys / 8; j++) here = fmaxf(here, fmaxf(s[j][2 * half], s[j][2 * half + 1]));
            const float now = fmaxf(max[t][half], row_max(here));
            const float zero = finite_max(now) * factor;
            const float scale = exp2_fast(max[t][half] * factor - zero);
            max[t][half] = now;
            float added = 0.0f;
#pragma unroll
            for (int j = 0; j < kPrefillKeys / 8; j++)
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; i++) {
                    s[j][i] = exp2_fast(s[j][i] * factor - zero);
                    added += s[j][i];
                }
            sums[half] = sums[half] * scale + added;
#pragma unroll
            for (int j = 0; j < D / 8; j++) {
                out[t][j][2 * half] *= scale;
                out[t][j][2 * half + 1] *= scale;
            }
        }
        *kept = make_float2(sums[0], sums[1]);
#pragma unroll
        for (int k = 0; k < kPrefillKeys / 16; k++) {
            p[k][0] = pair<T>(s[2 * k][0], s[2 * k][1]);
            p[k][1] = pair<T>(s[2 * k][2], s[2 * k][3]);
            p[k][2] = pair<T>(s[2 * k + 1][0], s[2 * k + 1][1]);
            p[k][3] = pair<T>(s[2 * k + 1][2], s[2 * k + 1][3]);
        }
    }

    __device__ __forceinline__ void begin() {
#pragma unroll
        for (int t = 0; t < kTiles; t++) {
            max[t][0] = max[t][1] = -infinity();
            *WarpPlace<D>().sums(t) = make_float2(0.0f, 0.0f);
        }
#pragma unroll
        for (int t = 0; t < kTiles; t++)
#pragma unroll
            for (int j = 0; j < D / 8; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) out[t][j][i] = 0.0f;
    }

    // Writes the warp's rows, by way of its rows of q, which nobody needs any more.
    __device__ __forceinline__ void finish(const Attend<T>& a, const Item& item, u32 head, float factor) {
        const WarpPlace<D> place;
        const u32 lane = place.lane, first_row = place.first_row;
        T* queries = reinterpret_cast<T*>(shared_bytes + place.queries());
        const u32 num_rows = item.num_queries * a.group;
        __syncwarp();
#pragma unroll
        for (int t = 0; t < kTiles; t++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const u32 local = t * 16 + lane / 4 + 8 * half, row = first_row + local;
                const float total = row_sum(half == 0 ? place.sums(t)->x : place.sums(t)->y);
                const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
                const u64 vector = u64(item.partial) + u64(head) * num_rows + row;
                if (item.partial == kNone) {
#pragma unroll
                    for (int j = 0; j < D / 8; j++)
                        *reinterpret_cast<u32*>(queries + swizzled<D>(local, j) + lane % 4 * 2) =
                            pair<T>(out[t][j][2 * half] * inverse, out[t][j][2 * half + 1] * inverse);
                } else if (row < num_rows) {
#pragma unroll
                    for (int j = 0; j < D / 8; j++)
                        *reinterpret_cast<float2*>(a.partial_out + vector * D + j * 8 + lane % 4 * 2) =
                            make_float2(out[t][j][2 * half] * inverse, out[t][j][2 * half + 1] * inverse);
                    if (lane % 4 == 0)
                        a.partial_lse[vector] =
                            total > 0.0f ? finite_max(max[t][half]) * factor + log2f(total) : -infinity();
                }
            }
        if (item.partial != kNone) return;
        __syncwarp();
        constexpr u32 kPieces = D / 8;
        for (u32 i = lane; i < kTiles * 16 * kPieces; i += 32) {
            const u32 local = i / kPieces, piece = i % kPieces, row = first_row + local;
            const u32 query = row / a.group, query_head = head * a.group + row - query * a.group;
            if (row < num_rows && query_head < a.num_heads_owned) {
                T* to = a.out + u64(item.query_row + query) * a.out_width + a.out_column + u64(query_head) * D + piece * 8;
                store_vec(to, load_vec<T>(queries + swizzled<D>(local, piece)));
            }
        }
    }
};

// Starts the copy of the warp's own rows of q, and writes their positions, ascending. Rows behind the item's become zeros
// at the last position; a warp that has only such rows gets position 0 and so looks at little.
template <typename T, int D>
__device__ __forceinline__ void copy_queries(const Attend<T>& a, u32 index, u32 head) {
    const WarpPlace<D> place;
    constexpr u32 kPieces = D / 8, kRows = WarpPlace<D>::kRows;
    const u32 lane = place.lane, first_row = place.first_row, to = shared_address(shared_bytes) + place.queries();
    const Item item = load_item(a.items, index);
    for (u32 i = lane; i < kRows * kPieces; i += 32) {
        const u32 local = i / kPieces, piece = i % kPieces, row = first_row + local;
        const u32 query = row / a.group;
        const bool valid = query < item.num_queries;
        const T* from = valid ? a.q + u64(item.query_row + query) * a.q_stride +
                                    u64(head * a.group + row - query * a.group) * D + piece * 8
                              : a.q;
        copy_async(to + 2 * swizzled<D>(local, piece), from, valid);
    }
    const u32 last = item.first_position + item.num_queries - 1;
    const u32 position = min(item.first_position + (first_row + lane) / a.group, last);
    if (lane < kRows) place.positions()[lane] = first_row < item.num_queries * a.group ? position : 0;
}

template <typename T, int D> __device__ __forceinline__ void attend_prefill(const Attend<T>& a) {
    using Shape = PrefillShape<D>;
    pdl_wait();
    pdl_launch();
    const u32 first_item = a.header[kHeaderDecode];
    const u32 num_units = a.header[kHeaderPrefill] * a.num_kv_heads;
    const float factor = exponent_factor(a);

    for (u32 unit = blockIdx.x; unit < num_units; unit += gridDim.x) {
        const u32 index = first_item + unit / a.num_kv_heads;
        const u32 head = unit % a.num_kv_heads;
        KeyLoader<T, D> loader;
        __syncthreads(); // The last unit's stages and positions are read.
        copy_queries<T, D>(a, index, head);
        loader.issue(a, index, head, 0);
        copy_commit();
        PrefillRowsState<T, D> rows;
        rows.begin();
        for (u32 step = 0;; step++) {
            const Item item = load_item(a.items, index);
            const u32 key = item.kv_begin + step * kPrefillKeys;
            if (key >= item.kv_end) break;
            copy_wait<0>();
            __syncthreads(); // This stage is there for all, and the other one is read by all.
            if (key + kPrefillKeys < item.kv_end) loader.issue(a, index, head, step + 1);
            copy_commit();
            const u32* positions = WarpPlace<D>().positions();
            const u32 last = positions[WarpPlace<D>::kRows - 1];
            if (key > last) continue;
            const bool whole = all_seen(positions[0], last, key, key + kPrefillKeys - 1, window_or_all(a.window));
            rows.take(a, step, key, !whole, factor);
        }
        rows.finish(a, load_item(a.items, index), head, factor);
    }
    copy_wait<0>();
}

#define PREFILL(D, NAME, T, BLOCKS)                                                                                          \
    extern "C" __global__ void __launch_bounds__(PrefillShape<D>::kThreads, BLOCKS)                                          \
        attend_prefill_##D##_##NAME(ATTEND_PARAMETERS(T)) {                                                                  \
        const Attend<T> a = ATTEND_VALUES;                                                                                   \
        attend_prefill<T, D>(a);                                                                                             \
    }

PREFILL(64, f16, f16, 2)
PREFILL(64, bf16, bf16, 2)
PREFILL(96, f16, f16, 2)
PREFILL(96, bf16, bf16, 2)
PREFILL(128, f16, f16, 2)
PREFILL(128, bf16, bf16, 2)
PREFILL(256, f16, f16, 1)
PREFILL(256, bf16, bf16, 1)
