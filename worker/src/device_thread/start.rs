//! A rank's start-up, phase by phase, and its life after it.

use std::time::{Duration, Instant};

use phalanx_kernels::Ops;
use phalanx_proto::{HeadMessage, LoadModel, Phase, RankEvent};
use tracing::trace_span;

use super::RankSetup;
use super::channel::{Head, out_of_order};
use crate::backend::{self, DeviceKind};
use crate::collective;
use crate::epoch::EpochRecord;
use crate::error::WorkerError;
use crate::kv_cache::host_bytes_available;
use crate::runner::Runner;
use crate::shard::{self, Shard};

/// Longest wait for the other ranks to meet.
const CONNECT_DEADLINE: Duration = Duration::from_secs(60);
/// How long a head that is back may take to pass a plan on.
const RESUME_DEADLINE: Duration = Duration::from_secs(15);
/// How long the thread looks for a message or a finished step without giving its processor up.
const SPIN: Duration = Duration::from_micros(50);
/// How long it sleeps between two looks after that.
const POLL: Duration = Duration::from_micros(20);

/// From the head's first message to its last.
pub(super) fn serve(setup: &RankSetup, head: &mut Head) -> Result<(), WorkerError> {
    let load = head.load()?;
    head.enter(Phase::Device, setup.device.as_str())?;
    let num_threads = backend::num_threads(setup.num_threads, &setup.node_id, &load);
    let ranks_here = backend::ranks_here(&setup.node_id, &load);
    setup.device.check()?;
    let head_wait = if setup.head_grace.is_zero() { Duration::ZERO } else { setup.head_grace + RESUME_DEADLINE };
    let call_deadline = collective::CALL_DEADLINE.max(head_wait);
    let pending = collective::prepare(&load, setup.rank)?.with_threads(num_threads).with_call_deadline(call_deadline);
    head.send(RankEvent::Listening(pending.address()))?;
    let addresses = head.addresses()?;
    head.enter(Phase::Communicator, format!("{} ranks", load.world_size))?;
    let group = pending.connect(&addresses, CONNECT_DEADLINE)?;
    match setup.device {
        DeviceKind::Cpu => serve_on(backend::cpu::open(group, &load, num_threads, ranks_here)?, setup, &load, head),
        DeviceKind::Reference => serve_on(backend::reference::open(group), setup, &load, head),
        DeviceKind::Cuda => {
            let files = shard::open(&load)?;
            let plan = files.shard_plan(load.world_size as usize, setup.rank.0 as usize);
            let ops = backend::cuda::open(group, &load, files.main_dtype(), files.geometry(), &plan, head_wait)?;
            serve_on(ops, setup, &load, head)
        }
        unknown @ DeviceKind::Rocm => Err(unknown.refused()),
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
    head.enter(runner.warm_up_phase(), "")?;
    runner.warm_up(|fraction| head.fraction(fraction))?;
    head.enter(Phase::Ready, "")?;
    head.send(RankEvent::Ready { num_blocks })?;
    while let Some(message) = next(&mut runner, head)? {
        match message {
            HeadMessage::Plan(plan) => {
                let span = trace_span!("rank_step", rank = setup.rank.0, epoch = plan.epoch.0, step = plan.step.0);
                let _entered = span.enter();
                while runner.lags(&plan) {
                    head.send(RankEvent::Output(runner.finish()?))?;
                }
                runner.launch(&plan)?;
            }
            HeadMessage::BeginEpoch { term, epoch } => {
                runner.begin(EpochRecord::new(term, setup.incarnation, epoch, load.steps_in_flight_max as usize))?;
                head.send(RankEvent::Ready { num_blocks })?;
            }
            other => return Err(out_of_order("a plan", &other)),
        }
    }
    Ok(())
}

/// The head's next message, `None` where it is the last. Steps that finish meanwhile are answered.
fn next<B: Ops>(runner: &mut Runner<B>, head: &mut Head) -> Result<Option<HeadMessage>, WorkerError> {
    let mut idle_since = Instant::now();
    loop {
        let message = if runner.num_in_flight() == 0 { Some(head.next()?) } else { head.try_next()? };
        match message {
            Some(HeadMessage::Shutdown(_)) => return Ok(None),
            Some(message) => return Ok(Some(message)),
            None if runner.is_done()? => {
                head.send(RankEvent::Output(runner.finish()?))?;
                idle_since = Instant::now();
            }
            None if idle_since.elapsed() < SPIN => std::hint::spin_loop(),
            None => std::thread::sleep(POLL),
        }
    }
}
