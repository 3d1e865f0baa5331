//! Sampling through whole ranks: the same tokens at any world size, alone and beside others.

use crate::group::{Group, Request, goldens, greedy, load};
use phalanx_proto::{SamplingParams, TokenId};
use phalanx_worker::backend::DeviceKind;

fn request(seed: u64, sampling: SamplingParams) -> Request {
    let prompt = (0..20).map(|i| TokenId((seed as u32 * 31 + i * 7) % 500)).collect();
    Request { prompt, num_new: 24, sampling: SamplingParams { seed, logprobs: Some(3), ..sampling }, shares: None }
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
