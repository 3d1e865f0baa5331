//! What the store keeps of a deployment, and how it comes back.
//!
//! **Invariant:** a record holds all that is needed to know the ranks that may still run: their places, their incarnation and
//! the tokens by which they prove who they are.

use std::time::{Duration, Instant, UNIX_EPOCH};

use phalanx_formats::Geometry;
use phalanx_proto::{Epoch, Incarnation, NodeId};
use serde::{Deserialize, Serialize};

use super::deployment::{CheckedSpec, Deployment};
use super::named_group::GroupRecord;
use super::placement_group::Place;
use super::replica::Replica;
use super::spec::DeploymentSpec;
use crate::security::LaunchToken;

/// Said of a deployment whose ranks are still to be heard of.
const WAITS: &str = "the head was started again and waits for the ranks";

/// What an earlier head has left.
#[derive(Debug, Default)]
pub struct Restored {
    /// Its deployments.
    pub deployments: Vec<DeploymentRecord>,
    /// Its placement groups.
    pub groups: Vec<GroupRecord>,
}

/// A deployment as it is written.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DeploymentRecord {
    spec: DeploymentSpec,
    geometry: Geometry,
    size: u32,
    /// Where it stands among the others, oldest first.
    order: u64,
    /// When it got its slots, seconds since 1970.
    #[serde(default)]
    placed_s: u64,
    /// When it got its slots last, among all that were given any.
    #[serde(default)]
    placed_order: u64,
    replicas: Vec<ReplicaRecord>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct ReplicaRecord {
    incarnation: u64,
    epoch: u64,
    ranks: Vec<RankPlace>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct RankPlace {
    node: String,
    slot: u32,
    token: String,
}

impl DeploymentRecord {
    /// What is to be kept of a deployment now.
    pub(super) fn of(deployment: &Deployment) -> Self {
        let replica = |replica: &Replica| ReplicaRecord {
            incarnation: replica.incarnation.0,
            epoch: replica.epoch.0,
            ranks: if replica.wants_processes() {
                replica.ranks.iter().map(RankPlace::of).collect()
            } else {
                Vec::new()
            },
        };
        Self {
            spec: deployment.checked.spec.clone(),
            geometry: deployment.checked.geometry.clone(),
            size: deployment.size,
            order: deployment.order,
            placed_order: deployment.placed_order,
            placed_s: deployment.placed_at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
            replicas: deployment.replicas.iter().map(replica).collect(),
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

    /// Where it stands among the others.
    pub fn order(&self) -> u64 {
        self.order
    }

    /// The deployment as it was: its slots are taken, and its ranks are waited for.
    pub(super) fn restore(self, now: Instant) -> Deployment {
        let Self { spec, geometry, size, order, placed_s, placed_order, replicas } = self;
        let last = replicas.iter().map(|kept| Incarnation(kept.incarnation)).max().unwrap_or(Incarnation(0));
        let mut deployment = Deployment::new(CheckedSpec { spec, geometry }, size, last, now);
        // Its ranks may be started again: whoever asked for it is not there any more to be told that they failed.
        deployment.has_served = true;
        (deployment.order, deployment.placed_order) = (order, placed_order);
        deployment.placed_at = UNIX_EPOCH + Duration::from_secs(placed_s);
        deployment.reason = WAITS.to_owned();
        while deployment.is_auto() && deployment.replicas.len() < replicas.len() {
            deployment.grow();
        }
        for (number, kept) in (0..).zip(replicas) {
            let Some(replica) = deployment.replicas.get_mut(number as usize) else { break };
            (replica.incarnation, replica.epoch) = (Incarnation(kept.incarnation), Epoch(kept.epoch));
            if kept.ranks.len() != size as usize {
                continue;
            }
            let places: Vec<Place> = kept.ranks.iter().map(RankPlace::place).collect();
            let tokens = kept.ranks.into_iter().map(|rank| LaunchToken::known(rank.token)).collect();
            replica.restore(places.clone(), tokens, now);
            deployment.group.place(number, places);
        }
        deployment.state = deployment.derive_state();
        deployment
    }
}

impl RankPlace {
    fn of(record: &super::replica::RankRecord) -> Self {
        let Place { node, slot } = &record.place;
        Self { node: node.0.clone(), slot: *slot, token: record.token.reveal().to_owned() }
    }

    fn place(&self) -> Place {
        Place { node: NodeId(self.node.clone()), slot: self.slot }
    }
}

#[cfg(test)]
mod tests {
    use super::super::deployment::DeploymentState;
    use super::super::membership::tests::checked;
    use super::*;

    #[test]
    fn a_deployment_comes_back_as_it_was_written() {
        let now = Instant::now();
        let mut deployment = Deployment::new(checked("m", 2), 2, Incarnation(0), now);
        let unplaced = DeploymentRecord::of(&deployment);
        let places: Vec<Place> = (0..2).map(|slot| Place { node: NodeId("a".into()), slot }).collect();
        deployment.group.place(0, places.clone());
        deployment.replicas[0].launch(places.clone(), now);
        let record = DeploymentRecord::of(&deployment);
        assert_ne!(record, unplaced);
        let read = DeploymentRecord::from_bytes(&record.to_bytes().expect("writes")).expect("reads");
        assert_eq!(read, record);
        let restored = read.restore(now);
        assert_eq!(DeploymentRecord::of(&restored), record);
        assert_eq!((restored.group.places(0), restored.state), (places, DeploymentState::Recovering));
        let token = deployment.replicas[0].ranks[1].token.reveal();
        assert!(restored.replicas[0].ranks[1].token.matches(token));
        assert_eq!(unplaced.restore(now).wanted().replicas, 1, "what had no slots is placed anew");
        assert!(DeploymentRecord::from_bytes(b"{}").is_err());
    }
}
