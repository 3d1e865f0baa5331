//! The node agent and the ranks.
//!
//! Inside a rank: `session -> device_thread -> runner -> models -> layers -> collective, kernels`, never backwards.

pub mod backend;
pub mod collective;
pub mod device_thread;
pub mod error;
pub mod layers;
pub mod models;
pub mod weights;
