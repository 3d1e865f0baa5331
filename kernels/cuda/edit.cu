// Edits of logits before a token is drawn: grammars' masks, bans, biases, penalties; in place.
//
// The meaning is that of `kernels/src/ops/edit.rs`. What the host knows of a step comes in a blob of its memory, one record a row and
// lists behind them; what it does not know yet, the tokens of steps in flight, is in `recents`, a ring of tokens for each slot:
// the token of draw n of a sequence is at n modulo the ring's length, which is a power of two.
//
//   load:    edit_load, before the step; not recorded, since the blob's address and the rows' lists differ from step to step
//   sample:  edit_survey, G, edit_apply, then the kernels of sample.cu, edit_keep; G gathers records rank by rank
//
// A row whose edits leave no token draws without them, uncut; where its mask leaves none either, from the raw logits.
//
// Invariant: each token of a row is written by one thread of the grid, whatever the number of blocks, so that nothing depends on
// timing; values are those of the host, rounded after each operation.
#include "vocab.cuh"

constexpr u32 kChanged = 1;     // the row has a mask or edits
constexpr u32 kAllows = 2;      // some tokens are not allowed
constexpr u32 kMasked = 4;      // some of them by a mask
constexpr u32 kKeeps = 8;       // the token that is drawn goes to `recents`
constexpr u32 kPenalises = 16;  // tokens of `recents` are penalised

// A row's edits. Offsets are words of the blob. 64 bytes.
struct EditRow {
    u32 flags;
    u32 slot;
    u32 place;        // in the ring, of the token that this step draws
    u32 num_recents;  // tokens before it that the host does not know
    u32 mask_at;      // a bit a token, of the whole vocabulary; words that are not there allow nothing
    u32 mask_len;     // 0: none
    u32 allowed_at;
    u32 allowed_len;
    u32 bans_at;      // `Ban`s of 2 + num_recents words
    u32 num_bans;
    u32 items_at;     // `Item`s
    u32 num_items;
    float repetition;
    float frequency;
    float presence;
    u32 reserved;
};

constexpr u32 kRowWords = sizeof(EditRow) / 4;
static_assert(kRowWords == 16, "the host writes 16 words");

// A ban: {token, n, n tokens}. It holds where the last n of the recents are these.
// An item, three words: {token, count, bias}. How often the token stands in the known output; kNone: neither there nor in the prompt.
constexpr u32 kItemWords = 3;

constexpr u32 kRecentsMax = 64;

// A word of host memory that the host has written since it was last read.
__device__ __forceinline__ u32 load_host(const u32* at) {
#if PHALANX_HIP
    return *at;
#else
    return __ldcv(at);
#endif
}

// The i-th of the tokens that the host does not know.
__device__ __forceinline__ u32 recent(const EditRow& row, const u32* recents, u32 ring, u32 i) {
    return recents[u64(row.slot) * ring + ((row.place - row.num_recents + i) & (ring - 1))];
}

__device__ __forceinline__ bool holds(const EditRow& row, const u32* ban, const u32* recents, u32 ring) {
    const u32 num = load_host(ban + 1);
    for (u32 i = 0; i < num; i++) {
        if (recent(row, recents, ring, row.num_recents - num + i) != load_host(ban + 2 + i)) return false;
    }
    return true;
}

// Takes a step's records in and writes which tokens are allowed. Launch: grid rows of logits (padded), block 256. `blob` device address of
// host memory: a record for each row of the grid, then lists; it stays as it is until the step's kernels have ended. `recents`
// [slots][ring]. Writes rows [rows], items [rows] (address of the row's items), allowed and masked [rows][words]: without and
// with bans and allowed tokens; words that a row has no use for stay as they are.
extern "C" __global__ void __launch_bounds__(256) edit_load(
    const u32* blob, const u32* recents, u32 ring, u32 words, EditRow* rows, u64* items, u32* allowed, u32* masked
) {
    __shared__ EditRow row;
    pdl_launch();
    if (threadIdx.x < kRowWords) {
        reinterpret_cast<u32*>(&row)[threadIdx.x] = load_host(blob + u64(blockIdx.x) * kRowWords + threadIdx.x);
    }
    pdl_wait();
    __syncthreads();
    if (threadIdx.x == 0) {
        rows[blockIdx.x] = row;
        items[blockIdx.x] = u64(blob + row.items_at);
    }
    if ((row.flags & kAllows) == 0) return;
    u32* own = allowed + u64(blockIdx.x) * words;
    for (u32 at = threadIdx.x; at < words; at += blockDim.x) {
        u32 word = ~0u;
        if (row.flags & kMasked) {
            word = at < row.mask_len ? load_host(blob + row.mask_at + at) : 0;
            masked[u64(blockIdx.x) * words + at] = word;
        }
        if (row.allowed_len > 0) word &= at < row.allowed_len ? load_host(blob + row.allowed_at + at) : 0;
        own[at] = word;
    }
    __syncthreads();
    const u32* bans = blob + row.bans_at;
    for (u32 i = threadIdx.x; i < row.num_bans; i += blockDim.x) {
        const u32* ban = bans + u64(i) * (2 + row.num_recents);
        const u32 token = load_host(ban);
        if (token / 32 < words && holds(row, ban, recents, ring)) atomicAnd(own + token / 32, ~(1u << (token % 32)));
    }
}

// Four bits of a row's tokens, from `quad` on; all of them where there is no such list.
__device__ __forceinline__ u32 bits_of(const u32* list, u32 words, bool is_there, u32 quad) {
    return is_there ? list[u64(blockIdx.y) * words + quad / 8] >> (quad % 8 * 4) : ~0u;
}

// Whether each part of a changed row has a token that may be drawn: with its edits (bit 0 of `id`), with its mask alone (bit 1).
// Launch: grid (splits, rows), block 256, as sample_best. `alive` [rows][splits]; nothing is written for other rows.
extern "C" __global__ void __launch_bounds__(256) edit_survey(
    const float* logits, u32 width, u32 lead, u32 owned, u32 first_id, const Sample* samples, const EditRow* rows,
    const u32* allowed, const u32* masked, u32 words, Best* alive
) {
    pdl_launch();
    pdl_wait();
    const u32 flags = rows[blockIdx.y].flags;
    if (samples[blockIdx.y].slot == kNone || (flags & kChanged) == 0) return;
    const Row row = own_row(logits, width, lead, owned, first_id, blockIdx.y);
    u32 begin, end, edited = 0, raw = 0;
    own_quads(row, begin, end);
    for_quads(row, begin, end, [&](u32 quad, const float(&logits)[4]) {
        u32 there = 0;
#pragma unroll
        for (u32 i = 0; i < 4; i++) there |= u32(counts(logits[i])) << i;
        edited |= there & bits_of(allowed, words, flags & kAllows, quad);
        raw |= there & bits_of(masked, words, flags & kMasked, quad);
    });
    const bool any_edited = __syncthreads_or(edited != 0), any_raw = __syncthreads_or(raw != 0);
    if (threadIdx.x == 0) alive[blockIdx.y * gridDim.x + blockIdx.x] = {0, u32(any_edited) | u32(any_raw) << 1, 0};
}

// Which of a row's edits are applied.
enum Level { kAll, kMaskOnly, kNothing };

// For all threads of the block.
__device__ __forceinline__ Level level_of(const Best* alive, u32 world, u32 stride, u32 splits) {
    u32 bits = 0;
    for (u32 i = threadIdx.x; i < world * splits; i += blockDim.x) {
        bits |= alive[(u64(i / splits) * stride + blockIdx.y) * splits + i % splits].id;
    }
    const bool edited = __syncthreads_or(bits & 1), raw = __syncthreads_or(bits & 2);
    return edited ? kAll : raw ? kMaskOnly : kNothing;
}

// One token's bias and penalties. A logit that counts goes on counting.
struct Editor {
    const EditRow& row;
    const u32* allowed;  // of the row, or null
    float* logits;       // of first_id
    u32 first_id;
    u32 owned;

    __device__ __forceinline__ void edit(u32 token, bool stands, u32 count, float bias) const {
        const u32 at = token - first_id;
        if (at >= owned || (allowed && (allowed[token / 32] >> (token % 32) & 1) == 0)) return;
        const float raw = logits[at];
        float logit = bias == 0 ? raw : __fadd_rn(raw, bias);
        if ((row.flags & kPenalises) && stands) {
            logit = logit > 0 ? __fdiv_rn(logit, row.repetition) : __fmul_rn(logit, row.repetition);
            if (count > 0) {
                logit = __fsub_rn(logit, __fmul_rn(row.frequency, float(count)));
                logit = __fsub_rn(logit, row.presence);
            }
        }
        logits[at] = counts(raw) && !counts(logit) ? -3.402823466e38f : logit;
    }
};

// All of a row's items, and its recents that are no item; by one block.
__device__ __forceinline__ void edit_tokens(const Editor& editor, const u32* items, const u32* recents, u32 ring) {
    __shared__ u32 tokens[kRecentsMax];
    __shared__ bool found[kRecentsMax];
    const EditRow& row = editor.row;
    const u32 num_recents = row.flags & kPenalises ? row.num_recents : 0;
    if (threadIdx.x < num_recents) {
        tokens[threadIdx.x] = recent(row, recents, ring, threadIdx.x);
        found[threadIdx.x] = false;
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < row.num_items; i += blockDim.x) {
        const u32* item = items + u64(i) * kItemWords;
        const u32 token = load_host(item), known = load_host(item + 1);
        u32 count = known == kNone ? 0 : known;
        bool stands = known != kNone;
        for (u32 j = 0; j < num_recents; j++) {
            if (tokens[j] != token) continue;
            count++;
            stands = found[j] = true;
        }
        editor.edit(token, stands, count, __uint_as_float(load_host(item + 2)));
    }
    __syncthreads();
    if (threadIdx.x >= num_recents || found[threadIdx.x] || tokens[threadIdx.x] == kNone) return;
    u32 count = 0;
    for (u32 j = 0; j < num_recents; j++) {
        if (tokens[j] != tokens[threadIdx.x]) continue;
        // The first of equal ones edits for all.
        if (j < threadIdx.x) return;
        count++;
    }
    editor.edit(tokens[threadIdx.x], true, count, 0);
}

// Edits changed rows. Launch: grid (splits + 1, rows), block 256; the last block of a row edits single tokens, the others take away
// what is not allowed. `alive` [world][stride][splits], as edit_survey left it on each rank; the rest as edit_load. Rows that draw
// without their edits lose their cuts in `samples`.
extern "C" __global__ void __launch_bounds__(256) edit_apply(
    float* logits, u32 width, u32 lead, u32 owned, u32 first_id, Sample* samples, const EditRow* rows, const u64* items,
    const u32* recents, u32 ring, const u32* allowed, const u32* masked, u32 words, const Best* alive, u32 world, u32 stride
) {
    pdl_launch();
    pdl_wait();
    const EditRow edits = rows[blockIdx.y];
    if (samples[blockIdx.y].slot == kNone || (edits.flags & kChanged) == 0) return;
    const u32 splits = gridDim.x - 1;
    const Level level = level_of(alive, world, stride, splits);
    float* own = logits + u64(blockIdx.y) * width + lead;
    const u32* allows = edits.flags & kAllows ? allowed + u64(blockIdx.y) * words : nullptr;
    if (blockIdx.x == splits) {
        if (level == kAll) {
            edit_tokens({edits, allows, own, first_id, owned}, reinterpret_cast<const u32*>(items[blockIdx.y]), recents, ring);
        } else if (threadIdx.x == 0) {
            samples[blockIdx.y].top_k = 0;
            samples[blockIdx.y].top_p = 1;
            samples[blockIdx.y].min_p = 0;
        }
        return;
    }
    const u32* masks = edits.flags & kMasked ? masked + u64(blockIdx.y) * words : nullptr;
    const u32* bits = level == kAll ? allows : level == kMaskOnly ? masks : nullptr;
    if (!bits) return;
    const u32 share = (owned + splits - 1) / splits, begin = blockIdx.x * share;
    const u32 end = begin + share < owned ? begin + share : owned;
    for (u32 at = begin + threadIdx.x; at < end; at += blockDim.x) {
        const u32 token = first_id + at;
        if ((bits[token / 32] >> (token % 32) & 1) == 0) own[at] = -infinity();
    }
}

// Keeps what edited rows drew for the steps behind. Launch: grid ceil(rows / 256), block 256. `tokens` [rows], as sample_commit left
// them.
extern "C" __global__ void __launch_bounds__(256) edit_keep(
    const EditRow* rows, u32 num_rows, const u32* tokens, u32* recents, u32 ring
) {
    pdl_launch();
    pdl_wait();
    const u32 row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= num_rows || (rows[row].flags & kKeeps) == 0) return;
    recents[u64(rows[row].slot) * ring + rows[row].place] = tokens[row];
}
