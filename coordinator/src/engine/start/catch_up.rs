//! Plans that an earlier head gave to some ranks of a group and not to others.
//!
//! It died while it sent them. Those that have such a plan wait in its step for those that lack it, and cannot begin an epoch. The
//! rank that was given most still holds what is not finished: it gives that back, and the others are given what they lack.
//!
//! **Invariant:** after this every rank was given the same plans, so all come to rest.

use std::time::Duration;

use phalanx_proto::{HeadMessage, Phase, PlanMark, Rank, RankEvent, RankResumes};
use tokio::time::{Instant, timeout_at};

use super::Start;
use crate::engine::group::{GroupError, SendFailure, Wire, event_name, to_wire};

impl Start {
    /// Gives each rank the plans that others were given and it was not.
    ///
    /// # Errors
    /// A rank is gone, fails, or does not give back what it holds within `limit`.
    pub(super) async fn catch_up(&mut self, kept: &[RankResumes], limit: Duration) -> Result<(), GroupError> {
        let newest = kept.iter().map(|kept| kept.last_plan).max().flatten();
        let Some(lead) = kept.iter().position(|kept| kept.last_plan == newest) else { return Ok(()) };
        if kept.iter().all(|kept| kept.last_plan == newest) {
            return Ok(());
        }
        tracing::info!(rank = lead, "an earlier head did not send its last plan to every rank: it is passed on");
        let deadline = Instant::now() + limit;
        self.hand(lead, to_wire(&HeadMessage::RecallPlans), deadline, limit).await?;
        let mut messages: Vec<Wire> = Vec::new();
        loop {
            let part = self.recalled(lead, deadline, limit).await?;
            messages.extend(part.message);
            if let Some(mark) = messages.last().and_then(PlanMark::of) {
                let lacks = |kept: &RankResumes| kept.last_plan < Some(mark);
                for (index, _) in kept.iter().enumerate().filter(|(_, kept)| lacks(kept)) {
                    for message in &messages {
                        self.hand(index, message.clone(), deadline, limit).await?;
                    }
                }
                messages.clear();
            }
            if part.num_left == 0 {
                return Ok(());
            }
        }
    }

    /// The next message that the rank gives back.
    async fn recalled(&mut self, index: usize, deadline: Instant, limit: Duration) -> Result<Part, GroupError> {
        let (rank, phase) = (Rank(index as u32), Phase::WarmUp);
        match timeout_at(deadline, self.members[index].link.events.recv()).await {
            Ok(Some(RankEvent::Recalled(part))) => Ok(Part { message: part.message, num_left: part.num_left }),
            Ok(Some(RankEvent::Failure(failure))) => Err(GroupError::Failed { rank, failure }),
            Ok(Some(event)) => Err(GroupError::OutOfTurn { rank, what: event_name(&event) }),
            Ok(None) => Err(GroupError::Gone { rank, phase }),
            Err(_) => Err(GroupError::StartLate { rank, phase, limit }),
        }
    }

    async fn hand(&self, index: usize, message: Wire, deadline: Instant, limit: Duration) -> Result<(), GroupError> {
        let (rank, phase) = (Rank(index as u32), Phase::WarmUp);
        self.members[index].send(message, deadline).await.map_err(|failure| match failure {
            SendFailure::Gone => GroupError::Gone { rank, phase },
            SendFailure::Late => GroupError::StartLate { rank, phase, limit },
        })
    }
}

/// A message of an earlier head, and how many follow.
struct Part {
    message: Option<Wire>,
    num_left: u32,
}

#[cfg(test)]
mod tests {
    use phalanx_proto::{Epoch, RankCapacity, SamplerFeatures, StepId, StepPlan, Term};
    use tokio::sync::mpsc;

    use super::super::{StartDeadlines, StartProgress};
    use super::*;
    use crate::engine::group::{RankLink, to_messages};

    const LIMIT: Duration = Duration::from_secs(5);

    /// A rank's end of its stream.
    struct Far {
        inbox: mpsc::Receiver<Result<Wire, tonic::Status>>,
        outbox: mpsc::Sender<RankEvent>,
    }

    impl Far {
        fn heard(&mut self) -> Vec<Wire> {
            std::iter::from_fn(|| self.inbox.try_recv().ok()).map(|message| message.expect("no status")).collect()
        }
    }

    fn start(num_ranks: u32) -> (Start, Vec<Far>) {
        let (links, far) = (0..num_ranks)
            .map(|rank| {
                let (commands, inbox) = mpsc::channel(16);
                let (outbox, events) = mpsc::channel(16);
                (RankLink { rank: Rank(rank), commands, events }, Far { inbox, outbox })
            })
            .unzip();
        let (progress, _) = mpsc::channel::<StartProgress>(1);
        (Start::new(links, num_ranks, StartDeadlines::default(), progress).expect("all ranks"), far)
    }

    fn kept(last: Option<(u64, u64)>) -> RankResumes {
        let features = SamplerFeatures::default();
        let capacity = RankCapacity { num_blocks: 1, weight_bytes: 1, block_bytes: 1, free_bytes: 1, features };
        let mark = |(epoch, step)| PlanMark { term: Term(1), epoch: Epoch(epoch), step: StepId(step) };
        RankResumes { capacity, num_blocks: 1, last_plan: last.map(mark) }
    }

    fn plan(step: u64) -> Wire {
        let plan = StepPlan { term: Term(1), epoch: Epoch(1), step: StepId(step), ..StepPlan::default() };
        to_messages(&plan).pop().expect("the plan")
    }

    async fn give_back(far: &Far, messages: Vec<Wire>) {
        let mut num_left = messages.len() as u32;
        for message in messages {
            num_left -= 1;
            let mut part = phalanx_proto::RecalledPart::default();
            (part.message, part.num_left) = (Some(message), num_left);
            far.outbox.send(RankEvent::Recalled(part)).await.expect("room");
        }
    }

    #[tokio::test]
    async fn each_rank_is_given_what_it_lacks_and_no_more() {
        let (mut start, mut far) = start(3);
        give_back(&far[1], vec![plan(7), plan(8)]).await;
        let kept = [kept(Some((1, 7))), kept(Some((1, 8))), kept(Some((1, 6)))];
        start.catch_up(&kept, LIMIT).await.expect("all are even");
        assert_eq!(far[0].heard(), [plan(8)]);
        assert_eq!(far[1].heard(), [to_wire(&HeadMessage::RecallPlans)]);
        assert_eq!(far[2].heard(), [plan(7), plan(8)]);
    }

    #[tokio::test]
    async fn ranks_that_are_even_are_asked_for_nothing() {
        for last in [None, Some((1, 3))] {
            let (mut start, mut far) = start(2);
            start.catch_up(&[kept(last), kept(last)], LIMIT).await.expect("nothing to do");
            assert!(far.iter_mut().all(|far| far.heard().is_empty()));
        }
    }

    #[tokio::test]
    async fn a_rank_that_gives_nothing_back_is_named() {
        let (mut start, _far) = start(2);
        let limit = Duration::from_millis(50);
        let error = start.catch_up(&[kept(Some((1, 3))), kept(None)], limit).await.expect_err("nobody answers");
        assert_eq!(error, GroupError::StartLate { rank: Rank(0), phase: Phase::WarmUp, limit });
    }
}
