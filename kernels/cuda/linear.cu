// Linear layers: Y[M, N] = X[M, K] W[N, K]^T, f32 sums.
//
// `linear_stream_*`: few rows of X (up to 64), time bound by reading W once. `linear_tiled_*`: any M, any K, plain
// arithmetic: the way of f32 (no TF32), and of whatever the other cannot take.
#include "linear.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// linear_tiled_{f32,f16,bf16}
//
//   grid  (ceil(n / 64), ceil(m / 64), 1)   block 256   dynamic shared memory 0   no cluster
//   args  (void* out, const T* x, const T* w, const float* bias, const u32* rows,
//          u32 m, u32 n, u32 k, u32 out_pitch, u32 epilogue)
//
// As `linear_stream_*`, but without limits on m and k. Each sum runs over k in order, one term after the other.
// ---------------------------------------------------------------------------------------------------------------------

constexpr int kTile = 64;
constexpr int kTileDepth = 16;
constexpr int kTilePitch = kTile + 4;

template <typename T>
__device__ __forceinline__ void load_tile(float (&to)[kTileDepth][kTilePitch], const T* from, bool exists, u32 row, u32 k_in_tile,
                                          u32 k_first, u32 k) {
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        const u32 at = k_first + k_in_tile + i;
        to[k_in_tile + i][row] = (exists && at < k) ? to_float(from[at]) : 0.0f;
    }
}

template <typename T>
__device__ __forceinline__ void linear_tiled(void* out, const T* x, const T* w, const float* bias, const u32* rows, u32 m, u32 n,
                                             u32 k, u32 out_pitch, u32 epilogue) {
    __shared__ float x_tile[kTileDepth][kTilePitch];
    __shared__ float w_tile[kTileDepth][kTilePitch];
    __shared__ float y_tile[kTile][kTile + 1];
    const u32 thread = threadIdx.x;
    const u32 m_first = blockIdx.y * kTile, n_first = blockIdx.x * kTile;
    const u32 row = thread / 4, k_in_tile = thread % 4 * 4;
    const u32 my = thread / 16 * 4, nx = thread % 16 * 4;

    pdl_launch();
    pdl_wait();
    const bool x_exists = m_first + row < m, w_exists = n_first + row < n;
    const u32 x_row = !x_exists ? 0 : rows ? rows[m_first + row] : m_first + row;
    const T* x_from = x + u64(x_row) * k;
    const T* w_from = w + (w_exists ? u64(n_first + row) * k : 0);

    float sum[4][4] = {};
    for (u32 k_first = 0; k_first < k; k_first += kTileDepth) {
        load_tile(x_tile, x_from, x_exists, row, k_in_tile, k_first, k);
        load_tile(w_tile, w_from, w_exists, row, k_in_tile, k_first, k);
        __syncthreads();
#pragma unroll
        for (int d = 0; d < kTileDepth; d++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++) sum[i][j] = fmaf(x_tile[d][my + i], w_tile[d][nx + j], sum[i][j]);
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const u32 at = n_first + nx + j;
            y_tile[my + i][nx + j] = sum[i][j] + (bias && at < n ? bias[at] : 0.0f);
        }
    }
    __syncthreads();
    const u32 width = is_gated(epilogue) ? kTile / 2 : kTile;
    for (u32 at = thread; at < kTile * width; at += blockDim.x) {
        const u32 m_at = at / width, column = at % width;
        if (m_first + m_at >= m) continue;
        const u64 line = u64(m_first + m_at) * out_pitch;
        if (!is_gated(epilogue)) {
            if (n_first + column < n) put<T>(out, line + n_first + column, epilogue, y_tile[m_at][column]);
        } else {
            const u32 gate_at = column / 16 * 32 + column % 16;
            if (n_first + gate_at + 16 < n) {
                put<T>(out, line + n_first / 2 + column, epilogue,
                       gated(epilogue, y_tile[m_at][gate_at], y_tile[m_at][gate_at + 16]));
            }
        }
    }
}

#define LINEAR_TILED(T)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(256)                                                                          \
        linear_tiled_##T(void* out, const T* x, const T* w, const float* bias, const u32* rows, u32 m, u32 n, u32 k,           \
                         u32 out_pitch, u32 epilogue) {                                                                        \
        linear_tiled<T>(out, x, w, bias, rows, m, n, k, out_pitch, epilogue);                                                  \
    }

typedef float f32;
LINEAR_TILED(f32)
LINEAR_TILED(f16)
LINEAR_TILED(bf16)

#if !PHALANX_HIP

// ---------------------------------------------------------------------------------------------------------------------
// linear_stream_{f16,bf16}_m{8,16,24,32,40,48,56,64}: the number in the name is the least multiple of 8 that holds m rows.
//
//   grid  (clusters * split, 1, 1), clusters from 1 to ceil(n / (32 * warp_rows)): below that, blocks take several tiles
//   block 32 * (warp_rows * warp_cols + 1); at most 15 + 1 warps for m <= 16, 8 + 1 above
//   cluster (split, 1, 1), split 1 to 8; 1 needs no cluster attribute. Before sm_90 split must be 1
//   dynamic shared memory: with P = 8 * ceil(m / 8) rows, ring = stages * (warp_rows * warp_cols * 4096 + warp_cols * P * 128),
//     sums = warp_cols * P * (32 * warp_rows + 4) * 4: max(ring, sums) if clusters is the number of tiles, else ring + sums
//   args  (void* out, const T* x, const T* w, const float* bias, const u32* rows,
//          u32 m, u32 n, u32 k, u32 out_pitch, u32 epilogue,
//          u32 warp_rows, u32 warp_cols, u32 stages, u32 split, u32 ahead)
//
//   out     16-byte aligned [m, out_pitch] T, or f32 with epilogue 1; n columns are written (n / 2 with epilogue 2 and 3)
//   x       [rows of x, k] T; row r is x[rows[r]], or x[r] where rows is null. w [n, k] T. Both 16-byte aligned.
//   bias    [n] f32 or null
//   m       1 to 64 and not above the number in the kernel's name     k  a multiple of 8; n * k / 8 below 2^32
//   n       any; a multiple of 32 with epilogue 2 and 3               stages  2 to 12
//   split * 64 * warp_cols <= k rounded up to 64 * warp_cols (every block of a cluster has a part of k)
//   ahead   stages beyond the ring asked into L2 before the wait for the kernels before; 0 for none
//
// `linear_plan.rs` chooses the last five. A row's result does not depend on other rows; it does on warp_cols and split.
//
// How it works. W's rows are the 16-row operand of the tensor cores, so 8 rows of X cost one product of n = 8. A warp owns 32
// rows of W and every warp_cols-th run of 64 columns. Its lanes copy, asynchronously and 16 bytes at a time, exactly the parts
// of W that they multiply themselves into a ring in shared memory: lane (g, t) = (lane / 4, lane % 4) takes columns 8t to
// 8t + 7 of rows g, g + 8, ... of a run of 32. The order of k inside a product is free if both operands agree, so the four
// pairs of those 16 bytes serve as the fragments of two products, and X is laid out in the same order: no transposing loads,
// no bank conflicts, no barrier for W. One more warp copies X, which is shared, in step with the ring. Sums of the warps that
// share rows, and of the blocks of a cluster that share rows, are added through (distributed) shared memory in order of k.
//
// The ring is filled with W before `pdl_wait`: weights are constants.
// ---------------------------------------------------------------------------------------------------------------------

constexpr u32 kWarpRows = 32;         // rows of W of a warp
constexpr u32 kRun = 64;              // columns of a warp and stage
constexpr u32 kWarpStageBytes = 4096; // 32 x 64 values of 2 bytes
constexpr u32 kFragmentBytes = 512;   // 16 bytes per lane

template <typename T> struct LinearStream {
    void* out;
    const T* x;
    const T* w;
    const float* bias;
    const u32* rows;
    u32 m, n, k, out_pitch, epilogue, warp_rows, warp_cols, stages, split, ahead;
};

// Where a warp's copies stand: a worker's of its 32 rows of W, or the last warp's of X. One set of registers for both.
template <typename T, int kTiles> struct Reader {
    static constexpr u32 kRows = kTiles > 4 ? kTiles : 4;
    // Rows lane / 4 of each 8 rows, in units of 8 values from the first; kNone where there is no such row.
    u32 row[kRows];

    __device__ __forceinline__ void enter_weights(const LinearStream<T>& a, u32 first_row, u32 lane) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            const u32 at = first_row + lane / 4 + 8 * i;
            row[i] = at < a.n ? at * (a.k / 8) : kNone;
        }
    }

    __device__ __forceinline__ void enter_inputs(const LinearStream<T>& a, u32 lane) {
#pragma unroll
        for (u32 i = 0; i < kTiles; i++) {
            const u32 at = i * 8 + lane / 4;
            row[i] = at < a.m ? (a.rows ? a.rows[at] : at) * (a.k / 8) : kNone;
        }
    }

    __device__ __forceinline__ void copy_row(u32 to, const T* from, u32 i, u32 column, u32 k) const {
        const bool take = row[i] != kNone && column < k;
        copy_async(to, take ? from + u64(row[i]) * 8 + column : from, take);
    }

    __device__ __forceinline__ void copy_weights(u32 to, const LinearStream<T>& a, u32 column, u32 lane) const {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                copy_row(to + lane * 16 + (i * 2 + half) * kFragmentBytes, a.w, i, column + half * 32 + lane % 4 * 8, a.k);
            }
        }
    }

    __device__ __forceinline__ void copy_inputs(u32 to, const LinearStream<T>& a, u32 column, u32 lane) const {
        to += lane * 16;
        column += lane % 4 * 8;
#pragma unroll 1
        for (u32 half = 0; half < 2 * a.warp_cols; half++) {
#pragma unroll
            for (u32 i = 0; i < kTiles; i++) copy_row(to + i * kFragmentBytes, a.x, i, column, a.k);
            to += kTiles * kFragmentBytes;
            column += 32;
        }
    }
};

template <int kTiles> __device__ __forceinline__ void clear(float (&sum)[2][kTiles][4]) {
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
#pragma unroll
        for (u32 tile = 0; tile < kTiles; tile++) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) sum[r][tile][i] = 0.0f;
        }
    }
}

// One stage of a warp: 32 rows of W by 64 columns, by all rows of X.
template <typename T, int kTiles>
__device__ __forceinline__ void multiply_stage(float (&sum)[2][kTiles][4], const uint4* w, const uint4* x) {
    // Unrolled, 64 rows would want more registers than there are.
#pragma unroll (kTiles > 7 ? 1 : 2)
    for (u32 half = 0; half < 2; half++) {
        uint4 a[4];
#pragma unroll
        for (u32 i = 0; i < 4; i++) a[i] = w[(i * 2 + half) * 32];
#pragma unroll
        for (u32 tile = 0; tile < kTiles; tile++) {
            const uint4 b = x[(half * kTiles + tile) * 32];
#pragma unroll
            for (u32 r = 0; r < 2; r++) {
                multiply_add<T>(sum[r][tile], a[2 * r].x, a[2 * r + 1].x, a[2 * r].y, a[2 * r + 1].y, b.x, b.y);
                multiply_add<T>(sum[r][tile], a[2 * r].z, a[2 * r + 1].z, a[2 * r].w, a[2 * r + 1].w, b.z, b.w);
            }
        }
    }
}

// A warp's sums, to `sums[x row][w row]` with `pitch` (4 more than a multiple of 32: no bank conflicts).
template <int kTiles>
__device__ __forceinline__ void store_sums(float* to, u32 pitch, u32 lane, const float (&sum)[2][kTiles][4]) {
    const u32 g = lane / 4, t = lane % 4;
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
#pragma unroll
        for (u32 tile = 0; tile < kTiles; tile++) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                to[(tile * 8 + 2 * t + i % 2) * pitch + r * 16 + g + i / 2 * 8] = sum[r][tile][i];
            }
        }
    }
}

__device__ __forceinline__ void add(float (&sum)[4], const float4& part) {
    sum[0] += part.x;
    sum[1] += part.y;
    sum[2] += part.z;
    sum[3] += part.w;
}

// Four neighbouring sums, over the warps and blocks that have a part of them.
__device__ __forceinline__ void add_parts(float (&sum)[4], const float* at, u32 part_floats, u32 parts, u32 split) {
    sum[0] = sum[1] = sum[2] = sum[3] = 0.0f;
    if (split == 1) {
#pragma unroll 4
        for (u32 part = 0; part < parts; part++) add(sum, *reinterpret_cast<const float4*>(at + part * part_floats));
        return;
    }
    for (u32 part = 0; part < parts; part++) {
        const u32 address = shared_address(at + part * part_floats);
        for (u32 first = 0; first < split; first += 4) {
            // All loads before the first use: another block's memory is far.
            float4 of_rank[4];
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                if (first + i < split) of_rank[i] = load_from_block(address, first + i);
            }
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                if (first + i < split) add(sum, of_rank[i]);
            }
        }
    }
}

__device__ __forceinline__ void add_bias(float (&sum)[4], const float* bias, u32 row, u32 n) {
    if (!bias) return;
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        if (row + i < n) sum[i] += bias[row + i];
    }
}

// Outputs of a tile of W's rows from `first_row`, four per thread and turn; the blocks of a cluster share them.
template <typename T, int kTiles>
__device__ __forceinline__ void finish_tile(const LinearStream<T>& a, const float* sums, u32 pitch, u32 first_row, u32 rank,
                                            u32 split) {
    const bool pairs = is_gated(a.epilogue);
    const u32 part_floats = kTiles * 8 * pitch, fours = a.warp_rows * (pairs ? 4 : 8);
#pragma unroll 1
    for (u32 unit = rank * blockDim.x + threadIdx.x; unit < a.m * fours; unit += blockDim.x * split) {
        const u32 m_at = unit / fours, four = unit % fours;
        const u32 in_tile = pairs ? four / 4 * kWarpRows + four % 4 * 4 : four * 4, row = first_row + in_tile;
        if (row >= a.n) continue;
        const float* at = sums + m_at * pitch + in_tile;
        float value[4];
        add_parts(value, at, part_floats, a.warp_cols, split);
        add_bias(value, a.bias, row, a.n);
        if (pairs) {
            float up[4];
            add_parts(up, at + 16, part_floats, a.warp_cols, split);
            add_bias(up, a.bias, row + 16, a.n);
#pragma unroll
            for (u32 i = 0; i < 4; i++) value[i] = gated(a.epilogue, value[i], up[i]);
        }
        const u32 column = pairs ? first_row / 2 + four * 4 : row;
        put_four<T>(a.out, u64(m_at) * a.out_pitch + column, a.epilogue, value, pairs ? 4 : min(4u, a.n - row));
    }
}

template <typename T, int kTiles> __device__ __forceinline__ void linear_stream(const LinearStream<T>& a) {
    extern __shared__ __align__(128) unsigned char shared[];
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    const u32 split = a.split;
#else
    const u32 split = 1;
#endif
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, workers = a.warp_rows * a.warp_cols;
    const bool feeds_input = warp == workers;
    const u32 group = warp / a.warp_cols, column_group = warp % a.warp_cols;
    const u32 rank = blockIdx.x % split, cluster = blockIdx.x / split, clusters = gridDim.x / split;

    const u32 tile_rows = a.warp_rows * kWarpRows, tiles = (a.n + tile_rows - 1) / tile_rows;
    const u32 step_columns = a.warp_cols * kRun, steps_all = (a.k + step_columns - 1) / step_columns;
    const u32 step_first = steps_all * rank / split, steps = steps_all * (rank + 1) / split - step_first;
    const u32 total = cluster < tiles ? (tiles - cluster + clusters - 1) / clusters * steps : 0;

    const u32 w_bytes = workers * kWarpStageBytes, stage_bytes = w_bytes + a.warp_cols * kTiles * 2 * kFragmentBytes;
    const u32 part_in_stage = feeds_input ? w_bytes : warp * kWarpStageBytes;
    const u32 ring = shared_address(shared);
    const bool one_tile_each = tiles <= clusters;
    float* sums = reinterpret_cast<float*>(shared + (one_tile_each ? 0 : a.stages * stage_bytes));
    const u32 pitch = tile_rows + 4;

    pdl_launch();

    // The reader's place: `stages - 1` steps ahead of the multiplier's.
    Reader<T, kTiles> reader;
    u32 read_tile = cluster, read_step = 0, read = 0, read_slot = 0;
    const auto read_one = [&]() {
        if (read < total) {
            const u32 to = ring + read_slot * stage_bytes + part_in_stage;
            const u32 column = (step_first + read_step) * step_columns;
            if (feeds_input) {
                reader.copy_inputs(to, a, column, lane);
            } else {
                if (read_step == 0) reader.enter_weights(a, read_tile * tile_rows + group * kWarpRows, lane);
                reader.copy_weights(to, a, column + column_group * kRun, lane);
            }
            if (++read_step == steps) {
                read_step = 0;
                read_tile += clusters;
            }
            read++;
        }
        if (++read_slot == a.stages) read_slot = 0;
        commit_copies();
    };

    if (feeds_input) {
        pdl_wait();
        reader.enter_inputs(a, lane);
    }
    for (u32 i = 0; i + 1 < a.stages; i++) read_one();
    if (!feeds_input) {
        // A lane per row; a run of 64 columns is one line of 128 bytes.
        const u32 row = cluster * tile_rows + group * kWarpRows + lane;
        for (u32 i = 0; i < a.ahead && row < a.n; i++) {
            const u32 next = a.stages - 1 + i, column = (step_first + next) * step_columns + column_group * kRun;
            if (next < steps && column < a.k) prefetch_l2(a.w + u64(row) * a.k + column);
        }
        pdl_wait();
    }

    float sum[2][kTiles][4];
    clear<kTiles>(sum);
    u32 slot = 0, step = 0, first_row = cluster * tile_rows;
    for (u32 done = 0; done < total; done++) {
        wait_copies(a.stages - 2);
        // X of this stage is there for all, and all are done with the slot that is filled next.
        __syncthreads();
        read_one();
        if (!feeds_input) {
            const unsigned char* stage = shared + slot * stage_bytes + lane * 16;
            const unsigned char* input = stage + w_bytes + column_group * kTiles * 2 * kFragmentBytes;
            multiply_stage<T, kTiles>(sum, reinterpret_cast<const uint4*>(stage + warp * kWarpStageBytes),
                                      reinterpret_cast<const uint4*>(input));
        }
        if (++slot == a.stages) slot = 0;
        if (++step < steps) continue;
        step = 0;
        if (one_tile_each) __syncthreads(); // The sums take the ring's place.
        if (!feeds_input) {
            store_sums<kTiles>(sums + column_group * kTiles * 8 * pitch + group * kWarpRows, pitch, lane, sum);
        }
        if (split > 1) {
            cluster_sync();
        } else {
            __syncthreads();
        }
        finish_tile<T, kTiles>(a, sums, pitch, first_row, rank, split);
        // Other blocks still read these sums. Within a block the barriers of the next tile's steps keep them.
        if (split > 1) cluster_meet();
        first_row += clusters * tile_rows;
        clear<kTiles>(sum);
    }
}

#define LINEAR_STREAM(T, ROWS)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(ROWS <= 16 ? 512 : 288, 1)                                                     \
        linear_stream_##T##_m##ROWS(void* out, const T* x, const T* w, const float* bias, const u32* rows, u32 m, u32 n,       \
                                    u32 k, u32 out_pitch, u32 epilogue, u32 warp_rows, u32 warp_cols, u32 stages, u32 split,   \
                                    u32 ahead) {                                                                               \
        const LinearStream<T> a = {out,       x,        w,         bias,      rows,   m,     n,    k,                          \
                                   out_pitch, epilogue, warp_rows, warp_cols, stages, split, ahead};                           \
        linear_stream<T, ROWS / 8>(a);                                                                                         \
    }

#define LINEAR_STREAM_ALL(T)                                                                                                   \
    LINEAR_STREAM(T, 8)                                                                                                        \
    LINEAR_STREAM(T, 16)                                                                                                       \
    LINEAR_STREAM(T, 24)                                                                                                       \
    LINEAR_STREAM(T, 32)                                                                                                       \
    LINEAR_STREAM(T, 40)                                                                                                       \
    LINEAR_STREAM(T, 48)                                                                                                       \
    LINEAR_STREAM(T, 56)                                                                                                       \
    LINEAR_STREAM(T, 64)

LINEAR_STREAM_ALL(f16)
LINEAR_STREAM_ALL(bf16)

#endif
