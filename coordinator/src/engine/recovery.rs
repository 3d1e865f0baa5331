//! An engine between two groups: what ran waits, new requests queue, and the next group goes on with all of them.
//!
//! Knows that groups come through a channel, and word of other engines that may take over (`moving.rs`); not where from, nor how ranks
//! are started.
//!
//! **Invariant:** a request that is in the engine when its group breaks either goes on in the next epoch, each output index emitted
//! once, or ends with one error event; it never waits longer than [`RecoveryLimits::deadline`](super::RecoveryLimits).

use tokio::time::{Instant, sleep_until};

use super::block_manager::BlockManager;
use super::group::{GroupError, TpGroup};
use super::handle::{EngineState, NextGroup};
use super::{Engine, EngineError};
use std::sync::atomic::Ordering;

impl Engine {
    /// Ends the epoch and waits for the next group.
    ///
    /// # Errors
    /// No group comes: the engine stops, was told so, or has waited long enough.
    pub(super) async fn recover(&mut self, error: &GroupError) -> Result<(), EngineError> {
        let limits = self.shared.limits.recovery;
        let failed = EngineError::GroupFailed { reason: error.to_string() };
        if limits.deadline.is_zero() || !self.enter_recovery(error.to_string()) {
            return Err(failed);
        }
        tracing::warn!(epoch = self.group.epoch().0, %error, "group broke, waiting for the next one");
        self.in_flight.clear();
        self.scheduler.end_epoch(limits.replays_max, &failed);
        self.blocks = BlockManager::new(0, self.shared.limits.block_size, false);
        self.recovering = true;
        self.emit(Vec::new()).await?;
        self.group.shut_down(&error.to_string()).await;
        let group = self.next_group(Instant::now() + limits.deadline, failed).await?;
        self.adopt(*group);
        Ok(())
    }

    /// Says that requests wait for a group. False: the engine stops, and nobody brings one.
    fn enter_recovery(&self, reason: String) -> bool {
        let epoch = self.group.epoch();
        self.shared.state.send_if_modified(|state| {
            let serves = *state == EngineState::Serving;
            if serves {
                *state = EngineState::Recovering { epoch, reason };
            }
            serves
        })
    }

    /// Takes in what is asked until a group is there.
    async fn next_group(&mut self, ends: Instant, failed: EngineError) -> Result<Box<TpGroup>, EngineError> {
        loop {
            tokio::select! {
                next = self.next_groups.recv() => return match next {
                    Some(NextGroup::Ready(group)) => Ok(group),
                    Some(NextGroup::None(error)) => Err(error),
                    Some(NextGroup::Elsewhere(engines)) => {
                        self.move_waiting(&engines);
                        self.emit(Vec::new()).await?;
                        continue;
                    }
                    None => Err(failed),
                },
                command = self.inbox.recv() => match command {
                    Some(command) => self.take(command),
                    None => return Err(failed),
                },
                _changed = self.state.changed() => {
                    if matches!(*self.state.borrow_and_update(), EngineState::Draining(_)) {
                        return Err(EngineError::Stopping);
                    }
                }
                () = sleep_until(ends) => return Err(failed),
            }
            self.drain_inbox();
            self.emit(Vec::new()).await?;
        }
    }

    /// Goes on with a new group in a new epoch: nothing runs yet, nothing is cached.
    fn adopt(&mut self, mut group: TpGroup) {
        let limits = &self.shared.limits;
        group.set_step_deadline_min(limits.step_deadline_min);
        let num_blocks = limits.num_blocks.min(group.num_blocks());
        self.blocks = BlockManager::new(num_blocks, limits.block_size, limits.enable_prefix_caching);
        self.shared.num_blocks.store(num_blocks, Ordering::Release);
        self.scheduler.begin_epoch(num_blocks);
        self.group = group;
        self.recovering = false;
        self.shared.yielding.store(false, Ordering::Release);
        let waiting = self.scheduler.num_waiting();
        tracing::info!(epoch = self.group.epoch().0, num_blocks, waiting, "engine goes on in a new epoch");
        self.shared.state.send_if_modified(|state| {
            let recovers = matches!(state, EngineState::Recovering { .. });
            if recovers {
                *state = EngineState::Serving;
            }
            recovers
        });
    }
}
