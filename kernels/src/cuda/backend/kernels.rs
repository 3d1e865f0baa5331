//! Every kernel of a backend, found once when it opens.

use super::buffers::Dtype;
use crate::cuda::{CudaError, Kernel, ModuleSet};

/// Kernels for one activation type.
pub(super) struct Kernels {
    pub load_step: Kernel,
    pub embed: Kernel,
    pub rms_norm: Kernel,
    pub add_norm: Kernel,
    pub rope_store: Kernel,
    pub silu_mul: Kernel,
    pub gelu_tanh_mul: Kernel,
    pub gather_rows: Kernel,
    pub to_residual: Kernel,
    pub add: Kernel,
    pub linear_tiled: Kernel,
    /// By padded rows, 8 to 64 in steps of 8; none in f32.
    pub linear_stream: Vec<Kernel>,
    pub attention: AttentionKernels,
    pub sampling: SamplingKernels,
    pub editing: EditingKernels,
}

/// Kernels of attention for one head size.
pub(super) struct AttentionKernels {
    /// Decode and prefill on tensor cores, where there are such for the head size and type.
    pub tuned: Option<[Kernel; 2]>,
    pub generic: Kernel,
    pub merge: Kernel,
}

/// Kernels of sampling and scoring.
pub(super) struct SamplingKernels {
    pub best: Kernel,
    pub draw: Kernel,
    pub cut_begin: Kernel,
    pub cut_count: Kernel,
    pub cut_apply: Kernel,
    pub commit: Kernel,
    pub score_rows: Kernel,
    pub score_rank: Kernel,
}

/// Kernels of masks and edits.
pub(super) struct EditingKernels {
    pub load: Kernel,
    pub survey: Kernel,
    pub apply: Kernel,
    pub keep: Kernel,
}

/// Head sizes with kernels of their own.
const TUNED_HEAD_DIMS: [usize; 4] = [64, 96, 128, 256];
/// Dynamic shared memory of the decode and prefill kernels for each of them.
const TUNED_SHARED_BYTES: [[u32; 2]; 4] =
    [[115_200, 51_712], [111_104, 76_288], [115_200, 100_864], [156_160, 199_168]];

/// Dynamic shared memory of the tuned decode and prefill kernels for a head size that has them.
pub(super) fn tuned_shared_bytes(head_dim: usize) -> Option<[u32; 2]> {
    TUNED_HEAD_DIMS.iter().position(|tuned| *tuned == head_dim).map(|index| TUNED_SHARED_BYTES[index])
}

impl Kernels {
    /// Finds all of them. `head_dim` and `group` say which kernels attention takes.
    pub(super) fn find(
        modules: &ModuleSet,
        dtype: Dtype,
        head_dim: usize,
        group: usize,
        shared_bytes_max: u32,
    ) -> Result<Self, CudaError> {
        let typed = |module: &str, name: &str| modules.kernel(module, &format!("{name}_{}", dtype.suffix()));
        let stream = |rows: usize| modules.kernel("linear", &format!("linear_stream_{}_m{rows}", dtype.suffix()));
        let linear_stream = match dtype {
            Dtype::F32 => Vec::new(),
            _ => (8..=64).step_by(8).map(stream).collect::<Result<_, _>>()?,
        };
        Ok(Self {
            load_step: modules.kernel("elementwise", "load_step")?,
            embed: typed("elementwise", "embed")?,
            rms_norm: typed("elementwise", "rms_norm")?,
            add_norm: typed("elementwise", "add_norm")?,
            rope_store: typed("elementwise", "rope_store")?,
            silu_mul: typed("elementwise", "act_mul_silu")?,
            gelu_tanh_mul: typed("elementwise", "act_mul_gelu")?,
            gather_rows: typed("elementwise", "gather_rows")?,
            to_residual: typed("elementwise", "to_residual")?,
            add: typed("elementwise", "add")?,
            linear_tiled: typed("linear", "linear_tiled")?,
            linear_stream,
            attention: AttentionKernels::find(modules, dtype, head_dim, group, shared_bytes_max)?,
            sampling: SamplingKernels::find(modules)?,
            editing: EditingKernels::find(modules)?,
        })
    }
}

impl AttentionKernels {
    fn find(
        modules: &ModuleSet,
        dtype: Dtype,
        head_dim: usize,
        group: usize,
        shared_bytes_max: u32,
    ) -> Result<Self, CudaError> {
        let tuned = |part: &str| {
            modules.kernel(&format!("attention_{part}"), &format!("attend_{part}_{head_dim}_{}", dtype.suffix()))
        };
        let fits = tuned_shared_bytes(head_dim).is_some_and(|bytes| bytes.iter().all(|b| *b <= shared_bytes_max));
        let tuned =
            if fits && dtype != Dtype::F32 && group <= 16 { Some([tuned("decode")?, tuned("prefill")?]) } else { None };
        let portable = |name: &str| modules.kernel("attention_portable", &format!("{name}_{}", dtype.suffix()));
        Ok(Self { tuned, generic: portable("attend_generic")?, merge: portable("attend_merge")? })
    }
}

impl SamplingKernels {
    fn find(modules: &ModuleSet) -> Result<Self, CudaError> {
        let kernel = |name| modules.kernel("sample", name);
        Ok(Self {
            best: kernel("sample_best")?,
            draw: kernel("sample_draw")?,
            cut_begin: kernel("cut_begin")?,
            cut_count: kernel("cut_count")?,
            cut_apply: kernel("cut_apply")?,
            commit: kernel("sample_commit")?,
            score_rows: kernel("score_rows")?,
            score_rank: kernel("score_rank")?,
        })
    }
}

impl EditingKernels {
    fn find(modules: &ModuleSet) -> Result<Self, CudaError> {
        let kernel = |name| modules.kernel("edit", name);
        Ok(Self {
            load: kernel("edit_load")?,
            survey: kernel("edit_survey")?,
            apply: kernel("edit_apply")?,
            keep: kernel("edit_keep")?,
        })
    }
}
