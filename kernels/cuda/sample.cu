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

// A row whose token is scored. 16 bytes.
struct Score {
    u32 row;      // of the logits; kNone is padding
    u32 token;    // kNone: the token that was sampled for the row
    u32 num_top;  // alternatives, at most kTopMax
    u32 reserved;
};

constexpr int kTopMax = 20;

struct Alternative {
    float logit;
    u32 id;
};

// What one rank knows of a scored row. 184 bytes.
struct ScoreRecord {
    double sum;   // of exp(logit - max)
    float max;    // -inf where there is none
    u32 token;
    float logit;  // the token's; -inf where another rank has it
    u32 num_top;
    Alternative top[kTopMax];  // best first; -inf and kNone where there is none
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
    u32 floor;
    u32 begin;
    u32 end;

    __device__ __forceinline__ bool keeps(float logit) const { return counts(logit) && logit_key(logit) >= floor; }

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
                second = value > first ? first : fmaxf(second, value);
                id = value > first ? quad * 4 + i : id;
                first = value > first ? value : first;
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

struct CutState;
__device__ __forceinline__ u32 cut_floor(const CutState* cuts, u32 row);

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
    const u32 floor = cuts ? cut_floor(cuts, blockIdx.y) : 0;
    const Best found =
        sample.temperature == 0 ? largest(row, begin, end) : Draw{row, sample, floor, begin, end}.run();
    if (threadIdx.x == 0) best[blockIdx.y * gridDim.x + blockIdx.x] = found;
}

// ---- the cut: which keys survive ----
//
// A radix search from the top over digits of 11, 11 and 10 bits. Pass 0 looks at the first digit of all tokens, passes 1 and 2
// at the second and third below the digits found. A row with a top-k finds its lowest key there, and a row with a top-p alone
// its; a row with both reads the first digit of its top-p from the masses of pass 0, which top-k does not change above its
// edge, and finds the others in passes 3 and 4. A row is done early where the bin at the edge survives whole.

constexpr u32 kBins = 2048;

// Counts and masses of one row and pass. Mass: exp((logit - max) / temperature) in units of 2^-40. 24576 bytes.
struct Bins {
    u64 mass[kBins];
    u32 count[kBins];
};

enum Search : u32 {
    kDone = 0,
    kTopK = 1,        // passes 0 to 2
    kTopP = 2,        // passes 0 to 2
    kTopPAfter = 3,   // passes 3 and 4
};

// A row's search. 48 bytes.
struct CutState {
    u64 wanted;      // count or mass that is still wanted from the bins below the digits found
    u64 mass_above;  // of the keys above them
    float max;
    u32 floor;       // lowest key that survives, as far as it is known
    u32 prefix;      // digits found
    u32 search;
    u32 reserved[4];
};

__device__ __forceinline__ u32 cut_floor(const CutState* cuts, u32 row) { return cuts[row].floor; }

// Whether a row takes part in a pass.
__device__ __forceinline__ bool takes_part(u32 search, u32 pass) {
    return pass < 3 ? search == kTopK || search == kTopP : search == kTopPAfter;
}

// The lowest bit of the digit that a pass decides.
__device__ __forceinline__ u32 digit_shift(u32 pass) { return pass == 0 ? 21 : pass % 2 == 1 ? 10 : 0; }

// The lowest key that min-p lets survive.
__device__ __forceinline__ u32 min_p_floor(const Sample& sample, float max) {
    const double least = double(max) + double(sample.temperature) * log(double(sample.min_p));
    float near = float(least);
    if (double(near) < least) near = nextafterf(near, infinity());
    return logit_key(near < max ? near : max);
}

// Begins the search of each row. Launch: grid rows, block 256.
// `best` [world][stride][splits]: what sample_best left, gathered; `stride` is the (padded) number of rows of a rank's part.
// `cuts` [rows], `bins` [rows]: this rank's, zeroed here.
extern "C" __global__ void __launch_bounds__(256) cut_begin(
    const Best* best, u32 world, u32 stride, u32 splits, const Sample* samples, CutState* cuts, Bins* bins
) {
    __shared__ float scratch[kWarpsMax];
    pdl_launch();
    pdl_wait();
    const u32 row = blockIdx.x;
    const Sample sample = samples[row];
    uint4* words = reinterpret_cast<uint4*>(bins + row);
    for (u32 i = threadIdx.x; i < sizeof(Bins) / 16; i += blockDim.x) words[i] = make_uint4(0, 0, 0, 0);
    float max = -infinity();
    if (sample.slot != kNone) {
        for (u32 i = threadIdx.x; i < world * splits; i += blockDim.x) {
            max = fmaxf(max, float(best[(u64(i / splits) * stride + row) * splits + i % splits].value));
        }
    }
    max = block_max(max, scratch);
    if (threadIdx.x > 0) return;
    CutState cut = {};
    cut.max = max;
    const bool drawn = sample.slot != kNone && sample.temperature > 0 && counts(max);
    if (drawn) cut.floor = sample.min_p > 0 ? min_p_floor(sample, max) : logit_key(-infinity());
    if (drawn && sample.top_p < 1) cut.search = kTopP;
    if (drawn && sample.top_k > 0) cut.search = kTopK;
    cuts[row] = cut;
}

// A token's mass: 2^40 at the largest logit.
__device__ __forceinline__ u64 mass_of(float logit, float max, float rate) {
    const float below = logit - max;
    return logit == max ? u64(1) << 40 : u64(__float2ull_rn(expf(below * rate) * 1099511627776.0f));
}

// Adds each part of each row to its bins. Launch: grid (splits, rows), block 256, as sample_best. `bins` [rows]: this rank's.
extern "C" __global__ void __launch_bounds__(256) cut_count(
    const float* logits, u32 width, u32 lead, u32 owned, u32 first_id, const Sample* samples, const CutState* cuts, Bins* bins,
    u32 pass
) {
    // The halves of masses: shared memory adds 32 bits natively.
    __shared__ u32 low[kBins], high[kBins], count[kBins];
    pdl_launch();
    pdl_wait();
    const CutState cut = cuts[blockIdx.y];
    if (!takes_part(cut.search, pass)) return;
    const Sample sample = samples[blockIdx.y];
    const u32 shift = digit_shift(pass), mask = shift == 0 ? kBins / 2 - 1 : kBins - 1;
    const u32 decided = shift == 0 ? 10 : shift + 11;
    const bool masses = sample.top_p < 1, wants_count = pass > 0 || cut.search == kTopK;
    const float rate = 1.0f / sample.temperature;
    for (u32 bin = threadIdx.x; bin < kBins; bin += blockDim.x) low[bin] = high[bin] = count[bin] = 0;
    __syncthreads();
    const Row row = own_row(logits, width, lead, owned, first_id, blockIdx.y);
    u32 begin, end;
    own_quads(row, begin, end);
    for_quads(row, begin, end, [&](u32, const float(&logits)[4]) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            const u32 key = logit_key(logits[i]);
            const bool below = pass > 0 && (key ^ cut.prefix) >> decided != 0;
            if (!counts(logits[i]) || key < cut.floor || below) continue;
            const u32 bin = key >> shift & mask;
            if (wants_count) atomicAdd(&count[bin], 1u);
            const u64 mass = masses ? mass_of(logits[i], cut.max, rate) : 0;
            if (mass == 0) continue;
            const u32 before = atomicAdd(&low[bin], u32(mass));
            const u32 carried = u32(mass >> 32) + u32(before + u32(mass) < before);
            if (carried > 0) atomicAdd(&high[bin], carried);
        }
    });
    __syncthreads();
    Bins& to = bins[blockIdx.y];
    for (u32 bin = threadIdx.x; bin < kBins; bin += blockDim.x) {
        const u64 mass = u64(high[bin]) << 32 | low[bin];
        if (count[bin] > 0) atomicAdd(&to.count[bin], count[bin]);
        if (mass > 0) atomicAdd(&to.mass[bin], mass);
    }
}

constexpr u32 kApplyThreads = 512;
constexpr u32 kBinsEach = kBins / kApplyThreads;
static_assert(kBinsEach == 4, "a thread reads its counts as one vector");

// Where the edge was found.
struct Edge {
    u32 bin;
    u64 wanted;  // of that bin
    u64 weight;  // of that bin
    bool found;  // false where all bins are empty
};

// The first bin from the top that brings the sum to `wanted`, or the lowest that holds anything. Thread t holds the bins from
// kBins - 4 (t + 1) on, ascending: the first thread has the highest. All threads call it and get the answer.
__device__ __forceinline__ Edge find_edge(const u64 (&weights)[kBinsEach], u64 wanted, bool share, float top_p) {
    __shared__ u64 sums[kWarpsMax];
    __shared__ Edge edge;
    const u32 lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const u64 own = weights[0] + weights[1] + weights[2] + weights[3];
    u64 through = own;
#pragma unroll
    for (u32 delta = 1; delta < kWarp; delta *= 2) {
        const u64 above = shuffle_up(through, int(delta));
        through += lane >= delta ? above : 0;
    }
    __syncthreads();
    if (lane == kWarp - 1) sums[warp] = through;
    if (threadIdx.x == 0) edge.found = false;
    __syncthreads();
    u64 total = 0;
    for (u32 i = 0; i < kApplyThreads / kWarp; i++) {
        through += i < warp ? sums[i] : 0;
        total += sums[i];
    }
    // `share`: what is wanted is top_p of the whole.
    if (share) wanted = u64(ceil(double(total) * double(top_p)));
    wanted = wanted < 1 ? 1 : wanted;
    wanted = wanted < total ? wanted : total;
    u64 above = through - own;
    if (above < wanted && wanted <= through) {
        for (u32 i = kBinsEach; i-- > 0;) {
            if (above + weights[i] >= wanted) {
                edge = {kBins - kBinsEach * (threadIdx.x + 1) + i, wanted - above, weights[i], true};
                break;
            }
            above += weights[i];
        }
    }
    __syncthreads();
    return edge;
}

// The mass above `bin` and in it, for all threads.
__device__ __forceinline__ u64 mass_from(const u64 (&mass)[kBinsEach], u32 bin, bool with_it) {
    __shared__ u64 scratch[kWarpsMax];
    const u32 base = kBins - kBinsEach * (threadIdx.x + 1);
    u64 sum = 0;
#pragma unroll
    for (u32 i = 0; i < kBinsEach; i++) sum += base + i > bin || (with_it && base + i == bin) ? mass[i] : 0;
    __syncthreads();
    return block_sum(sum, scratch);
}

__device__ __forceinline__ void load_masses(const u64* from, u64 (&to)[kBinsEach]) {
    const ulonglong2 a = reinterpret_cast<const ulonglong2*>(from)[0], b = reinterpret_cast<const ulonglong2*>(from)[1];
    to[0] = a.x, to[1] = a.y, to[2] = b.x, to[3] = b.y;
}

// Takes in the sum over ranks of a pass: narrows each row's search. Launch: grid rows, block 512.
// `gathered` [world][stride]: what cut_count left on each rank (world 1: `bins` itself). `bins` [rows]: this rank's, zeroed for
// the next pass. `firsts` u64 [rows][2048]: the masses of pass 0, kept from pass to pass.
extern "C" __global__ void __launch_bounds__(512) cut_apply(
    const Bins* gathered, u32 world, u32 stride, Bins* bins, u64* firsts, const Sample* samples, CutState* cuts, u32 pass
) {
    __shared__ u32 edge_count;
    pdl_launch();
    pdl_wait();
    const u32 row = blockIdx.x;
    CutState cut = cuts[row];
    if (!takes_part(cut.search, pass)) return;
    const Sample sample = samples[row];
    const u32 base = kBins - kBinsEach * (threadIdx.x + 1), shift = digit_shift(pass);
    u64 mass[kBinsEach] = {}, count[kBinsEach] = {};
    for (u32 rank = 0; rank < world; rank++) {
        const Bins& part = gathered[u64(rank) * stride + row];
        u64 masses[kBinsEach];
        load_masses(part.mass + base, masses);
        const uint4 counted = *reinterpret_cast<const uint4*>(part.count + base);
        const u32 numbers[kBinsEach] = {counted.x, counted.y, counted.z, counted.w};
#pragma unroll
        for (u32 i = 0; i < kBinsEach; i++) mass[i] += masses[i], count[i] += numbers[i];
    }
    const uint4 zero = make_uint4(0, 0, 0, 0);
    uint4* mass_words = reinterpret_cast<uint4*>(bins[row].mass + base);
    mass_words[0] = mass_words[1] = *reinterpret_cast<uint4*>(bins[row].count + base) = zero;

    const bool by_count = cut.search == kTopK;
    const u64 wanted = pass == 0 ? u64(sample.top_k) : cut.wanted;
    const Edge edge = find_edge(by_count ? count : mass, wanted, pass == 0 && !by_count, sample.top_p);
    if (base <= edge.bin && edge.bin < base + kBinsEach) edge_count = u32(count[edge.bin - base]);
    __syncthreads();
    cut.prefix |= edge.bin << shift;
    cut.wanted = edge.wanted;
    const bool whole = by_count ? edge.weight <= edge.wanted : pass > 0 && edge_count == 1;
    const bool last = shift == 0 || whole || !edge.found;
    if (last && edge.found && cut.prefix > cut.floor) cut.floor = cut.prefix;
    if (!by_count || sample.top_p >= 1 || !edge.found) {
        if (last) cut.search = kDone;
    } else {
        u64* first = firsts + u64(row) * kBins + base;
        if (pass == 0 && !last) {
            for (u32 i = 0; i < kBinsEach; i++) first[i] = mass[i];
        }
        cut.mass_above += mass_from(mass, edge.bin, last);
        if (last) {
            // The survivors of top-k are known, and their mass: top-p begins.
            if (pass > 0) load_masses(first, mass);
            const u64 share = u64(ceil(double(cut.mass_above) * double(sample.top_p)));
            const Edge next = find_edge(mass, share, false, 1);
            cut.prefix = next.bin << digit_shift(0);
            cut.wanted = next.wanted;
            cut.search = next.found ? kTopPAfter : kDone;
        }
    }
    if (threadIdx.x == 0) cuts[row] = cut;
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

// ---- log-probabilities ----

// The best tokens that a thread remembers; more are found by another look.
constexpr int kKept = 4;

// This thread's best tokens of [begin, end) below `limit`, best first; says whether there are more.
__device__ __forceinline__ bool best_below(const Row& row, u32 begin, u32 end, u64 limit, u64 (&kept)[kKept]) {
    bool more = false;
#pragma unroll
    for (int i = 0; i < kKept; i++) kept[i] = 0;
    for_quads(row, begin, end, [&](u32 quad, const float(&logits)[4]) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            u64 candidate = counts(logits[i]) ? ranked(logits[i], quad * 4 + i) : 0;
            if (candidate >= limit) continue;
            more |= candidate > 0 && kept[kKept - 1] > 0;
            if (candidate <= kept[kKept - 1]) continue;
#pragma unroll
            for (int place = 0; place < kKept; place++) {
                const u64 held = kept[place];
                kept[place] = larger(held, candidate);
                candidate = held < candidate ? held : candidate;
            }
        }
    });
    return more;
}

// What this rank knows of scored rows. Launch: grid scored rows, block 1024. `scores` [scored rows], `tokens` [rows of logits]:
// what sample_commit wrote (null where no score asks for it). `records` [scored rows], nothing for padding.
extern "C" __global__ void __launch_bounds__(1024) score_rows(
    const float* logits, u32 width, u32 lead, u32 owned, u32 first_id, const Score* scores, const u32* tokens,
    ScoreRecord* records
) {
    __shared__ u64 scratch[2][kWarpsMax];
    __shared__ double sums[kWarpsMax];
    pdl_launch();
    pdl_wait();
    const Score score = scores[blockIdx.x];
    if (score.row == kNone) return;
    ScoreRecord& record = records[blockIdx.x];
    const Row row = own_row(logits, width, lead, owned, first_id, score.row);
    const u32 begin = first_quad(row), end = end_quad(row);
    u64 kept[kKept];
    bool more = best_below(row, begin, end, ~u64(0), kept);
    u64 best = block_largest(kept[0], scratch[1]);
    const float max = best == 0 ? -infinity() : key_logit(u32(best >> 32));
    double sum = 0;
    for_quads(row, begin, end, [&](u32, const float(&logits)[4]) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            const float mass = logits[i] == max ? 1.0f : expf(logits[i] - max);
            sum += counts(logits[i]) ? double(mass) : 0.0;
        }
    });
    sum = block_sum(sum, sums);
    const u32 num_top = score.num_top < kTopMax ? score.num_top : kTopMax;
    // Round i takes the i-th best; two scratches, so that one barrier a round is enough.
    for (u32 place = 0; place < num_top; place++) {
        best = block_largest(kept[0], scratch[place % 2]);
        if (threadIdx.x == 0) {
            const Alternative none = {-infinity(), kNone}, found = {key_logit(u32(best >> 32)), ~u32(best)};
            record.top[place] = best == 0 ? none : found;
        }
        if (best == 0 || kept[0] != best) continue;
#pragma unroll
        for (int i = 0; i + 1 < kKept; i++) kept[i] = kept[i + 1];
        kept[kKept - 1] = 0;
        if (kept[0] == 0 && more) more = best_below(row, begin, end, best, kept);
    }
    if (threadIdx.x > 0) return;
    const u32 token = score.token == kNone && tokens ? tokens[score.row] : score.token;
    record.sum = sum;
    record.max = max;
    record.token = token;
    record.logit = logit_of(row, token);
    record.num_top = num_top;
    for (u32 place = num_top; place < kTopMax; place++) record.top[place] = {-infinity(), kNone};
}

// How many of this rank's logits are above the scored token's. Launch: grid scored rows, block 1024. `records` [world][stride]:
// what score_rows left on each rank. `above` u32 [scored rows]: summed over ranks, plus 1, the token's rank.
extern "C" __global__ void __launch_bounds__(1024) score_rank(
    const float* logits, u32 width, u32 lead, u32 owned, u32 first_id, const Score* scores, const ScoreRecord* records, u32 world,
    u32 stride, u32* above
) {
    __shared__ u32 scratch[kWarpsMax];
    pdl_launch();
    pdl_wait();
    const Score score = scores[blockIdx.x];
    if (score.row == kNone) return;
    float logit = -infinity();
    for (u32 rank = 0; rank < world; rank++) logit = fmaxf(logit, records[u64(rank) * stride + blockIdx.x].logit);
    const Row row = own_row(logits, width, lead, owned, first_id, score.row);
    u32 count = 0;
    for_quads(row, first_quad(row), end_quad(row), [&](u32, const float(&logits)[4]) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) count += u32(logits[i] > logit);
    });
    count = block_sum(count, scratch);
    if (threadIdx.x == 0) above[blockIdx.x] = count;
}
