//! To which sizes steps are padded, and which of them are run before the first plan.
//!
//! **Invariant:** a padded size depends on the size alone, so eager and recorded steps, and all ranks, use the same kernels
//! with the same shapes.

use crate::{InputLimits, SamplerKind, WarmUpStep};

/// Steps of more padded tokens are not recorded: their kernels run for longer than it takes to launch them.
pub(super) const RECORDED_TOKENS_MAX: usize = 512;

/// Rows that a step of `count` rows is padded to: at most twice as many, and few different ones.
pub(super) fn padded(count: usize) -> usize {
    match count {
        0..=2 => count.max(1),
        3..=4 => 4,
        5..=64 => count.next_multiple_of(8),
        65..=128 => count.next_multiple_of(16),
        129..=256 => count.next_multiple_of(32),
        // 448 rows take cuBLASLt longer than 512 (8B on an H200: 18.5 ms a step against 14.3).
        257..=384 => count.next_multiple_of(64),
        _ => count.next_multiple_of(128),
    }
}

/// Every padded size up to that of `max`, ascending.
fn all(max: usize) -> impl Iterator<Item = usize> {
    std::iter::successors(Some(1), |size| Some(padded(size + 1))).take_while(move |size| *size <= padded(max))
}

/// Steps that bring every recorded shape about, and the largest one. `split_context`: a context that attention splits.
pub(super) fn warm_up_steps(limits: &InputLimits, split_context: usize) -> Vec<WarmUpStep> {
    let greedy = SamplerKind::Greedy;
    let recorded_max = limits.tokens_max.min(RECORDED_TOKENS_MAX);
    let mut contexts = vec![1];
    if split_context < limits.positions_max {
        contexts.push(split_context);
    }
    let mut steps = vec![WarmUpStep { num_prompt_tokens: limits.tokens_max, sampler: greedy, ..WarmUpStep::default() }];
    for size in all(limits.seqs_max.min(recorded_max)) {
        for sampler in [SamplerKind::Greedy, SamplerKind::NoCut, SamplerKind::Cut] {
            steps.push(WarmUpStep { num_decodes: size, context: 1, num_prompt_tokens: 0, sampler });
        }
    }
    for &context in &contexts {
        for size in all(recorded_max) {
            if context > 1 && size <= limits.seqs_max {
                steps.push(WarmUpStep { num_decodes: size, context, num_prompt_tokens: 0, sampler: greedy });
            }
            // One sequence decodes, another begins: large enough to be a prompt's tile of its own.
            if size > 32 {
                steps.push(WarmUpStep { num_decodes: 1, context, num_prompt_tokens: size - 1, sampler: greedy });
            }
        }
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_is_monotonic_idempotent_and_small() {
        let mut last = 0;
        for count in 1..10_000 {
            let size = padded(count);
            assert!(size >= count && size >= last && padded(size) == size, "{count}: {size}");
            assert!(size <= 2 * count || count <= 5, "{count}: {size}");
            last = size;
        }
    }

    #[test]
    fn sizes_are_those_of_padding() {
        let sizes: Vec<usize> = all(600).collect();
        let mut expected: Vec<usize> = (1..=600).map(padded).collect();
        expected.dedup();
        assert_eq!(sizes, expected);
    }
}
