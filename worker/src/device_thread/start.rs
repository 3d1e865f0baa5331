//! A rank's start-up, phase by phase, and its life after it.

use std::time::Duration;

use phalanx_kernels::Ops;
use phalanx_proto::{
    BlockId, HeadMessage, LoadModel, NewSequence, Phase, PlanRow, RankEvent, SamplingParams, SeqId, SeqSlot, StepId,
    StepPlan, TokenId,
};
use tracing::trace_span;

use super::RankSetup;
use super::channel::{Head, out_of_order};
use crate::backend::{self, DeviceKind};
use crate::collective;
use crate::error::WorkerError;
use crate::kv_cache::host_bytes_available;
use crate::shard::{Shard, first_epoch};

/// Longest wait for the other ranks to meet.
const CONNECT_DEADLINE: Duration = Duration::from_secs(60);
/// Most tokens of the first step.
const WARM_UP_TOKENS: u32 = 4;

/// From the head's first message to its last.
pub(super) fn serve(setup: &RankSetup, head: &mut Head) -> Result<(), WorkerError> {
    let load = head.load()?;
    head.enter(Phase::Device, setup.device.as_str())?;
    let num_threads = backend::num_threads(setup.num_threads, &setup.node_id, &load);
    let ranks_here = backend::ranks_here(&setup.node_id, &load);
    setup.device.check()?;
    let pending = collective::prepare(&load, setup.rank)?.with_threads(num_threads);
    head.send(RankEvent::Listening(pending.address()))?;
    let addresses = head.addresses()?;
    head.enter(Phase::Communicator, format!("{} ranks", load.world_size))?;
    let group = pending.connect(&addresses, CONNECT_DEADLINE)?;
    match setup.device {
        DeviceKind::Cpu => serve_on(backend::cpu::open(group, &load, num_threads, ranks_here)?, setup, &load, head),
        DeviceKind::Reference => serve_on(backend::reference::open(group), setup, &load, head),
        unknown @ (DeviceKind::Cuda | DeviceKind::Rocm) => Err(unknown.refused()),
    }
}

/// From an open device on.
fn serve_on<B: Ops + 'static>(ops: B, setup: &RankSetup, load: &LoadModel, head: &mut Head) -> Result<(), WorkerError> {
    head.enter(Phase::Weights, load.model_path.as_str())?;
    let shard = Shard::load(ops, setup.rank, load, |fraction| head.fraction(fraction))?;
    head.send(RankEvent::Capacity(shard.capacity(load, &setup.node_id, host_bytes_available()?)?))?;
    let num_blocks = head.num_blocks()?;
    head.enter(Phase::KvCache, format!("{num_blocks} blocks"))?;
    let mut runner = shard.into_runner(load, setup.incarnation, num_blocks)?;
    head.enter(Phase::WarmUp, "")?;
    runner.step(&warm_up_plan(setup, load))?;
    runner.begin(first_epoch(load, setup.incarnation));
    head.enter(Phase::Ready, "")?;
    head.send(RankEvent::Ready { num_blocks })?;
    loop {
        match head.next()? {
            HeadMessage::Plan(plan) => {
                let span = trace_span!("rank_step", rank = setup.rank.0, epoch = plan.epoch.0, step = plan.step.0);
                let output = span.in_scope(|| runner.step(&plan))?;
                head.send(RankEvent::Output(output))?;
            }
            HeadMessage::Shutdown(_) => return Ok(()),
            other => return Err(out_of_order("a plan", &other)),
        }
    }
}

/// A small first step: the same on all ranks, in the block that every cache has.
fn warm_up_plan(setup: &RankSetup, load: &LoadModel) -> StepPlan {
    let num_tokens = WARM_UP_TOKENS.min(load.max_num_batched_tokens).min(load.max_model_len);
    let slot = SeqSlot(0);
    let sequence = NewSequence {
        slot,
        seq_id: SeqId(0),
        tokens: vec![TokenId(0); num_tokens as usize],
        num_prompt_tokens: num_tokens,
        blocks: Vec::new(),
        sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
    };
    let row = PlanRow { slot, start: 0, num_tokens, new_blocks: vec![BlockId(0)], samples: true, consumes: None };
    let mut plan = StepPlan {
        term: load.term,
        incarnation: setup.incarnation,
        epoch: load.epoch,
        step: StepId(1),
        new_sequences: vec![sequence],
        rows: vec![row],
        ..StepPlan::default()
    };
    plan.plan_hash = plan.chain(0);
    plan
}
