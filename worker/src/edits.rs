//! Edits of logits: from the form in which they travel to the one that a backend takes.

use phalanx_kernels::ops::edit::LogitEdits;
use phalanx_proto::TokenId;

/// Edits as the backend takes them, where they change something; tokens that do not exist are left out.
pub fn to_kernel(edits: Option<&phalanx_proto::LogitEdits>, vocab_size: usize) -> Option<LogitEdits> {
    let edits = edits.filter(|edits| !edits.changes_nothing())?;
    let exists = |token: &&TokenId| (token.0 as usize) < vocab_size;
    let ids = |tokens: &[TokenId]| tokens.iter().map(|token| token.0).collect::<Vec<u32>>();
    let allowed = (!edits.allowed.is_empty()).then(|| {
        let mut words = vec![0; vocab_size.div_ceil(u32::BITS as usize)];
        for token in edits.allowed.iter().filter(exists) {
            words[(token.0 / u32::BITS) as usize] |= 1 << (token.0 % u32::BITS);
        }
        words
    });
    Some(LogitEdits {
        presence_penalty: edits.presence_penalty,
        frequency_penalty: edits.frequency_penalty,
        repetition_penalty: edits.repetition_penalty,
        bias: edits.bias.iter().map(|(token, bias)| (token.0, *bias)).collect(),
        allowed,
        bad_words: edits.bad_words.iter().map(|word| ids(word)).collect(),
        min_tokens: edits.min_tokens,
        end_tokens: ids(&edits.end_tokens),
    })
}
