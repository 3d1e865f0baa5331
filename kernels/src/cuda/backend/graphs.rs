//! Recorded parts of steps.
//!
//! **Invariant:** a recording is found by everything that its launches depend on; what differs from step to step is in memory.

use std::collections::HashMap;
use std::rc::Rc;

use super::CudaOps;
use super::inputs::StepShape;
use crate::cuda::GraphExec;
use crate::{KernelError, StepPart};

/// All that the launches of a part depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    part: StepPart,
    rows: usize,
    has_prefill: bool,
    has_merges: bool,
    is_edited: bool,
}

impl Key {
    /// `None` where the part is not recorded.
    fn of(part: StepPart, shape: &StepShape) -> Option<Self> {
        let StepShape { tokens, logit_rows, has_prefill, has_merges, is_edited, .. } = *shape;
        let of_rows = |rows| Self { part, rows, has_prefill: false, has_merges: false, is_edited: false };
        match part {
            StepPart::Forward if shape.is_recorded() => Some(Self { has_prefill, has_merges, ..of_rows(tokens) }),
            StepPart::Sample(_) => Some(Self { is_edited, ..of_rows(logit_rows) }),
            StepPart::Forward | StepPart::Score => None,
        }
    }
}

/// What was recorded so far.
#[derive(Default)]
pub(super) struct Graphs(HashMap<Key, GraphExec>);

impl CudaOps {
    /// Replays a part, or runs it and records it for the next time.
    pub(super) fn run_part(
        &mut self,
        shape: &StepShape,
        part: StepPart,
        work: &mut dyn FnMut(&mut Self) -> Result<(), KernelError>,
    ) -> Result<(), KernelError> {
        let Some(key) = Key::of(part, shape).filter(|_| !self.enforce_eager) else { return work(self) };
        if let Some(graph) = self.graphs.0.get(&key) {
            // SAFETY: recorded addresses are those of this backend's buffers and of the model's, which live as long.
            return Ok(unsafe { graph.launch(&self.stream) }?);
        }
        // Run once, so that nothing is loaded or chosen while recording.
        work(self)?;
        let stream = Rc::clone(&self.stream);
        let label = format!("{part:?} of {} rows", key.rows);
        let graph = stream.capture(&label, || work(self))?;
        self.graphs.0.insert(key, graph);
        Ok(())
    }
}
