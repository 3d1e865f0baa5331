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
use tokio::time::{Instant, MissedTickBehavior};
use tonic::transport::Channel;
use tracing::{info, warn};

use super::credentials::Credentials;
use super::node;
use crate::head_note::HeadNote;
use crate::session::HeadTarget;

/// Time between two looks at all heads.
const LOOK: Duration = Duration::from_millis(500);
/// Heads that are known at most: those that the leader does not name give way first.
const HEADS_MAX: usize = 8;
/// Time for a head to answer.
const ANSWER_DEADLINE: Duration = Duration::from_secs(1);
/// A head that has not said for so long that it leads gives way to one of a lower term: their store may be another.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(10);

/// Starts to look; what is seen first is the head that the user has named.
pub fn start(credentials: &Credentials, file: PathBuf) -> watch::Receiver<HeadNote> {
    let named = credentials.head.as_str().to_owned();
    let first = HeadNote { term: 0, address: named.clone(), socket: None };
    let (notes, seen) = watch::channel(first);
    let heads = BTreeMap::from([(named.clone(), Known::default())]);
    let lookout = Lookout { named, credentials: credentials.clone(), heads, notes, file, led_at: Instant::now() };
    // It ends with the agent's runtime.
    tokio::spawn(lookout.run());
    seen
}

/// A head that is asked.
#[derive(Default)]
struct Known {
    /// The connection that it has answered over.
    client: Option<HeadsClient<Channel>>,
    /// Its answer is waited for.
    is_asked: bool,
}

/// What came of asking a head.
type Answer = (String, Option<(HeadsClient<Channel>, HeadSight)>);

struct Lookout {
    named: String,
    credentials: Credentials,
    heads: BTreeMap<String, Known>,
    notes: watch::Sender<HeadNote>,
    file: PathBuf,
    /// When the noted head has last said that it leads.
    led_at: Instant,
}

impl Lookout {
    async fn run(mut self) {
        self.write();
        let mut answers = JoinSet::new();
        let mut looks = tokio::time::interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = looks.tick() => self.ask_all(&mut answers),
                Some(answer) = answers.join_next() => if let Ok(answer) = answer { self.hear(answer) },
            }
        }
    }

    /// Asks all whose answer is not waited for yet, each within its deadline: one that is frozen does not keep the others waiting.
    fn ask_all(&mut self, answers: &mut JoinSet<Answer>) {
        let seen_term = self.notes.borrow().term;
        for (address, known) in self.heads.iter_mut().filter(|(_, known)| !known.is_asked) {
            known.is_asked = true;
            let (address, client) = (address.clone(), known.client.take());
            let target = self.credentials.target(&address);
            answers.spawn(async move {
                let answer = tokio::time::timeout(ANSWER_DEADLINE, ask(&target, client, seen_term)).await;
                (address, answer.ok().flatten())
            });
        }
    }

    fn hear(&mut self, (address, answer): Answer) {
        let (client, sight) = answer.unzip();
        if let Some(known) = self.heads.get_mut(&address) {
            *known = Known { client, is_asked: false };
        }
        if let Some(sight) = sight {
            self.take(&address, sight, Instant::now());
        }
    }

    fn take(&mut self, address: &str, sight: HeadSight, now: Instant) {
        if sight.leads {
            self.take_leader(address, &sight, now);
        }
        // A head that is away just now may lead next, and nobody else would say so: it is asked on.
        let leads = sight.leads && self.notes.borrow().address == address;
        if leads && self.heads.len() > HEADS_MAX {
            let named = &self.named;
            self.heads.retain(|known, _| known == named || known == address || sight.heads.contains(known));
        }
        for head in sight.heads.into_iter().take(HEADS_MAX) {
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
    // A head that begins to lead closes what it had open while it stood by: then it is dialled anew at once.
    if let Some(mut client) = client
        && let Ok(reply) = client.who(pb::WhoRequest { seen_term }).await
    {
        return Some((client, reply.into_inner().into()));
    }
    let mut client = HeadsClient::new(target.dial().await.ok()?);
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
        let heads = BTreeMap::from([("a".to_owned(), Known::default())]);
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
        lookout.take("a", leads(9, &["a"]), now);
        assert_eq!(lookout.heads.len(), 3, "a head that is away is asked on");
        lookout.take("a", leads(9, &["a", "d", "e", "f", "g", "h", "i"]), now);
        lookout.take("a", leads(9, &["a", "b"]), now);
        assert_eq!(lookout.heads.len(), 2, "not without end");
        lookout.take("a", leads(3, &["a", "b"]), now);
        check(&lookout, "a", 3);
        lookout.take("b", leads(2, &["a", "b"]), now + FORGOTTEN_AFTER * 2);
        check(&lookout, "b", 2);
        assert_eq!(HeadNote::read(&lookout.file).unwrap().address, "b");
    }
}
