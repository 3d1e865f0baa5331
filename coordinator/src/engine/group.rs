//! A tensor-parallel group as the head sees it: one link to each rank, plans out to all, every rank's answer back.
//!
//! Knows no sequence and no queue. With what is beneath it (`blame`, `error`, `messages`) the only place of the engine that names
//! generated types.
//!
//! **Invariant:** every rank gets the same messages in the same order.
//! **Invariant:** a step is finished only when every rank has answered with the same hashes; anything else breaks the group.

mod blame;
mod error;
mod messages;

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use phalanx_proto::{
    Epoch, HeadMessage, Incarnation, Phase, Rank, RankCapacity, RankEvent, SamplerFeatures, StepId, StepOutput,
    StepPlan, Term, pb,
};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout_at};

use super::scheduler::PlannedStep;
use super::step_time::StepDeadlines;
pub use error::GroupError;
#[cfg(test)]
pub(super) use messages::Decoder;
pub use messages::to_messages;
pub(super) use messages::{Wire, event_name, to_wire};

/// Shortest deadline of a step until the engine sets its own.
const STEP_DEADLINE_MIN: Duration = Duration::from_secs(5);
/// How long a rank's channel may refuse the last message.
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(1);

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
