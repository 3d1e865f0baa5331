//! Looks which head leads, where a cluster has several.
//!
//! Asks every head that it knows, again and again; each tells it of the others. What it finds is told to the agent, and noted in
//! a file for the ranks.
//!
//! **Invariant:** a head is left for another only if that one leads by a higher term, or if it has not led for a long time: one
//! that was deposed and does not know it yet takes nobody back.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use phalanx_proto::pb::heads_client::HeadsClient;
use phalanx_proto::{HeadSight, Term, pb};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tonic::transport::Channel;
use tracing::{info, warn};

use super::credentials::Credentials;
use super::node;
use crate::head_note::HeadNote;
use crate::session::HeadTarget;

/// Time between two looks at several heads.
const LOOK: Duration = Duration::from_millis(500);
/// The same where only one is known.
const LOOK_ALONE: Duration = Duration::from_secs(2);
/// Time for a head to answer.
const ANSWER_DEADLINE: Duration = Duration::from_secs(1);
/// A head that has not said for so long that it leads gives way to one of a lower term: their store may be another.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(10);

/// Starts to look; what is seen first is the head that the user has named.
pub fn start(credentials: &Credentials, file: PathBuf) -> watch::Receiver<HeadNote> {
    let named = credentials.head.as_str().to_owned();
    let first = HeadNote { term: 0, address: named.clone(), socket: None };
    let (notes, seen) = watch::channel(first);
    let heads = BTreeMap::from([(named.clone(), None)]);
    let lookout = Lookout { named, credentials: credentials.clone(), heads, notes, file, led_at: Instant::now() };
    // It ends with the agent's runtime.
    tokio::spawn(lookout.run());
    seen
}

struct Lookout {
    named: String,
    credentials: Credentials,
    /// Connections by address; absent where there is none.
    heads: BTreeMap<String, Option<HeadsClient<Channel>>>,
    notes: watch::Sender<HeadNote>,
    file: PathBuf,
    /// When the noted head has last said that it leads.
    led_at: Instant,
}

impl Lookout {
    async fn run(mut self) {
        self.write();
        loop {
            for (address, answer) in self.ask_all().await {
                let Some((client, sight)) = answer else { continue };
                if let Some(known) = self.heads.get_mut(&address) {
                    *known = Some(client);
                }
                self.take(&address, sight, Instant::now());
            }
            tokio::time::sleep(if self.heads.len() > 1 { LOOK } else { LOOK_ALONE }).await;
        }
    }

    /// Asks all at once, each within its deadline.
    async fn ask_all(&mut self) -> Vec<(String, Option<(HeadsClient<Channel>, HeadSight)>)> {
        let seen_term = self.notes.borrow().term;
        let mut asked = JoinSet::new();
        for (address, client) in &mut self.heads {
            let (address, client) = (address.clone(), client.take());
            let target = self.credentials.target(&address);
            asked.spawn(async move {
                let answer = tokio::time::timeout(ANSWER_DEADLINE, ask(&target, client, seen_term)).await;
                (address, answer.ok().flatten())
            });
        }
        asked.join_all().await
    }

    fn take(&mut self, address: &str, sight: HeadSight, now: Instant) {
        if sight.leads {
            self.take_leader(address, &sight, now);
        }
        // Only the head that leads knows who has gone.
        if sight.leads && self.notes.borrow().address == address {
            let named = &self.named;
            self.heads.retain(|known, _| known == named || known == address || sight.heads.contains(known));
        }
        for head in sight.heads {
            self.heads.entry(head).or_default();
        }
    }

    fn take_leader(&mut self, address: &str, sight: &HeadSight, now: Instant) {
        let noted = self.notes.borrow().clone();
        let is_noted = noted.address == address;
        let is_forgotten = now.saturating_duration_since(self.led_at) > FORGOTTEN_AFTER;
        if !is_noted && sight.term <= Term(noted.term) && !is_forgotten {
            return;
        }
        self.led_at = now;
        let boot_id = node::boot_id();
        let socket = sight.socket.as_ref().filter(|socket| !boot_id.is_empty() && socket.boot_id == boot_id);
        let socket = socket.map(|socket| PathBuf::from(&socket.path));
        let note = HeadNote { term: sight.term.0, address: address.to_owned(), socket };
        if note == noted {
            return;
        }
        if !is_noted {
            info!(head = address, term = note.term, before = noted.address, "another head leads");
        }
        self.notes.send_replace(note);
        self.write();
    }

    fn write(&self) {
        if let Err(error) = self.notes.borrow().write(&self.file) {
            warn!(path = %self.file.display(), %error, "ranks cannot be told which head leads");
        }
    }
}

/// One head's answer, over a connection that is kept.
async fn ask(
    target: &HeadTarget,
    client: Option<HeadsClient<Channel>>,
    seen_term: u64,
) -> Option<(HeadsClient<Channel>, HeadSight)> {
    let mut client = match client {
        Some(client) => client,
        None => HeadsClient::new(target.dial().await.ok()?),
    };
    // A head without this service is the only one of its cluster.
    let reply = client.who(pb::WhoRequest { seen_term }).await.ok()?.into_inner();
    Some((client, reply.into()))
}

#[cfg(test)]
mod tests {
    use phalanx_proto::NodeId;

    use super::super::credentials::TrustWish;
    use super::*;
    use crate::config::Home;

    fn lookout(dir: &std::path::Path) -> Lookout {
        let note = HeadNote { term: 0, address: "a".into(), socket: None };
        let heads = BTreeMap::from([("a".to_owned(), None)]);
        let file = dir.join("head.json");
        let credentials = Credentials {
            home: Home::new(dir),
            head: "a".parse().unwrap(),
            node_id: NodeId("n".into()),
            wish: TrustWish::Insecure,
        };
        Lookout { named: "a".into(), credentials, heads, notes: watch::channel(note).0, file, led_at: Instant::now() }
    }

    fn leads(term: u64, heads: &[&str]) -> HeadSight {
        let heads = heads.iter().map(|&head| head.to_owned()).collect();
        HeadSight { leads: true, term: Term(term), heads, ..HeadSight::default() }
    }

    #[tokio::test]
    async fn the_head_of_the_highest_term_is_followed() {
        let dir = tempfile::tempdir().unwrap();
        let mut lookout = lookout(dir.path());
        let now = Instant::now();
        let check = |lookout: &Lookout, address: &str, term: u64| {
            let note = lookout.notes.borrow();
            assert_eq!((note.address.as_str(), note.term), (address, term));
        };
        lookout.take("a", HeadSight { heads: vec!["a".into(), "b".into()], ..HeadSight::default() }, now);
        assert_eq!(lookout.heads.len(), 2, "a head that stands by names the others");
        lookout.take("b", leads(7, &["a", "b"]), now);
        check(&lookout, "b", 7);
        lookout.take("a", leads(9, &["a", "b", "c"]), now);
        check(&lookout, "a", 9);
        lookout.take("b", leads(7, &["b"]), now);
        check(&lookout, "a", 9);
        assert_eq!(lookout.heads.len(), 3);
        lookout.take("a", leads(9, &["a", "b"]), now);
        assert_eq!(lookout.heads.len(), 2, "the head that leads knows who has gone");
        lookout.take("a", leads(3, &["a", "b"]), now);
        check(&lookout, "a", 3);
        lookout.take("b", leads(2, &["a", "b"]), now + FORGOTTEN_AFTER * 2);
        check(&lookout, "b", 2);
        assert_eq!(HeadNote::read(&lookout.file).unwrap().address, "b");
    }
}
