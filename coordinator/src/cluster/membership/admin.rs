//! What the command line asks: status, deploy, undeploy, leave, stop.

use std::time::{Duration, Instant};

use phalanx_proto::{DeploymentName, NodeId, WireError, pb};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use tracing::error;

use super::super::admission;
use super::super::{
    ClusterError, ClusterHandle, DeployEvent, DeployFailure, DeployFailureCode, DeploymentSpec, GroupSpec, StatusBoard,
};
use super::story::Story;
use crate::config::defaults;

/// Time between two looks at the board while somebody waits.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// Answers the command line.
pub(super) struct AdminService {
    pub cluster: ClusterHandle,
    pub board: StatusBoard,
    pub story: Story,
}

#[tonic::async_trait]
impl pb::admin_server::Admin for AdminService {
    type DeployStream = std::pin::Pin<Box<dyn futures::Stream<Item = Result<pb::DeployEvent, Status>> + Send>>;

    type EventsStream = ReceiverStream<Result<pb::EventsReply, Status>>;

    async fn status(&self, _: Request<pb::StatusRequest>) -> Result<Response<pb::StatusReply>, Status> {
        let snapshot_json = to_json(&self.board.snapshot())?;
        Ok(Response::new(pb::StatusReply { snapshot_json }))
    }

    async fn deploy(&self, request: Request<pb::DeployRequest>) -> Result<Response<Self::DeployStream>, Status> {
        let spec: DeploymentSpec = serde_json::from_str(&request.into_inner().spec_json)
            .map_err(|error| Status::invalid_argument(format!("not a deployment: {error}")))?;
        let (watcher, events) = mpsc::channel(defaults::WATCH_QUEUE);
        match admission::check(spec).await {
            Ok(checked) => self.cluster.deploy(checked, watcher).await?,
            Err(failure) => {
                let _ = watcher.try_send(DeployEvent::Failed(failure));
            }
        }
        let events = ReceiverStream::new(events).map(|event| to_wire(&event));
        Ok(Response::new(Box::pin(events)))
    }

    async fn undeploy(&self, request: Request<pb::UndeployRequest>) -> Result<Response<pb::UndeployReply>, Status> {
        self.cluster.undeploy(DeploymentName(request.into_inner().name)).await?;
        Ok(Response::new(pb::UndeployReply {}))
    }

    async fn stop(&self, _: Request<pb::StopRequest>) -> Result<Response<pb::StopReply>, Status> {
        self.cluster.stop().await?;
        Ok(Response::new(pb::StopReply {}))
    }

    async fn restart(&self, request: Request<pb::RestartRequest>) -> Result<Response<pb::RestartReply>, Status> {
        self.cluster.restart(DeploymentName(request.into_inner().name)).await?;
        Ok(Response::new(pb::RestartReply {}))
    }

    async fn events(&self, request: Request<pb::EventsRequest>) -> Result<Response<Self::EventsStream>, Status> {
        Ok(Response::new(ReceiverStream::new(self.story.events(request.into_inner()))))
    }

    async fn logs(&self, request: Request<pb::LogsRequest>) -> Result<Response<pb::LogsReply>, Status> {
        let snapshot = self.board.snapshot();
        self.story.log(&self.cluster, &snapshot, request.into_inner()).await.map(Response::new)
    }

    async fn create_placement_group(
        &self,
        request: Request<pb::CreatePlacementGroupRequest>,
    ) -> Result<Response<pb::CreatePlacementGroupReply>, Status> {
        let spec: GroupSpec = serde_json::from_str(&request.into_inner().spec_json)
            .map_err(|error| Status::invalid_argument(format!("not a placement group: {error}")))?;
        Ok(Response::new(match self.cluster.create_group(spec).await? {
            Ok(status) => pb::CreatePlacementGroupReply { group_json: to_json(&status)?, refused: None },
            Err(failure) => {
                pb::CreatePlacementGroupReply { group_json: String::new(), refused: Some(failure_to_wire(failure)) }
            }
        }))
    }

    async fn wait_placement_group(
        &self,
        request: Request<pb::WaitPlacementGroupRequest>,
    ) -> Result<Response<pb::WaitPlacementGroupReply>, Status> {
        let pb::WaitPlacementGroupRequest { name, timeout_ms } = request.into_inner();
        let until = Instant::now() + Duration::from_millis(timeout_ms).min(defaults::WAIT_MAX);
        loop {
            let groups = self.board.snapshot().placement_groups;
            let known = groups.iter().filter(|group| !group.name.is_empty()).map(|group| group.name.clone()).collect();
            let group = groups.into_iter().find(|group| group.name == name);
            let group = group.ok_or_else(|| ClusterError::UnknownGroup { name: name.clone(), known })?;
            if group.state == "created" || Instant::now() >= until {
                return Ok(Response::new(pb::WaitPlacementGroupReply { group_json: to_json(&group)? }));
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }

    async fn remove_placement_group(
        &self,
        request: Request<pb::RemovePlacementGroupRequest>,
    ) -> Result<Response<pb::RemovePlacementGroupReply>, Status> {
        let pb::RemovePlacementGroupRequest { name, force } = request.into_inner();
        self.cluster.remove_group(name, force).await?;
        Ok(Response::new(pb::RemovePlacementGroupReply {}))
    }

    async fn leave(&self, request: Request<pb::LeaveRequest>) -> Result<Response<pb::LeaveReply>, Status> {
        self.cluster.leave(NodeId(request.into_inner().node_id)).await?;
        Ok(Response::new(pb::LeaveReply {}))
    }
}

pub(super) fn to_json(value: &impl serde::Serialize) -> Result<String, Status> {
    serde_json::to_string(value).map_err(|error| {
        error!(%error, "a snapshot cannot be written as JSON");
        Status::internal(error.to_string())
    })
}

fn to_wire(event: &DeployEvent) -> Result<pb::DeployEvent, Status> {
    use pb::deploy_event::Event;
    let event = match event.clone() {
        DeployEvent::Progress { state, text, rank, phase, fraction } => {
            Event::Progress(pb::DeployProgress { state, text, rank, phase, fraction })
        }
        DeployEvent::Ready(status) => Event::Ready(pb::DeployReady { deployment_json: to_json(&status)? }),
        DeployEvent::Failed(failure) => Event::Failed(failure_to_wire(failure)),
    };
    Ok(pb::DeployEvent { event: Some(event) })
}

fn failure_to_wire(failure: DeployFailure) -> pb::DeployFailed {
    let DeployFailure { code, message, hint } = failure;
    pb::DeployFailed { code: code.as_str().to_owned(), message, hint }
}

/// A refusal from the wire.
pub(super) fn failure_from_wire(failed: pb::DeployFailed) -> Result<DeployFailure, WireError> {
    let pb::DeployFailed { code, message, hint } = failed;
    let known = DeployFailureCode::ALL.into_iter().find(|known| known.as_str() == code);
    let invalid = WireError::Invalid { field: "code", value: code, expected: "a code of a failed deployment" };
    Ok(DeployFailure { code: known.ok_or(invalid)?, message, hint })
}

/// A `DeployEvent` from the wire.
pub(super) fn from_wire(event: pb::DeployEvent) -> Result<DeployEvent, WireError> {
    use pb::deploy_event::Event;
    let missing = WireError::Missing { message: "DeployEvent", field: "event" };
    Ok(match event.event.ok_or(missing)? {
        Event::Progress(pb::DeployProgress { state, text, rank, phase, fraction }) => {
            DeployEvent::Progress { state, text, rank, phase, fraction }
        }
        Event::Ready(ready) => {
            let status = serde_json::from_str(&ready.deployment_json);
            DeployEvent::Ready(status.map_err(|error| WireError::Invalid {
                field: "deployment_json",
                value: error.to_string(),
                expected: "a deployment's status",
            })?)
        }
        Event::Failed(failed) => DeployEvent::Failed(failure_from_wire(failed)?),
    })
}
