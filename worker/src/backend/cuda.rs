//! NVIDIA devices.

use phalanx_formats::{Geometry, ShardPlan, StoredType};
use phalanx_kernels::Collective;
use phalanx_kernels::cuda::{CudaOps, CudaSettings, Dtype, ModuleSettings, devices};
use phalanx_proto::LoadModel;
use tracing::warn;

use crate::error::WorkerError;

/// The device of a rank: its agent lets it see only this one.
const ORDINAL: u32 = 0;

/// Opens the device for a model. Collective: the devices of a group meet.
///
/// # Errors
/// No usable device or library, or a data type that the device lacks.
pub fn open(
    group: Box<dyn Collective>,
    load: &LoadModel,
    checkpoint: StoredType,
    geometry: &Geometry,
    plan: &ShardPlan,
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
        modules: ModuleSettings::default(),
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
