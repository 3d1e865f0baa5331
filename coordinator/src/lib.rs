//! The head of a cluster.
//!
//! Owns membership, placement, scheduling, the OpenAI-compatible API, the dashboard and the command line.
//! Never sees a device: device work is asked of the `worker` binary.
//!
//! Rooms: `api -> text, constraint, engine`; `constraint -> text, engine`; `cluster -> engine`; `engine` knows none of them;
//! `dashboard` only reads. `heavy` is where `api` and `constraint` do what takes long, `traces` where `api` leaves
//! spans for a collector.
#![forbid(unsafe_code)]

pub mod api;
pub mod cli;
pub mod cluster;
pub mod config;
pub mod constraint;
pub mod dashboard;
pub mod engine;
pub mod head;
pub mod heavy;
pub mod logging;
pub mod metrics;
mod security;
mod store;
pub mod text;
pub mod traces;
