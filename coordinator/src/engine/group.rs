//! A tensor-parallel group as the head sees it: one link to each rank, plans out to all, every rank's answer back.
//!
//! Knows no sequence and no queue. The only file of the engine that names generated types.
//!
//! **Invariant:** every rank gets the same messages in the same order.
//! **Invariant:** a step is finished only when every rank has answered with the same hashes; anything else breaks the group.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use phalanx_proto::{
    Epoch, HeadMessage, Incarnation, PLAN_BYTES_MAX, Phase, Rank, RankCapacity, RankEvent, RankFailure,
    STAGE_TOKENS_MAX, SamplerFeatures, StepId, StepOutput, StepPlan, Term, edit_messages, mask_messages, pb,
};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout_at};

use super::scheduler::PlannedStep;
use super::step_time::StepDeadlines;

/// Prompt tokens that a plan carries itself; the rest is staged ahead.
const INLINE_TOKENS_MAX: usize = 1024;
/// Shortest deadline of a step until the engine sets its own.
const STEP_DEADLINE_MIN: Duration = Duration::from_secs(5);
/// When a rank complains about another one, how long the other one has to show itself.
const CULPRIT_GRACE: Duration = Duration::from_millis(250);
/// How long a rank's channel may refuse the last message.
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(1);

/// A message as the streams take it.
pub(super) type Wire = pb::HeadToRank;

/// The stream of one rank.
#[derive(Debug)]
pub struct RankLink {
    /// Its place in the group.
    pub rank: Rank,
    /// Towards the rank: what a tonic server stream is made of.
    pub commands: mpsc::Sender<Result<pb::HeadToRank, tonic::Status>>,
    /// From the rank; closed when its stream has ended.
    pub events: mpsc::Receiver<RankEvent>,
}

/// Why a group is broken. Each names the rank that failed first.
#[derive(Debug, Clone, thiserror::Error, PartialEq)]
pub enum GroupError {
    /// The cluster gave the group up: a machine or a process of it is gone.
    #[error("{reason}")]
    GivenUp {
        /// What was seen.
        reason: String,
    },
    /// A rank's stream ended.
    #[error("rank {rank} went away in phase {phase}")]
    Gone {
        /// Which.
        rank: Rank,
        /// What it did then.
        phase: Phase,
    },
    /// A rank gave up.
    #[error("rank {rank} failed in phase {}: {} ({})", .failure.phase, .failure.message, .failure.code)]
    Failed {
        /// Which.
        rank: Rank,
        /// What it said.
        failure: RankFailure,
    },
    /// A rank did not get ready in time.
    #[error("rank {rank} is late in phase {phase}: nothing within {limit:?}")]
    StartLate {
        /// Which.
        rank: Rank,
        /// In which phase.
        phase: Phase,
        /// The phase's deadline.
        limit: Duration,
    },
    /// Ranks did not answer a step in time. One that hangs makes those wait that share a collective with it: they are not
    /// named where they still answer when they are told to end.
    #[error("late: no answer to step {step} within {limit:?} from rank {}", numbers(.ranks))]
    StepLate {
        /// Those that hang, or all that are late where that cannot be told.
        ranks: Vec<Rank>,
        /// Which step.
        step: StepId,
        /// The step's deadline.
        limit: Duration,
    },
    /// A rank does not agree with the head.
    #[error("rank {rank} disagrees about {what} of step {step}")]
    Diverged {
        /// Which.
        rank: Rank,
        /// In which step.
        step: StepId,
        /// `the plans` or `the tokens`.
        what: &'static str,
    },
    /// A rank said what it must not say now.
    #[error("rank {rank} sent {what}, out of turn")]
    OutOfTurn {
        /// Which.
        rank: Rank,
        /// The message.
        what: &'static str,
    },
    /// The ranks' numbers are not 0 to `world_size` - 1, each once.
    #[error("the group has {num_links} links, and rank {rank} is not where it should be")]
    WrongRanks {
        /// The first one that is wrong.
        rank: Rank,
        /// Links that were given.
        num_links: usize,
    },
    /// No KV block fits on a rank.
    #[error("rank {rank} has no room for a KV block: {free_bytes} bytes are free, a block takes {block_bytes}")]
    NoRoom {
        /// Which.
        rank: Rank,
        /// Bytes free on its device.
        free_bytes: u64,
        /// Bytes of one block.
        block_bytes: u64,
    },
}

fn numbers(ranks: &[Rank]) -> String {
    ranks.iter().map(Rank::to_string).collect::<Vec<_>>().join(", ")
}

/// A rank, and what it has answered that nobody asked for yet.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) link: RankLink,
    pub(super) outputs: VecDeque<StepOutput>,
    pub(super) has_failed: bool,
}

/// A step that the ranks have.
#[derive(Debug)]
pub struct Launched {
    step: PlannedStep,
    at: Instant,
}

/// The end of a group that its owner keeps: who sends a reason through it breaks the group at once.
pub type Fuse = oneshot::Sender<String>;

/// A group that serves steps.
#[derive(Debug)]
pub struct TpGroup {
    pub(super) members: Vec<Member>,
    pub(super) term: Term,
    pub(super) incarnation: Incarnation,
    pub(super) epoch: Epoch,
    pub(super) num_blocks: u32,
    pub(super) capacities: Vec<RankCapacity>,
    plan_hash: u64,
    token_hash: u64,
    finished_step: StepId,
    finished_at: Instant,
    num_in_flight: usize,
    deadlines: StepDeadlines,
    given_up: Option<oneshot::Receiver<String>>,
}

impl TpGroup {
    /// A group whose ranks are ready.
    pub(super) fn new(members: Vec<Member>, term: Term, epoch: Epoch, capacities: Vec<RankCapacity>) -> Self {
        Self {
            members,
            term,
            incarnation: Incarnation(0),
            epoch,
            num_blocks: 0,
            capacities,
            plan_hash: 0,
            token_hash: 0,
            finished_step: StepId(0),
            finished_at: Instant::now(),
            num_in_flight: 0,
            deadlines: StepDeadlines::new(STEP_DEADLINE_MIN),
            given_up: None,
        }
    }

    /// Ties the group to a fuse: it breaks when a reason comes through it. A fuse that is dropped does nothing.
    #[must_use]
    pub fn with_fuse(mut self, given_up: oneshot::Receiver<String>) -> Self {
        self.given_up = Some(given_up);
        self
    }

    /// Names the set of rank processes; plans carry it.
    #[must_use]
    pub fn with_incarnation(mut self, incarnation: Incarnation) -> Self {
        self.incarnation = incarnation;
        self
    }

    /// Ranks in the group.
    pub fn world_size(&self) -> usize {
        self.members.len()
    }

    /// KV blocks of every rank.
    pub fn num_blocks(&self) -> u32 {
        self.num_blocks
    }

    /// This life of sequences and KV blocks.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// What each rank said of its memory, in rank order.
    pub fn capacities(&self) -> &[RankCapacity] {
        &self.capacities
    }

    /// What the samplers of all ranks can do.
    pub fn features(&self) -> SamplerFeatures {
        let all = SamplerFeatures { masks: true, edits: true };
        self.capacities.iter().fold(all, |all, capacity| all.and(capacity.features))
    }

    pub(super) fn set_step_deadline_min(&mut self, min: Duration) {
        self.deadlines = StepDeadlines::new(min);
    }

    /// Sends a step to every rank at once, what is long of its prompts before it. The ranks may still be busy with the one before.
    ///
    /// # Errors
    /// A rank is gone, or has not taken earlier messages within the step's deadline. The group is broken.
    pub async fn launch(&mut self, mut step: PlannedStep) -> Result<Launched, GroupError> {
        let plan = &mut step.plan;
        plan.term = self.term;
        plan.incarnation = self.incarnation;
        plan.epoch = self.epoch;
        plan.committed_step = self.finished_step;
        plan.token_hash = self.token_hash;
        plan.plan_hash = plan.chain(self.plan_hash);
        self.plan_hash = plan.plan_hash;
        let limit = self.deadlines.deadline(plan.num_tokens());
        for message in to_messages(plan) {
            if let Err(error) = self.broadcast(message, plan.step, limit).await {
                return Err(self.explained(error).await);
            }
        }
        self.num_in_flight += 1;
        Ok(Launched { step, at: Instant::now() })
    }

    /// Waits for every rank's answer to the oldest step in flight, and checks that they agree. Gives rank 0's answer.
    ///
    /// # Errors
    /// A rank died, gave up, disagrees or is late. The group is broken.
    pub async fn finish(&mut self, launched: Launched) -> Result<(PlannedStep, StepOutput), GroupError> {
        let Launched { step, at } = launched;
        let num_tokens = step.plan.num_tokens();
        let limit = self.deadlines.deadline(num_tokens);
        let started = at.max(self.finished_at);
        match timeout_at(started + limit, self.gathered()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(self.culprit(error).await),
            Err(_) => return Err(self.late(step.plan.step, limit).await),
        }
        let output = self.agreed(&step.plan)?;
        self.finished_step = step.plan.step;
        self.finished_at = Instant::now();
        self.num_in_flight -= 1;
        let elapsed = self.finished_at - started;
        self.deadlines.observe(num_tokens, elapsed);
        let (number, num_rows, elapsed_us) = (step.plan.step.0, step.plan.rows.len(), elapsed.as_micros() as u64);
        tracing::trace!(step = number, num_rows, num_tokens, elapsed_us, rank_us = output.elapsed_us, "step finished");
        Ok((step, output))
    }

    /// Ends when the group breaks while no step is in flight.
    pub async fn broken(&mut self) -> GroupError {
        let error = self.next_failure().await;
        self.culprit(error).await
    }

    /// How long no step may end, with work there, until the group is called stalled.
    pub fn stall_limit(&self) -> Duration {
        self.deadlines.stall()
    }

    /// Tells every rank to end, and lets go of their streams. Ranks that are gone do not matter any more.
    pub async fn shut_down(&mut self, reason: &str) {
        let message = to_wire(&HeadMessage::Shutdown(reason.into()));
        for member in self.members.drain(..) {
            let _gone = member.link.commands.send_timeout(Ok(message.clone()), SHUTDOWN_DEADLINE).await;
        }
    }

    async fn broadcast(&self, message: pb::HeadToRank, step: StepId, limit: Duration) -> Result<(), GroupError> {
        let deadline = Instant::now() + limit;
        for member in &self.members {
            member.send(message.clone(), deadline).await.map_err(|failure| match failure {
                SendFailure::Gone => GroupError::Gone { rank: member.link.rank, phase: Phase::Ready },
                SendFailure::Late => GroupError::StepLate { ranks: vec![member.link.rank], step, limit },
            })?;
        }
        Ok(())
    }

    /// Ends when every rank has an answer waiting.
    async fn gathered(&mut self) -> Result<(), GroupError> {
        std::future::poll_fn(|cx| match self.poll_members(cx) {
            Err(error) => Poll::Ready(Err(error)),
            Ok(()) if self.members.iter().all(|member| !member.outputs.is_empty()) => Poll::Ready(Ok(())),
            Ok(()) => Poll::Pending,
        })
        .await
    }

    /// Takes in what every rank has sent. All are looked at, so that the one that fails is named and not the one that waits for it.
    fn poll_members(&mut self, cx: &mut Context<'_>) -> Result<(), GroupError> {
        if let Some(given_up) = &mut self.given_up
            && let Poll::Ready(reason) = Pin::new(given_up).poll(cx)
        {
            self.given_up = None;
            if let Ok(reason) = reason {
                return Err(GroupError::GivenUp { reason });
            }
        }
        let num_in_flight = self.num_in_flight;
        for member in &mut self.members {
            let rank = member.link.rank;
            while let Poll::Ready(event) = member.link.events.poll_recv(cx) {
                match event {
                    // It said why before.
                    None if member.has_failed => break,
                    None => return Err(GroupError::Gone { rank, phase: Phase::Ready }),
                    Some(RankEvent::Output(output)) if member.outputs.len() < num_in_flight => {
                        member.outputs.push_back(output);
                    }
                    Some(RankEvent::Failure(failure)) => {
                        member.has_failed = true;
                        return Err(GroupError::Failed { rank, failure });
                    }
                    Some(RankEvent::Progress { .. }) => {}
                    Some(event) => return Err(GroupError::OutOfTurn { rank, what: event_name(&event) }),
                }
            }
        }
        Ok(())
    }

    /// One answer of every rank, if all say the same.
    fn agreed(&mut self, plan: &StepPlan) -> Result<StepOutput, GroupError> {
        let mut answer: Option<StepOutput> = None;
        let mut slowest_us = 0;
        for member in &mut self.members {
            let rank = member.link.rank;
            let diverged = |what| GroupError::Diverged { rank, step: plan.step, what };
            let output = member.outputs.pop_front().ok_or_else(|| diverged("the number"))?;
            if (output.epoch, output.step, output.plan_hash) != (plan.epoch, plan.step, plan.plan_hash) {
                return Err(diverged("the plans"));
            }
            if answer.is_none() {
                self.token_hash = check_rows(plan, &output, self.token_hash).ok_or_else(|| diverged("the rows"))?;
            }
            if output.token_hash != self.token_hash {
                return Err(diverged("the tokens"));
            }
            slowest_us = slowest_us.max(output.elapsed_us);
            answer.get_or_insert(output);
        }
        let mut answer = answer.ok_or(GroupError::WrongRanks { rank: Rank(0), num_links: 0 })?;
        answer.elapsed_us = slowest_us;
        Ok(answer)
    }

    /// Names who is late. One rank that hangs keeps the others waiting for it: told to end, those still answer.
    async fn late(&mut self, step: StepId, limit: Duration) -> GroupError {
        let mut late: Vec<&mut Member> = self.members.iter_mut().filter(|member| member.outputs.is_empty()).collect();
        let ranks: Vec<Rank> = late.iter().map(|member| member.link.rank).collect();
        let message = to_wire(&HeadMessage::Shutdown(format!("step {step} is late")));
        for member in &late {
            let _gone = member.link.commands.try_send(Ok(message.clone()));
        }
        let deadline = Instant::now() + CULPRIT_GRACE;
        let mut silent = Vec::new();
        for member in &mut late {
            let ended = async { while member.link.events.recv().await.is_some() {} };
            if timeout_at(deadline, ended).await.is_err() {
                silent.push(member.link.rank);
            }
        }
        GroupError::StepLate { ranks: if silent.is_empty() { ranks } else { silent }, step, limit }
    }

    /// A rank that complains about its communicator has often only noticed first that another one died.
    async fn culprit(&mut self, error: GroupError) -> GroupError {
        if !is_complaint(&error) {
            return error;
        }
        let deadline = Instant::now() + CULPRIT_GRACE;
        loop {
            match timeout_at(deadline, self.next_failure()).await {
                Ok(next) if is_complaint(&next) => {}
                Ok(culprit) => return culprit,
                Err(_) => return error,
            }
        }
    }

    /// A rank that takes no message has often said why, or another one has.
    async fn explained(&mut self, error: GroupError) -> GroupError {
        match timeout_at(Instant::now() + CULPRIT_GRACE, self.next_failure()).await {
            Ok(next) => self.culprit(next).await,
            Err(_) => error,
        }
    }

    async fn next_failure(&mut self) -> GroupError {
        std::future::poll_fn(|cx| match self.poll_members(cx) {
            Ok(()) => Poll::Pending,
            Err(error) => Poll::Ready(error),
        })
        .await
    }
}

fn is_complaint(error: &GroupError) -> bool {
    matches!(error, GroupError::Failed { failure, .. } if matches!(failure.code.as_str(), "communicator" | "deadline"))
}

/// The token chain after a step, if rank 0 answered every row that samples or pools and no other.
fn check_rows(plan: &StepPlan, output: &StepOutput, previous: u64) -> Option<u64> {
    let expected = plan.rows.iter().filter(|row| row.samples).map(|row| row.slot);
    if !expected.eq(output.rows.iter().map(|row| row.slot)) {
        return None;
    }
    let pools = plan.rows.iter().filter(|row| row.pools).map(|row| row.slot);
    if !pools.eq(output.pooled.iter().map(|row| row.slot)) {
        return None;
    }
    Some(StepOutput::chain(previous, plan.step, output.rows.iter().map(|row| (row.slot, row.token))))
}

/// The messages that carry a plan, in order: masks, edits, parts of long prompts, then the plan itself, none above
/// `PLAN_BYTES_MAX`.
///
/// Public for the benchmark of a step.
pub fn to_messages(plan: &StepPlan) -> Vec<pb::HeadToRank> {
    use pb::head_to_rank::Message;
    let mut messages = mask_messages(plan);
    messages.append(&mut edit_messages(plan));
    let mut wire = pb::Plan::from(plan);
    let mut inline_left = INLINE_TOKENS_MAX;
    for new in &mut wire.new_sequences {
        if new.tokens.len() <= inline_left {
            inline_left -= new.tokens.len();
            continue;
        }
        for part in std::mem::take(&mut new.tokens).chunks(STAGE_TOKENS_MAX) {
            let part = pb::StagePart { seq_id: new.seq_id, tokens: part.to_vec() };
            messages.push(pb::HeadToRank { message: Some(Message::Stage(part)) });
        }
    }
    messages.push(pb::HeadToRank { message: Some(Message::Plan(wire)) });
    debug_assert!(messages.iter().all(|message| prost::Message::encoded_len(message) <= PLAN_BYTES_MAX));
    messages
}

/// The wire form of a message.
pub(super) fn to_wire(message: &HeadMessage) -> Wire {
    message.into()
}

pub(super) fn event_name(event: &RankEvent) -> &'static str {
    match event {
        RankEvent::Hello(_) => "a hello",
        RankEvent::Progress { .. } => "progress",
        RankEvent::Listening(_) => "the address of its collective",
        RankEvent::Capacity(_) => "its capacity",
        RankEvent::Ready { .. } => "that it is ready",
        RankEvent::Output(_) => "the output of a step",
        RankEvent::Failure(_) => "a failure",
    }
}

/// Why a message did not reach a rank.
pub(super) enum SendFailure {
    Gone,
    Late,
}

impl Member {
    /// Hands a message to the rank's stream, waiting for room until `deadline`.
    pub(super) async fn send(&self, message: pb::HeadToRank, deadline: Instant) -> Result<(), SendFailure> {
        let message = match self.link.commands.try_send(Ok(message)) {
            Ok(()) => return Ok(()),
            Err(mpsc::error::TrySendError::Closed(_)) => return Err(SendFailure::Gone),
            Err(mpsc::error::TrySendError::Full(message)) => message,
        };
        match timeout_at(deadline, self.link.commands.send(message)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(SendFailure::Gone),
            Err(_) => Err(SendFailure::Late),
        }
    }
}

/// What a rank makes of the head's messages: staged parts stand in front of their sequence's tokens.
#[cfg(test)]
#[derive(Default)]
pub(super) struct Decoder {
    staged: std::collections::HashMap<u64, Vec<u32>>,
    masks: phalanx_proto::MaskStaging,
    edits: phalanx_proto::EditStaging,
}

#[cfg(test)]
impl Decoder {
    /// The message, if it is complete.
    pub(super) fn decode(&mut self, message: pb::HeadToRank) -> Option<HeadMessage> {
        use pb::head_to_rank::Message;
        Some(match message.message.expect("a message has content") {
            Message::Load(load) => HeadMessage::Load(load.try_into().expect("valid")),
            Message::Connect(group) => HeadMessage::Connect(group.addresses),
            Message::InitKvCache(init) => HeadMessage::InitKvCache { num_blocks: init.num_blocks },
            Message::Stage(part) => {
                self.staged.entry(part.seq_id).or_default().extend(part.tokens);
                return None;
            }
            Message::Plan(mut plan) => {
                for new in &mut plan.new_sequences {
                    let mut tokens = self.staged.remove(&new.seq_id).unwrap_or_default();
                    tokens.append(&mut new.tokens);
                    new.tokens = tokens;
                }
                let mut plan = plan.try_into().expect("valid");
                self.masks.complete(&mut plan).expect("every mask came before its plan");
                self.edits.complete(&mut plan).expect("all edits came before their plan");
                HeadMessage::Plan(plan)
            }
            Message::StageEdits(part) => {
                self.edits.keep(part).expect("valid");
                return None;
            }
            Message::SampleInputs(inputs) => {
                self.masks.keep(inputs).expect("valid");
                return None;
            }
            Message::BeginEpoch(begin) => {
                self.masks = phalanx_proto::MaskStaging::default();
                HeadMessage::BeginEpoch { term: Term(begin.term), epoch: Epoch(begin.epoch) }
            }
            Message::Shutdown(shutdown) => HeadMessage::Shutdown(shutdown.reason),
        })
    }
}

#[cfg(test)]
mod tests {
    use phalanx_proto::{NewSequence, PlanRow, SamplingParams, SeqId, SeqSlot, TokenId};
    use prost::Message;

    use super::*;

    fn plan(prompts: &[u32]) -> StepPlan {
        let new = |(index, num_tokens): (usize, &u32)| NewSequence {
            slot: SeqSlot(index as u32),
            seq_id: SeqId(index as u64),
            tokens: (0..*num_tokens).map(|at| TokenId(u32::MAX - at)).collect(),
            num_prompt_tokens: *num_tokens,
            blocks: vec![],
            sampling: SamplingParams::default(),
        };
        let row = PlanRow {
            slot: SeqSlot(0),
            start: 0,
            num_tokens: 1,
            new_blocks: vec![phalanx_proto::BlockId(1)],
            samples: false,
            consumes: None,
            pools: false,
        };
        StepPlan {
            new_sequences: prompts.iter().enumerate().map(new).collect(),
            rows: vec![row],
            ..StepPlan::default()
        }
    }

    fn check(prompts: &[u32], num_parts: usize) {
        let plan = plan(prompts);
        let messages = to_messages(&plan);
        assert_eq!(messages.len(), num_parts + 1);
        assert!(messages.iter().all(|message| message.encoded_len() <= PLAN_BYTES_MAX));
        let mut decoder = Decoder::default();
        let mut decoded: Vec<_> = messages.into_iter().filter_map(|message| decoder.decode(message)).collect();
        assert_eq!(decoded.pop(), Some(HeadMessage::Plan(plan)));
        assert!(decoded.is_empty());
    }

    #[test]
    fn long_prompts_go_ahead_in_parts() {
        check(&[10], 0);
        check(&[1_000, 24], 0);
        check(&[1_000, 25], 1);
        check(&[30_000, 10, 8_193], 4 + 2);
    }
}
