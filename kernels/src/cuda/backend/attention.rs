//! Attention and what surrounds it: rotary embedding with the store of K and V, and the merge of split contexts.

use super::buffers::{CudaBuffer, CudaKvLayer, CudaRope};
use super::inputs::CudaInputs;
use super::{CudaOps, CudaVector};
use crate::cuda::attention_plan::AttentionPlanner;
use crate::cuda::{Context, CudaError, DeviceMemory, KernelArg, LaunchConfig, Stream};
use crate::{AttentionShape, InputLimits, KernelError, kernel_args};

/// Partial results of split contexts.
pub(super) struct AttentionScratch {
    out: DeviceMemory,
    log_sums: DeviceMemory,
    /// Units of work that blocks have asked for; kernels leave it at 0.
    num_taken: DeviceMemory,
}

/// The planner of a model's attention on a device.
pub(super) fn planner(context: &Context, limits: &InputLimits) -> AttentionPlanner {
    let attention = &limits.attention;
    let mut planner = AttentionPlanner {
        sm_count: context.device().num_multiprocessors,
        num_kv_heads: attention.num_kv_heads.max(1) as u32,
        group: attention.group.max(1) as u32,
        head_dim: attention.head_dim as u32,
        block_size: attention.block_size as u32,
        window: attention.window.map(|window| window as u32),
        partials_max: 0,
    };
    planner.partials_max = planner.bounds(limits.tokens_max, limits.seqs_max, limits.positions_max).partials as u32;
    planner
}

impl AttentionScratch {
    pub(super) fn new(context: &Context, stream: &Stream, planner: &AttentionPlanner) -> Result<Self, CudaError> {
        let vectors = planner.partials_max as usize;
        let num_taken = DeviceMemory::alloc(context, size_of::<u32>())?;
        stream.fill(num_taken.span(), 0)?;
        Ok(Self {
            out: DeviceMemory::alloc(context, vectors * planner.head_dim as usize * 4)?,
            log_sums: DeviceMemory::alloc(context, vectors * 4)?,
            num_taken,
        })
    }
}

impl CudaOps {
    /// Adds the bias, rotates q, stores rotated k, and v.
    pub(super) fn rotate_and_store(
        &self,
        inputs: &CudaInputs,
        shape: &AttentionShape,
        rope: &CudaRope,
        bias: Option<&CudaVector>,
        qkv: &CudaBuffer,
        kv: &CudaKvLayer,
    ) -> Result<(), KernelError> {
        let rows = inputs.shape.tokens;
        let AttentionShape { num_kv_heads, group, head_dim, .. } = *shape;
        let width = num_kv_heads * (group + 2) * head_dim;
        let reason = || {
            format!(
                "heads of {head_dim} and {} and {}, {width} of {} columns",
                rope.head_dim, kv.shape.head_dim, qkv.width
            )
        };
        let fits = rope.head_dim == head_dim && kv.shape.head_dim == head_dim && qkv.width == width;
        if !fits || kv.shape.num_kv_heads != num_kv_heads || bias.is_some_and(|bias| bias.len != width) {
            return Err(KernelError::Shape { op: "rope_store", reason: reason() });
        }
        let units = num_kv_heads * (group + 2) * head_dim / if head_dim % 16 == 0 { 16 } else { 2 };
        let args = kernel_args![
            qkv.typed("rope_store", rows, self.dtype)?,
            bias.map(|bias| bias.memory.span()),
            &rope.cos,
            &rope.sin,
            inputs.arrays.positions,
            inputs.arrays.kv_slots,
            &kv.memory,
            CudaKvLayer::block_stride(&kv.shape) as u32,
            num_kv_heads as u32,
            group as u32,
            head_dim as u32,
            kv.shape.block_size as u32,
        ];
        let config = LaunchConfig::new([rows as u32, units.div_ceil(128) as u32, 1], [128, 1, 1]);
        // SAFETY: positions and slots were checked against the tables and the cache when the step was planned.
        unsafe { self.launch(&self.kernels.rope_store, config, args) }
    }

    /// Attention of all items of the step, then the merge of those that were split.
    pub(super) fn attend_items(
        &self,
        inputs: &CudaInputs,
        shape: &AttentionShape,
        qkv: &CudaBuffer,
        kv: &CudaKvLayer,
        out: &CudaBuffer,
    ) -> Result<(), KernelError> {
        let (op, rows) = ("attend", inputs.shape.tokens);
        let Some(scratch) = &self.attention else {
            return Err(KernelError::Shape { op, reason: "no inputs were planned".into() });
        };
        let end = shape.out_column + shape.num_heads_owned * shape.head_dim;
        let planner = &inputs.planner;
        let planned = (planner.num_kv_heads as usize, planner.group as usize, planner.window.map(|w| w as usize));
        if end > out.width || planned != (shape.num_kv_heads, shape.group, shape.window) {
            let reason = format!("columns to {end} of {}, planned for {planned:?}", out.width);
            return Err(KernelError::Shape { op, reason });
        }
        let (q, out_span) = (qkv.typed(op, rows, self.dtype)?, out.typed(op, rows, self.dtype)?);
        let arrays = &inputs.arrays;
        let common = kernel_args![
            q,
            &kv.memory,
            arrays.items,
            arrays.block_tables,
            arrays.header,
            out_span,
            &scratch.out,
            &scratch.log_sums,
            qkv.width as u32,
            CudaKvLayer::block_stride(&kv.shape) as u32,
            kv.shape.block_size as u32,
            shape.num_kv_heads as u32,
            shape.group as u32,
            shape.num_heads_owned as u32,
            out.width as u32,
            shape.out_column as u32,
            shape.window.unwrap_or(0) as u32,
            shape.scale,
            shape.soft_cap.unwrap_or(0.0),
            shape.head_dim as u32,
        ];
        let num_sms = self.context.device().num_multiprocessors;
        let kernels = &self.kernels.attention;
        if let Some(tuned) = &kernels.tuned {
            let mut args = *common;
            let num_common = args.len() - 1;
            args[num_common] = KernelArg::from(&scratch.num_taken);
            let wanted = [true, inputs.shape.has_prefill];
            for (tuned, _) in tuned.iter().zip(wanted).filter(|(_, wanted)| *wanted) {
                let config =
                    LaunchConfig::linear(tuned.blocks_per_sm * num_sms, tuned.threads).shared(tuned.shared_bytes);
                let args = if tuned.counts_units { &args[..] } else { &args[..num_common] };
                // SAFETY: items, tables and slots come from a checked step; scratch is as large as the planner's bounds.
                unsafe { self.launch(&tuned.kernel, config, args)? };
            }
        } else {
            // SAFETY: as above.
            unsafe { self.launch(&kernels.generic, LaunchConfig::linear(4 * num_sms, 128), common)? };
        }
        if !inputs.shape.has_merges {
            return Ok(());
        }
        let args = kernel_args![
            &scratch.out,
            &scratch.log_sums,
            arrays.merges,
            arrays.header,
            out_span,
            shape.num_kv_heads as u32,
            shape.group as u32,
            shape.num_heads_owned as u32,
            out.width as u32,
            shape.out_column as u32,
            shape.head_dim as u32,
        ];
        // SAFETY: as above.
        unsafe { self.launch(&kernels.merge, LaunchConfig::linear(4 * num_sms, 128), args) }
    }
}
