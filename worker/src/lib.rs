//! The node agent and the ranks.
//!
//! Inside a rank: `session -> device_thread -> runner -> decoder -> layers -> collective, kernels`, never backwards.

pub mod agent;
pub mod backend;
pub mod cli;
pub mod collective;
pub mod config;
pub mod decoder;
pub mod device_thread;
pub mod edits;
pub mod epoch;
pub mod error;
pub mod head_note;
pub mod inputs;
pub mod kv_cache;
pub mod layers;
pub mod logging;
pub mod pooling;
pub mod rank;
pub mod reduce_bench;
pub mod runner;
pub mod scoring;
pub mod session;
pub mod shard;
pub mod warm_up;
pub mod weights;
