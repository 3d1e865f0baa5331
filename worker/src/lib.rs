//! The node agent and the ranks.
//!
//! Inside a rank: `session -> device_thread -> runner -> models -> layers -> collective, kernels`, never backwards.

pub mod weights;
