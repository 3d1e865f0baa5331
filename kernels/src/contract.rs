//! The contract between models and devices.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use phalanx_formats::StoredType;

use crate::ops::edit::{LogitEdits, TokenHistory};
use crate::{CollectiveError, KernelError};

/// A weight matrix `[rows, cols]`, row-major, in its stored format, on its way to a device.
///
/// A fused matrix is a list of these, one below the other, each in its own format.
#[derive(Debug, Clone)]
pub struct HostMatrix {
    /// Stored format.
    pub dtype: StoredType,
    /// Output width N.
    pub rows: usize,
    /// Input width K.
    pub cols: usize,
    /// `rows * dtype.row_bytes(cols)` bytes.
    pub data: Vec<u8>,
}

/// Writes the bytes of a range of rows.
type ReadBytes<'a> = dyn Fn(Range<usize>, &mut [u8]) + Sync + 'a;

/// A weight matrix `[rows, cols]` that is read when a device wants it: by ranges of rows, from several threads at once.
pub struct MatrixSource<'a> {
    /// Stored format.
    pub dtype: StoredType,
    /// Output width N.
    pub rows: usize,
    /// Input width K.
    pub cols: usize,
    read: Box<ReadBytes<'a>>,
}

impl<'a> MatrixSource<'a> {
    /// A matrix whose rows `read` writes, in the stored format; it is given the range's bytes.
    pub fn new(
        dtype: StoredType,
        rows: usize,
        cols: usize,
        read: impl Fn(Range<usize>, &mut [u8]) + Sync + 'a,
    ) -> Self {
        Self { dtype, rows, cols, read: Box::new(read) }
    }

    /// Bytes of a row; 0 where the width is no whole number of blocks.
    pub fn row_bytes(&self) -> usize {
        self.dtype.row_bytes(self.cols).unwrap_or(0)
    }

    /// Reads rows; `out` holds their bytes.
    pub fn read(&self, rows: Range<usize>, out: &mut [u8]) {
        (self.read)(rows, out);
    }

    /// Reads some rows as a matrix of their own.
    pub fn load_rows(&self, rows: Range<usize>) -> HostMatrix {
        let mut data = vec![0; rows.len() * self.row_bytes()];
        self.read(rows.clone(), &mut data);
        HostMatrix { dtype: self.dtype, rows: rows.len(), cols: self.cols, data }
    }

    /// Reads all of it.
    pub fn load(&self) -> HostMatrix {
        self.load_rows(0..self.rows)
    }
}

impl fmt::Debug for MatrixSource<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MatrixSource({} x {} of {:?})", self.rows, self.cols, self.dtype)
    }
}

impl From<HostMatrix> for MatrixSource<'static> {
    fn from(matrix: HostMatrix) -> Self {
        let HostMatrix { dtype, rows, cols, data } = matrix;
        // Bytes that are no such matrix read as they lie: the backend that loads it sees that they are too few.
        let row_bytes = data.len().checked_div(rows).unwrap_or(0);
        Self::new(dtype, rows, cols, move |range, out| {
            let from = data.get(range.start * row_bytes..range.end * row_bytes).unwrap_or_default();
            let len = from.len().min(out.len());
            out[..len].copy_from_slice(&from[..len]);
        })
    }
}

/// Sizes of one layer's K and V storage: `[K/V][kv head][slot][head dim]`, `slot = block * block_size + offset`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    /// Blocks.
    pub num_blocks: usize,
    /// Slots in a block, a multiple of 16.
    pub block_size: usize,
    /// KV heads on this rank.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// F32, F16 or BF16, as the backend has it.
    pub dtype: StoredType,
}

/// Heads on this rank, and where their output goes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// KV heads on this rank, padding included.
    pub num_kv_heads: usize,
    /// Query heads of one KV head, padding included.
    pub group: usize,
    /// Query heads that are real: the first ones. Nothing is written for the others.
    pub num_heads_owned: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Column of the output buffer where the first owned head goes; columns outside the owned heads stay zero.
    pub out_column: usize,
    /// Factor on q . k.
    pub scale: f32,
    /// A query sees this many positions back, itself included.
    pub window: Option<usize>,
}

/// Rotary cosines and sines, host side: `[max_position, head_dim / 2]` each. Halves are rotated (not interleaved pairs).
#[derive(Debug, Clone)]
pub struct RopeTable {
    /// Cosines.
    pub cos: Vec<f32>,
    /// Sines.
    pub sin: Vec<f32>,
    /// Width of a head.
    pub head_dim: usize,
}

/// One sequence's share of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeqInputs {
    /// Its first row in the batch.
    pub query_start: u32,
    /// Its rows.
    pub query_len: u32,
    /// Tokens that its last query may see, its own included.
    pub context_len: u32,
    /// Where its block table begins in `StepInputs::block_tables`.
    pub table_start: u32,
}

/// In [`StepInputs::token_ids`]: no id, but the slot (in the other bits) whose last sampled token stands here.
pub const LAST_TOKEN: u32 = 1 << 31;

/// How the sampled rows of a step are drawn; the same on every rank, since it changes the sequence of collectives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum SamplerKind {
    /// Every row takes the highest logit.
    #[default]
    Greedy,
    /// Rows draw from the whole distribution.
    NoCut,
    /// Some row has top-k, top-p or min-p.
    Cut,
}

/// A row whose next token is wanted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SampleRow {
    /// Where the token is kept for later steps.
    pub slot: u32,
    /// Index of the output token that is drawn.
    pub output_index: u32,
    /// Keys the counter-based random numbers.
    pub seed: u64,
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 is off.
    pub top_k: u32,
    /// In (0, 1]; 1 is off.
    pub top_p: f32,
    /// In [0, 1]; 0 is off.
    pub min_p: f32,
}

/// A token whose log-probability is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScoreRow {
    /// Row of the logits buffer.
    pub row: u32,
    /// The token; `None` for the one that is sampled for the row in this step.
    pub token: Option<u32>,
    /// Alternatives to report, at most [`SCORED_TOP_MAX`].
    pub num_top: u32,
}

/// Most alternatives that are reported beside a token.
pub const SCORED_TOP_MAX: u32 = 20;

/// A scored token: log-probabilities are natural and of the raw logits.
#[derive(Debug, Clone, PartialEq)]
pub struct Scored {
    /// The token.
    pub token: u32,
    /// Its log-probability.
    pub logprob: f32,
    /// Its place among all tokens, 1 for the best.
    pub rank: u32,
    /// The best tokens, best first.
    pub top: Vec<(u32, f32)>,
}

/// What a step sampled and scored.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StepResult {
    /// One entry a sampled row; `None` where it has no finite logit at all.
    pub tokens: Vec<Option<u32>>,
    /// One entry a scored row.
    pub scores: Vec<Scored>,
}

/// This rank's part of the vocabulary in a row of the logits buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VocabSlice {
    /// Columns of the tokens that the rank owns.
    pub columns: Range<usize>,
    /// Id of the token in the first of them.
    pub first_id: u32,
}

/// A part of a step that a device may record and replay; see [`Ops::run`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StepPart {
    /// From tokens to hidden states.
    Forward,
    /// From hidden states to tokens.
    Sample(SamplerKind),
    /// From hidden states to log-probabilities.
    Score,
}

/// A step that is run before the first real one, so that nothing is recorded or tuned later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WarmUpStep {
    /// Sequences that decode one token.
    pub num_decodes: usize,
    /// Tokens that each of them sees, 0 for its own only.
    pub context: usize,
    /// Tokens of one more sequence's prompt.
    pub num_prompt_tokens: usize,
    /// How rows are drawn.
    pub sampler: SamplerKind,
}

/// Memory of the device, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemoryInfo {
    /// All of it.
    pub total: u64,
    /// What nobody holds.
    pub free: u64,
}

/// What a step computes, on the host. `T` rows: the tokens of all sequences, one after the other.
#[derive(Debug, Clone, Default)]
pub struct StepInputs {
    /// `[T]` token ids, or [`LAST_TOKEN`] and a slot.
    pub token_ids: Vec<u32>,
    /// `[T]` positions.
    pub positions: Vec<u32>,
    /// `[T]` slot where the row's K and V are stored.
    pub kv_slots: Vec<u32>,
    /// Sequences, in batch order.
    pub seqs: Vec<SeqInputs>,
    /// Block tables, one after the other.
    pub block_tables: Vec<u32>,
    /// Rows whose logits are wanted, ascending.
    pub logit_rows: Vec<u32>,
    /// How the first of the logit rows are drawn.
    pub samples: Vec<SampleRow>,
    /// Which of them may draw certain tokens only.
    pub masks: Vec<SampleMask>,
    /// Which of them have their logits edited.
    pub edits: Vec<SampleEdits>,
    /// What is scored.
    pub scores: Vec<ScoreRow>,
}

/// The tokens that a sampled row may draw. Scores are those of the raw logits, as without a mask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SampleMask {
    /// Index into [`StepInputs::samples`].
    pub row: u32,
    /// Token `t` of the whole vocabulary is allowed where bit `t % 32` of word `t / 32` is set.
    pub words: Arc<[u32]>,
}

/// How the logits of a sampled row are edited before it draws; scores are those of the raw logits.
#[derive(Debug, Clone, PartialEq)]
pub struct SampleEdits {
    /// Index into [`StepInputs::samples`].
    pub row: u32,
    /// The edits.
    pub edits: Arc<LogitEdits>,
    /// The sequence's tokens, where it draws for the first time in its slot. From then on the backend keeps them: a token that it has
    /// drawn belongs to them.
    pub history: Option<Arc<TokenHistory>>,
}

/// What a backend's sampler can do beside drawing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SamplerFeatures {
    /// [`StepInputs::masks`].
    pub masks: bool,
    /// [`StepInputs::edits`].
    pub edits: bool,
    /// Whether masks and edits leave the logits as they were. Where not, they are projected again before they are scored.
    pub keeps_logits: bool,
}

/// Largest step that a backend must hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct InputLimits {
    /// Rows.
    pub tokens_max: usize,
    /// Sequences.
    pub seqs_max: usize,
    /// Entries of all block tables.
    pub table_entries_max: usize,
    /// Rows with logits.
    pub logit_rows_max: usize,
    /// Slots that keep a last token.
    pub slots_max: usize,
    /// Positions of the longest sequence.
    pub positions_max: usize,
    /// Steps that may be submitted and not yet taken.
    pub steps_max: usize,
    /// Tokens of the whole vocabulary; 0 where no row has a mask or edits.
    pub vocab_size: usize,
    /// What attention is planned for.
    pub attention: AttentionLimits,
}

/// What all attention layers of a model have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AttentionLimits {
    /// KV heads on this rank, padding included.
    pub num_kv_heads: usize,
    /// Query heads of one KV head, padding included.
    pub group: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Slots in a block.
    pub block_size: usize,
    /// A query sees this many positions back, itself included.
    pub window: Option<usize>,
}

/// A rank's term of a sum over ranks: only a collective op makes a value of it.
#[derive(Debug)]
pub struct Partial<B>(pub(crate) B);

impl<B> Partial<B> {
    /// Marks a buffer as a place for terms.
    pub fn new(buffer: B) -> Self {
        Self(buffer)
    }
}

/// Host collectives of a group; every call is made by all ranks, in the same order, with the same sizes.
///
/// Sums are formed in rank order, so that all ranks hold the same bits. Each call has a deadline.
pub trait Collective: Send {
    /// This rank.
    fn rank(&self) -> usize;
    /// Ranks in the group.
    fn world_size(&self) -> usize;
    /// Replaces `data` by the sum over ranks.
    ///
    /// # Errors
    /// A peer is late or gone: the group is broken, and the caller leaves its epoch.
    fn all_reduce_sum(&mut self, data: &mut [f32]) -> Result<(), CollectiveError>;
    /// Concatenates every rank's `part` in rank order: `out.len() == part.len() * world_size`.
    ///
    /// # Errors
    /// As `all_reduce_sum`.
    fn all_gather(&mut self, part: &[u8], out: &mut [u8]) -> Result<(), CollectiveError>;
}

/// What a backend computes. Buffers are `[rows_max, width]`; `rows` of them are in use, as `Inputs` says.
pub trait Ops {
    /// Activations, `[rows_max, width]`.
    type Buffer;
    /// A weight matrix `[N, K]`, in the backend's layout.
    type Matrix;
    /// A one-dimensional parameter: a norm's weight or a bias.
    type Vector;
    /// K and V of one layer.
    type KvLayer;
    /// The step's inputs on the device.
    type Inputs;
    /// Rotary tables on the device.
    type Rope;

    // ---- planning: before the first step ----

    /// Plans a zeroed buffer of the device's activation type.
    ///
    /// # Errors
    /// No memory.
    fn buffer(&mut self, rows_max: usize, width: usize) -> Result<Self::Buffer, KernelError>;
    /// Plans a zeroed buffer in f32, whatever the activation type: the residual stream and logits.
    ///
    /// # Errors
    /// No memory.
    fn wide_buffer(&mut self, rows_max: usize, width: usize) -> Result<Self::Buffer, KernelError> {
        self.buffer(rows_max, width)
    }
    /// Takes a matrix in, parts one below the other.
    ///
    /// # Errors
    /// A format that this backend lacks, parts of different widths, no memory.
    fn matrix<'a>(&mut self, parts: Vec<impl Into<MatrixSource<'a>>>) -> Result<Self::Matrix, KernelError>;
    /// Takes gate and up in, in the layout that `gate_up_act` wants.
    ///
    /// # Errors
    /// As `matrix`; both must have the same shape.
    fn gate_up_matrix<'a>(
        &mut self,
        gate: impl Into<MatrixSource<'a>>,
        up: impl Into<MatrixSource<'a>>,
    ) -> Result<Self::Matrix, KernelError>;
    /// Bytes that a matrix holds on the device.
    fn matrix_bytes(&self, matrix: &Self::Matrix) -> u64;
    /// Takes a vector in.
    ///
    /// # Errors
    /// No memory.
    fn vector(&mut self, values: &[f32]) -> Result<Self::Vector, KernelError>;
    /// Takes rotary tables in.
    ///
    /// # Errors
    /// No memory.
    fn rope_table(&mut self, table: RopeTable) -> Result<Self::Rope, KernelError>;
    /// Allocates one layer's K and V.
    ///
    /// # Errors
    /// No memory.
    fn kv_layer(&mut self, shape: KvShape) -> Result<Self::KvLayer, KernelError>;
    /// Plans the inputs.
    ///
    /// # Errors
    /// No memory.
    fn inputs(&mut self, limits: InputLimits) -> Result<Self::Inputs, KernelError>;

    /// Memory of the device; `None` where it is the host's.
    ///
    /// # Errors
    /// The device does not say.
    fn memory(&self) -> Result<Option<DeviceMemoryInfo>, KernelError> {
        Ok(None)
    }
    /// Element type that a cache has where nothing else is asked for.
    fn kv_dtype(&self) -> StoredType {
        StoredType::F32
    }
    /// Steps to run before the first real one, the same on all ranks. They may write into block 0.
    fn warm_up_steps(&self, _limits: &InputLimits) -> Vec<WarmUpStep> {
        vec![WarmUpStep { num_prompt_tokens: 4, ..WarmUpStep::default() }]
    }

    // ---- around a forward ----

    /// Begins a step: puts its inputs on the device.
    ///
    /// # Errors
    /// More than the planned limits.
    fn load_inputs(&mut self, step: &StepInputs, inputs: &mut Self::Inputs) -> Result<(), KernelError>;
    /// Runs a part of the step. A device may record what `work` asks for, and later replay it where shapes are the same.
    ///
    /// # Errors
    /// What `work` returns, or a device fault.
    fn run(
        &mut self,
        inputs: &Self::Inputs,
        part: StepPart,
        work: &mut dyn FnMut(&mut Self) -> Result<(), KernelError>,
    ) -> Result<(), KernelError> {
        let _ = (inputs, part);
        work(self)
    }
    /// Draws a token for each of the step's sampled rows: kept in the row's slot for later steps, and reported. Collective. Where
    /// the sampler keeps no logits ([`SamplerFeatures::keeps_logits`]), those of masked and edited rows are others afterwards.
    ///
    /// # Errors
    /// A device fault or a broken group.
    fn sample(
        &mut self,
        inputs: &Self::Inputs,
        logits: &Self::Buffer,
        vocab: &VocabSlice,
        kind: SamplerKind,
    ) -> Result<(), KernelError>;
    /// What [`Self::sample`] can do beside drawing; a step never asks for more.
    fn sampler_features(&self) -> SamplerFeatures {
        SamplerFeatures::default()
    }
    /// Scores the step's scored rows. Collective.
    ///
    /// # Errors
    /// A device fault or a broken group.
    fn score(&mut self, inputs: &Self::Inputs, logits: &Self::Buffer, vocab: &VocabSlice) -> Result<(), KernelError>;
    /// Ends the step: what it sampled and scored can be taken when the device has done it.
    ///
    /// # Errors
    /// More steps than were planned, or a device fault.
    fn submit(&mut self, inputs: &Self::Inputs) -> Result<(), KernelError>;
    /// Whether [`Ops::take`] would not wait.
    ///
    /// # Errors
    /// A device fault.
    fn is_done(&mut self) -> Result<bool, KernelError>;
    /// Waits for the oldest submitted step and gives its results.
    ///
    /// # Errors
    /// None was submitted, a device fault, a broken group or a passed deadline.
    fn take(&mut self) -> Result<StepResult, KernelError>;
    /// Waits for the device and shows the first `rows` of a buffer, `[rows, width]`.
    ///
    /// # Errors
    /// A device fault or a passed deadline.
    fn read<'a>(&'a mut self, buffer: &'a Self::Buffer, rows: usize) -> Result<&'a [f32], KernelError>;

    /// The same for some rows of a buffer, the first of them first.
    ///
    /// # Errors
    /// As `read`.
    fn read_rows<'a>(&'a mut self, buffer: &'a Self::Buffer, rows: Range<usize>) -> Result<&'a [f32], KernelError> {
        let all = self.read(buffer, rows.end)?;
        let width = all.len().checked_div(rows.end).unwrap_or(0);
        Ok(all.get(rows.start * width..).unwrap_or_default())
    }

    // ---- fine ops ----

    /// `out[t] = table[token_ids[t] - first_id]`, zero where the id is outside the table. `out` `[T, hidden]`.
    ///
    /// # Errors
    /// Shapes that do not fit (this holds for all ops below).
    fn embed(
        &mut self,
        inputs: &Self::Inputs,
        table: &Self::Matrix,
        first_id: u32,
        out: &mut Partial<Self::Buffer>,
    ) -> Result<(), KernelError>;
    /// `out = x / rms(x) * weight`, row by row. Source: arXiv:1910.07467.
    fn rms_norm(
        &mut self,
        inputs: &Self::Inputs,
        x: &Self::Buffer,
        weight: &Self::Vector,
        eps: f32,
        out: &mut Self::Buffer,
    ) -> Result<(), KernelError>;
    /// `out = x W^T + bias`. `x` `[T, K]`, `out` `[T, N]`.
    fn linear(
        &mut self,
        inputs: &Self::Inputs,
        x: &Self::Buffer,
        weight: &Self::Matrix,
        bias: Option<&Self::Vector>,
        out: &mut Self::Buffer,
    ) -> Result<(), KernelError>;
    /// Rotates q in place, and stores rotated k, and v; what k's columns hold afterwards is the backend's affair.
    /// `qkv` `[T, (kv * group + 2 kv) * head_dim]`: q, then k, then v.
    /// Source: arXiv:2104.09864.
    fn rope_store(
        &mut self,
        inputs: &Self::Inputs,
        shape: &AttentionShape,
        rope: &Self::Rope,
        qkv: &mut Self::Buffer,
        kv: &mut Self::KvLayer,
    ) -> Result<(), KernelError>;
    /// Causal attention of the step's queries over the paged cache. `out` `[T, width]`, see `AttentionShape::out_column`.
    fn attend(
        &mut self,
        inputs: &Self::Inputs,
        shape: &AttentionShape,
        qkv: &Self::Buffer,
        kv: &Self::KvLayer,
        out: &mut Self::Buffer,
    ) -> Result<(), KernelError>;
    /// `out = silu(gate(x)) * up(x)`. `x` `[T, K]`, `out` `[T, inner]`.
    fn gate_up_act(
        &mut self,
        inputs: &Self::Inputs,
        x: &Self::Buffer,
        gate_up: &Self::Matrix,
        out: &mut Self::Buffer,
    ) -> Result<(), KernelError>;
    /// `out = x W^T`, this rank's term of a row-parallel linear layer. Source: arXiv:1909.08053, section 3.
    fn linear_partial(
        &mut self,
        inputs: &Self::Inputs,
        x: &Self::Buffer,
        weight: &Self::Matrix,
        out: &mut Partial<Self::Buffer>,
    ) -> Result<(), KernelError>;
    /// Sums the terms of all ranks. Collective. `out` `[T, width]`.
    fn reduce(
        &mut self,
        inputs: &Self::Inputs,
        partial: &mut Partial<Self::Buffer>,
        out: &mut Self::Buffer,
    ) -> Result<(), KernelError>;
    /// `x += y`.
    fn add(&mut self, inputs: &Self::Inputs, y: &Self::Buffer, x: &mut Self::Buffer) -> Result<(), KernelError>;
    /// `out[i] = x[logit_rows[i]] W^T`. `out` `[logit_rows, vocab on this rank]`.
    fn logits(
        &mut self,
        inputs: &Self::Inputs,
        x: &Self::Buffer,
        head: &Self::Matrix,
        out: &mut Self::Buffer,
    ) -> Result<(), KernelError>;

    // ---- block ops: default bodies compose the fine ops ----

    /// Sums the terms of all ranks into the residual stream and normalises it. Collective.
    fn reduce_add_norm(
        &mut self,
        inputs: &Self::Inputs,
        partial: &mut Partial<Self::Buffer>,
        residual: &mut Self::Buffer,
        weight: &Self::Vector,
        eps: f32,
        normed: &mut Self::Buffer,
    ) -> Result<(), KernelError> {
        self.reduce(inputs, partial, normed)?;
        self.add(inputs, normed, residual)?;
        self.rms_norm(inputs, residual, weight, eps, normed)
    }
    /// QKV projection, rotary embedding, storage of K and V. `x` `[T, hidden]`, `qkv` as in `rope_store`.
    #[expect(clippy::too_many_arguments, reason = "one fused block: its operands are what it is")]
    fn qkv_rope_store(
        &mut self,
        inputs: &Self::Inputs,
        shape: &AttentionShape,
        x: &Self::Buffer,
        weight: &Self::Matrix,
        bias: Option<&Self::Vector>,
        rope: &Self::Rope,
        qkv: &mut Self::Buffer,
        kv: &mut Self::KvLayer,
    ) -> Result<(), KernelError> {
        self.linear(inputs, x, weight, bias, qkv)?;
        self.rope_store(inputs, shape, rope, qkv, kv)
    }
}
