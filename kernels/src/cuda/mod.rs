//! CUDA, opened at run time: libraries, devices, memory, streams, graphs, kernels and matrix products.
//!
//! Owns every call into the driver, NVRTC and cuBLASLt. Knows no op and no model. It is compiled on every machine, and says
//! what is missing where there is no GPU. The tables of functions are our own: a binding would have to be kept from its
//! panics on missing libraries and from its enums, which a newer library's codes do not fit.
//!
//! **Invariant:** no panic and no wait without a deadline; all that belongs to a device stays on the thread that opened it.
//!
//! Order of dropping, first to last: graphs, then what their kernels use (memory, communicators, modules), then streams,
//! then the context. Each keeps its context alive, so only graphs need care.

mod attention_plan;
mod backend;
mod blaslt;
mod cache;
mod check;
mod context;
mod device;
mod driver;
mod edit_plan;
mod error;
mod event;
mod graph;
mod launch;
mod library;
mod linear_plan;
mod memory;
mod module;
mod nvml;
mod nvrtc;
pub mod peer_memory;
pub mod peer_plan;
mod stream;
mod transfer;

pub use backend::{
    CudaBuffer, CudaInputs, CudaKvLayer, CudaMatrix, CudaOps, CudaRope, CudaSettings, CudaVector, Dtype, PEER_WAIT,
    ReduceBench, ReduceTiming, ReduceWay,
};
pub use blaslt::{BlasLt, MatmulOperands, MatmulPlan, MatmulShape, Scalar, WORKSPACE_BYTES};
pub use check::{CheckLine, self_check};
pub use context::{Context, DeviceBytes};
pub use device::{Device, PeerAccess, devices, driver_version, peer_matrix};
pub use error::CudaError;
pub use event::Event;
pub use graph::GraphExec;
pub use launch::{ARGS_MAX, KernelArg, LaunchConfig};
pub use library::{FoundLibrary, LibraryReport, libraries, search_also, toolkit_folders};
pub use memory::{DeviceMemory, IpcHandle, PeerMemory, PinnedMemory, Plain, Span};
pub use module::{Kernel, KernelAttributes, Module, ModuleSet, ModuleSettings, Origin, build_line, has_images};
pub use nvml::{driver_release, num_nvlinks};
pub use stream::{Priority, Rows, Stream};
pub use transfer::{PinnedRing, ReadBack, RingEntry};
