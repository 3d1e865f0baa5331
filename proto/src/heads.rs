//! What a head says about who leads.

use crate::{HeadSocket, Term, pb};

/// A head's answer to who leads.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HeadSight {
    /// Whether the head that answers leads.
    pub leads: bool,
    /// The term of the head that leads, as far as this one knows; 0: none does.
    pub term: Term,
    /// Cluster address of the head that leads, where that is known.
    pub leader: Option<String>,
    /// Cluster addresses of all heads.
    pub heads: Vec<String>,
    /// The Unix socket of the head that answers.
    pub socket: Option<HeadSocket>,
}

impl From<HeadSight> for pb::WhoReply {
    fn from(sight: HeadSight) -> Self {
        let HeadSocket { path, boot_id } = sight.socket.unwrap_or_default();
        Self {
            leads: sight.leads,
            term: sight.term.0,
            leader: sight.leader.unwrap_or_default(),
            heads: sight.heads,
            socket_path: path,
            boot_id,
        }
    }
}

impl From<pb::WhoReply> for HeadSight {
    fn from(reply: pb::WhoReply) -> Self {
        let pb::WhoReply { leads, term, leader, heads, socket_path: path, boot_id } = reply;
        Self {
            leads,
            term: Term(term),
            leader: Some(leader).filter(|leader| !leader.is_empty()),
            heads,
            socket: (!path.is_empty()).then_some(HeadSocket { path, boot_id }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_come_back_as_they_were_sent() {
        let socket = Some(HeadSocket { path: "/run/head.sock".into(), boot_id: "b".into() });
        let leads =
            HeadSight { leads: true, term: Term(7), leader: Some("a:1".into()), heads: vec!["a:1".into()], socket };
        for sight in [leads, HeadSight::default()] {
            assert_eq!(HeadSight::from(pb::WhoReply::from(sight.clone())), sight);
        }
    }
}
