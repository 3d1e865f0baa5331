//! A group of one: its sum is its own term.

use phalanx_kernels::{Collective, CollectiveError};

/// The group of a model that is not split.
pub(super) struct LocalGroup;

impl Collective for LocalGroup {
    fn rank(&self) -> usize {
        0
    }

    fn world_size(&self) -> usize {
        1
    }

    fn all_reduce_sum(&mut self, _data: &mut [f32]) -> Result<(), CollectiveError> {
        Ok(())
    }

    fn all_gather(&mut self, part: &[u8], out: &mut [u8]) -> Result<(), CollectiveError> {
        assert!(out.len() == part.len(), "a gather's output holds one part per rank");
        out.copy_from_slice(part);
        Ok(())
    }
}
