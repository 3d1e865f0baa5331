//! Every kernel of a backend, found once when it opens.

use super::buffers::Dtype;
use crate::cuda::{CudaError, Device, Kernel, ModuleSet};

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
    pub tuned: Option<[TunedKernel; 2]>,
    pub generic: Kernel,
    pub merge: Kernel,
}

/// A kernel of attention that is launched as its source says.
pub(super) struct TunedKernel {
    pub kernel: Kernel,
    pub threads: u32,
    pub blocks_per_sm: u32,
    pub shared_bytes: u32,
    /// Its blocks take units of work from a counter, which is its last argument.
    pub counts_units: bool,
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

/// Head sizes with kernels of their own, and the dynamic shared memory of those for decode and prefill.
const TUNED_SHARED_BYTES: [(usize, [u32; 2]); 4] =
    [(64, [115_200, 51_712]), (96, [111_104, 76_288]), (128, [115_200, 100_864]), (256, [156_160, 199_168])];
/// The same of the prefill kernel with products of warpgroups.
const WGMMA_SHARED_BYTES: [(usize, u32); 2] = [(64, 99_456), (128, 197_760)];
/// The capability that has such products.
const WGMMA_CAPABILITY: (u32, u32) = (9, 0);

impl Kernels {
    /// Finds all of them. `head_dim` and `group` say which kernels attention takes.
    pub(super) fn find(
        modules: &ModuleSet,
        device: &Device,
        dtype: Dtype,
        head_dim: usize,
        group: usize,
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
            attention: AttentionKernels::find(modules, device, dtype, head_dim, group)?,
            sampling: SamplingKernels::find(modules)?,
            editing: EditingKernels::find(modules)?,
        })
    }
}

impl AttentionKernels {
    fn find(
        modules: &ModuleSet,
        device: &Device,
        dtype: Dtype,
        head_dim: usize,
        group: usize,
    ) -> Result<Self, CudaError> {
        let portable = |name: &str| modules.kernel("attention_portable", &format!("{name}_{}", dtype.suffix()));
        let tuned = if dtype == Dtype::F32 || group > 16 {
            None
        } else {
            TunedKernel::find_both(modules, device, dtype, head_dim)?
        };
        Ok(Self { tuned, generic: portable("attend_generic")?, merge: portable("attend_merge")? })
    }
}

impl TunedKernel {
    /// For decode and for prefill; none for a head size that has none, or a device with too little shared memory.
    fn find_both(
        modules: &ModuleSet,
        device: &Device,
        dtype: Dtype,
        head_dim: usize,
    ) -> Result<Option<[Self; 2]>, CudaError> {
        let sizes = TUNED_SHARED_BYTES.iter().find(|(known, _)| *known == head_dim).map(|(_, sizes)| *sizes);
        let Some(sizes) = sizes.filter(|sizes| sizes.iter().all(|bytes| *bytes <= device.shared_bytes_max)) else {
            return Ok(None);
        };
        let is_wide = head_dim > 128;
        let tuned = |part: &str, shared_bytes, threads| {
            let name = format!("attend_{part}_{head_dim}_{}", dtype.suffix());
            let kernel = modules.kernel(&format!("attention_{part}"), &name)?;
            let blocks_per_sm = if is_wide { 1 } else { 2 };
            Ok::<_, CudaError>(Self { kernel, threads, blocks_per_sm, shared_bytes, counts_units: false })
        };
        let prefill = match Self::find_wgmma(modules, device, dtype, head_dim) {
            Some(prefill) => prefill,
            None => tuned("prefill", sizes[1], if is_wide { 256 } else { 128 })?,
        };
        Ok(Some([tuned("decode", sizes[0], 128)?, prefill]))
    }

    /// Prefill with products of warpgroups; an image for more than one kind of device holds no such kernel.
    fn find_wgmma(modules: &ModuleSet, device: &Device, dtype: Dtype, head_dim: usize) -> Option<Self> {
        let (_, shared_bytes) = *WGMMA_SHARED_BYTES.iter().find(|(known, _)| *known == head_dim)?;
        if device.capability != WGMMA_CAPABILITY {
            return None;
        }
        let name = format!("attend_prefill_wgmma_{head_dim}_{}", dtype.suffix());
        let kernel = modules.kernel("attention_wgmma", &name).ok()?;
        Some(Self { kernel, threads: 384, blocks_per_sm: 1, shared_bytes, counts_units: true })
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
