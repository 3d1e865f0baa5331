//! A served model without a device: the real engine over a rank in this process that answers every plan at once.
//!
//! For measuring and fuzzing what stands before the devices. The rank speaks the protocol of ranks and keeps its hashes; its
//! tokens are arithmetic, held to the masks of their rows.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use phalanx_coordinator::api::{Admission, ServedModel};
use phalanx_coordinator::constraint::GrammarCompiler;
use phalanx_coordinator::engine::group::{RankLink, TpGroup};
use phalanx_coordinator::engine::{self, EngineLimits, RecoveryLimits, StartDeadlines};
use phalanx_coordinator::text::TextModel;
use phalanx_formats::ModelFiles;
use phalanx_proto::pb::head_to_rank::Message;
use phalanx_proto::{
    Epoch, LoadModel, MaskStaging, NodeId, Phase, PlanRow, PooledRow, Rank, RankCapacity, RankEvent, RankFailure,
    SampledRow, SamplerFeatures, StepOutput, StepPlan, Term, TokenId, TokenMask, WireError, pb,
};
use tokio::sync::mpsc;

/// Messages in a rank's channel, either way.
const CHANNEL_CAPACITY: usize = 16;
/// KV blocks that the rank claims to hold.
const NUM_BLOCKS: u32 = 65_536;

/// A vector that depends on the length of its prompt only.
fn pooled(row: &PlanRow) -> PooledRow {
    PooledRow { slot: row.slot, values: (1..=64).map(|at| (at * row.num_tokens) as f32).collect() }
}

type Commands = mpsc::Receiver<Result<pb::HeadToRank, tonic::Status>>;

/// Limits of an engine with room for everything.
pub fn limits(max_num_seqs: u32, max_queue: u32) -> EngineLimits {
    EngineLimits {
        num_blocks: NUM_BLOCKS,
        block_size: 16,
        max_model_len: 512,
        max_num_seqs,
        max_num_batched_tokens: 8_192,
        max_queue,
        policy: phalanx_coordinator::engine::policy::Policy::default(),
        steps_in_flight_max: 2,
        vocab_size: 512,
        enable_prefix_caching: true,
        step_time_budget: Duration::from_millis(10),
        step_deadline_min: Duration::from_secs(60),
        recovery: RecoveryLimits::default(),
        features: SamplerFeatures { masks: true, edits: true },
    }
}

/// Serves the text side of the model in `folder` under the name `dummy`, within the current runtime.
pub async fn served(folder: &Path, limits: EngineLimits) -> Result<ServedModel, Box<dyn Error>> {
    let files = ModelFiles::open(folder)?;
    let text = Arc::new(TextModel::load(&files)?);
    let end_token_ids: Vec<TokenId> = files.end_token_ids().into_iter().map(TokenId).collect();
    let grammars = GrammarCompiler::new(Arc::clone(&text), limits.vocab_size, end_token_ids.clone());
    let max_model_len = limits.max_model_len;
    let vocab_size = limits.vocab_size;
    let engine = engine::spawn(group(vocab_size).await?, limits);
    Ok(ServedModel {
        name: "dummy".into(),
        model_path: "dummy".into(),
        aliases: Vec::new(),
        text: Some(text),
        grammars: Some(grammars),
        engine: engine.into(),
        max_model_len,
        created: 0,
        defaults: files.generation_defaults(),
        embedding: files.embedding_settings(),
        queue_timeout: None,
        log_stats: false,
        admission: Admission::default(),
        end_token_ids,
    })
}

/// A group of one rank, ready.
async fn group(vocab_size: u32) -> Result<TpGroup, Box<dyn Error>> {
    let (commands, inbox) = mpsc::channel(CHANNEL_CAPACITY);
    let (outbox, events) = mpsc::channel(CHANNEL_CAPACITY);
    tokio::spawn(DummyRank { outbox, vocab_size, masks: MaskStaging::default(), hashes: (0, 0), drawn: 0 }.run(inbox));
    let (progress, _nobody) = mpsc::channel(1);
    let links = vec![RankLink { rank: Rank(0), commands, events }];
    Ok(TpGroup::start(links, load(), StartDeadlines::default(), progress).await?)
}

fn load() -> LoadModel {
    LoadModel {
        term: Term(1),
        epoch: Epoch(1),
        model_path: "dummy".into(),
        load_format: "dummy".into(),
        dtype: "auto".into(),
        kv_cache_dtype: "auto".into(),
        world_size: 1,
        block_size: 16,
        max_model_len: 512,
        max_num_seqs: 256,
        max_num_batched_tokens: 8_192,
        memory_utilization: 0.9,
        num_blocks_override: Some(NUM_BLOCKS),
        seed: 0,
        group_key: Vec::new(),
        rank_nodes: vec![NodeId("dummy".into())],
        steps_in_flight_max: 2,
        enforce_eager: true,
        disable_custom_all_reduce: false,
        collective_interface: String::new(),
        collective_ports: (0, 0),
    }
}

/// The head sent what is no message: its group breaks.
fn failure(error: &WireError) -> RankEvent {
    RankEvent::Failure(RankFailure { phase: Phase::Ready, code: "internal".into(), message: error.to_string() })
}

struct DummyRank {
    outbox: mpsc::Sender<RankEvent>,
    vocab_size: u32,
    masks: MaskStaging,
    /// Of the plans and of the tokens so far.
    hashes: (u64, u64),
    drawn: u32,
}

impl DummyRank {
    /// Answers until the head is gone.
    async fn run(mut self, mut inbox: Commands) {
        while let Some(Ok(message)) = inbox.recv().await {
            let answer = match message.message {
                Some(Message::Load(_)) => Some(RankEvent::Listening("dummy".into())),
                Some(Message::Connect(_)) => Some(RankEvent::Capacity(RankCapacity {
                    num_blocks: NUM_BLOCKS.into(),
                    weight_bytes: 0,
                    block_bytes: 1,
                    free_bytes: NUM_BLOCKS.into(),
                    features: SamplerFeatures { masks: true, edits: true },
                })),
                Some(Message::InitKvCache(_) | Message::BeginEpoch(_)) => {
                    Some(RankEvent::Ready { num_blocks: NUM_BLOCKS })
                }
                Some(Message::Plan(plan)) => Some(self.step(plan).map_or_else(|e| failure(&e), RankEvent::Output)),
                Some(Message::SampleInputs(inputs)) => self.masks.keep(inputs).err().map(|error| failure(&error)),
                // Prompts and edits change nothing here.
                Some(Message::Stage(_) | Message::StageEdits(_) | Message::RecallPlans(_)) => None,
                Some(Message::Shutdown(_)) | None => return,
            };
            if let Some(event) = answer
                && self.outbox.send(event).await.is_err()
            {
                return;
            }
        }
    }

    fn step(&mut self, mut wire: pb::Plan) -> Result<StepOutput, WireError> {
        // A plan's prompt may have come in parts, which are not kept.
        for new in &mut wire.new_sequences {
            new.tokens.resize(new.tokens.len().max(new.num_prompt_tokens as usize), 0);
        }
        let mut plan: StepPlan = wire.try_into()?;
        self.masks.complete(&mut plan)?;
        self.hashes.0 = plan.plan_hash;
        let mut rows = Vec::new();
        for row in plan.rows.iter().filter(|row| row.samples) {
            let mask = plan.masks.iter().find(|mask| mask.slot == row.slot);
            let token = self.draw(mask);
            rows.push(SampledRow { slot: row.slot, token, logprobs: None });
        }
        self.hashes.1 = StepOutput::chain(self.hashes.1, plan.step, rows.iter().map(|row| (row.slot, row.token)));
        Ok(StepOutput {
            epoch: plan.epoch,
            step: plan.step,
            elapsed_us: 1,
            plan_hash: self.hashes.0,
            token_hash: self.hashes.1,
            rows,
            pooled: plan.rows.iter().filter(|row| row.pools).map(pooled).collect(),
            ..StepOutput::default()
        })
    }

    /// The next token around the vocabulary, control tokens at its end left out unless a mask wants one.
    fn draw(&mut self, mask: Option<&TokenMask>) -> TokenId {
        self.drawn = self.drawn.wrapping_mul(1_103_515_245).wrapping_add(12_345);
        let start = (self.drawn >> 8) % self.vocab_size;
        match mask {
            None => TokenId(40 + start % (self.vocab_size - 80)),
            Some(mask) => {
                let mut all = (0..self.vocab_size).map(|step| (start + step) % self.vocab_size);
                TokenId(all.find(|token| TokenMask::allows(&mask.words, *token)).unwrap_or_default())
            }
        }
    }
}
