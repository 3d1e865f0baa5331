//! candle-core on the host, for comparisons: in f32, whatever was asked for.

use phalanx_kernels::Collective;
use phalanx_kernels::reference::ReferenceOps;

/// Opens the backend. It has no threads of its own.
pub fn open(group: Box<dyn Collective>) -> ReferenceOps {
    ReferenceOps::new(group)
}
