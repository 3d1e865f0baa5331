//! From a checkpoint to a model on a device, and from there to a runner.
//!
//! Knows what was agreed when the group started; knows no session. The head sees only what [`Shard::capacity`] says.
//!
//! **Invariant:** what is read, and its local shape, follow from the model's headers and the place in the group alone.

use std::path::Path;

use phalanx_formats::{FileKind, Geometry, ModelFiles, ShardPlan, StoredType};
use phalanx_kernels::{AttentionLimits, InputLimits, KvShape, Ops, VocabSlice};
use phalanx_proto::{Incarnation, LoadModel, NodeId, Rank, RankCapacity, SamplerFeatures};

use crate::decoder::Decoder;
use crate::epoch::EpochRecord;
use crate::error::WorkerError;
use crate::inputs::{Batch, BatchLimits};
use crate::kv_cache::{KvBudget, KvCache, kv_dtype};
use crate::layers::Build;
use crate::runner::{Runner, RunnerParts};
use crate::weights::ShardLoader;

/// Fewest rows that logits have room for, so that a prompt's log-probabilities need few passes.
const LOGIT_ROWS_MIN: u32 = 64;

/// One rank's part of a model, on its device.
pub struct Shard<B: Ops> {
    rank: Rank,
    ops: B,
    model: Decoder<B>,
    inputs: B::Inputs,
    limits: InputLimits,
    geometry: Geometry,
    plan: ShardPlan,
    kv_dtype: StoredType,
    weight_bytes: u64,
}

impl<B: Ops + 'static> Shard<B> {
    /// Reads this rank's weights. `progress` hears fractions from 0 to 1.
    ///
    /// # Errors
    /// The model or a setting cannot be used; no memory.
    pub fn load(mut ops: B, rank: Rank, load: &LoadModel, progress: impl Fn(f32)) -> Result<Self, WorkerError> {
        let kv_dtype = kv_dtype(load, ops.kv_dtype())?;
        let files = open(load)?;
        let geometry = files.geometry().clone();
        check_limits(load, &geometry)?;
        let plan = files.shard_plan(load.world_size as usize, rank.0 as usize);
        let limits = input_limits(load, &geometry, &plan);
        let (model, weight_bytes) = {
            let weights = match load.load_format.as_str() {
                "dummy" => ShardLoader::dummy(&files, &plan, load.seed),
                _ => ShardLoader::new(&files, &plan),
            };
            let mut build = Build {
                ops: &mut ops,
                weights: &weights.on_progress(progress),
                geometry: &geometry,
                plan: &plan,
                limits,
                max_model_len: load.max_model_len as usize,
                weight_bytes: 0,
            };
            (Decoder::load(&mut build)?, build.weight_bytes)
        };
        // Planned before memory is counted for the cache.
        let inputs = ops.inputs(limits)?;
        Ok(Self { rank, ops, model, inputs, limits, geometry, plan, kv_dtype, weight_bytes })
    }

    /// What fits beside the weights, where the machine can still give `free_bytes`.
    ///
    /// # Errors
    /// Memory is too small for one sequence.
    pub fn capacity(&self, load: &LoadModel, node_id: &NodeId, free_bytes: u64) -> Result<RankCapacity, WorkerError> {
        let budget = KvBudget {
            geometry: &self.geometry,
            plan: &self.plan,
            dtype: self.kv_dtype,
            node_id,
            weight_bytes: self.weight_bytes,
            free_bytes,
            device: self.ops.memory()?,
        };
        let can = self.ops.sampler_features();
        let features = SamplerFeatures { masks: can.masks, edits: can.edits };
        Ok(RankCapacity { features, ..budget.capacity(load)? })
    }

    /// Allocates the cache and everything else that a step needs.
    ///
    /// # Errors
    /// No memory.
    pub fn into_runner(
        mut self,
        load: &LoadModel,
        incarnation: Incarnation,
        num_blocks: u32,
    ) -> Result<Runner<B>, WorkerError> {
        let shape = KvShape {
            num_blocks: num_blocks as usize,
            block_size: load.block_size as usize,
            num_kv_heads: self.plan.local_kv_heads,
            head_dim: self.geometry.head_dim,
            dtype: self.kv_dtype,
        };
        let kv = KvCache::new(&mut self.ops, self.geometry.num_layers, shape)?;
        let batch = Batch::new(BatchLimits {
            num_blocks: num_blocks as usize,
            block_size: load.block_size as usize,
            max_model_len: load.max_model_len as usize,
            max_num_seqs: load.max_num_seqs as usize,
            max_num_batched_tokens: load.max_num_batched_tokens as usize,
            vocab_size: self.geometry.vocab_size,
        });
        let vocab = &self.plan.vocab;
        let columns = vocab.lead..vocab.lead + vocab.owned.len();
        Ok(Runner::new(RunnerParts {
            rank: self.rank,
            ops: self.ops,
            model: self.model,
            kv,
            inputs: self.inputs,
            limits: self.limits,
            batch,
            vocab: VocabSlice { columns, first_id: vocab.owned.start as u32 },
            record: first_epoch(load, incarnation),
        }))
    }
}

/// The record of the group's first epoch.
pub fn first_epoch(load: &LoadModel, incarnation: Incarnation) -> EpochRecord {
    EpochRecord::new(load.term, incarnation, load.epoch, load.steps_in_flight_max as usize)
}

/// Opens the model as its load format says.
///
/// # Errors
/// No model there, a damaged one, or one of another format.
pub fn open(load: &LoadModel) -> Result<ModelFiles, WorkerError> {
    let path = Path::new(&load.model_path);
    let refuse = |expected| WorkerError::Setting { setting: "load-format", found: load.load_format.clone(), expected };
    if load.load_format == "dummy" {
        return Ok(ModelFiles::open_config(path)?);
    }
    let files = ModelFiles::open(path)?;
    match (load.load_format.as_str(), files.kind()) {
        ("auto" | "", _) | ("safetensors", FileKind::HuggingFace) | ("gguf", FileKind::Gguf) => Ok(files),
        ("safetensors" | "gguf", _) => Err(refuse("the kind of these files; use auto")),
        _ => Err(refuse("auto, safetensors, gguf or dummy")),
    }
}

/// Refuses limits that leave no room for a step.
fn check_limits(load: &LoadModel, geometry: &Geometry) -> Result<(), WorkerError> {
    let at_least_one = [
        ("max-model-len", load.max_model_len),
        ("max-num-seqs", load.max_num_seqs),
        ("max-num-batched-tokens", load.max_num_batched_tokens),
        ("block-size", load.block_size),
    ];
    if let Some((setting, found)) = at_least_one.into_iter().find(|(_, value)| *value == 0) {
        return Err(WorkerError::Setting { setting, found: found.to_string(), expected: "at least 1" });
    }
    if load.max_model_len as usize > geometry.max_position {
        let found = load.max_model_len.to_string();
        return Err(WorkerError::Setting { setting: "max-model-len", found, expected: "within the model's positions" });
    }
    Ok(())
}

/// The largest step that the head may plan.
fn input_limits(load: &LoadModel, geometry: &Geometry, plan: &ShardPlan) -> InputLimits {
    let blocks_of_one = load.max_model_len.div_ceil(load.block_size) as usize;
    InputLimits {
        tokens_max: load.max_num_batched_tokens as usize,
        seqs_max: load.max_num_seqs as usize,
        table_entries_max: load.max_num_seqs as usize * blocks_of_one,
        logit_rows_max: load.max_num_seqs.max(LOGIT_ROWS_MIN.min(load.max_num_batched_tokens)) as usize,
        slots_max: Batch::slots_max(load.max_num_seqs as usize),
        positions_max: load.max_model_len as usize,
        steps_max: load.steps_in_flight_max as usize + 1,
        vocab_size: geometry.vocab_size,
        attention: AttentionLimits {
            num_kv_heads: plan.local_kv_heads,
            group: plan.group,
            head_dim: geometry.head_dim,
            block_size: load.block_size as usize,
            window: geometry.sliding_window,
        },
    }
}
