//! Hidden states in place of tokens: what a head asks of a prompt that is to become a vector, and what it is given.

use crate::{SeqSlot, WireError, pb};

/// Most sequences whose pooled hidden states one step gives, so that its answer fits a message whatever the width.
pub const POOLED_ROWS_MAX: usize = 32;

/// What is made of a prompt's hidden states, behind the last norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// That of the last token.
    Last,
    /// The mean over all tokens.
    Mean,
}

impl Pooling {
    pub(crate) fn to_wire(pooling: Option<Self>) -> u32 {
        match pooling {
            None => 0,
            Some(Self::Last) => 1,
            Some(Self::Mean) => 2,
        }
    }

    pub(crate) fn from_wire(value: u32) -> Result<Option<Self>, WireError> {
        match value {
            0 => Ok(None),
            1 => Ok(Some(Self::Last)),
            2 => Ok(Some(Self::Mean)),
            other => {
                let expected = "0 (none), 1 (last) or 2 (mean)";
                Err(WireError::Invalid { field: "pooling", value: other.to_string(), expected })
            }
        }
    }
}

/// The pooled hidden states of a prompt that is computed whole.
#[derive(Debug, Clone, PartialEq)]
pub struct PooledRow {
    /// The sequence's slot.
    pub slot: SeqSlot,
    /// `[hidden]`, not normalised.
    pub values: Vec<f32>,
}

impl From<&PooledRow> for pb::PooledRow {
    fn from(row: &PooledRow) -> Self {
        Self { slot: row.slot.0, values: row.values.clone() }
    }
}

impl From<pb::PooledRow> for PooledRow {
    fn from(row: pb::PooledRow) -> Self {
        Self { slot: SeqSlot(row.slot), values: row.values }
    }
}
