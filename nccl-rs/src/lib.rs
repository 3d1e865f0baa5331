//! NCCL and RCCL, opened at run time.
//!
//! Both libraries speak the same C interface. This crate opens the one that is there (`libnccl.so.2`, `librccl.so.1`, ...), takes
//! its functions from the very handle that it opened, and wraps them in a [`Communicator`] whose waits have deadlines. Nothing
//! is linked: a program built with this crate starts on a machine without either, and a missing library is a value.
//!
//! Owns the search order, the table of functions, result codes, and the life of a communicator. Knows nothing of devices,
//! memory or streams but their addresses, which the caller brings from whatever binding it uses.
//!
//! **Invariant:** result codes and enumerations cross as integers, so an answer of a newer library is never undefined behaviour.
//! **Invariant:** no wait is without end where the library has non-blocking communicators (NCCL 2.14 and newer): set-up, calls
//! and teardown are polled against a deadline. [`Communicator::has_deadlines`] says whether this holds.
//! **Invariant:** a communicator stays on the thread that made it (its type is neither `Send` nor `Sync`), and one that failed
//! once refuses every later call.
//!
//! # Teardown
//!
//! The library's teardown waits for as long as a captured CUDA graph that holds its kernels is alive. So destroy the captured graph
//! right after it was instantiated, destroy every executable graph before its communicator, and bound the rest by
//! [`Communicator::close`]. A communicator that does not end by its deadline is left behind on purpose: there is no call that ends
//! it surely. A process that must end then ends itself; the system takes its device memory back.
//!
//! # Example
//!
//! ```no_run
//! use std::time::Duration;
//! use nccl_rs::{Communicator, DataType, DevicePtr, Elements, Library, Membership, ReduceOp, Search, Stream, UniqueId};
//!
//! # fn exchange(id: Option<UniqueId>) -> UniqueId { id.unwrap() }
//! # fn stream_of_this_thread() -> Stream { Stream::null() }
//! # fn device_memory() -> DevicePtr { DevicePtr(0) }
//! # fn main() -> Result<(), nccl_rs::NcclError> {
//! # let (rank, world_size) = (0, 2);
//! let library = Library::open(&Search::default())?;
//! println!("{} {} from {}", library.vendor(), library.version(), library.path().display());
//!
//! // Rank 0 makes the id; all others get it by other means.
//! let id = exchange(if rank == 0 { Some(library.unique_id()?) } else { None });
//!
//! // The thread's current device is this rank's. Every rank calls this at the same time.
//! let membership = Membership::new(id, rank, world_size).with_init_deadline(Duration::from_secs(30));
//! let communicator = Communicator::join(&library, &membership)?;
//!
//! let (buffer, stream) = (device_memory(), stream_of_this_thread());
//! // SAFETY: the buffer holds 1024 bf16 values on the current device and lives until the stream has drained.
//! unsafe { communicator.all_reduce(buffer, buffer, Elements::new(1024, DataType::Bf16), ReduceOp::Sum, stream)? };
//!
//! // The stream is drained and its graphs are destroyed by now.
//! communicator.close(Duration::from_secs(5))
//! # }
//! ```

mod communicator;
mod error;
mod library;
mod table;
mod types;

pub use communicator::{Communicator, Membership};
pub use error::NcclError;
pub use library::{Library, Search};
pub use types::{DataType, DevicePtr, Elements, ReduceOp, Stream, UniqueId, Vendor, Version};
