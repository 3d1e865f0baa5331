//! Every golden of the tiny models through whole ranks, at world sizes 1 to 4.

use crate::group::{Generated, Group, Request, goldens, greedy, load};
use phalanx_proto::{SamplingParams, TokenId, TokenLogprobs};
use phalanx_worker::backend::DeviceKind;
use serde_json::Value;

/// Largest difference in float32, whatever the order of summation.
const TOLERANCE: f64 = 5e-4;
const NUM_NEW: usize = 32;

fn golden(model: &str) -> Value {
    let path = goldens().join(model).join("goldens.json");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).expect("reference data is JSON")
}

fn ids(value: &Value) -> Vec<TokenId> {
    value.as_array().expect("ids").iter().map(|id| TokenId(id.as_u64().expect("an id") as u32)).collect()
}

fn numbers(value: &Value) -> Vec<Option<f64>> {
    value.as_array().expect("numbers").iter().map(Value::as_f64).collect()
}

fn requests(golden: &Value) -> Vec<Request> {
    let sampling = SamplingParams { logprobs: Some(20), prompt_logprobs: Some(2), ..greedy() };
    let prompts = golden["prompts"].as_array().expect("prompts").iter();
    prompts
        .map(|p| Request {
            prompt: ids(&p["ids"]),
            num_new: NUM_NEW,
            sampling: sampling.clone(),
            shares: None,
            num_output: 0,
        })
        .collect()
}

fn near(what: &str, got: f32, expected: f64) {
    let off = (f64::from(got) - expected).abs();
    assert!(off < TOLERANCE, "{what}: {got}, expected {expected}, off by {off:.2e}");
}

/// All that a prompt's reference says.
fn check(name: &str, got: &Generated, expected: &Value) {
    for (position, expected) in numbers(&expected["prompt_logprobs"]).into_iter().enumerate() {
        let got = got.prompt_logprobs.get(position).and_then(Option::as_ref);
        assert_eq!(got.is_some(), expected.is_some(), "{name}: position {position}");
        if let (Some(got), Some(expected)) = (got, expected) {
            near(&format!("{name}: ln p at {position}"), got.logprob, expected);
        }
    }
    let argmax = ids(&expected["prompt_argmax"]);
    for (position, got) in got.prompt_logprobs.iter().enumerate().filter_map(|(i, got)| Some((i, got.as_ref()?))) {
        let best = got.top.iter().find(|(token, _)| *token == argmax[position - 1]);
        let (_, logprob) = best.unwrap_or_else(|| panic!("{name}: {got:?} at {position} lacks the best"));
        near(&format!("{name}: best at {position}"), *logprob, f64::from(got.top[0].1));
        assert_eq!(got.rank == 1, got.top[0].0 == got.token, "{name}: rank at {position}");
    }
    assert_eq!(got.tokens, ids(&expected["greedy"]["ids"]), "{name}: greedy ids");
    for (step, expected) in numbers(&expected["greedy"]["logprobs"]).into_iter().enumerate() {
        near(&format!("{name}: ln p of output {step}"), got.logprobs[step].logprob, expected.expect("a number"));
        assert_eq!(got.logprobs[step].rank, 1, "{name}: output {step} is the best");
    }
    check_top(name, &got.logprobs[0], &expected["last"]);
}

/// The twenty best behind the last prompt token. Where two are nearly equal their order may differ.
fn check_top(name: &str, got: &TokenLogprobs, expected: &Value) {
    let logprobs = numbers(&expected["top20_logprobs"]);
    assert_eq!(got.top.len(), 20, "{name}");
    for (place, (id, expected)) in ids(&expected["top20_ids"]).iter().zip(&logprobs).enumerate() {
        let expected = expected.expect("a number");
        near(&format!("{name}: best {place}"), got.top[place].1, expected);
        match got.top.iter().find(|(token, _)| token == id) {
            Some((_, logprob)) => near(&format!("{name}: token {id} of the best"), *logprob, expected),
            None => near(&format!("{name}: token {id} at the edge"), got.top[19].1, expected),
        }
    }
}

fn check_model(model: &str) {
    let golden = golden(model);
    let requests = requests(&golden);
    for world_size in 1..=4 {
        let mut group = Group::start(load(&goldens().join(model), world_size), DeviceKind::Cpu, 1);
        let results = group.generate(&requests, u64::from(world_size));
        for (result, expected) in results.iter().zip(golden["prompts"].as_array().expect("prompts")) {
            check(&format!("{model}, {world_size} ranks, {}", expected["name"]), result, expected);
        }
    }
}

#[test]
fn tiny_llama_is_the_reference_on_1_to_4_ranks() {
    check_model("tiny-llama");
}

#[test]
fn tiny_llama3_rope_is_the_reference_on_1_to_4_ranks() {
    check_model("tiny-llama3-rope");
}

#[test]
fn tiny_qwen2_is_the_reference_on_1_to_4_ranks() {
    check_model("tiny-qwen2");
}

#[test]
fn tiny_qwen2_tied_sharded_is_the_reference_on_1_to_4_ranks() {
    check_model("tiny-qwen2-tied-sharded");
}

#[test]
fn tiny_internlm2_is_the_reference_on_1_to_4_ranks() {
    check_model("tiny-internlm2");
}

#[test]
fn tiny_mistral_is_the_reference_on_1_to_4_ranks() {
    check_model("tiny-mistral");
}

#[test]
fn a_shared_prefix_gives_the_same_tokens_as_computing_it() {
    let golden = golden("tiny-llama");
    let pair: Vec<usize> = golden["shared_prefix_pair"]
        .as_array()
        .expect("a pair")
        .iter()
        .map(|i| i.as_u64().expect("index") as usize)
        .collect();
    let all = requests(&golden);
    let mut pair_requests: Vec<Request> = pair.iter().map(|&index| all[index].clone()).collect();
    pair_requests[1].shares = Some((0, 48));
    pair_requests[1].sampling.prompt_logprobs = None;
    for world_size in [1, 3] {
        let mut group = Group::start(load(&goldens().join("tiny-llama"), world_size), DeviceKind::Cpu, 1);
        let results = group.generate(&pair_requests, 9);
        for (result, index) in results.iter().zip(&pair) {
            assert_eq!(result.tokens, ids(&golden["prompts"][*index]["greedy"]["ids"]), "{world_size} ranks");
        }
    }
}

#[test]
fn outputs_are_the_same_bits_alone_and_in_a_batch() {
    let all = requests(&golden("tiny-llama"));
    let mut group = Group::start(load(&goldens().join("tiny-llama"), 2), DeviceKind::Cpu, 1);
    let together = group.generate(&all, 1);
    for (index, request) in all.iter().enumerate().skip(2) {
        let alone = group.generate(std::slice::from_ref(request), index as u64);
        assert_eq!(alone[0].tokens, together[index].tokens, "prompt {index}");
        assert_eq!(alone[0].logprobs, together[index].logprobs, "prompt {index}");
        assert_eq!(alone[0].prompt_logprobs, together[index].prompt_logprobs, "prompt {index}");
    }
}

#[test]
fn the_reference_backend_gives_the_same_as_the_cpu() {
    let golden = golden("tiny-llama");
    let requests: Vec<Request> =
        requests(&golden).into_iter().enumerate().filter(|(i, _)| *i != 3).map(|p| p.1).collect();
    let run = |device, world_size| {
        Group::start(load(&goldens().join("tiny-llama"), world_size), device, 1).generate(&requests, 4)
    };
    let cpu = run(DeviceKind::Cpu, 1);
    for world_size in [1, 2] {
        for (reference, cpu) in run(DeviceKind::Reference, world_size).iter().zip(&cpu) {
            assert_eq!(reference.tokens, cpu.tokens);
            for (reference, cpu) in reference.prompt_logprobs.iter().flatten().zip(cpu.prompt_logprobs.iter().flatten())
            {
                near("reference", reference.logprob, f64::from(cpu.logprob));
            }
        }
    }
}
