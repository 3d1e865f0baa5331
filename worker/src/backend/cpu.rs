//! The host's own kernels.

use phalanx_kernels::cpu::{Activations, CpuOps, Pool, Waiting};
use phalanx_kernels::{Collective, KernelError};
use phalanx_proto::LoadModel;

use super::num_cpus;

/// Opens the backend with `num_threads` threads, on a node that runs `ranks_here` ranks of the group.
///
/// # Errors
/// No memory, or the system refuses a thread.
pub fn open(
    group: Box<dyn Collective>,
    load: &LoadModel,
    num_threads: usize,
    ranks_here: usize,
) -> Result<CpuOps, KernelError> {
    // Threads that spin on a CPU which another rank needs would take its time.
    let spare = ranks_here * num_threads < num_cpus();
    let waiting = if spare { Waiting::SpinThenSleep } else { Waiting::Sleep };
    CpuOps::new(Pool::new(num_threads, waiting)?, activations(load), group)
}

/// What meets quantised weights: f32 where exactness was asked for, else int8.
fn activations(load: &LoadModel) -> Activations {
    if load.dtype == "float32" { Activations::Float32 } else { Activations::Int8 }
}
