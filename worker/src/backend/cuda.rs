//! NVIDIA devices.

use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use phalanx_formats::{Geometry, ShardPlan, StoredType};
use phalanx_kernels::Collective;
use phalanx_kernels::cuda::{
    CudaOps, CudaSettings, Dtype, ModuleSettings, PEER_WAIT, devices, search_also, toolkit_folders,
};
use phalanx_proto::LoadModel;
use tracing::warn;

use crate::error::WorkerError;

/// The device of a rank: its agent lets it see only this one.
const ORDINAL: u32 = 0;

/// Longest wait of a kernel for another rank: below the longest wait for a step, which names nobody.
const PEER_WAIT_MAX: Duration = Duration::from_secs(100);

/// How this process compiles device code, where it must.
static MODULES: OnceLock<ModuleSettings> = OnceLock::new();

/// Says how this process compiles device code, and which toolkit's libraries it looks at first. Only the first call counts: the process
/// is one rank, which opens one device.
pub fn prepare(modules: ModuleSettings, cuda_home: Option<&Path>) {
    if let Some(home) = cuda_home {
        search_also(toolkit_folders(home));
    }
    // What was said first holds: something may have been compiled by it.
    let _ = MODULES.set(modules);
}

/// Opens the device for a model. Collective: the devices of a group meet. `head_wait`: how long another rank may lack a plan that the
/// next head has to pass on.
///
/// # Errors
/// No usable device or library, or a data type that the device lacks.
pub fn open(
    group: Box<dyn Collective>,
    load: &LoadModel,
    checkpoint: StoredType,
    geometry: &Geometry,
    plan: &ShardPlan,
    head_wait: Duration,
) -> Result<CudaOps, WorkerError> {
    let has_bfloat16 = || {
        let devices = devices().map_err(phalanx_kernels::KernelError::from)?;
        Ok::<bool, WorkerError>(devices.get(ORDINAL as usize).is_some_and(|device| device.has_bfloat16()))
    };
    let settings = CudaSettings {
        ordinal: ORDINAL,
        dtype: dtype(load, checkpoint, has_bfloat16)?,
        hidden_size: geometry.hidden_size,
        head_dim: geometry.head_dim,
        group: plan.group,
        enforce_eager: load.enforce_eager,
        peer_wait_max: head_wait.clamp(PEER_WAIT, PEER_WAIT_MAX),
        only_nccl: load.disable_custom_all_reduce,
        modules: MODULES.get().cloned().unwrap_or_default(),
    };
    Ok(CudaOps::open(&settings, group)?)
}

/// As asked for; `auto` takes the checkpoint's type, float16 where it is quantised or where the device lacks bfloat16.
fn dtype(
    load: &LoadModel,
    checkpoint: StoredType,
    has_bfloat16: impl Fn() -> Result<bool, WorkerError>,
) -> Result<Dtype, WorkerError> {
    match (load.dtype.as_str(), checkpoint) {
        ("float32" | "float", _) | ("auto" | "", StoredType::F32) => Ok(Dtype::F32),
        ("bfloat16", _) => Ok(Dtype::Bf16),
        ("auto" | "", StoredType::BF16) if has_bfloat16()? => Ok(Dtype::Bf16),
        ("auto" | "", StoredType::BF16) => {
            warn!("the checkpoint is in bfloat16, which this device lacks: float16 takes its place");
            Ok(Dtype::F16)
        }
        ("float16" | "half" | "auto" | "", _) => Ok(Dtype::F16),
        (other, _) => Err(WorkerError::Setting {
            setting: "dtype",
            found: other.into(),
            expected: "auto, float16, bfloat16 or float32",
        }),
    }
}
