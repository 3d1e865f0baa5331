//! New processes for a deployment that serves, replica by replica; and parts of logs, which only agents can read.

use std::time::Instant;

use phalanx_proto::{AgentCommand, DeploymentName, LogPart, LogRequest, NodeId};
use tokio::sync::oneshot;
use tracing::info;

use super::super::ClusterError;
use super::super::chronicle::{Level, event};
use super::super::deployment::{Deployment, Rolling};
use super::super::replica::Stage;
use super::Reconciler;
use crate::config::defaults;

impl Reconciler {
    /// Begins a restart of all replicas; who asks while one goes on hears of its end.
    pub(super) fn restart(
        &mut self,
        name: &DeploymentName,
        reply: oneshot::Sender<Result<(), ClusterError>>,
        now: Instant,
    ) {
        let deployment = match self.known_deployment(name) {
            Ok(deployment) => deployment,
            Err(error) => return drop(reply.send(Err(error))),
        };
        if let Some(error) = unfit(name, deployment) {
            let _ = reply.send(Err(error));
            return;
        }
        let rolling = deployment.rolling.get_or_insert_with(|| Rolling {
            since: now,
            turn: None,
            num_done: 0,
            replies: Vec::new(),
        });
        rolling.replies.push(reply);
        info!(group_id = %name, "rolling restart");
        self.tell_deployment(name, event(Level::Info, "restart", "restart asked: its replicas start again one by one"));
    }

    /// Moves each restart as far as it can go: the next replica yields once the one before serves again.
    pub(super) fn roll(&mut self, now: Instant) {
        let drain = self.settings.drain;
        let mut done = Vec::new();
        for (name, deployment) in &mut self.deployments {
            let Some(mut rolling) = deployment.rolling.take() else { continue };
            if let Some(error) = unfit(name, deployment) {
                rolling.answer(&Err(error));
                continue;
            }
            if now.saturating_duration_since(rolling.since) > defaults::RESTART_DEADLINE {
                let (num_done, num_replicas) = (rolling.num_done, deployment.replicas.len());
                let reason = format!("{num_done} of {num_replicas} replicas have started again in time");
                rolling.answer(&Err(ClusterError::CannotRestart { name: name.clone(), reason }));
                continue;
            }
            if let Some((number, before)) = rolling.turn {
                let back = deployment
                    .replicas
                    .get(number)
                    .is_none_or(|replica| matches!(replica.stage, Stage::Serving) && replica.incarnation != before);
                if back {
                    rolling.turn = None;
                    rolling.num_done += 1;
                }
            }
            if rolling.turn.is_none() {
                match deployment.replicas.get_mut(rolling.num_done) {
                    Some(replica) if matches!(replica.stage, Stage::Serving) => {
                        rolling.turn = Some((rolling.num_done, replica.incarnation));
                        replica.yield_work("restart asked", now + drain);
                    }
                    // It has no machine: when it gets one, its processes are new.
                    Some(replica) if matches!(replica.stage, Stage::Unplaced) => rolling.num_done += 1,
                    // It starts by itself; its turn comes when it serves.
                    Some(_) => {}
                    None => {
                        rolling.answer(&Ok(()));
                        done.push(name.clone());
                        continue;
                    }
                }
            }
            deployment.rolling = Some(rolling);
        }
        for name in done {
            self.tell_deployment(&name, event(Level::Info, "restarted", "every replica has started again"));
        }
    }

    /// Asks an agent for a part of a log. No answer comes where it is not there, or too many are asked for.
    pub(super) fn read_log(&mut self, node: &NodeId, request: LogRequest, reply: oneshot::Sender<LogPart>) {
        self.log_reads.retain(|_, (_, waiting)| !waiting.is_closed());
        let Some(link) = self.agents.get(node).filter(|_| self.log_reads.len() < defaults::LOG_READS_MAX) else {
            return;
        };
        let id = self.next_log_read;
        self.next_log_read += 1;
        if link.commands.try_send(AgentCommand::ReadLog(LogRequest { id, ..request })).is_ok() {
            self.log_reads.insert(id, (node.clone(), reply));
        }
    }

    /// An agent has answered.
    pub(super) fn log_was_read(&mut self, node: &NodeId, part: LogPart) {
        if self.log_reads.get(&part.id).is_some_and(|(asked, _)| asked == node)
            && let Some((_, reply)) = self.log_reads.remove(&part.id)
        {
            let _ = reply.send(part);
        }
    }
}

impl Rolling {
    fn answer(&mut self, result: &Result<(), ClusterError>) {
        for reply in std::mem::take(&mut self.replies) {
            let _ = reply.send(result.clone());
        }
    }
}

/// Why a deployment cannot be started again, where it cannot.
fn unfit(name: &DeploymentName, deployment: &Deployment) -> Option<ClusterError> {
    let reason = if deployment.stopping_since.is_some() {
        "it is being removed".to_owned()
    } else if deployment.gave_up {
        format!("it has failed: {}; undeploy and serve it again", deployment.reason)
    } else if !deployment.has_served {
        format!("it has not served yet ({})", deployment.state.as_str())
    } else {
        return None;
    };
    Some(ClusterError::CannotRestart { name: name.clone(), reason })
}
