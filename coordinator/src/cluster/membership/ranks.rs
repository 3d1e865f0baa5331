//! Ranks' streams: each becomes a `RankLink` that the engine's group drives.

use phalanx_proto::{RankEvent, RankHello, RankKey, pb};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::warn;

use super::super::ClusterHandle;
use super::{first_message, refused, trust};
use crate::config::defaults;
use crate::engine::group::RankLink;
use crate::security::access::Gate;

/// Takes ranks in.
pub(super) struct RankService {
    pub cluster: ClusterHandle,
    pub gate: Gate,
}

#[tonic::async_trait]
impl pb::rank_sessions_server::RankSessions for RankService {
    type SessionStream = ReceiverStream<Result<pb::HeadToRank, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<pb::RankMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let peer = trust::peer(&request).cloned();
        let mut inbound = request.into_inner();
        let first = RankEvent::try_from(first_message(&mut inbound).await?).map_err(|error| refused(&error))?;
        let RankEvent::Hello(hello) = first else {
            return Err(Status::invalid_argument("a rank's first message must be hello"));
        };
        let node = hello.node_id.clone();
        self.gate.node(peer.as_ref(), &node.0).inspect_err(|error| {
            warn!(node_id = %node, %error, "refused a rank");
        })?;
        let RankHello { deployment, replica, rank, incarnation, .. } = hello.clone();
        let key = RankKey { deployment, replica, rank, incarnation };
        let (commands, outbound) = mpsc::channel(defaults::PEER_QUEUE);
        let (events, incoming) = mpsc::channel(defaults::PEER_QUEUE);
        self.cluster.rank_dialed(hello, RankLink { rank, commands, events: incoming }).await?;
        let gate = self.gate.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = listen(key, inbound, events) => {}
                () = gate.revoked(&node.0) => {}
            }
        });
        Ok(Response::new(ReceiverStream::new(outbound)))
    }
}

/// Passes a rank's events to its group until either side ends.
async fn listen(key: RankKey, mut inbound: Streaming<pb::RankMessage>, events: mpsc::Sender<RankEvent>) {
    loop {
        let message = tokio::select! {
            message = inbound.message() => message,
            () = events.closed() => return,
        };
        let Ok(Some(message)) = message else { return };
        let event = match RankEvent::try_from(message) {
            Ok(event) => event,
            Err(error) => {
                warn!(rank = %key, %error, "rank sent a message that cannot be taken");
                return;
            }
        };
        if events.send(event).await.is_err() {
            return;
        }
    }
}
