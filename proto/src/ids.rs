//! Identifiers: newtypes, never bare integers.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id!(
    /// A token of the model's vocabulary.
    TokenId(u32)
);
id!(
    /// One sequence in an engine; never used again within an epoch.
    SeqId(u64)
);
id!(
    /// Where the ranks keep the state of a running sequence; freed when the sequence leaves the batch.
    SeqSlot(u32)
);
id!(
    /// A KV block: the same number names the same block on every rank.
    BlockId(u32)
);
id!(
    /// Position of a process in its tensor-parallel group.
    Rank(u32)
);
id!(
    /// One forward of the whole group, counted from 1 within an epoch.
    StepId(u64)
);
id!(
    /// One life of sequences and KV blocks.
    Epoch(u64)
);
id!(
    /// One set of rank processes: communicators, graphs, weights.
    Incarnation(u64)
);
id!(
    /// One life of the head.
    Term(u64)
);

macro_rules! name {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub String);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

name!(
    /// Names one node: one agent with one `PHALANX_HOME`.
    NodeId
);
name!(
    /// The served name of a deployment.
    DeploymentName
);
