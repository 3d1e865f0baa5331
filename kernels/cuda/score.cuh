// Log-probabilities of the raw logits: what the host merges into a token's log-probability, its rank and the best tokens.
//
// Invariant: maxima, counts and the best tokens do not depend on timing; the sum of a row is f64, in the block's own order.
#pragma once

#include "vocab.cuh"

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
