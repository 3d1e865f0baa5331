//! Which head leads, as the agent of this machine has noted it for its ranks.
//!
//! **Invariant:** the file is replaced whole or not at all; a rank that cannot read it goes on with what it knew.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use phalanx_trust::files::write_private;
use serde::{Deserialize, Serialize};

use crate::session::HeadTarget;

/// Time between two looks of a rank at the note.
const LOOK: Duration = Duration::from_millis(250);

/// A head that leads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeadNote {
    /// Its term.
    pub term: u64,
    /// `host:port`.
    pub address: String,
    /// Its Unix socket, where it is on this machine.
    pub socket: Option<PathBuf>,
}

impl HeadNote {
    /// Reads a note; none where there is none that can be read.
    pub fn read(path: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(path).ok()?).ok()
    }

    /// Replaces the note.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        write_private(path, &serde_json::to_vec(self)?)
    }
}

/// Where a rank finds the head that leads.
#[derive(Debug, Clone)]
pub struct Heads {
    /// The head that asked for it.
    first: HeadTarget,
    /// The agent's note.
    note: PathBuf,
}

/// A head that is taken to lead.
#[derive(Debug, Clone)]
pub struct Led {
    /// How it is reached.
    pub target: HeadTarget,
    term: u64,
}

impl Heads {
    /// The heads of a rank that this one has asked for.
    pub fn new(first: HeadTarget, note: PathBuf) -> Self {
        Self { first, note }
    }

    /// The head that leads now.
    pub fn now(&self) -> Led {
        let mut led = Led { target: self.first.clone(), term: 0 };
        let Some(note) = HeadNote::read(&self.note).filter(|note| note.term > 0) else { return led };
        // Both from the note: an address of one head and a socket of another would reach the wrong one.
        (led.term, led.target.address, led.target.socket) = (note.term, note.address, note.socket);
        led
    }

    /// Whether another head leads by now.
    pub fn is_superseded(&self, led: &Led) -> bool {
        let now = self.now();
        now.term > led.term && now.target.address != led.target.address
    }

    /// Resolves when another head leads.
    pub async fn superseded(&self, led: &Led) {
        loop {
            tokio::time::sleep(LOOK).await;
            if self.is_superseded(led) {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::HeadTrust;

    #[tokio::test]
    async fn ranks_follow_the_note() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("head.json");
        let note = |term, address: &str| {
            let socket = Some(format!("/{term}.sock").into());
            HeadNote { term, address: address.into(), socket }.write(&path).unwrap();
        };
        let trust = HeadTrust::Plain;
        let first = HeadTarget { address: "a:1".into(), socket: Some("/a.sock".into()), trust };
        let heads = Heads::new(first, path.clone());
        let before = heads.now();
        assert_eq!((before.target.address.as_str(), before.term), ("a:1", 0));
        note(4, "a:1");
        let led = heads.now();
        assert_eq!(
            (led.term, led.target.socket.clone()),
            (4, Some("/4.sock".into())),
            "never a socket of another head"
        );
        let look = |led: Led| {
            let heads = heads.clone();
            async move { tokio::time::timeout(LOOK * 3, heads.superseded(&led)).await.is_ok() }
        };
        assert!(!look(led.clone()).await);
        note(5, "b:1");
        assert!(look(led).await);
        assert_eq!((heads.now().target.address.as_str(), heads.now().target.socket), ("b:1", Some("/5.sock".into())));
        std::fs::write(&path, "{").unwrap();
        assert_eq!(heads.now().target.address, "a:1", "what cannot be read says nothing");
    }
}
