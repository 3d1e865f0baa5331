//! Which rank failed first, where several say that something is wrong.
//!
//! **Invariant:** nothing here waits longer than [`CULPRIT_GRACE`] for each thing that it wants to know, but for a failure as such.

use std::task::Poll;
use std::time::Duration;

use phalanx_proto::{HeadMessage, Rank, StepId};
use tokio::time::{Instant, timeout_at};

use super::{GroupError, Member, TpGroup, to_wire};

/// When a rank complains about another one, how long the other one has to show itself.
const CULPRIT_GRACE: Duration = Duration::from_millis(250);

impl TpGroup {
    /// Names who is late. One rank that hangs keeps the others waiting for it: told to end, those still answer.
    pub(super) async fn late(&mut self, step: StepId, limit: Duration) -> GroupError {
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
    pub(super) async fn culprit(&mut self, error: GroupError) -> GroupError {
        if !error.is_complaint() {
            return error;
        }
        let deadline = Instant::now() + CULPRIT_GRACE;
        loop {
            match timeout_at(deadline, self.next_failure()).await {
                Ok(next) if next.is_complaint() => {}
                Ok(culprit) => return culprit,
                Err(_) => return error,
            }
        }
    }

    /// A rank that takes no message has often said why, or another one has.
    pub(super) async fn explained(&mut self, error: GroupError) -> GroupError {
        match timeout_at(Instant::now() + CULPRIT_GRACE, self.next_failure()).await {
            Ok(next) => self.culprit(next).await,
            Err(_) => error,
        }
    }

    pub(super) async fn next_failure(&mut self) -> GroupError {
        std::future::poll_fn(|cx| match self.poll_members(cx) {
            Ok(()) => Poll::Pending,
            Err(error) => Poll::Ready(error),
        })
        .await
    }
}
