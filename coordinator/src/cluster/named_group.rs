//! A placement group that somebody asked for by name: bundles that stay reserved until they are given back, whatever runs in them.
//!
//! A plain record: time is an argument, nothing here sends or waits.
//!
//! **Invariant:** what the store holds of a group, or is about to hold, is known by its sign; nobody hears of a change before.

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use phalanx_proto::{NodeId, PlacementGroupStatus};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::bundle::BundleSpec;
use super::placement::GroupWanted;
use super::placement_group::{GroupState, PlacementGroup, Seat};
use super::strategy::Strategy;
use super::{ClusterError, DeployFailure};
use crate::config::defaults;

/// Longest name.
const NAME_CHARS_MAX: usize = 128;

/// A placement group as it was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupSpec {
    /// Its name.
    pub name: String,
    /// Its bundles.
    pub bundles: Vec<BundleSpec>,
    /// How they lie.
    pub strategy: Strategy,
    /// Words of whoever made it, for whoever looks for it.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// How long it may be kept although it can never fit on the machines that are there; `None`: refused at once.
    #[serde(default)]
    pub wait: Option<Duration>,
}

impl GroupSpec {
    /// Refuses what is no group.
    ///
    /// # Errors
    /// A sentence that says what is wrong.
    pub fn check(&self) -> Result<(), String> {
        let fine = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        let name = &self.name;
        if name.is_empty() || name.len() > NAME_CHARS_MAX || !name.chars().all(fine) {
            return Err(format!(
                "{name:?} is no name for a group: letters, digits, '-', '_' and '.', at most {NAME_CHARS_MAX}"
            ));
        }
        let (count, max) = (self.bundles.len(), defaults::BUNDLES_MAX);
        if count == 0 || count > max {
            return Err(format!("a group has 1 to {max} bundles, not {count}; write --bundle cpu=1,gpu=1 for each"));
        }
        Ok(())
    }
}

/// Who waits for the store's word on a new group.
pub(super) type GroupReply = oneshot::Sender<Result<PlacementGroupStatus, DeployFailure>>;

/// A group and everything of it.
#[derive(Debug)]
pub(super) struct NamedGroup {
    pub spec: GroupSpec,
    pub group: PlacementGroup,
    /// Where it stands among all that wait for slots, oldest first.
    pub order: u64,
    pub created_at: SystemTime,
    /// When its bundles got their seats last.
    pub seated_at: SystemTime,
    pub wait_until: Option<Instant>,
    /// What the store holds, or is about to hold; none: nothing.
    pub kept: Option<Vec<Option<Seat>>>,
    /// The store has held something of it.
    pub was_kept: bool,
    /// The store could not write the last change, and is asked again then.
    pub keep_again_at: Option<Instant>,
    /// When its bundles got their seats last, among all that were given any.
    pub seated_order: u64,
    /// It is being removed.
    pub removing: bool,
    pub create_reply: Option<GroupReply>,
    pub remove_replies: Vec<oneshot::Sender<Result<(), ClusterError>>>,
}

impl NamedGroup {
    pub fn new(spec: GroupSpec, order: u64, now: Instant) -> Self {
        Self {
            group: PlacementGroup::of_bundles(spec.name.clone(), spec.strategy, spec.bundles.clone()),
            order,
            created_at: SystemTime::now(),
            seated_at: SystemTime::now(),
            wait_until: spec.wait.map(|wait| now + wait),
            kept: None,
            was_kept: false,
            keep_again_at: None,
            seated_order: order,
            removing: false,
            create_reply: None,
            remove_replies: Vec::new(),
            spec,
        }
    }

    /// What placement must know of it.
    pub fn wanted(&self) -> GroupWanted {
        let bundles = self.group.bundles();
        GroupWanted {
            bundles: self.spec.bundles.clone(),
            placed: bundles.iter().map(|bundle| bundle.seat.as_ref().map(|seat| seat.node.clone())).collect(),
            strategy: self.spec.strategy,
            waits: false,
        }
    }

    /// Whether some bundle lies nowhere.
    pub fn is_waiting(&self) -> bool {
        !self.removing && self.group.bundles().iter().any(|bundle| bundle.seat.is_none())
    }

    /// Takes seats back on nodes of which `why` says that they are gone.
    pub fn lose_seats(&mut self, why: impl Fn(&NodeId, &[u32]) -> Option<String>) {
        self.group.unseat(|seat| why(&seat.node, &seat.slots));
    }

    /// What the store should hold now: where its bundles lie.
    pub fn version(&self) -> Option<Vec<Option<Seat>>> {
        (!self.removing).then(|| self.group.bundles().iter().map(|bundle| bundle.seat.clone()).collect())
    }

    /// Whether its removal is on disk: it does not come back.
    pub fn is_forgotten(&self) -> bool {
        self.removing && self.kept.is_none() && self.keep_again_at.is_none()
    }

    /// Whether it stands whole.
    pub fn is_created(&self) -> bool {
        self.group.state() == GroupState::Created && !self.removing
    }
}

/// A group as it is written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupRecord {
    spec: GroupSpec,
    order: u64,
    created_s: u64,
    #[serde(default)]
    seated_order: u64,
    seats: Vec<Option<Seat>>,
}

impl GroupRecord {
    /// What is to be kept of a group now.
    pub(super) fn of(named: &NamedGroup) -> Self {
        Self {
            spec: named.spec.clone(),
            order: named.order,
            created_s: named.created_at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
            seated_order: named.seated_order,
            seats: named.version().unwrap_or_default(),
        }
    }

    /// The record in bytes.
    pub(super) fn to_bytes(&self) -> Result<Vec<u8>, serde_json::Error> {
        serde_json::to_vec(self)
    }

    /// A record that was read.
    ///
    /// # Errors
    /// It is damaged, or of a version that says other things.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(bytes)
    }

    /// The group as it was: its slots are taken.
    pub(super) fn restore(self, now: Instant) -> NamedGroup {
        let Self { spec, order, created_s, seated_order, seats } = self;
        let mut named = NamedGroup::new(spec, order, now);
        named.created_at = UNIX_EPOCH + Duration::from_secs(created_s);
        named.seated_at = named.created_at;
        for (index, seat) in seats.iter().enumerate() {
            if let Some(seat) = seat {
                named.group.seat(index, seat.clone());
            }
        }
        (named.kept, named.was_kept, named.seated_order) = (named.version(), true, seated_order);
        named
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(name: &str, num_bundles: usize) -> GroupSpec {
        GroupSpec {
            name: name.into(),
            bundles: vec![BundleSpec::of_rank(); num_bundles],
            strategy: Strategy::Pack,
            labels: BTreeMap::new(),
            wait: None,
        }
    }

    #[test]
    fn names_and_counts_have_limits() {
        assert_eq!(spec("my-group.1", 4).check(), Ok(()));
        assert!(spec("my group", 1).check().expect_err("a space").contains("no name"));
        assert!(spec("g", 0).check().expect_err("none").contains("--bundle"));
    }

    #[test]
    fn a_group_comes_back_as_it_was_written() {
        let now = Instant::now();
        let mut named = NamedGroup::new(spec("g", 2), 7, now);
        named.group.seat(0, Seat { node: NodeId("a".into()), slots: vec![1] });
        let record = GroupRecord::of(&named);
        let read = GroupRecord::from_bytes(&record.to_bytes().expect("writes")).expect("reads");
        assert_eq!(read, record);
        let restored = read.restore(now);
        assert_eq!((restored.version(), restored.order), (named.version(), 7));
        assert!(restored.is_waiting() && restored.kept == named.version());
        assert!(GroupRecord::from_bytes(b"{}").is_err());
    }
}
