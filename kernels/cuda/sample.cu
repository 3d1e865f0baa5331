// Sampling and scoring over a vocabulary that is split over ranks, on the device, with shapes that data never change.
//
// The meaning is that of `kernels/src/ops/sample.rs`: temperature, min-p, top-k, top-p over the survivors of top-k, a Gumbel-max
// draw by Philox4x32-10. Each phase is a kernel; what it leaves for the others is a small record per row. With several ranks a
// collective gathers records rank by rank, `[world][rows][...]`, between two phases; with one rank the next phase reads them
// where they are (world 1).
//
//   greedy:     sample_best, G, sample_commit
//   no cut:     sample_draw, G, sample_commit
//   cut:        sample_best, G, cut_begin, { cut_count, G, cut_apply } for pass 0..3 (0..5 where a row has both a top-k and a
//               top-p), sample_draw, G, sample_commit
//   logprobs:   score_rows, G, score_rank, G; after sample_commit where the sampled tokens are scored
//
// Invariant: results do not depend on the number of ranks, splits or blocks, nor on timing: counts and masses are integers,
// maxima break ties by the lower id, the value of a draw is f64 and a function of logit, temperature, seed and id alone. One
// sum is free in its last bits: that of `score_rows` is f64 in the block's own order.
#include "cut.cuh"
#include "score.cuh"
#include "vocab.cuh"

// ---- the largest logit ----

// Best of the quads [begin, end) for thread 0.
__device__ __forceinline__ Best largest(const Row& row, u32 begin, u32 end) {
    __shared__ u64 scratch[kWarpsMax];
    float max = -infinity();
    u32 at = kNone;
    for_quads(row, begin, end, [&](u32 quad, const float(&logits)[4]) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            at = logits[i] > max ? quad * 4 + i : at;
            max = logits[i] > max ? logits[i] : max;
        }
    });
    const u64 best = block_largest(at == kNone ? 0 : ranked(max, at), scratch);
    if (best == 0) return no_best();
    return {double(key_logit(u32(best >> 32))), ~u32(best), 0};
}

// The largest logit of each part of each row. Launch: grid (splits, rows), block 256. `best` [rows][splits].
// logits f32 [rows, width], 16-byte aligned in memory whose size is a multiple of 16; this rank's tokens are the columns
// lead..lead + owned, the first of them is token first_id (this holds for all kernels here; fastest where width is a multiple of
// 4 and so is lead - first_id). A split should have 1024 quads or more: splits about 1024 / rows, at most owned / 4096.
extern "C" __global__ void __launch_bounds__(256) sample_best(
    const float* logits, u32 width, u32 lead, u32 owned, u32 first_id, const Sample* samples, Best* best
) {
    pdl_launch();
    pdl_wait();
    if (samples[blockIdx.y].slot == kNone) return;
    const Row row = own_row(logits, width, lead, owned, first_id, blockIdx.y);
    u32 begin, end;
    own_quads(row, begin, end);
    const Best found = largest(row, begin, end);
    if (threadIdx.x == 0) best[blockIdx.y * gridDim.x + blockIdx.x] = found;
}

// ---- the draw ----

struct Words {
    u32 at[4];
};

// Philox4x32-10 of the counter [block, index, 0, 0]. Source: Salmon et al., SC 2011.
__device__ __forceinline__ Words philox(u32 block, u32 index, u32 key_lo, u32 key_hi) {
    u32 c0 = block, c1 = index, c2 = 0, c3 = 0;
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const u64 a = u64(c0) * 0xD2511F53u, b = u64(c2) * 0xCD9E8D57u;
        c0 = u32(b >> 32) ^ c1 ^ key_lo;
        c1 = u32(b);
        c2 = u32(a >> 32) ^ c3 ^ key_hi;
        c3 = u32(a);
        key_lo += 0x9E3779B9u;
        key_hi += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

constexpr float kWordStep = 2.3283064365386963e-10f;  // 2^-32

// A word as a Gumbel variate, within 2e-5. Near u = 1, where u itself would round, -ln(u) is a series in 1 - u.
__device__ __forceinline__ float gumbel_about(u32 word) {
    const bool near = word >= 0xF0000000u;
    const float x = (float(near ? ~word : word) + 0.5f) * kWordStep;
    const float series = x * (1.0f + x * (0.5f + x * (0.33333334f + x * (0.25f + x * 0.2f))));
    return -__logf(near ? series : -__logf(x));
}

// The same in f64, as the host computes it.
__device__ __noinline__ double gumbel(u32 word) { return -log(-log((double(word) + 0.5) / 4294967296.0)); }

// The draw of one part of a row, for thread 0.
//
// All tokens are compared in f32 first. An f32 value is within 2e-5 + 4e-7 (|value| + 24) of the true one, so only tokens that
// come within twice that of the largest can win: those, most often one, are computed in f64.
struct Draw {
    const Row& row;
    const Sample& sample;
    float floor;  // lowest logit that survives, finite
    u32 begin;
    u32 end;

    __device__ __forceinline__ bool keeps(float logit) const { return logit >= floor; }

    __device__ __forceinline__ Words words(u32 quad) const {
        return philox(quad, sample.output_index, sample.seed_lo, sample.seed_hi);
    }

    __device__ __forceinline__ Best exact(float logit, u32 word, u32 id) const {
        return {double(logit) / double(sample.temperature) + gumbel(word), id, 0};
    }

    // All of this thread's tokens whose f32 value is not below `least`, in f64.
    __device__ __noinline__ Best rescan(float rate, float least) const {
        Best best = no_best();
        for (u32 quad = begin + threadIdx.x; quad < end; quad += blockDim.x) {
            const Words random = words(quad);
            for (u32 i = 0; i < 4; i++) {
                const float logit = logit_of(row, quad * 4 + i);
                if (!keeps(logit) || logit * rate + gumbel_about(random.at[i]) < least) continue;
                best = better(best, exact(logit, random.at[i], quad * 4 + i));
            }
        }
        return best;
    }

    __device__ __forceinline__ Best run() const {
        __shared__ float scratch[kWarpsMax];
        __shared__ Best bests[kWarpsMax];
        const float rate = 1.0f / sample.temperature;
        float first = -infinity(), second = -infinity();
        u32 id = kNone;
        bool any = false;
        for_quads(row, begin, end, [&](u32 quad, const float(&logits)[4]) {
            if (!(keeps(logits[0]) || keeps(logits[1]) || keeps(logits[2]) || keeps(logits[3]))) return;
            const Words random = words(quad);
            any = true;
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                const float value = keeps(logits[i]) ? logits[i] * rate + gumbel_about(random.at[i]) : -infinity();
                second = fmaxf(second, fminf(first, value));
                id = value > first ? quad * 4 + i : id;
                first = fmaxf(first, value);
            }
        });
        const float max = block_max(first, scratch);
        // Temperatures and logits that f32 cannot divide: everything in f64.
        const bool usable = rate < 1e30f && fabsf(max) < 1e30f;
        const float least = usable ? max - (1e-4f + 2e-6f * fabsf(max)) : -infinity();
        Best best = no_best();
        if (any && (!usable || second >= least)) {
            best = rescan(rate, least);
        } else if (any && first >= least) {
            best = exact(logit_of(row, id), words(id / 4).at[id % 4], id);
        }
        best = warp_best(best);
        if (threadIdx.x % kWarp == 0) bests[threadIdx.x / kWarp] = best;
        __syncthreads();
        if (threadIdx.x / kWarp > 0) return best;
        return warp_best(threadIdx.x < blockDim.x / kWarp ? bests[threadIdx.x] : no_best());
    }
};

// A draw from each part of each row; the plain maximum where the temperature is 0. Launch: grid (splits, rows), block 256, as
// sample_best. `cuts` [rows] as cut_apply left them, or null: no cut.
extern "C" __global__ void __launch_bounds__(256) sample_draw(
    const float* logits, u32 width, u32 lead, u32 owned, u32 first_id, const Sample* samples, const CutState* cuts, Best* best
) {
    pdl_launch();
    pdl_wait();
    const Sample sample = samples[blockIdx.y];
    if (sample.slot == kNone) return;
    const Row row = own_row(logits, width, lead, owned, first_id, blockIdx.y);
    u32 begin, end;
    own_quads(row, begin, end);
    const float lowest = -3.402823466e38f, floor = cuts ? fmaxf(key_logit(cuts[blockIdx.y].floor), lowest) : lowest;
    const Best found =
        sample.temperature == 0 ? largest(row, begin, end) : Draw{row, sample, floor, begin, end}.run();
    if (threadIdx.x == 0) best[blockIdx.y * gridDim.x + blockIdx.x] = found;
}

// ---- the winner ----

// Picks each row's winner among all parts of all ranks. Launch: grid ceil(rows * warp / 256), block 256 (warp: 32; 64 on CDNA).
// `best` as in cut_begin. Writes tokens[row] (device) and host_tokens[row] (host memory, or null): kNone where the row has no
// finite logit; and last_token[slot], which then stays. Nothing is written for padding.
extern "C" __global__ void __launch_bounds__(256) sample_commit(
    const Best* best, u32 world, u32 stride, u32 splits, const Sample* samples, u32 num_rows, u32* last_token, u32* tokens,
    u32* host_tokens
) {
    pdl_launch();
    pdl_wait();
    const u32 row = (blockIdx.x * blockDim.x + threadIdx.x) / kWarp, lane = threadIdx.x % kWarp;
    if (row >= num_rows || samples[row].slot == kNone) return;
    Best winner = no_best();
    for (u32 i = lane; i < world * splits; i += kWarp) {
        winner = better(winner, best[(u64(i / splits) * stride + row) * splits + i % splits]);
    }
    winner = warp_best(winner);
    if (lane > 0) return;
    tokens[row] = winner.id;
    if (host_tokens) host_tokens[row] = winner.id;
    if (winner.id != kNone) last_token[samples[row].slot] = winner.id;
}
