// The cut: which keys survive min-p, top-k and top-p.
//
// A radix search from the top over digits of 11, 11 and 10 bits. Pass 0 looks at the first digit of all tokens, passes 1 and 2
// at the second and third below the digits found. A row with a top-k finds its lowest key there, and a row with a top-p alone
// its; a row with both reads the first digit of its top-p from the masses of pass 0, which top-k does not change above its
// edge, and finds the others in passes 3 and 4. A row is done early where the bin at the edge survives whole.
//
// Invariant: counts and masses are integers, so the survivors depend on no order of summing, no split and no rank.
#pragma once

#include "vocab.cuh"

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
#pragma unroll
        for (int i = kBinsEach - 1; i >= 0; i--) {
            if (above < wanted && wanted <= above + weights[i]) {
                edge = {kBins - kBinsEach * (threadIdx.x + 1) + i, wanted - above, weights[i], true};
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
#pragma unroll
    for (u32 i = 0; i < kBinsEach; i++) {
        if (base + i == edge.bin) edge_count = u32(count[i]);
    }
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
