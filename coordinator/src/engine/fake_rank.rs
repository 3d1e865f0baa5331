//! Ranks in this process, for tests of group and engine: they speak the real protocol over the real channels.

use std::time::Duration;

use phalanx_proto::{
    Epoch, HeadMessage, LoadModel, NodeId, Phase, Rank, RankCapacity, RankEvent, RankFailure, StepId, Term, TokenId,
};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::group::{Decoder, GroupError, RankLink, TpGroup, Wire};
use super::simulation::SimulatedRank;
use super::start::{StartDeadlines, StartProgress};

pub(super) const BLOCK_SIZE: u32 = 4;

/// What a rank does wrong, and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    None,
    /// Its stream ends at this step.
    Die(StepId),
    /// No answer from this step on.
    Freeze(StepId),
    /// No answer from this step on, but it still listens: it waits for another rank.
    Wait(StepId),
    /// Another token than the others at this step.
    Diverge(StepId),
    /// It notices at this step that another rank is gone.
    Complain(StepId),
    /// Its stream ends in the first step of a sequence that begins with this token.
    Poisoned(TokenId),
    /// It cannot load its weights.
    FailWeights,
    /// It never gets ready with its weights.
    HangInWeights,
    /// Its stream ends while it connects.
    DieInCommunicator,
}

pub(super) fn load(world_size: u32) -> LoadModel {
    LoadModel {
        term: Term(1),
        epoch: Epoch(3),
        model_path: "model".into(),
        load_format: "auto".into(),
        dtype: "auto".into(),
        kv_cache_dtype: "auto".into(),
        world_size,
        block_size: 16,
        max_model_len: 200,
        max_num_seqs: 4,
        max_num_batched_tokens: 32,
        memory_utilization: 0.9,
        num_blocks_override: None,
        seed: 0,
        group_key: vec![],
        rank_nodes: (0..world_size).map(|rank| NodeId(rank.to_string())).collect(),
        steps_in_flight_max: 2,
        enforce_eager: false,
        disable_custom_all_reduce: false,
        collective_interface: String::new(),
        collective_ports: (0, 0),
    }
}

/// A group, the tasks of its ranks, and what was said of its start.
type Started = (Result<TpGroup, GroupError>, Vec<JoinHandle<String>>, Vec<StartProgress>);

/// Starts a group of fake ranks, the later ones first. The tasks end with why they were told to.
pub(super) async fn start(faults: &[Fault], deadlines: StartDeadlines) -> Started {
    start_with(faults, deadlines, load(faults.len() as u32)).await
}

/// The same for a later epoch.
pub(super) async fn start_epoch(faults: &[Fault], epoch: Epoch) -> Started {
    start_with(faults, StartDeadlines::default(), LoadModel { epoch, ..load(faults.len() as u32) }).await
}

async fn start_with(faults: &[Fault], deadlines: StartDeadlines, load: LoadModel) -> Started {
    let (progress, mut reports) = mpsc::channel(64);
    let mut links = vec![];
    let mut tasks = vec![];
    for (rank, fault) in faults.iter().enumerate().rev() {
        let (commands, inbox) = mpsc::channel(4);
        let (outbox, events) = mpsc::channel(4);
        links.push(RankLink { rank: Rank(rank as u32), commands, events });
        let fake = FakeRank { rank: rank as u32, fault: *fault, inbox, outbox };
        tasks.push(tokio::spawn(fake.run()));
    }
    tasks.reverse();
    let group = TpGroup::start(links, load, deadlines, progress).await;
    let mut all = vec![];
    while let Ok(report) = reports.try_recv() {
        all.push(report);
    }
    (group, tasks, all)
}

struct FakeRank {
    rank: u32,
    fault: Fault,
    inbox: mpsc::Receiver<Result<Wire, tonic::Status>>,
    outbox: mpsc::Sender<RankEvent>,
}

impl FakeRank {
    async fn run(mut self) -> String {
        let mut decoder = Decoder::default();
        let mut device = SimulatedRank::new(0, BLOCK_SIZE);
        while let Some(message) = self.inbox.recv().await {
            let Some(message) = decoder.decode(message.expect("no status")) else { continue };
            match message {
                HeadMessage::Load(_) => {
                    self.progress(Phase::Device).await;
                    self.say(RankEvent::Listening(format!("rank-{}", self.rank))).await;
                }
                HeadMessage::Connect(addresses) => {
                    assert_eq!(addresses[self.rank as usize], format!("rank-{}", self.rank));
                    if !self.load_weights().await {
                        return "a fault".into();
                    }
                }
                HeadMessage::InitKvCache { num_blocks } => {
                    device = SimulatedRank::new(num_blocks, BLOCK_SIZE);
                    self.progress(Phase::WarmUp).await;
                    self.say(RankEvent::Ready { num_blocks }).await;
                }
                HeadMessage::BeginEpoch { .. } => {
                    device = SimulatedRank::new(60, BLOCK_SIZE);
                    self.say(RankEvent::Ready { num_blocks: 60 }).await;
                }
                HeadMessage::Plan(plan) => {
                    if !self.step(&mut device, &plan).await {
                        return "a fault".into();
                    }
                }
                HeadMessage::Shutdown(reason) => return reason,
                HeadMessage::RecallPlans => unreachable!("these ranks hold nothing"),
                HeadMessage::Stage { .. } => unreachable!("the decoder keeps parts"),
            }
        }
        "the stream ended".into()
    }

    async fn load_weights(&mut self) -> bool {
        self.progress(Phase::Communicator).await;
        if self.fault == Fault::DieInCommunicator {
            return false;
        }
        self.progress(Phase::Weights).await;
        match self.fault {
            Fault::FailWeights => self.fail("model", "no tensor model.norm.weight", Phase::Weights).await,
            Fault::HangInWeights => std::future::pending::<()>().await,
            _ => {}
        }
        let num_blocks = 60 + 10 * u64::from(self.rank);
        let features = phalanx_proto::SamplerFeatures { masks: true, edits: self.rank != 1 };
        let capacity = RankCapacity { num_blocks, weight_bytes: 1, block_bytes: 1, free_bytes: 1, features };
        self.say(RankEvent::Capacity(capacity)).await;
        true
    }

    async fn step(&mut self, device: &mut SimulatedRank, plan: &phalanx_proto::StepPlan) -> bool {
        let mut output = device.run(plan);
        match self.fault {
            Fault::Die(step) if step == plan.step => return false,
            Fault::Poisoned(token) if plan.new_sequences.iter().any(|new| new.tokens.first() == Some(&token)) => {
                return false;
            }
            Fault::Freeze(step) if step == plan.step => std::future::pending().await,
            Fault::Wait(step) if step <= plan.step => return true,
            Fault::Diverge(step) if step == plan.step => output.token_hash ^= 1,
            Fault::Complain(step) if step == plan.step => {
                self.fail("communicator", "a peer is gone", Phase::Ready).await;
                return false;
            }
            _ => {}
        }
        if self.rank > 0 {
            output.rows.clear();
            output.prompt_logprobs.clear();
            output.pooled.clear();
        }
        // Devices take a moment, each its own.
        tokio::time::sleep(Duration::from_micros(50 * u64::from(self.rank))).await;
        self.say(RankEvent::Output(output)).await;
        true
    }

    async fn progress(&mut self, phase: Phase) {
        self.say(RankEvent::Progress { phase, fraction: None, detail: String::new() }).await;
    }

    async fn fail(&mut self, code: &str, message: &str, phase: Phase) {
        self.say(RankEvent::Failure(RankFailure { phase, code: code.into(), message: message.into() })).await;
    }

    async fn say(&mut self, event: RankEvent) {
        let _gone = self.outbox.send(event).await;
    }
}
