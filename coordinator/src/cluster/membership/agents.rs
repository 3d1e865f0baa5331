//! Agents' streams.

use std::pin::Pin;

use futures::{Stream, StreamExt};
use phalanx_proto::{AgentCommand, AgentEvent, NodeId, pb};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::warn;

use super::super::{AgentSession, ClusterHandle};
use super::{first_message, refused, trust};
use crate::config::defaults;
use crate::security::access::Gate;

/// Takes agents in.
pub(super) struct AgentService {
    pub cluster: ClusterHandle,
    pub gate: Gate,
}

#[tonic::async_trait]
impl pb::agents_server::Agents for AgentService {
    type JoinStream = Pin<Box<dyn Stream<Item = Result<pb::HeadToAgent, Status>> + Send>>;

    async fn join(&self, request: Request<Streaming<pb::AgentMessage>>) -> Result<Response<Self::JoinStream>, Status> {
        let (address, peer) = (trust::address(&request), trust::peer(&request).cloned());
        let mut inbound = request.into_inner();
        let first = AgentEvent::try_from(first_message(&mut inbound).await?).map_err(|error| refused(&error))?;
        let AgentEvent::Hello(hello) = first else {
            return Err(Status::invalid_argument("an agent's first message must be hello"));
        };
        let node = hello.node_id.clone();
        self.gate.node(peer.as_ref(), &node.0).inspect_err(|error| {
            warn!(node_id = %node, address, %error, "refused a machine");
        })?;
        let (commands, outbound) = mpsc::channel(defaults::PEER_QUEUE);
        // Weak: the stream ends when the cluster lets go of it.
        let answers = commands.downgrade();
        let session = self.cluster.join(hello, address, commands).await?;
        let (cluster, gate) = (self.cluster.clone(), self.gate.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = listen(&cluster, &node, session, inbound, answers) => {}
                () = gate.revoked(&node.0) => {
                    warn!(node_id = %node, "revoked: its stream ends");
                    let said = AgentEvent::Leaving("its certificate was revoked".to_owned());
                    let _ = cluster.agent_said(&node, session, said).await;
                }
            }
            let _ = cluster.agent_gone(&node, session).await;
        });
        let outbound = ReceiverStream::new(outbound).map(|command| Ok(pb::HeadToAgent::from(command)));
        Ok(Response::new(Box::pin(outbound)))
    }
}

/// Passes on what an agent says until its stream ends.
async fn listen(
    cluster: &ClusterHandle,
    node: &NodeId,
    session: AgentSession,
    mut inbound: Streaming<pb::AgentMessage>,
    answers: mpsc::WeakSender<AgentCommand>,
) {
    while let Ok(Some(message)) = inbound.message().await {
        match AgentEvent::try_from(message) {
            Ok(event) => {
                if let (AgentEvent::Heartbeat { sequence, .. }, Some(answers)) = (&event, answers.upgrade()) {
                    // One that is lost is one that is not measured.
                    let _ = answers.try_send(AgentCommand::Seen { sequence: *sequence });
                }
                if cluster.agent_said(node, session, event).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                warn!(node_id = %node, %error, "agent sent a message that cannot be taken");
                break;
            }
        }
    }
}
