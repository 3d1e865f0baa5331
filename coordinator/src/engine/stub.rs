//! STUB until the engine lands.
#![allow(missing_docs, clippy::allow_attributes)]
use super::*;
use phalanx_proto::*;
use std::time::Duration;
use tokio::sync::mpsc;
#[derive(Clone, Debug)]
pub struct EngineHandle;
#[derive(Debug, Clone, Default)]
pub struct EngineSnapshot { pub running: u32, pub waiting: u32, pub num_blocks: u32, pub num_blocks_free: u32, pub steps: u64, pub epoch: u64 }
impl EngineHandle {
    pub fn snapshot(&self) -> EngineSnapshot { EngineSnapshot::default() }
    pub async fn failed(&self) -> EngineError { std::future::pending().await }
    pub async fn stop(&self, _drain: Duration) {}
}
#[derive(Debug)]
pub struct RankLink { pub rank: Rank, pub commands: mpsc::Sender<Result<pb::HeadToRank, tonic::Status>>, pub events: mpsc::Receiver<RankEvent> }
#[derive(Default)]
pub struct StartDeadlines;
pub struct StartProgress { pub rank: Rank, pub phase: Phase, pub fraction: Option<f32>, pub detail: String }
pub struct TpGroup;
#[derive(Debug, thiserror::Error)]
#[error("x")]
pub struct GroupError;
impl TpGroup {
    pub async fn start(_links: Vec<RankLink>, _load: LoadModel, _d: StartDeadlines, _p: mpsc::Sender<StartProgress>) -> Result<TpGroup, GroupError> { Ok(TpGroup) }
    pub fn num_blocks(&self) -> u32 { 0 }
}
pub fn spawn(_g: TpGroup, _l: EngineLimits) -> EngineHandle { EngineHandle }
