//! Bundles and where they lie: a state machine. A deployment has one of these for its ranks; others are made by hand.
//!
//! `pending -> created -> rescheduling -> created`, `pending <-> infeasible`, and from anywhere `removed`.
//!
//! **Invariant:** a bundle is either on a node with its slots or on none; a removed group holds nothing. These bundles are
//! the one record of which slots are taken.

use phalanx_proto::NodeId;
use serde::{Deserialize, Serialize};

use super::bundle::BundleSpec;
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
    /// It can never fit on the machines that are there.
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

/// Where a bundle lies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seat {
    /// The node.
    pub node: NodeId,
    /// Its slots.
    pub slots: Vec<u32>,
}

/// One bundle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bundle {
    /// What it asks for.
    pub spec: BundleSpec,
    /// Where it lies.
    pub seat: Option<Seat>,
}

/// All bundles; those of a deployment replica after replica, in rank order.
#[derive(Debug, Clone)]
pub struct PlacementGroup {
    id: String,
    strategy: Strategy,
    state: GroupState,
    reason: String,
    bundles_per_replica: usize,
    bundles: Vec<Bundle>,
}

impl PlacementGroup {
    /// The group of a deployment's ranks, of which nothing is placed.
    pub fn new(id: String, strategy: Strategy, replicas: u32, tensor_parallel_size: u32) -> Self {
        let bundles_per_replica = tensor_parallel_size as usize;
        let ranks = vec![BundleSpec::of_rank(); replicas as usize * bundles_per_replica];
        Self { bundles_per_replica, ..Self::of_bundles(id, strategy, ranks) }
    }

    /// A group that was asked for by hand, of which nothing is placed.
    pub fn of_bundles(id: String, strategy: Strategy, bundles: Vec<BundleSpec>) -> Self {
        Self {
            id,
            strategy,
            state: GroupState::Pending,
            reason: String::new(),
            bundles_per_replica: bundles.len(),
            bundles: bundles.into_iter().map(|spec| Bundle { spec, seat: None }).collect(),
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

    /// All bundles.
    pub fn bundles(&self) -> &[Bundle] {
        &self.bundles
    }

    /// Every slot that it holds, in the order of its bundles.
    pub fn slots(&self) -> impl Iterator<Item = Place> {
        let seats = self.bundles.iter().filter_map(|bundle| bundle.seat.as_ref());
        seats.flat_map(|seat| seat.slots.iter().map(|&slot| Place { node: seat.node.clone(), slot }))
    }

    /// Whether a bundle of it lies anywhere.
    pub fn is_seated(&self) -> bool {
        self.bundles.iter().any(|bundle| bundle.seat.is_some())
    }

    /// The places of one replica in rank order; empty where it is not placed.
    pub fn places(&self, replica: u32) -> Vec<Place> {
        let seats = self.range(replica).filter_map(|index| self.bundles.get(index)?.seat.as_ref());
        seats.flat_map(|seat| seat.slots.iter().map(|&slot| Place { node: seat.node.clone(), slot })).collect()
    }

    /// Gives a replica its places.
    pub fn place(&mut self, replica: u32, places: Vec<Place>) {
        assert_eq!(places.len(), self.bundles_per_replica, "a place for each rank");
        for (index, Place { node, slot }) in self.range(replica).zip(places) {
            self.seat(index, Seat { node, slots: vec![slot] });
        }
    }

    /// Gives a bundle its seat.
    pub fn seat(&mut self, index: usize, seat: Seat) {
        if let Some(bundle) = self.bundles.get_mut(index) {
            bundle.seat = Some(seat);
        }
        if self.bundles.iter().all(|bundle| bundle.seat.is_some()) {
            self.state = GroupState::Created;
            self.reason.clear();
        }
    }

    /// Takes the seats back for which `why` gives a reason, to be given again.
    pub fn unseat(&mut self, why: impl Fn(&Seat) -> Option<String>) {
        for bundle in &mut self.bundles {
            let Some(reason) = bundle.seat.as_ref().and_then(&why) else { continue };
            bundle.seat = None;
            self.reason = reason;
            if self.state == GroupState::Created {
                self.state = GroupState::Rescheduling;
            }
        }
    }

    /// Has room for one more replica.
    pub fn grow(&mut self) {
        let replica = vec![Bundle { spec: BundleSpec::of_rank(), seat: None }; self.bundles_per_replica];
        self.bundles.extend(replica);
    }

    /// Forgets the last replica.
    pub fn shrink(&mut self) {
        self.bundles.truncate(self.bundles.len().saturating_sub(self.bundles_per_replica));
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

    /// Says that it waits, and whether it would wait for ever. What is on its way back stays so.
    pub fn wait(&mut self, reason: String, is_infeasible: bool) {
        self.state = match self.state {
            GroupState::Rescheduling => GroupState::Rescheduling,
            _ if is_infeasible => GroupState::Infeasible,
            _ => GroupState::Pending,
        };
        self.reason = reason;
    }

    /// Gives up; holds nothing any more.
    pub fn give_up(&mut self, reason: String) {
        self.clear_all();
        self.state = GroupState::Infeasible;
        self.reason = reason;
    }

    /// Ends; holds nothing any more.
    pub fn remove(&mut self) {
        self.clear_all();
        self.state = GroupState::Removed;
    }

    fn clear_all(&mut self) {
        for bundle in &mut self.bundles {
            bundle.seat = None;
        }
    }

    fn clear(&mut self, replica: u32) {
        for index in self.range(replica) {
            self.bundles[index].seat = None;
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
    fn bundles_made_by_hand_lose_and_regain_their_seats() {
        let specs = vec!["gpu=2".parse().expect("a bundle"), "cpu=1".parse().expect("a bundle")];
        let mut group = PlacementGroup::of_bundles("g".into(), Strategy::Spread, specs);
        group.wait("needs more".into(), true);
        assert_eq!((group.state(), group.reason()), (GroupState::Infeasible, "needs more"));
        group.seat(0, Seat { node: NodeId("a".into()), slots: vec![1, 3] });
        group.seat(1, Seat { node: NodeId("b".into()), slots: Vec::new() });
        assert_eq!((group.state(), group.reason(), group.slots().count()), (GroupState::Created, "", 2));
        group.unseat(|seat| (seat.node.0 == "b").then(|| "b died".to_owned()));
        group.wait("b died; no room".into(), true);
        assert_eq!((group.state(), group.reason()), (GroupState::Rescheduling, "b died; no room"));
        group.seat(1, Seat { node: NodeId("a".into()), slots: Vec::new() });
        assert_eq!(group.state(), GroupState::Created);
    }

    #[test]
    fn what_ended_holds_nothing() {
        for end in [PlacementGroup::remove as fn(&mut PlacementGroup), |group| group.give_up("never".into())] {
            let mut group = PlacementGroup::new("pg".into(), Strategy::Pack, 1, 2);
            group.place(0, places("a"));
            end(&mut group);
            assert!(!group.is_seated() && group.slots().next().is_none());
        }
    }
}
