//! The coordinator's own share of a decode step: plan, encode, commit, for 256 running sequences.
//!
//! Knows no rank: outputs are made up outside the measured time. Measures, never asserts.

use std::error::Error;
use std::hint::black_box;
use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use phalanx_coordinator::engine::block_manager::BlockManager;
use phalanx_coordinator::engine::group::to_messages;
use phalanx_coordinator::engine::scheduler::{PlannedStep, Scheduler};
use phalanx_coordinator::engine::sequence::Sequence;
use phalanx_coordinator::engine::{EngineLimits, GenerateRequest};
use phalanx_proto::{SampledRow, SamplingParams, SeqId, StepOutput, TokenId};
use prost::Message;

const NUM_SEQUENCES: u32 = 256;
const NUM_STEPS: usize = 2_000;
const NUM_PROMPT_TOKENS: u32 = 100;

fn limits() -> EngineLimits {
    EngineLimits {
        num_blocks: 65_536,
        block_size: 16,
        max_model_len: 4_096,
        max_num_seqs: NUM_SEQUENCES,
        max_num_batched_tokens: 8_192,
        max_queue: 1_000,
        steps_in_flight_max: 2,
        vocab_size: 50_000,
        enable_prefix_caching: true,
        step_time_budget: Duration::from_millis(10),
        step_deadline_min: Duration::from_secs(5),
        policy: phalanx_coordinator::engine::policy::Policy::default(),
        recovery: phalanx_coordinator::engine::RecoveryLimits::default(),
        features: phalanx_proto::SamplerFeatures::default(),
    }
}

fn sequence(id: u64, limits: &EngineLimits) -> Result<Sequence, Box<dyn Error>> {
    let request = GenerateRequest {
        request_id: id.to_string(),
        prompt: (0..NUM_PROMPT_TOKENS).map(|at| TokenId(at + 100 * id as u32)).collect(),
        sampling: SamplingParams::default(),
        max_tokens: NonZeroU32::MAX,
        stop_token_ids: vec![TokenId(0)],
        constraint: None,
        priority: 0,
        cache_salt: None,
    };
    let max_tokens = limits.admit(&request)?;
    Ok(Sequence::new(SeqId(id), request, max_tokens))
}

fn output(step: &PlannedStep) -> StepOutput {
    let rows = step.plan.rows.iter().filter(|row| row.samples);
    let rows = rows.map(|row| SampledRow { slot: row.slot, token: TokenId(1 + row.start % 1_000), logprobs: None });
    StepOutput { step: step.plan.step, elapsed_us: 5_000, rows: rows.collect(), ..StepOutput::default() }
}

fn main() -> Result<(), Box<dyn Error>> {
    let limits = limits();
    let mut scheduler = Scheduler::new(limits.clone());
    let mut blocks = BlockManager::new(limits.num_blocks, limits.block_size, true);
    for id in 0..u64::from(NUM_SEQUENCES) {
        scheduler.enqueue(sequence(id, &limits)?);
    }
    let mut times = Vec::with_capacity(NUM_STEPS);
    let mut num_bytes = 0;
    while times.len() < NUM_STEPS {
        let begin = Instant::now();
        let mut step = scheduler.plan(&mut blocks).ok_or("every sequence decodes")?;
        step.plan.plan_hash = step.plan.chain(1);
        let encoded: Vec<_> = to_messages(&step.plan).iter().map(Message::encode_to_vec).collect();
        let planned = begin.elapsed();
        num_bytes = encoded.iter().map(Vec::len).sum();
        let is_decode = step.plan.rows.len() == NUM_SEQUENCES as usize && step.plan.num_tokens() == NUM_SEQUENCES;
        let output = output(&step);
        let begin = Instant::now();
        let events = scheduler.commit(step, output, &mut blocks);
        let committed = begin.elapsed();
        black_box((encoded, events));
        if is_decode {
            times.push((planned + committed, planned, committed));
        }
    }
    times.sort_unstable();
    let (whole, planned, committed) = times[NUM_STEPS / 2];
    let p99 = times[NUM_STEPS * 99 / 100].0;
    println!(
        "decode step of {NUM_SEQUENCES} sequences: median {whole:?} (plan and encode {planned:?}, commit {committed:?}), \
         p99 {p99:?}, plan of {num_bytes} bytes"
    );
    Ok(())
}
