//! Starts clusters of real processes on this machine, for the tests that cross rooms.
//!
//! Every cluster has a `PHALANX_HOME` and free ports of its own, and ends with its value: a test that fails leaves nothing.
//!
//! **Invariant:** every wait has a deadline, and what ran over it is named.
#![expect(clippy::expect_used, clippy::panic, reason = "a test harness: what goes wrong ends the test")]

mod calls;
mod client;
mod clock;
mod cluster;
mod company;
mod convert;
mod disk;
mod edited;
mod embeddings;
mod etcd;
mod far;
mod golden;
mod judge;
mod lasting;
mod network;
mod places;
mod schema;
mod suites;

pub use calls::{CallFigures, check_calls};
pub use client::{Completion, Http, Stream, StreamEnd};
pub use clock::Clock;
pub use cluster::{Cluster, Finished, Node, Processes, wait_for};
pub use company::{Company, Random, Work};
pub use disk::TinyDisk;
pub use edited::{check_edited, edited_answers, edited_requests};
pub use embeddings::{EMBEDDINGS, check_near, embedding_model, embedding_reference, vectors};
pub use etcd::{Cable, Etcd, free_ports};
pub use far::FarHost;
pub use golden::{Golden, GoldenPrompt, golden, goldens, reference, smollm2, smollm2_bf16};
pub use judge::{Precision, check_agreement, check_model, token_ids};
pub use lasting::Lasting;
pub use network::TwoHosts;
pub use places::{model_config, programs};
pub use schema::{Fit, fit};
pub use suites::{Suite, keep_document, pass};
