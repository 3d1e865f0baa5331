//! The steps that a backend runs before the first plan: made-up tokens, the same on all ranks, in the block that every cache has.

use phalanx_kernels::{InputLimits, SampleRow, SamplerKind, SeqInputs, StepInputs, WarmUpStep};

/// Slots that any block has.
const BLOCK_SLOTS: usize = 16;

/// Writes a step's inputs, cut to what the limits allow. All sequences share block 0: what they store is never read.
pub fn write(step: &WarmUpStep, limits: &InputLimits, inputs: &mut StepInputs) {
    *inputs = StepInputs::default();
    let num_decodes = step.num_decodes.min(limits.seqs_max).min(limits.tokens_max);
    for _ in 0..num_decodes {
        let context = step.context.clamp(1, limits.positions_max);
        if inputs.block_tables.len() + context.div_ceil(BLOCK_SLOTS) <= limits.table_entries_max {
            push(inputs, 1, context, step.sampler);
        }
    }
    let mut rest = step.num_prompt_tokens.min(limits.tokens_max - num_decodes);
    while rest > 0 && inputs.seqs.len() < limits.seqs_max {
        let num_tokens = rest.min(limits.positions_max);
        push(inputs, num_tokens, num_tokens, step.sampler);
        rest -= num_tokens;
    }
}

/// Adds a sequence whose last `num_tokens` of `context` tokens are computed.
fn push(inputs: &mut StepInputs, num_tokens: usize, context: usize, sampler: SamplerKind) {
    let (query_start, table_start) = (inputs.token_ids.len() as u32, inputs.block_tables.len() as u32);
    let (query_len, context_len) = (num_tokens as u32, context as u32);
    inputs.seqs.push(SeqInputs { query_start, query_len, context_len, table_start });
    inputs.token_ids.extend(std::iter::repeat_n(0, num_tokens));
    inputs.positions.extend(context_len - query_len..context_len);
    inputs.kv_slots.extend((0..num_tokens).map(|position| (position % BLOCK_SLOTS) as u32));
    inputs.block_tables.extend(std::iter::repeat_n(0, context.div_ceil(BLOCK_SLOTS)));
    let slot = inputs.samples.len() as u32;
    let (temperature, top_k, top_p) = match sampler {
        SamplerKind::Greedy => (0.0, 0, 1.0),
        SamplerKind::NoCut => (1.0, 0, 1.0),
        SamplerKind::Cut => (1.0, 2, 0.9),
    };
    inputs.logit_rows.push(query_start + query_len - 1);
    inputs.samples.push(SampleRow { slot, output_index: 0, seed: 0, temperature, top_k, top_p, min_p: 0.0 });
}

#[cfg(test)]
mod tests {
    use phalanx_kernels::AttentionLimits;

    use super::*;

    const LIMITS: InputLimits = InputLimits {
        tokens_max: 100,
        seqs_max: 8,
        table_entries_max: 64,
        logit_rows_max: 8,
        slots_max: 32,
        positions_max: 40,
        steps_max: 2,
        vocab_size: 100,
        attention: AttentionLimits { num_kv_heads: 1, group: 1, head_dim: 16, block_size: 16, window: None },
    };

    fn check(num_decodes: usize, num_prompt_tokens: usize, lens: &[u32]) {
        let mut inputs = StepInputs::default();
        let step = WarmUpStep { num_decodes, context: 3, num_prompt_tokens, sampler: SamplerKind::Cut };
        write(&step, &LIMITS, &mut inputs);
        assert_eq!(inputs.seqs.iter().map(|seq| seq.query_len).collect::<Vec<_>>(), lens);
        assert_eq!(inputs.samples.len(), lens.len());
        assert_eq!(inputs.kv_slots.len(), inputs.token_ids.len());
        assert!(inputs.token_ids.len() <= LIMITS.tokens_max && inputs.kv_slots.iter().all(|slot| *slot < 16));
    }

    #[test]
    fn steps_stay_within_the_limits() {
        check(3, 0, &[1, 1, 1]);
        check(20, 0, &[1; 8]);
        check(0, 4, &[4]);
        check(1, 90, &[1, 40, 40, 10]);
        check(0, 1000, &[40, 40, 20]);
    }
}
