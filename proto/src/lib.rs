//! The wire between head, agents and ranks.
//!
//! Owns the protobuf definitions, the ids, and the checked conversions from generated types (`pb`) to domain types.
//! Knows no device, no scheduler and no text.
//!
//! **Invariant:** a domain value that exists is valid; everything that a peer can get wrong is refused by a conversion here.
#![forbid(unsafe_code)]

mod agent;
mod edits;
mod error;
mod heads;
mod ids;
mod masks;
mod plan;
mod pooling;
mod session;
mod status;

pub use agent::{
    AgentCommand, AgentEvent, AgentHello, AgentWelcome, DesiredRank, DesiredRanks, DeviceKind, HeadSocket, LogPart,
    LogRequest, LogSource, LogStart, RankKey, RankObserved, RankProcess,
};
pub use edits::{EditStaging, LogitEdits, edit_messages};
pub use error::WireError;
pub use heads::HeadSight;
pub use ids::{BlockId, DeploymentName, Epoch, Incarnation, NodeId, Rank, SeqId, SeqSlot, StepId, Term, TokenId};
pub use masks::{MaskStaging, TokenMask, mask_messages};
pub use pb::RecalledPart;
pub use plan::{
    Fnv, NewSequence, PlanRow, PromptLogprobs, SampledRow, SamplerVariant, SamplingParams, StepOutput, StepPlan,
    TokenLogprobs,
};
pub use pooling::{POOLED_ROWS_MAX, PooledRow, Pooling};
pub use session::{
    HeadMessage, LoadModel, Phase, PlanMark, RankCapacity, RankEvent, RankFailure, RankHello, RankResumes,
    SamplerFeatures,
};
pub use status::*;

/// The generated types. Only `proto`, `session.rs`, `agent/`, `engine/group.rs` and `cluster/membership.rs` may name them.
pub mod pb {
    #![expect(clippy::allow_attributes, clippy::allow_attributes_without_reason, reason = "generated code")]
    tonic::include_proto!("phalanx.v1");
}

/// The part of etcd's interface that is used. Only `coordinator/src/store/etcd` may name it.
pub mod etcd {
    #![expect(clippy::allow_attributes, clippy::allow_attributes_without_reason, reason = "generated code")]
    tonic::include_proto!("etcdserverpb");
}

/// The version that both ends must share.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// No encoded plan exceeds this; longer prompts are staged ahead in parts.
pub const PLAN_BYTES_MAX: usize = 64 * 1024;
/// Tokens in one staged part: at most 5 bytes each, so that a part stays under `PLAN_BYTES_MAX`.
pub const STAGE_TOKENS_MAX: usize = 8 * 1024;
