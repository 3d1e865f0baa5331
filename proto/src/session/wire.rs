//! Checked conversions of a session's messages to their generated types and back.

use super::{
    HeadMessage, LoadModel, PlanMark, RankCapacity, RankEvent, RankFailure, RankHello, RankResumes, SamplerFeatures,
};
use crate::{DeploymentName, Epoch, Incarnation, NodeId, Rank, StepId, Term, WireError, pb};

fn missing(message: &'static str) -> WireError {
    WireError::Missing { message, field: "message" }
}

impl From<&RankCapacity> for pb::RankCapacity {
    fn from(c: &RankCapacity) -> Self {
        Self {
            num_blocks: c.num_blocks,
            weight_bytes: c.weight_bytes,
            block_bytes: c.block_bytes,
            free_bytes: c.free_bytes,
            token_masks: c.features.masks,
            logit_edits: c.features.edits,
        }
    }
}

impl From<pb::RankCapacity> for RankCapacity {
    fn from(c: pb::RankCapacity) -> Self {
        Self {
            num_blocks: c.num_blocks,
            weight_bytes: c.weight_bytes,
            block_bytes: c.block_bytes,
            free_bytes: c.free_bytes,
            features: SamplerFeatures { masks: c.token_masks, edits: c.logit_edits },
        }
    }
}

fn resumes(kept: pb::RankResumes) -> Result<RankResumes, WireError> {
    let capacity = kept.capacity.ok_or(WireError::Missing { message: "RankResumes", field: "capacity" })?;
    let last_plan =
        kept.last_plan.map(|m| PlanMark { term: Term(m.term), epoch: Epoch(m.epoch), step: StepId(m.step) });
    Ok(RankResumes { capacity: capacity.into(), num_blocks: kept.num_blocks, last_plan })
}

/// Only what belongs to plans is given back.
fn recalled(part: pb::RecalledPart) -> Result<RankEvent, WireError> {
    use pb::head_to_rank::Message as M;
    let message = part.message.as_ref().and_then(|message| message.message.as_ref());
    match message {
        None | Some(M::Plan(_) | M::Stage(_) | M::SampleInputs(_) | M::StageEdits(_)) => Ok(RankEvent::Recalled(part)),
        Some(_) => Err(WireError::Invalid {
            field: "recalled",
            value: "another message".into(),
            expected: "a plan or a part of one",
        }),
    }
}

impl From<RankEvent> for pb::RankMessage {
    fn from(event: RankEvent) -> Self {
        use pb::rank_message::Message as M;
        let message = match event {
            RankEvent::Hello(h) => M::Hello(pb::RankHello {
                deployment: h.deployment.0,
                replica: h.replica,
                rank: h.rank.0,
                incarnation: h.incarnation.0,
                node_id: h.node_id.0,
                pid: h.pid,
                launch_token: h.launch_token,
                version: h.version,
                device: h.device,
                resumes: h.resumes.map(|kept| pb::RankResumes {
                    capacity: Some((&kept.capacity).into()),
                    num_blocks: kept.num_blocks,
                    last_plan: kept.last_plan.map(|m| pb::PlanMark {
                        term: m.term.0,
                        epoch: m.epoch.0,
                        step: m.step.0,
                    }),
                }),
            }),
            RankEvent::Progress { phase, fraction, detail } => {
                M::Progress(pb::RankProgress { phase: phase.as_str().into(), fraction, detail })
            }
            RankEvent::Listening(address) => M::Listening(pb::CollectiveListening { address }),
            RankEvent::Capacity(c) => M::Capacity((&c).into()),
            RankEvent::Ready { num_blocks } => M::Ready(pb::RankReady { num_blocks }),
            RankEvent::Output(output) => M::Output((&output).into()),
            RankEvent::Recalled(part) => M::Recalled(part),
            RankEvent::Failure(f) => {
                M::Failure(pb::RankFailure { phase: f.phase.as_str().into(), code: f.code, message: f.message })
            }
        };
        Self { message: Some(message) }
    }
}

impl TryFrom<pb::RankMessage> for RankEvent {
    type Error = WireError;

    fn try_from(message: pb::RankMessage) -> Result<Self, WireError> {
        use pb::rank_message::Message as M;
        Ok(match message.message.ok_or_else(|| missing("RankMessage"))? {
            M::Hello(h) => Self::Hello(RankHello {
                deployment: DeploymentName(h.deployment),
                replica: h.replica,
                rank: Rank(h.rank),
                incarnation: Incarnation(h.incarnation),
                node_id: NodeId(h.node_id),
                pid: h.pid,
                launch_token: h.launch_token,
                version: h.version,
                device: h.device,
                resumes: h.resumes.map(resumes).transpose()?,
            }),
            M::Progress(p) => Self::Progress { phase: p.phase.parse()?, fraction: p.fraction, detail: p.detail },
            M::Listening(l) => Self::Listening(l.address),
            M::Capacity(c) => Self::Capacity(c.into()),
            M::Ready(r) => Self::Ready { num_blocks: r.num_blocks },
            M::Output(output) => Self::Output(output.into()),
            M::Recalled(part) => recalled(part)?,
            M::Failure(f) => Self::Failure(RankFailure { phase: f.phase.parse()?, code: f.code, message: f.message }),
        })
    }
}

impl From<&LoadModel> for pb::LoadModel {
    fn from(l: &LoadModel) -> Self {
        Self {
            term: l.term.0,
            epoch: l.epoch.0,
            model_path: l.model_path.clone(),
            load_format: l.load_format.clone(),
            dtype: l.dtype.clone(),
            kv_cache_dtype: l.kv_cache_dtype.clone(),
            world_size: l.world_size,
            block_size: l.block_size,
            max_model_len: l.max_model_len,
            max_num_seqs: l.max_num_seqs,
            max_num_batched_tokens: l.max_num_batched_tokens,
            memory_utilization: l.memory_utilization,
            num_blocks_override: l.num_blocks_override,
            seed: l.seed,
            group_key: l.group_key.clone().into(),
            rank_nodes: l.rank_nodes.iter().map(|node| node.0.clone()).collect(),
            steps_in_flight_max: l.steps_in_flight_max,
            enforce_eager: l.enforce_eager,
            disable_custom_all_reduce: l.disable_custom_all_reduce,
            collective_interface: l.collective_interface.clone(),
            collective_port_first: l.collective_ports.0.into(),
            collective_port_last: l.collective_ports.1.into(),
        }
    }
}

impl TryFrom<pb::LoadModel> for LoadModel {
    type Error = WireError;

    fn try_from(l: pb::LoadModel) -> Result<Self, WireError> {
        let port = |value: u32| {
            u16::try_from(value).map_err(|_| WireError::Invalid {
                field: "collective_port",
                value: value.to_string(),
                expected: "a port",
            })
        };
        if l.world_size == 0 || l.rank_nodes.len() != l.world_size as usize {
            return Err(WireError::Invalid {
                field: "world_size",
                value: l.world_size.to_string(),
                expected: "the number of rank_nodes, at least 1",
            });
        }
        if l.block_size == 0 || !l.block_size.is_multiple_of(16) {
            return Err(WireError::Invalid {
                field: "block_size",
                value: l.block_size.to_string(),
                expected: "a multiple of 16",
            });
        }
        Ok(Self {
            term: Term(l.term),
            epoch: Epoch(l.epoch),
            model_path: l.model_path,
            load_format: l.load_format,
            dtype: l.dtype,
            kv_cache_dtype: l.kv_cache_dtype,
            world_size: l.world_size,
            block_size: l.block_size,
            max_model_len: l.max_model_len,
            max_num_seqs: l.max_num_seqs,
            max_num_batched_tokens: l.max_num_batched_tokens,
            memory_utilization: l.memory_utilization,
            num_blocks_override: l.num_blocks_override,
            seed: l.seed,
            group_key: l.group_key.to_vec(),
            rank_nodes: l.rank_nodes.into_iter().map(NodeId).collect(),
            steps_in_flight_max: l.steps_in_flight_max,
            enforce_eager: l.enforce_eager,
            disable_custom_all_reduce: l.disable_custom_all_reduce,
            collective_interface: l.collective_interface,
            collective_ports: (port(l.collective_port_first)?, port(l.collective_port_last)?),
        })
    }
}

impl From<&HeadMessage> for pb::HeadToRank {
    fn from(message: &HeadMessage) -> Self {
        use pb::head_to_rank::Message as M;
        let message = match message {
            HeadMessage::Load(load) => M::Load(load.into()),
            HeadMessage::Connect(addresses) => M::Connect(pb::ConnectGroup { addresses: addresses.clone() }),
            HeadMessage::InitKvCache { num_blocks } => M::InitKvCache(pb::InitKvCache { num_blocks: *num_blocks }),
            HeadMessage::Stage { seq_id, tokens } => {
                M::Stage(pb::StagePart { seq_id: seq_id.0, tokens: tokens.iter().map(|token| token.0).collect() })
            }
            HeadMessage::Plan(plan) => M::Plan(plan.into()),
            HeadMessage::BeginEpoch { term, epoch } => M::BeginEpoch(pb::BeginEpoch { term: term.0, epoch: epoch.0 }),
            HeadMessage::RecallPlans => M::RecallPlans(pb::RecallPlans {}),
            HeadMessage::Shutdown(reason) => M::Shutdown(pb::Shutdown { reason: reason.clone() }),
        };
        Self { message: Some(message) }
    }
}
