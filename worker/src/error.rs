//! What ends a rank, and the word that the head is told for it.

use phalanx_formats::ModelError;
use phalanx_kernels::{CollectiveError, KernelError};
use phalanx_proto::{BlockId, Phase, SeqSlot, StepId, TokenId};

use crate::layers::BuildError;

/// A plan that does not fit what this rank knows: head and rank have parted, and the epoch must end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Divergence {
    /// The plan belongs to another life of head, processes or sequences.
    #[error("plan of {counter} {found}, this rank is in {expected}")]
    Life {
        /// Which counter: term, incarnation or epoch.
        counter: &'static str,
        /// What this rank is in.
        expected: u64,
        /// What the plan says.
        found: u64,
    },
    /// A step was lost or came twice.
    #[error("plan of step {found} where step {expected} is next")]
    Step {
        /// The next step.
        expected: StepId,
        /// What came.
        found: StepId,
    },
    /// The chain over plans differs.
    #[error("plan hash {found:#018x}, computed {expected:#018x}")]
    PlanHash {
        /// As this rank computes it.
        expected: u64,
        /// As the plan says.
        found: u64,
    },
    /// The chain over sampled tokens differs.
    #[error("token hash {found:#018x} at step {step}, this rank has {expected:#018x}")]
    TokenHash {
        /// The committed step.
        step: StepId,
        /// As this rank computed it.
        expected: u64,
        /// As the plan says.
        found: u64,
    },
    /// The committed step is not among the last ones.
    #[error("committed step {found} is not among steps {oldest} to {newest}")]
    Committed {
        /// Oldest step whose token hash is kept.
        oldest: StepId,
        /// Newest one.
        newest: StepId,
        /// What the plan says.
        found: StepId,
    },
    /// A row or a release names a slot that holds no sequence.
    #[error("slot {0} holds no sequence")]
    UnknownSlot(SeqSlot),
    /// A new sequence is put on another one.
    #[error("slot {0} is taken")]
    SlotTaken(SeqSlot),
    /// Two rows name one slot.
    #[error("slot {0} has two rows")]
    SlotTwice(SeqSlot),
    /// A row begins elsewhere than its sequence stands.
    #[error("slot {slot}: row starts at {found}, the sequence stands at {expected}")]
    Start {
        /// The sequence.
        slot: SeqSlot,
        /// Where it stands; for its first row the end of its cached blocks, which the row may not pass.
        expected: u32,
        /// What the row says.
        found: u32,
    },
    /// A row ends elsewhere than it may.
    #[error("slot {slot}: row ends at {end}, the sequence has {num_tokens} tokens")]
    End {
        /// The sequence.
        slot: SeqSlot,
        /// End of the row.
        end: u64,
        /// Tokens of the sequence.
        num_tokens: usize,
    },
    /// A row consumes a token that this rank did not sample in that step.
    #[error("slot {slot}: row consumes the token of step {found}, the last one is of step {last:?}")]
    Consumes {
        /// The sequence.
        slot: SeqSlot,
        /// Where its last token was sampled, if it was.
        last: Option<StepId>,
        /// What the row says.
        found: StepId,
    },
    /// A block that does not exist.
    #[error("slot {slot}: block {block} of {num_blocks}")]
    Block {
        /// The sequence.
        slot: SeqSlot,
        /// The block.
        block: BlockId,
        /// Blocks that exist.
        num_blocks: usize,
    },
    /// A block table that is too short or too long for its tokens.
    #[error("slot {slot}: {num_blocks} blocks for {num_tokens} tokens of {block_size} in a block")]
    Table {
        /// The sequence.
        slot: SeqSlot,
        /// Entries of its table.
        num_blocks: usize,
        /// Tokens that need a place.
        num_tokens: usize,
        /// Tokens in a block.
        block_size: usize,
    },
    /// A token outside the vocabulary.
    #[error("slot {slot}: token {token} of {vocab_size}")]
    Token {
        /// The sequence.
        slot: SeqSlot,
        /// The token.
        token: TokenId,
        /// Size of the vocabulary.
        vocab_size: usize,
    },
    /// More than was agreed at start-up.
    #[error("{found} {what}, at most {max} were agreed")]
    TooMany {
        /// What there is too much of.
        what: &'static str,
        /// How many.
        found: usize,
        /// The limit.
        max: usize,
    },
    /// The sampler that the plan names cannot serve one of its rows.
    #[error("slot {0} needs another sampler than the plan names")]
    Sampler(SeqSlot),
    /// A mask of a sequence that does not sample in this plan.
    #[error("slot {0} has a mask and no sample")]
    Mask(SeqSlot),
}

/// Why a rank gives up.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// Head and rank have parted.
    #[error("step {step}: {reason}")]
    Divergence {
        /// The plan's step.
        step: StepId,
        /// What differs.
        #[source]
        reason: Divergence,
    },
    /// The model's files cannot be used.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A weight does not fit the device, or an op failed.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The group is broken.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// A row without a finite logit: weights or kernels are broken.
    #[error("step {step}: slot {slot} has no finite logit")]
    NoToken {
        /// The plan's step.
        step: StepId,
        /// The sequence.
        slot: SeqSlot,
    },
    /// This build or machine has no such device.
    #[error("device {device} cannot be used: {reason}")]
    Device {
        /// The device.
        device: &'static str,
        /// Why, and what to use.
        reason: &'static str,
    },
    /// A setting that no rank can follow.
    #[error("{setting} is {found}, which is not {expected}")]
    Setting {
        /// Its name.
        setting: &'static str,
        /// What it is.
        found: String,
        /// What it may be.
        expected: &'static str,
    },
    /// Memory is too small for a single sequence.
    #[error(
        "weights hold {weight_bytes} bytes, and {free_bytes} are left for the KV cache; one sequence of {max_model_len} tokens \
         needs {needed_bytes} ({token_bytes} a token, so {fitting_len} tokens fit). Lower --max-model-len, raise \
         --gpu-memory-utilization or use more ranks"
    )]
    KvMemory {
        /// What is left.
        free_bytes: u64,
        /// What one sequence needs.
        needed_bytes: u64,
        /// What the weights hold.
        weight_bytes: u64,
        /// What one token needs.
        token_bytes: u64,
        /// Longest sequence.
        max_model_len: u32,
        /// Tokens that fit.
        fitting_len: u64,
    },
    /// The head did not send what comes next.
    #[error("no {expected} from the head within {waited_ms} ms")]
    Deadline {
        /// What was waited for.
        expected: &'static str,
        /// How long.
        waited_ms: u64,
    },
    /// The head sent something else.
    #[error("the head sent {found} where {expected} comes next")]
    OutOfOrder {
        /// What was waited for.
        expected: &'static str,
        /// What came.
        found: &'static str,
    },
    /// The head ended the rank before it was ready.
    #[error("the head ended the start: {reason}")]
    ShutDown {
        /// What the head said.
        reason: String,
    },
    /// The session took no events for too long.
    #[error("the session took no event for {waited_ms} ms")]
    SessionStuck {
        /// How long.
        waited_ms: u64,
    },
    /// The session ended.
    #[error("the session ended in phase {phase}")]
    SessionGone {
        /// In which phase.
        phase: Phase,
    },
    /// The device thread could not be started.
    #[error("the device thread could not be started: {0}")]
    Thread(#[source] std::io::Error),
    /// Memory figures of the machine cannot be read.
    #[error("/proc/meminfo: {0}")]
    Meminfo(#[source] std::io::Error),
    /// The device thread panicked.
    #[error("the device thread panicked: {message}")]
    Panicked {
        /// What it said.
        message: String,
    },
}

impl From<BuildError> for WorkerError {
    fn from(error: BuildError) -> Self {
        match error {
            BuildError::Model(error) => Self::Model(error),
            BuildError::Kernel(error) => Self::Kernel(error),
        }
    }
}

impl WorkerError {
    /// The word that stands in `RankFailure::code`.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Divergence { .. } | Self::OutOfOrder { .. } => "divergence",
            Self::Model(_) | Self::Setting { .. } => "model",
            Self::Kernel(KernelError::Collective(_)) | Self::Collective(_) => "communicator",
            Self::Kernel(_) | Self::NoToken { .. } | Self::Device { .. } | Self::KvMemory { .. } => "device",
            Self::Deadline { .. } => "deadline",
            Self::ShutDown { .. }
            | Self::SessionStuck { .. }
            | Self::SessionGone { .. }
            | Self::Thread(_)
            | Self::Meminfo(_)
            | Self::Panicked { .. } => "internal",
        }
    }
}
