//! Sampling through whole ranks: the same tokens at any world size, alone and beside others.

use std::sync::Arc;

use crate::group::{Group, Request, goldens, greedy, load};
use phalanx_proto::{LogitEdits, SamplingParams, TokenId};
use phalanx_worker::backend::DeviceKind;

fn request(seed: u64, sampling: SamplingParams) -> Request {
    let prompt = (0..20).map(|i| TokenId((seed as u32 * 31 + i * 7) % 500)).collect();
    Request {
        prompt,
        num_new: 24,
        sampling: SamplingParams { seed, logprobs: Some(3), ..sampling },
        shares: None,
        num_output: 0,
    }
}

/// Requests whose logits are edited, in every way that there is.
fn edited() -> Vec<Request> {
    let tokens = |tokens: &[u32]| tokens.iter().copied().map(TokenId).collect::<Vec<_>>();
    let neutral = LogitEdits::default();
    let all = LogitEdits {
        presence_penalty: 0.6,
        frequency_penalty: 0.4,
        repetition_penalty: 1.3,
        min_tokens: 10,
        end_tokens: tokens(&[83, 511]),
        bias: vec![(TokenId(7), 2.0), (TokenId(400), -4.0)],
        allowed: (0..450).map(TokenId).collect(),
        bad_words: vec![tokens(&[11]), tokens(&[7, 12])],
        ..neutral.clone()
    };
    let kinds = [
        LogitEdits { repetition_penalty: 1.5, ..neutral.clone() },
        LogitEdits { frequency_penalty: 2.0, ..neutral.clone() },
        LogitEdits { allowed: tokens(&[3, 4, 5]), ..neutral },
        all,
    ];
    let of = |(edits, seed): (LogitEdits, u64)| {
        let edits = Some(Arc::new(edits));
        let drawn = SamplingParams { temperature: 0.9, top_k: 40, edits: edits.clone(), ..SamplingParams::default() };
        [request(seed, drawn), request(seed + 50, SamplingParams { edits, ..greedy() })]
    };
    kinds.into_iter().zip(1..).flat_map(of).collect()
}

#[test]
fn edited_logits_give_the_same_tokens_at_any_world_size_and_after_a_new_start() {
    let requests = edited();
    let run = |world_size, requests: &[Request]| {
        let mut group = Group::start(load(&goldens().join("tiny-llama"), world_size), DeviceKind::Cpu, 1);
        group.generate(requests, u64::from(world_size))
    };
    let whole = run(1, &requests);
    for world_size in [2, 3] {
        for (index, (split, whole)) in run(world_size, &requests).iter().zip(&whole).enumerate() {
            assert_eq!(split.tokens, whole.tokens, "request {index}, {world_size} ranks");
        }
    }
    assert!(whole[4].tokens.iter().chain(&whole[5].tokens).all(|token| (3..6).contains(&token.0)));
    assert!(whole[6].tokens.iter().chain(&whole[7].tokens).all(|token| token.0 < 450 && token.0 != 11));

    // As after a preemption: the first tokens of the output come with the sequence.
    let mut again = requests.clone();
    for (request, whole) in again.iter_mut().zip(&whole) {
        request.prompt.extend_from_slice(&whole.tokens[..9]);
        (request.num_output, request.num_new) = (9, request.num_new - 9);
    }
    for (index, (rest, whole)) in run(2, &again).iter().zip(&whole).enumerate() {
        assert_eq!(rest.tokens, whole.tokens[9..], "request {index}");
    }
}

/// The scores of named tokens are those of the best ones under other names, at any world size, whatever edits do to the draw.
#[test]
fn named_tokens_are_scored_beside_drawn_ones_and_in_the_prompt() {
    let named: Vec<TokenId> = (0..100).map(|at| TokenId(at * 5)).collect();
    let own = request(3, greedy());
    let scored = LogitEdits {
        scored: named.clone(),
        scored_prompt: vec![named[..7].to_vec(); own.prompt.len() - 5],
        scored_prompt_start: 5,
        ..LogitEdits::default()
    };
    let sampling = |edits| SamplingParams {
        edits: Some(Arc::new(edits)),
        logprobs: Some(20),
        prompt_logprobs: Some(20),
        ..greedy()
    };
    let plain = request(3, sampling(scored.clone()));
    let edited = LogitEdits { allowed: vec![TokenId(2), TokenId(3)], ..scored };
    let plain = Request { sampling: sampling(plain.sampling.edits.as_deref().cloned().expect("edits")), ..plain };
    let requests = [plain, Request { sampling: sampling(edited), ..request(3, greedy()) }];
    let mut whole = Vec::new();
    for world_size in [1, 2] {
        let mut group = Group::start(load(&goldens().join("tiny-llama"), world_size), DeviceKind::Cpu, 1);
        let generated = group.generate(&requests, 1);
        for generated in &generated {
            let prompt =
                generated.prompt_logprobs.iter().enumerate().filter_map(|(at, entry)| Some((at, entry.as_ref()?)));
            let output = generated.logprobs.iter().map(|entry| (usize::MAX, entry));
            let mut num_seen = 0;
            for (position, entry) in prompt.chain(output) {
                let num_named = if position == usize::MAX { 100 } else { 7 * usize::from(position >= 5) };
                assert_eq!(entry.top.len(), 20 + num_named, "at {position}");
                let (best, scores) = entry.top.split_at(20);
                assert!(scores.iter().map(|(token, _)| token).eq(&named[..num_named]));
                for (token, logprob) in scores {
                    let same = best.iter().find(|(best, _)| best == token);
                    assert!(same.is_none_or(|(_, other)| (other - logprob).abs() < 1e-6));
                    assert!(same.is_some() || *logprob <= best[19].1);
                    num_seen += usize::from(same.is_some());
                }
            }
            assert!(num_seen > 20, "{num_seen}");
        }
        assert!(generated[1].tokens.iter().all(|token| [2, 3].contains(&token.0)));
        whole.push(generated.into_iter().map(|generated| generated.tokens).collect::<Vec<_>>());
    }
    assert_eq!(whole[0], whole[1]);
}

/// One request of each kind, so that every step mixes variants.
fn requests() -> Vec<Request> {
    let base = SamplingParams { temperature: 0.9, ..SamplingParams::default() };
    let kinds = [
        greedy(),
        base.clone(),
        SamplingParams { top_k: 5, ..base.clone() },
        SamplingParams { top_p: 0.8, ..base.clone() },
        SamplingParams { min_p: 0.05, ..base.clone() },
        SamplingParams { top_k: 40, top_p: 0.9, min_p: 0.01, temperature: 1.4, ..base },
    ];
    kinds.into_iter().zip(1..).map(|(sampling, seed)| request(seed, sampling)).collect()
}

#[test]
fn the_same_tokens_at_world_size_1_2_and_3() {
    let requests = requests();
    let run = |world_size| {
        let mut group = Group::start(load(&goldens().join("tiny-llama"), world_size), DeviceKind::Cpu, 1);
        group.generate(&requests, u64::from(world_size))
    };
    let whole = run(1);
    for world_size in [2, 3] {
        for (index, (split, whole)) in run(world_size).iter().zip(&whole).enumerate() {
            assert_eq!(split.tokens, whole.tokens, "request {index}, {world_size} ranks");
            for (split, whole) in split.logprobs.iter().zip(&whole.logprobs) {
                assert!((split.logprob - whole.logprob).abs() < 5e-4);
                assert_eq!((split.token, split.rank), (whole.token, whole.rank));
            }
        }
    }
    for (index, request) in requests.iter().enumerate() {
        let best = whole[index].logprobs.iter().all(|token| token.rank == 1);
        assert_eq!(best, request.sampling.temperature == 0.0, "request {index} draws");
        let limit = if request.sampling.top_k == 0 { u32::MAX } else { request.sampling.top_k };
        assert!(whole[index].logprobs.iter().all(|token| token.rank <= limit), "request {index} keeps to its top-k");
    }
}

#[test]
fn a_drawn_text_does_not_depend_on_its_neighbours() {
    let requests = requests();
    let mut group = Group::start(load(&goldens().join("tiny-qwen2"), 2), DeviceKind::Cpu, 1);
    let together = group.generate(&requests, 3);
    for (index, request) in requests.iter().enumerate() {
        let alone = group.generate(std::slice::from_ref(request), 8);
        assert_eq!(alone[0].tokens, together[index].tokens, "request {index}");
        assert_eq!(alone[0].logprobs, together[index].logprobs, "request {index}");
    }
}

#[test]
fn another_seed_gives_another_text() {
    let base = SamplingParams { temperature: 1.0, ..SamplingParams::default() };
    let mut group = Group::start(load(&goldens().join("tiny-llama"), 1), DeviceKind::Cpu, 1);
    let mut request = request(1, base);
    let first = group.generate(std::slice::from_ref(&request), 1);
    request.sampling.seed = 2;
    assert_ne!(group.generate(std::slice::from_ref(&request), 1)[0].tokens, first[0].tokens);
}
