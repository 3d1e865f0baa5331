//! What happened, told to whoever asks for events: the words are those of `status` and of errors.

use phalanx_proto::{DeploymentName, EventRecord, NodeId};

use super::super::chronicle::{Level, event};
use super::super::event::GroupKey;
use super::super::nodes::NodeState;
use super::Reconciler;

impl Reconciler {
    /// Something about a machine.
    pub(super) fn tell_node(&self, node: &NodeId, event: EventRecord) {
        self.chronicle.note(EventRecord { node: Some(node.to_string()), ..event });
    }

    /// A machine is gone that did not say so.
    pub(super) fn tell_node_died(&self, node: &NodeId) {
        let reason = self.nodes.node(node).map(|known| known.reason.clone()).unwrap_or_default();
        self.tell_node(node, event(Level::Error, "node_died", format!("node {node} is gone: {reason}")));
    }

    /// Machines that are late, or are heard again, each once.
    pub(super) fn tell_suspects(&mut self) {
        for node in self.nodes.iter() {
            let id = &node.hello.node_id;
            let told = self.suspects.contains(id);
            let late = node.state == NodeState::Suspect;
            if late && !told {
                let text = format!("node {id} is late: {}; nothing new is placed there", node.reason);
                self.tell_node(id, event(Level::Warn, "node_late", text));
                self.suspects.insert(id.clone());
            } else if !late && told {
                if node.state == NodeState::Alive {
                    self.tell_node(id, event(Level::Info, "node_heard", format!("node {id} is heard again")));
                }
                self.suspects.remove(id);
            }
        }
    }

    /// Something about a whole deployment.
    pub(super) fn tell_deployment(&self, name: &DeploymentName, event: EventRecord) {
        self.chronicle.note(EventRecord { deployment: Some(name.to_string()), ..event });
    }

    /// Something about one replica, with where it stands.
    pub(super) fn tell_group(&self, key: &GroupKey, event: EventRecord) {
        let EventRecord { level, kind, text, .. } = event;
        self.chronicle.note(EventRecord { level, kind, text, ..self.standing(key) });
    }

    /// Where a replica stands: its epoch, its steps, and the rank that failed where one did.
    pub(super) fn standing(&self, key: &GroupKey) -> EventRecord {
        let deployment = self.deployments.iter().find(|(name, _)| *name == key.deployment);
        let replica = deployment.and_then(|(_, known)| known.replicas.get(key.replica as usize));
        let culprit = replica.and_then(|replica| replica.culprit());
        let record = replica.zip(culprit).and_then(|(replica, rank)| replica.ranks.get(rank.0 as usize));
        EventRecord {
            deployment: Some(key.deployment.to_string()),
            replica: Some(key.replica),
            incarnation: Some(key.incarnation.0),
            epoch: replica.map(|replica| replica.epoch.0),
            step: replica.and_then(|replica| replica.engine.as_ref()).map(|engine| engine.snapshot().steps()),
            rank: culprit.map(|rank| rank.0),
            node: record.map(|record| record.place.node.to_string()),
            ..EventRecord::default()
        }
    }

    /// Something about a placement group.
    pub(super) fn tell_placement_group(&self, name: &str, event: EventRecord) {
        self.chronicle.note(EventRecord { placement_group: Some(name.to_owned()), ..event });
    }
}
