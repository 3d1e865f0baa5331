//! What users of a simulated cluster ask for, what they were promised, and what they have heard of it.
//!
//! **Invariant:** what was acknowledged comes back with the next head, what was removed does not, and no question goes without an
//! answer while its head lives.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use phalanx_proto::{DeploymentName, NodeId, PlacementGroupStatus};
use tokio::sync::mpsc::{self, error::TryRecvError};
use tokio::sync::oneshot;

use super::super::super::ClusterError;
use super::super::super::bundle::BundleSpec;
use super::super::super::deployment::{DeployEvent, DeployFailure};
use super::super::super::event::ClusterEvent;
use super::super::super::membership::tests::checked;
use super::super::super::named_group::GroupSpec;
use super::super::super::strategy::Strategy;
use super::head::Head;
use super::{NUM_MACHINES, NUM_SLOTS};
use crate::stories::Random;

/// Deployments that there may be, and placement groups: no two of a name.
const DEPLOYMENTS: [&str; 3] = ["a", "b", "c"];
const GROUPS: [&str; 2] = ["g", "h"];
/// Nobody gives up waiting in a simulation.
const PATIENCE: Duration = Duration::from_secs(3_600);

/// What the head has promised.
#[derive(Default)]
pub struct Promises {
    /// Deployments that were called ready, and placement groups that were called created.
    pub acknowledged: BTreeSet<String>,
    /// Those whose end was asked for, and not answered.
    pub removing: BTreeSet<String>,
    /// Those whose end was answered.
    removed: BTreeSet<String>,
    /// The last epoch of each replica, by the life of the head that counted it.
    pub epochs: BTreeMap<(String, u32), (u64, u64, u64)>,
    /// What a full disk has kept from being written down.
    pub unwritten: BTreeSet<String>,
}

type Answer = oneshot::Receiver<Result<(), ClusterError>>;
type Created = oneshot::Receiver<Result<PlacementGroupStatus, DeployFailure>>;

/// Everybody who waits for something.
#[derive(Default)]
pub struct Users {
    pub promises: Promises,
    watchers: Vec<(String, mpsc::Receiver<DeployEvent>)>,
    creations: Vec<(String, Created)>,
    /// And whether it was this question that put the name among those that are removed.
    ends: Vec<(String, bool, Answer)>,
    /// Restarts, and nodes that leave.
    others: Vec<(String, Answer)>,
}

impl Users {
    /// Their head is gone: they will not hear.
    pub fn lose_head(&mut self) {
        self.watchers.clear();
        self.creations.clear();
        self.ends.clear();
        self.others.clear();
    }

    /// Another head is there, and knows these.
    pub fn meet_head(&mut self, names: &BTreeSet<String>) {
        let promises = &mut self.promises;
        for name in &promises.acknowledged {
            let may_be_gone = promises.removing.contains(name);
            assert!(may_be_gone || names.contains(name), "{name} was acknowledged and does not come back");
        }
        for name in &promises.removed {
            assert!(!names.contains(name), "{name} was removed and comes back");
        }
        // What became of an end that was asked for is known now.
        promises.acknowledged.retain(|name| names.contains(name));
        promises.removing.clear();
    }

    /// Somebody wants something, now and then.
    pub fn wish(&mut self, head: &Head, random: &mut Random) {
        let names = head.names();
        let name = DEPLOYMENTS[random.below(3) as usize].to_owned();
        let group = GROUPS[random.below(2) as usize].to_owned();
        match random.below(60) {
            0..=5 if !names.contains(&name) => self.deploy(name, &group, head, random),
            6..=7 if names.contains(&name) => self.undeploy(name, head),
            8..=9 if !names.contains(&group) => self.create_group(group, head, random),
            10 if names.contains(&group) => self.remove_group(group, head, random),
            11 if names.contains(&name) => {
                let (reply, answer) = oneshot::channel();
                self.others.push((format!("restart of {name}"), answer));
                head.tell(ClusterEvent::Restart { name: DeploymentName(name), reply });
            }
            12 => {
                let (reply, answer) = oneshot::channel();
                let node = NodeId(format!("node-{}", random.below(u64::from(NUM_MACHINES))));
                self.others.push((format!("leave of {node}"), answer));
                head.tell(ClusterEvent::Leave { node, reply });
            }
            _ => {}
        }
    }

    /// Only what fits when all machines are there: it must be ready in the end.
    fn deploy(&mut self, name: String, group: &str, head: &Head, random: &mut Random) {
        let (size, replicas) = (1 + random.below(2) as u32, 1 + random.below(2) as u32);
        let inside = random.one_in(3) && head.num_slots_free_in(group) >= size * replicas;
        if !inside && head.num_slots_wanted() + size * replicas > NUM_MACHINES * NUM_SLOTS {
            return;
        }
        let mut checked = checked(&name, size);
        checked.spec.replicas = replicas;
        checked.spec.strategy = Strategy::Pack;
        checked.spec.wait = Some(PATIENCE);
        checked.spec.placement_group = inside.then(|| group.to_owned());
        let (watcher, events) = mpsc::channel(64);
        self.promises.removed.remove(&name);
        head.tell(ClusterEvent::Deploy { checked: Box::new(checked), watcher });
        self.watchers.push((name, events));
    }

    fn undeploy(&mut self, name: String, head: &Head) {
        let (reply, answer) = oneshot::channel();
        let is_first = self.promises.removing.insert(name.clone());
        head.tell(ClusterEvent::Undeploy { name: DeploymentName(name.clone()), reply });
        self.ends.push((name, is_first, answer));
    }

    fn create_group(&mut self, name: String, head: &Head, random: &mut Random) {
        let num_bundles = 1 + random.below(4) as u32;
        if head.num_slots_wanted() + num_bundles > NUM_MACHINES * NUM_SLOTS {
            return;
        }
        let strategy = if random.one_in(2) { Strategy::Pack } else { Strategy::Spread };
        let bundles = vec![BundleSpec::of_rank(); num_bundles as usize];
        let spec = GroupSpec { name: name.clone(), bundles, strategy, labels: BTreeMap::new(), wait: Some(PATIENCE) };
        let (reply, answer) = oneshot::channel();
        self.promises.removed.remove(&name);
        head.tell(ClusterEvent::CreateGroup { spec, reply });
        self.creations.push((name, answer));
    }

    fn remove_group(&mut self, name: String, head: &Head, random: &mut Random) {
        let (reply, answer) = oneshot::channel();
        let inside = head.deployments_in(&name);
        let force = random.one_in(2);
        if force {
            // They end with it; nobody is told when.
            self.promises.removing.extend(inside);
        }
        let is_first = self.promises.removing.insert(name.clone());
        head.tell(ClusterEvent::RemoveGroup { name: name.clone(), force, reply });
        self.ends.push((name, is_first, answer));
    }

    /// Users hear what has become of their wishes.
    pub fn hear(&mut self) {
        let promises = &mut self.promises;
        self.watchers.retain_mut(|(name, events)| {
            loop {
                match events.try_recv() {
                    Ok(DeployEvent::Ready(_)) => drop(promises.acknowledged.insert(name.clone())),
                    Ok(_) => {}
                    Err(TryRecvError::Empty) => return true,
                    Err(TryRecvError::Disconnected) => return false,
                }
            }
        });
        self.creations.retain_mut(|(name, answer)| match answer.try_recv() {
            Ok(Ok(_)) => {
                promises.acknowledged.insert(name.clone());
                false
            }
            // A group that nobody was told of waits for a place, or is refused by a full disk.
            Ok(Err(_)) => false,
            Err(oneshot::error::TryRecvError::Empty) => true,
            Err(oneshot::error::TryRecvError::Closed) => false,
        });
        self.ends.retain_mut(|(name, is_first, answer)| match answer.try_recv() {
            Ok(Ok(())) => {
                promises.acknowledged.remove(name);
                promises.removing.remove(name);
                promises.removed.insert(name.clone());
                false
            }
            Ok(Err(ClusterError::GroupInUse { .. })) => {
                if *is_first {
                    promises.removing.remove(name);
                }
                false
            }
            Err(oneshot::error::TryRecvError::Empty) => true,
            _ => false,
        });
        self.others.retain_mut(|(_, answer)| matches!(answer.try_recv(), Err(oneshot::error::TryRecvError::Empty)));
    }

    /// Questions that nobody has answered.
    pub fn unanswered(&self) -> Vec<&str> {
        let ends = self.ends.iter().map(|(name, ..)| name.as_str());
        let creations = self.creations.iter().map(|(name, _)| name.as_str());
        ends.chain(creations).chain(self.others.iter().map(|(name, _)| name.as_str())).collect()
    }
}
