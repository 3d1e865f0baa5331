// Attention of many queries on devices of capability 9.0: the same items as attention_prefill.cu, through products of whole
// warpgroups.
//
// One warpgroup copies: queries, K and V of 128 keys at a time, into rings. Two others multiply, 64 rows of queries each; one
// of them weighs its scores while the other multiplies, and each has the scores of the next keys under way while it weighs.
// Sources: arXiv:2407.08608 for the order of work, the PTX manual for layouts.
//
// Launch: attend_prefill_wgmma_<head_dim>_<f16|bf16>, head_dim 64, 128; block 384;
//   dynamic shared memory, bytes: 99456 (64), 197760 (128);
//   grid: 1 x SMs, or fewer: any grid is right, units are dealt round;
//   arguments as in attention.cuh, and u32 *next_unit, which is 0 before and after; prefill items only,
//   num_queries * group <= 128.
// Images for other architectures hold no kernel of this file.
#include "warpgroup.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int kRows = 128;
constexpr int kKeys = 128;
constexpr int kStages = 2;
constexpr int kCopiers = 128;
constexpr int kMultiplierWarps = 8;
// Registers of a thread: 128 x 56 + 256 x 224 are what 384 threads of 168 have.
constexpr int kCopierRegisters = 56;
constexpr int kMultiplierRegisters = 224;

// Tiles of queries, K and V, in bytes.
template <int D> struct WideShape {
    static constexpr int kHalves = D / 64;
    static constexpr int kTileBytes = kHalves * kHalfBytes;
    static constexpr int kKeysAt = kStages * kTileBytes;
    static constexpr int kValuesAt = 2 * kStages * kTileBytes;
    static constexpr int kBarriersAt = 3 * kStages * kTileBytes;
    // The barriers, and what it takes to begin at a multiple of 1024.
    static constexpr int kBytes = kBarriersAt + 128 + 1024;
};

static_assert(WideShape<64>::kBytes == 99456 && WideShape<128>::kBytes == 197760, "as the launch comment says");
static_assert(kRows == 128 && kKeys == 128, "a tile has 128 rows");

// ---- turns and rings ----

// Barriers of both multiplying warpgroups, by number: from 1 on, 0 is __syncthreads'.
__device__ __forceinline__ void turn_wait(u32 warpgroup) {
    asm volatile("bar.sync %0, 256;" ::"r"(1 + warpgroup) : "memory");
}
__device__ __forceinline__ void turn_give(u32 warpgroup) {
    asm volatile("bar.arrive %0, 256;" ::"r"(1 + warpgroup) : "memory");
}

// A ring of `kStages` tiles: what is in it, and what is free.
struct Ring {
    u32 barriers; // shared address: full, then empty, of each stage
    u32 turn;     // tiles taken so far

    __device__ __forceinline__ u32 stage() const { return turn % kStages; }
    __device__ __forceinline__ u32 full() const { return barriers + stage() * 8; }
    __device__ __forceinline__ u32 empty() const { return barriers + (kStages + stage()) * 8; }
    __device__ __forceinline__ void wait_full() const { barrier_wait(full(), turn / kStages % 2); }
    // The first round finds all stages free.
    __device__ __forceinline__ void wait_empty() const { barrier_wait(empty(), turn / kStages % 2 ^ 1); }
};

// Where the unit of a stage of queries is told: behind the barriers.
__device__ __forceinline__ u32 unit_at(const Ring& q) { return q.barriers + 6 * kStages * 8 + q.stage() * 4; }

// row / group for rows and groups of at most 128.
struct Group {
    u32 size, inverse;

    __device__ __forceinline__ explicit Group(u32 size) : size(size), inverse(65535 / size + 1) {}
    __device__ __forceinline__ u32 query(u32 row) const { return row * inverse >> 16; }
};

// ---- copying ----

// One thread's part in copying. `start`: shared address of the tiles.
template <typename T, int D> struct Copier {
    using Shape = WideShape<D>;
    static constexpr u32 kPieces = D / 8;
    const Attend<T>& a;
    u32 start;
    u32 thread;
    Group group;

    // Rows of q; behind the item's own, zeros.
    __device__ __forceinline__ void queries(const Item& item, u32 head, u32 stage) const {
        const u32 to = start + stage * Shape::kTileBytes;
#pragma unroll 4
        for (u32 i = thread; i < kRows * kPieces; i += kCopiers) {
            const u32 row = i / kPieces, piece = i % kPieces, query = group.query(row);
            const bool valid = query < item.num_queries;
            const T* from = valid ? a.q + u64(item.query_row + query) * a.q_stride +
                                        u64(head * group.size + row - query * group.size) * D + piece * 8
                                  : a.q;
            copy_async(to + piece_at(row, piece), from, valid);
        }
    }

    // K or V of the 128 keys from `key` on; `lane_tile`: the lane's address of the tile of 16 keys of that number, of 32.
    __device__ __forceinline__ void keys(const Item& item, u32 key, u64 lane_tile, u64 offset, u32 to) const {
#pragma unroll
        for (u32 tile = 0; tile < kKeys / kSlots; tile++) {
            const u32 number = (key - item.kv_begin) / kSlots + tile;
            const T* from = reinterpret_cast<const T*>(shuffle(lane_tile, int(number % 32))) + offset;
            const u32 first = key + tile * kSlots;
            const u32 valid = first < item.kv_end ? item.kv_end - first : 0;
#pragma unroll
            for (u32 i = 0; i < kSlots * kPieces / kCopiers; i++) {
                const u32 at = thread + i * kCopiers, row = at / kPieces, piece = at % kPieces;
                copy_async(to + piece_at(tile * kSlots + row, piece), from + at * 8, row < valid);
            }
        }
    }

    // Takes the next unit and tells the multiplying warps, beside the queries of that stage. A block begins with the unit of
    // its own number and then takes those that no block has; `ahead` is what the first thread asked for a unit before. There
    // are as many questions as units: the last one puts the counter back.
    __device__ __forceinline__ u32 take_unit(u32* next_unit, u32& ahead, u32 num_units, const Ring& q) const {
        u32 unit = ahead;
        if (thread == 0) {
            if (unit < num_units) ahead = gridDim.x + atomicAdd(next_unit, 1);
            if (unit == gridDim.x + num_units - 1) *next_unit = 0;
        }
        q.wait_empty();
        if (thread == 0) {
            asm volatile("st.shared.u32 [%0], %1;" ::"r"(unit_at(q)), "r"(unit) : "memory");
            barrier_arrive(q.full());
        }
        // Behind a barrier of their own the other copying warps see it.
        asm volatile("bar.sync 3, 128;" ::: "memory");
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(unit) : "r"(unit_at(q)) : "memory");
        return unit;
    }

    __device__ __forceinline__ void run(u32 first_item, u32 num_units, u32* next_unit, u32 barriers) const {
        const u64 to_values = u64(a.num_kv_heads) * a.block_size * D;
        Ring q = {barriers, 0}, k = {barriers + 2 * kStages * 8, 0}, v = {barriers + 4 * kStages * 8, 0};
        u32 ahead = blockIdx.x;
        for (;; q.turn++) {
            const u32 unit = take_unit(next_unit, ahead, num_units, q);
            if (unit >= num_units) break;
            const Item item = load_item(a.items, first_item + unit / a.num_kv_heads);
            const u32 head = unit % a.num_kv_heads;
            queries(item, head, q.stage());
            barrier_arrive_copied(q.full());
            u64 lane_tile = 0;
            for (u32 key = item.kv_begin; key < item.kv_end; key += kKeys) {
                const u32 number = (key - item.kv_begin) / kSlots;
                if (number % 32 == 0) {
                    const u32 mine = item.kv_begin / kSlots + number + thread % 32;
                    const T* from = a.kv + u64(head) * a.block_size * D;
                    if (mine * kSlots < item.kv_end) from += tile_offset(a, item.table_start, mine, D);
                    lane_tile = reinterpret_cast<u64>(from);
                }
                k.wait_empty();
                keys(item, key, lane_tile, 0, start + Shape::kKeysAt + k.stage() * Shape::kTileBytes);
                barrier_arrive_copied(k.full());
                k.turn++;
                v.wait_empty();
                keys(item, key, lane_tile, to_values, start + Shape::kValuesAt + v.stage() * Shape::kTileBytes);
                barrier_arrive_copied(v.full());
                v.turn++;
            }
        }
        // So that the last phase of the queries' barrier ends too: the multiplying warps wait for it.
        barrier_arrive_copied(q.full());
        copy_wait<0>();
    }
};

// ---- multiplying ----

// A warpgroup's 64 rows; a lane has rows lane / 4 and lane / 4 + 8 of its warp's 16.
template <typename T, int D> struct Multiplier {
    using Shape = WideShape<D>;
    static constexpr u32 kPieces = D / 8;
    const Attend<T>& a;
    u32 start;
    u32 warpgroup;
    Group group;
    float factor;
    float out[D / 8][4];
    float max[2], sum[2], rescale[2];

    __device__ __forceinline__ Multiplier(const Attend<T>& a, u32 start, u32 warpgroup)
        : a(a), start(start), warpgroup(warpgroup), group(a.group), factor(exponent_factor(a)) {}

    __device__ __forceinline__ static u32 lane() { return threadIdx.x % 32; }
    // The lane's first row, of the item's 128.
    __device__ __forceinline__ u32 row() const { return warpgroup * 64 + threadIdx.x / 32 % 4 * 16 + lane() / 4; }

    __device__ __forceinline__ void begin_scores(float (&s)[16][4], u32 q_stage, u32 k_stage) const {
        const u64 q = describe(start + q_stage * Shape::kTileBytes + warpgroup * 64 * 128);
        const u64 k = describe(start + Shape::kKeysAt + k_stage * Shape::kTileBytes);
        pin(s);
        products_begin();
#pragma unroll
        for (int i = 0; i < D / 16; i++) {
            const u64 step = i / 4 * (kHalfBytes >> 4) + i % 4 * 2;
            Products<T>::scores(s, q + step, k + step, i > 0);
        }
        products_commit();
    }

    __device__ __forceinline__ void begin_values(const u32 (&p)[8][4], u32 v_stage, bool is_first) {
        const u64 v = describe(start + Shape::kValuesAt + v_stage * Shape::kTileBytes);
        pin(out);
        products_begin();
#pragma unroll
        for (int i = 0; i < kKeys / 16; i++)
            Products<T>::values(out, p[i], v + i * (16 * 128 >> 4), i > 0 || !is_first);
        products_commit();
    }

    // Scores become weights; the maximum, the sum, and by what the output is to be multiplied, follow.
    __device__ __forceinline__ void weigh(float (&s)[16][4], const Item& item, u32 key, const u32 (&position)[2], bool masked) {
        if (a.soft_cap > 0.0f) {
#pragma unroll
            for (int j = 0; j < 16; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) s[j][i] = capped(s[j][i], a.scale, a.soft_cap);
        }
        if (masked) {
            const u32 window = window_or_all(a.window);
#pragma unroll
            for (int j = 0; j < 16; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const u32 at = key + 8 * j + lane() % 4 * 2 + i % 2;
                    if (!sees(position[i / 2], at, window) || at >= item.kv_end) s[j][i] = -infinity();
                }
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float here = max[half];
#pragma unroll
            for (int j = 0; j < 16; j++) here = fmaxf(here, fmaxf(s[j][2 * half], s[j][2 * half + 1]));
            const float now = row_max(here), zero = finite_max(now) * factor;
            rescale[half] = exp2_fast(max[half] * factor - zero);
            max[half] = now;
            float added = 0.0f;
#pragma unroll
            for (int j = 0; j < 16; j++)
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; i++) {
                    s[j][i] = exp2_fast(s[j][i] * factor - zero);
                    added += s[j][i];
                }
            sum[half] = sum[half] * rescale[half] + added;
        }
    }

    __device__ __forceinline__ static void round(const float (&s)[16][4], u32 (&p)[8][4]) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            p[i][0] = pair<T>(s[2 * i][0], s[2 * i][1]);
            p[i][1] = pair<T>(s[2 * i][2], s[2 * i][3]);
            p[i][2] = pair<T>(s[2 * i + 1][0], s[2 * i + 1][1]);
            p[i][3] = pair<T>(s[2 * i + 1][2], s[2 * i + 1][3]);
        }
    }

    __device__ __forceinline__ void rescale_out() {
#pragma unroll
        for (int j = 0; j < D / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) out[j][i] *= rescale[i / 2];
    }

    // One unit of work.
    __device__ __forceinline__ void attend(const Item& item, u32 head, const Ring& q, Ring& k, Ring& v) {
        const u32 last_query = item.num_queries - 1, first_row = row() - lane() / 4;
        const u32 position[2] = {item.first_position + min(group.query(row()), last_query),
                                 item.first_position + min(group.query(row() + 8), last_query)};
        const u32 lowest = item.first_position + min(group.query(first_row), last_query);
        const u32 highest = item.first_position + min(group.query(first_row + 15), last_query);
        const u32 window = window_or_all(a.window);
        const auto masked = [&](u32 key) {
            return key + kKeys > item.kv_end || !all_seen(lowest, highest, key, key + kKeys - 1, window);
        };
        max[0] = max[1] = -infinity();
        sum[0] = sum[1] = 0.0f;
        float s[16][4];
        u32 p[8][4];
        k.wait_full();
        fence_proxy();
        begin_scores(s, q.stage(), k.stage());
        products_wait<0>();
        pin(s);
        release(k);
        weigh(s, item, item.kv_begin, position, masked(item.kv_begin));
        round(s, p);
        bool is_first = true;
        for (u32 key = item.kv_begin + kKeys; key < item.kv_end; key += kKeys) {
            k.wait_full();
            fence_proxy();
            turn_wait(warpgroup);
            begin_scores(s, q.stage(), k.stage());
            if (!is_first) rescale_out();
            v.wait_full();
            fence_proxy();
            begin_values(p, v.stage(), is_first);
            turn_give(warpgroup ^ 1);
            products_wait<1>();
            pin(s);
            release(k);
            weigh(s, item, key, position, masked(key));
            products_wait<0>();
            pin(out);
            release(v);
            round(s, p);
            is_first = false;
        }
        if (!is_first) rescale_out();
        v.wait_full();
        fence_proxy();
        begin_values(p, v.stage(), is_first);
        products_wait<0>();
        pin(out);
        release(v);
        finish(item, head, q.stage());
        release_only(q);
    }

    __device__ __forceinline__ static void release_only(const Ring& ring) {
        __syncwarp();
        if (lane() == 0) barrier_arrive(ring.empty());
    }
    __device__ __forceinline__ static void release(Ring& ring) {
        release_only(ring);
        ring.turn++;
    }

    // Writes the warp's rows, by way of its rows of q, which nobody needs any more.
    __device__ __forceinline__ void finish(const Item& item, u32 head, u32 q_stage) {
        const u32 num_rows = item.num_queries * group.size;
        unsigned char* queries = shared_bytes + (start - shared_address(shared_bytes)) + q_stage * Shape::kTileBytes;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const u32 mine = row() + 8 * half;
            const float total = row_sum(sum[half]), inverse = total > 0.0f ? 1.0f / total : 0.0f;
            const u64 vector = u64(item.partial) + u64(head) * num_rows + mine;
            if (item.partial == kNone) {
#pragma unroll
                for (int j = 0; j < D / 8; j++)
                    *reinterpret_cast<u32*>(queries + piece_at(mine, j) + lane() % 4 * 4) =
                        pair<T>(out[j][2 * half] * inverse, out[j][2 * half + 1] * inverse);
            } else if (mine < num_rows) {
#pragma unroll
                for (int j = 0; j < D / 8; j++)
                    *reinterpret_cast<float2*>(a.partial_out + vector * D + j * 8 + lane() % 4 * 2) =
                        make_float2(out[j][2 * half] * inverse, out[j][2 * half + 1] * inverse);
                if (lane() % 4 == 0)
                    a.partial_lse[vector] = total > 0.0f ? finite_max(max[half]) * factor + log2f(total) : -infinity();
            }
        }
        if (item.partial != kNone) return;
        __syncwarp();
        const u32 first_row = row() - lane() / 4;
        for (u32 i = lane(); i < 16 * kPieces; i += 32) {
            const u32 mine = first_row + i / kPieces, piece = i % kPieces;
            const u32 query = group.query(mine), query_head = head * group.size + mine - query * group.size;
            if (mine < num_rows && query_head < a.num_heads_owned) {
                T* to = a.out + u64(item.query_row + query) * a.out_width + a.out_column + u64(query_head) * D + piece * 8;
                store_vec(to, load_vec<T>(reinterpret_cast<const T*>(queries + piece_at(mine, piece))));
            }
        }
    }

    __device__ __forceinline__ void run(u32 first_item, u32 num_units, u32 barriers) {
        Ring q = {barriers, 0}, k = {barriers + 2 * kStages * 8, 0}, v = {barriers + 4 * kStages * 8, 0};
        if (warpgroup == 1) turn_give(0); // The first turn is the other's.
        for (;;) {
            q.wait_full();
            u32 unit;
            asm volatile("ld.shared.u32 %0, [%1];" : "=r"(unit) : "r"(unit_at(q)) : "memory");
            if (unit >= num_units) break;
            const Item item = load_item(a.items, first_item + unit / a.num_kv_heads);
            attend(item, unit % a.num_kv_heads, q, k, v);
            q.turn++;
        }
        if (warpgroup == 0) turn_wait(0); // So that no arrival is left behind.
    }
};

template <typename T, int D> __device__ __forceinline__ void attend_prefill_wgmma(const Attend<T>& a, u32* next_unit) {
    using Shape = WideShape<D>;
    const u32 start = (shared_address(shared_bytes) + 1023) / 1024 * 1024, barriers = start + Shape::kBarriersAt;
    if (threadIdx.x == 0) {
        for (int ring = 0; ring < 3; ring++)
            for (int stage = 0; stage < kStages; stage++) {
                // The queries' barrier has one arrival more: of the unit's number.
                barrier_init(barriers + (ring * 2 * kStages + stage) * 8, kCopiers + (ring == 0 ? 1 : 0));
                barrier_init(barriers + (ring * 2 * kStages + kStages + stage) * 8, kMultiplierWarps);
            }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    pdl_wait();
    pdl_launch();
    const u32 first_item = a.header[kHeaderDecode];
    const u32 num_units = a.header[kHeaderPrefill] * a.num_kv_heads;
    const u32 warpgroup = threadIdx.x / 128;
    if (warpgroup == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCopierRegisters));
        const Copier<T, D> copier = {a, start, threadIdx.x, Group(a.group)};
        copier.run(first_item, num_units, next_unit, barriers);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kMultiplierRegisters));
        Multiplier<T, D> multiplier(a, start, warpgroup - 1);
        multiplier.run(first_item, num_units, barriers);
    }
}

#define PREFILL_WGMMA(D, NAME, T)                                                                                            \
    extern "C" __global__ void __launch_bounds__(384, 1)                                                                     \
        attend_prefill_wgmma_##D##_##NAME(ATTEND_PARAMETERS(T), u32* next_unit) {                                            \
        const Attend<T> a = ATTEND_VALUES;                                                                                   \
        attend_prefill_wgmma<T, D>(a, next_unit);                                                                            \
    }

PREFILL_WGMMA(64, f16, f16)
PREFILL_WGMMA(64, bf16, bf16)
PREFILL_WGMMA(128, f16, f16)
PREFILL_WGMMA(128, bf16, bf16)

#endif
