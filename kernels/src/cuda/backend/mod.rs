//! `CudaOps`: the contract on one NVIDIA device.
//!
//! Owns context, stream, kernels, scratch memory, recorded steps and the device's part in the group. The kernels are in
//! `kernels/cuda`; here is how they are launched. Activations are in the device type, the residual stream and logits in f32.
//!
//! **Invariant:** grids, blocks and algorithms depend on the padded shape of a step only; eager and recorded steps launch the
//! same kernels on the same addresses, so their tokens are equal.
//! **Invariant:** recorded steps are dropped before the memory and the communicator that they use (fields drop in order), and
//! before any of them what waits for other ranks is ended: freeing memory waits for the device.

mod attention;
mod buckets;
mod buffers;
mod editing;
mod graphs;
mod group;
mod inputs;
mod kernels;
mod linear;
mod ops;
mod sampling;
mod upload;

use std::rc::Rc;
use std::time::{Duration, Instant};

pub use buffers::{CudaBuffer, CudaKvLayer, CudaMatrix, CudaRope, CudaVector, Dtype};
pub use group::{ReduceBench, ReduceTiming, ReduceWay};
pub use inputs::CudaInputs;

use crate::cuda::{
    BlasLt, Context, CudaError, Kernel, KernelArg, LaunchConfig, ModuleSet, ModuleSettings, Priority, Stream,
};
use crate::{Collective, KernelError};
use attention::AttentionScratch;
use editing::Editing;
use graphs::Graphs;
use group::{Exchange, Group};
use kernels::Kernels;
use linear::Scratch;
use sampling::Sampling;
use upload::Uploader;

/// Longest wait for a step, or for what is before an upload.
const STEP_DEADLINE: Duration = Duration::from_secs(120);

/// Longest wait of a kernel for another rank, where nobody asks for more: twice the head's shortest deadline of a step, so that the
/// head, which knows who died, speaks first where it can.
pub const PEER_WAIT: Duration = Duration::from_secs(10);

/// How a backend is opened.
#[derive(Debug, Clone)]
pub struct CudaSettings {
    /// Which of the visible devices.
    pub ordinal: u32,
    /// Type of activations and weights.
    pub dtype: Dtype,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of an attention head.
    pub head_dim: usize,
    /// Query heads of one KV head.
    pub group: usize,
    /// Longest wait of a kernel for another rank.
    pub peer_wait_max: Duration,
    /// Never records steps.
    pub enforce_eager: bool,
    /// Exchanges through NCCL even with devices whose memory it reaches.
    pub only_nccl: bool,
    /// Where device code is compiled, if it must be.
    pub modules: ModuleSettings,
}

/// The CUDA backend.
pub struct CudaOps {
    graphs: Graphs,
    sampling: Option<Sampling>,
    editing: Option<Editing>,
    attention: Option<AttentionScratch>,
    scratch: Scratch,
    uploader: Uploader,
    group: Group,
    /// The host's group: its connections live as long as the device's.
    _collective: Box<dyn Collective>,
    blas: Option<BlasLt>,
    kernels: Kernels,
    stream: Rc<Stream>,
    context: Context,
    dtype: Dtype,
    enforce_eager: bool,
    /// Since when somebody asks for a step that has not ended.
    awaited_since: Option<Instant>,
    read_back: Vec<f32>,
}

impl CudaOps {
    /// Opens a device. `collective` is the ranks' way to set their devices' group up. Collective.
    ///
    /// # Errors
    /// No driver, device, kernels or memory; or a group of devices that do not reach each other.
    pub fn open(settings: &CudaSettings, collective: Box<dyn Collective>) -> Result<Self, KernelError> {
        let context = Context::open(settings.ordinal)?;
        if settings.dtype == Dtype::Bf16 && !context.device().has_bfloat16() {
            let what = format!("bfloat16 on {}", context.device().name);
            return Err(KernelError::Unsupported { backend: "cuda", op: "open", what });
        }
        let stream = Rc::new(Stream::new(&context, Priority::High)?);
        let modules = ModuleSet::new(&context, settings.modules.clone());
        let kernels = Kernels::find(&modules, context.device(), settings.dtype, settings.head_dim, settings.group)?;
        let mut collective = collective;
        let CudaSettings { dtype, hidden_size: hidden, only_nccl, peer_wait_max: wait_max, .. } = *settings;
        let exchange = Exchange { dtype, hidden, only_nccl, wait_max };
        let group = Group::form(&context, &stream, &modules, &exchange, &mut *collective)?;
        let blas = if settings.dtype == Dtype::F32 { None } else { Some(BlasLt::new(&context)?) };
        Ok(Self {
            graphs: Graphs::default(),
            sampling: None,
            editing: None,
            attention: None,
            scratch: Scratch::default(),
            uploader: Uploader::new(&context)?,
            group,
            _collective: collective,
            blas,
            kernels,
            stream,
            context,
            dtype: settings.dtype,
            enforce_eager: settings.enforce_eager,
            awaited_since: None,
            read_back: Vec::new(),
        })
    }

    /// Launches a kernel; on devices that can, it may begin before the kernel before it has ended, and waits itself.
    ///
    /// # Safety
    /// As for [`Stream::launch`].
    unsafe fn launch(&self, kernel: &Kernel, config: LaunchConfig, args: &[KernelArg<'_>]) -> Result<(), KernelError> {
        let config = if self.context.device().capability.0 >= 9 { config.dependent() } else { config };
        // SAFETY: the caller's.
        Ok(unsafe { self.stream.launch(kernel, &config, args) }?)
    }

    /// Whether the oldest step has ended; an error where it takes longer than any step may, or where a peer is known to be gone.
    fn has_ended(&mut self) -> Result<bool, KernelError> {
        if self.results_arrived()? {
            self.awaited_since = None;
            return Ok(true);
        }
        self.group.look()?;
        let waited = self.awaited_since.get_or_insert_with(Instant::now).elapsed();
        if waited < STEP_DEADLINE {
            return Ok(false);
        }
        let (device, kernel) = (self.context.ordinal(), self.context.last_launch());
        Err(CudaError::Deadline { device, awaited: "a step", waited, kernel }.into())
    }

    fn blas(&self) -> Result<&BlasLt, KernelError> {
        self.blas.as_ref().ok_or_else(|| CudaError::refused("matmul", "cuBLASLt was not opened").into())
    }
}

impl Drop for CudaOps {
    /// A device that waits for a rank which is gone would otherwise hold up the fields' ends, and the word of what happened.
    fn drop(&mut self) {
        self.group.abort();
    }
}
