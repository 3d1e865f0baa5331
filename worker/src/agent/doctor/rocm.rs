//! AMD devices: whether there are any, and what this version does with them.

use nccl_rs::{Library, Search, Vendor};
use phalanx_proto::DeviceKind;

use super::Check;
use crate::backend::presence;
use crate::config::defaults;

/// Says nothing where there is no driver: most machines have none.
pub(super) fn examine(report: &mut dyn FnMut(Check)) {
    let Ok(count) = presence::count(DeviceKind::Rocm, defaults::PROBE_DEADLINE) else { return };
    if count == 0 {
        return;
    }
    let rccl = match Library::open(&Search { vendor: Some(Vendor::Rccl), folders: Vec::new() }) {
        Ok(library) => format!("RCCL {} at {}", library.version(), library.path().display()),
        Err(error) => error.to_string(),
    };
    let found = format!("{count} AMD devices, {rccl}");
    report(Check::warn("ROCm", found, "this version has no kernels that were run on them: --device cpu serves"));
}
