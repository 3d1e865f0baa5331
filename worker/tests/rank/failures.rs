//! What a rank says before it ends.

use crate::group::{Group, goldens, greedy, load, next_milestone};
use phalanx_proto::{
    BlockId, HeadMessage, Incarnation, LoadModel, NewSequence, NodeId, Phase, PlanRow, Rank, RankFailure, SeqId,
    SeqSlot, StepPlan, TokenId,
};
use phalanx_worker::backend::DeviceKind;
use phalanx_worker::device_thread::{DeviceHandle, RankSetup, spawn};

fn rank(device: DeviceKind) -> DeviceHandle {
    let (rank, incarnation, node_id) = (Rank(0), Incarnation(1), NodeId("here".into()));
    spawn(RankSetup { rank, incarnation, node_id, device, num_threads: 1, head_grace: std::time::Duration::ZERO })
        .expect("a thread")
}

fn tiny() -> LoadModel {
    load(&goldens().join("tiny-llama"), 1)
}

/// The failure of a rank that is told these things, one after each of its answers.
fn failure(device: DeviceKind, messages: &[HeadMessage]) -> RankFailure {
    let mut rank = rank(device);
    for message in messages {
        rank.commands.try_send(message.clone()).expect("room");
        if let Err(failure) = next_milestone(&mut rank) {
            assert!(rank.events.blocking_recv().is_none(), "nothing comes after a failure");
            return failure;
        }
    }
    panic!("no failure");
}

fn check(device: DeviceKind, messages: &[HeadMessage], phase: Phase, code: &str, words: &str) {
    let failure = failure(device, messages);
    assert_eq!((failure.phase, failure.code.as_str()), (phase, code), "{failure:?}");
    assert!(failure.message.contains(words), "{failure:?}");
}

#[test]
fn what_cannot_start_is_named() {
    use HeadMessage::{Connect, InitKvCache, Load};
    let cpu = DeviceKind::Cpu;
    let connect = || Connect(vec![String::new()]);
    check(DeviceKind::Rocm, &[Load(tiny())], Phase::Device, "device", "--device cpu");
    check(cpu, &[Connect(Vec::new())], Phase::Connect, "divergence", "where load comes next");
    let absent = LoadModel { model_path: "/nowhere".into(), ..tiny() };
    check(cpu, &[Load(absent), connect()], Phase::Weights, "model", "/nowhere");
    let long = LoadModel { max_model_len: 4096, ..tiny() };
    check(cpu, &[Load(long), connect()], Phase::Weights, "model", "max-model-len");
    let gguf = LoadModel { load_format: "gguf".into(), ..tiny() };
    check(cpu, &[Load(gguf), connect()], Phase::Weights, "model", "load-format");
    let fp8 = LoadModel { kv_cache_dtype: "fp8".into(), ..tiny() };
    check(cpu, &[Load(fp8), connect()], Phase::Weights, "model", "kv-cache-dtype");
    let no_memory = LoadModel { num_blocks_override: None, memory_utilization: 1e-9, ..tiny() };
    check(cpu, &[Load(no_memory), connect()], Phase::Weights, "device", "max-model-len");
    let twice = [Load(tiny()), connect(), connect()];
    check(cpu, &twice, Phase::Weights, "divergence", "KV blocks");
    let early = [Load(tiny()), connect(), InitKvCache { num_blocks: 8 }, InitKvCache { num_blocks: 8 }];
    check(cpu, &early, Phase::Ready, "divergence", "a plan");
}

#[test]
fn a_plan_that_does_not_fit_ends_the_rank_and_nothing_panics() {
    let sequence = NewSequence {
        slot: SeqSlot(1),
        seq_id: SeqId(1),
        tokens: vec![TokenId(3); 20],
        num_prompt_tokens: 20,
        blocks: Vec::new(),
        sampling: greedy(),
    };
    let row = |start, num_tokens, block| PlanRow {
        slot: SeqSlot(1),
        start,
        num_tokens,
        new_blocks: vec![BlockId(block), BlockId(1)],
        samples: true,
        consumes: None,
        pools: false,
    };
    for row in [row(0, 20, 9_999), row(3, 20, 0), row(0, u32::MAX, 0), row(u32::MAX, 20, 0)] {
        let mut group = Group::start(tiny(), DeviceKind::Cpu, 1);
        group.send(StepPlan { new_sequences: vec![sequence.clone()], rows: vec![row], ..StepPlan::default() });
        let failure = group.finish().expect_err("it does not fit");
        assert_eq!((failure.phase, failure.code.as_str()), (Phase::Ready, "divergence"), "{failure:?}");
    }
}

#[test]
fn a_rank_ends_with_its_session() {
    let mut rank = rank(DeviceKind::Cpu);
    drop(rank.commands);
    assert!(rank.events.blocking_recv().is_none());
}
