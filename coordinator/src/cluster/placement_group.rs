//! The bundles of one deployment and where they lie: a state machine.
//!
//! `pending -> created -> rescheduling -> created`, `pending -> infeasible`, and from anywhere `removed`.
//!
//! **Invariant:** a bundle is either on a node with a slot or on none; a removed group holds nothing. These bundles are
//! the one record of which slots are taken.

use phalanx_proto::NodeId;

use super::strategy::Strategy;

/// Where a group stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupState {
    /// Nothing is placed yet.
    Pending,
    /// All bundles are placed.
    Created,
    /// Bundles lost their node and wait for another.
    Rescheduling,
    /// It holds nothing any more.
    Removed,
    /// The wait for machines ended in vain.
    Infeasible,
}

impl GroupState {
    /// The word in `status`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Created => "created",
            Self::Rescheduling => "rescheduling",
            Self::Removed => "removed",
            Self::Infeasible => "infeasible",
        }
    }
}

/// A device slot of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The node.
    pub node: NodeId,
    /// Its slot.
    pub slot: u32,
}

/// All bundles of a deployment, replica after replica.
#[derive(Debug, Clone)]
pub struct PlacementGroup {
    id: String,
    strategy: Strategy,
    state: GroupState,
    reason: String,
    bundles_per_replica: usize,
    bundles: Vec<Option<Place>>,
}

impl PlacementGroup {
    /// A group of which nothing is placed.
    pub fn new(id: String, strategy: Strategy, replicas: u32, tensor_parallel_size: u32) -> Self {
        let bundles_per_replica = tensor_parallel_size as usize;
        Self {
            id,
            strategy,
            state: GroupState::Pending,
            reason: String::new(),
            bundles_per_replica,
            bundles: vec![None; replicas as usize * bundles_per_replica],
        }
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// How its bundles lie.
    pub fn strategy(&self) -> Strategy {
        self.strategy
    }

    /// Where it stands.
    pub fn state(&self) -> GroupState {
        self.state
    }

    /// The arithmetic of what is not met, else empty.
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// All bundles, replica after replica, in rank order.
    pub fn bundles(&self) -> &[Option<Place>] {
        &self.bundles
    }

    /// The places of one replica in rank order; empty where it is not placed.
    pub fn places(&self, replica: u32) -> Vec<Place> {
        self.range(replica).filter_map(|index| self.bundles.get(index).cloned().flatten()).collect()
    }

    /// Gives a replica its places.
    pub fn place(&mut self, replica: u32, places: Vec<Place>) {
        assert_eq!(places.len(), self.bundles_per_replica, "a place for each rank");
        for (index, place) in self.range(replica).zip(places) {
            self.bundles[index] = Some(place);
        }
        if self.bundles.iter().all(Option::is_some) {
            self.state = GroupState::Created;
            self.reason.clear();
        }
    }

    /// Takes a replica's places back, to be placed again.
    pub fn reschedule(&mut self, replica: u32, reason: String) {
        self.clear(replica);
        if self.state == GroupState::Created {
            self.state = GroupState::Rescheduling;
        }
        self.reason = reason;
    }

    /// Says why it waits.
    pub fn explain(&mut self, reason: String) {
        self.reason = reason;
    }

    /// Gives up; holds nothing any more.
    pub fn give_up(&mut self, reason: String) {
        self.bundles.fill(None);
        self.state = GroupState::Infeasible;
        self.reason = reason;
    }

    /// Ends; holds nothing any more.
    pub fn remove(&mut self) {
        self.bundles.fill(None);
        self.state = GroupState::Removed;
    }

    fn clear(&mut self, replica: u32) {
        for index in self.range(replica) {
            self.bundles[index] = None;
        }
    }

    fn range(&self, replica: u32) -> std::ops::Range<usize> {
        let first = replica as usize * self.bundles_per_replica;
        first..first + self.bundles_per_replica
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(node: &str) -> Vec<Place> {
        (0..2).map(|slot| Place { node: NodeId(node.into()), slot }).collect()
    }

    #[test]
    fn a_group_is_created_when_its_last_replica_is_placed() {
        let mut group = PlacementGroup::new("pg".into(), Strategy::Pack, 2, 2);
        assert_eq!(group.state(), GroupState::Pending);
        group.place(0, places("a"));
        assert_eq!(group.state(), GroupState::Pending);
        group.place(1, places("b"));
        assert_eq!(group.state(), GroupState::Created);
        assert_eq!(group.places(1), places("b"));
    }

    #[test]
    fn a_lost_node_reschedules_only_its_replica() {
        let mut group = PlacementGroup::new("pg".into(), Strategy::Pack, 2, 2);
        group.place(0, places("a"));
        group.place(1, places("b"));
        group.reschedule(1, "node b died".into());
        assert_eq!((group.state(), group.reason()), (GroupState::Rescheduling, "node b died"));
        assert_eq!((group.places(0).len(), group.places(1).len()), (2, 0));
        group.place(1, places("c"));
        assert_eq!((group.state(), group.reason()), (GroupState::Created, ""));
    }

    #[test]
    fn what_ended_holds_nothing() {
        for end in [PlacementGroup::remove as fn(&mut PlacementGroup), |group| group.give_up("never".into())] {
            let mut group = PlacementGroup::new("pg".into(), Strategy::Pack, 1, 2);
            group.place(0, places("a"));
            end(&mut group);
            assert!(group.bundles().iter().all(Option::is_none));
        }
    }
}
