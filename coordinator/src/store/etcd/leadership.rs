//! Who leads: a lease that is renewed, and a key that goes with it.
//!
//! A thread of its own renews the lease and looks who else is there, so that no load on the head delays it. It waits for the
//! lead, holds it, and says when it is lost.
//!
//! **Invariant:** this head acts only while its lease cannot have ended: counted from before the renewal was asked for, by the
//! monotonic clock, less a margin.
//! **Invariant:** a head takes up a lead that lapsed only if nobody has led in between; else it is deposed.

use std::io;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use phalanx_proto::Term;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, oneshot, watch};
use tracing::{info, warn};

use super::super::Table;
use super::client::{Check, Client, Done, Entry, EtcdError, Write};
use super::{EtcdPlace, EtcdStore, Records};

/// How long a lead outlives the head that had it.
const TTL: Duration = Duration::from_secs(3);
/// A head stops acting so long before its lease can end.
const MARGIN: Duration = Duration::from_millis(500);
/// Time between two renewals.
const BEAT: Duration = Duration::from_millis(500);
/// Time between two looks of a head that stands by.
const LOOK: Duration = Duration::from_millis(250);

/// What a head says of itself to the others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeadCard {
    /// Names this life of it.
    pub id: String,
    /// Cluster address.
    pub address: String,
    /// OpenAI-compatible HTTP.
    pub http: String,
    /// By what nodes know its authority; empty where there is none (`--insecure`).
    #[serde(default)]
    pub authority: String,
}

/// The heads as one of them sees them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HeadsSeen {
    /// Whether this head leads.
    pub leads: bool,
    /// Who leads.
    pub leader: Option<HeadCard>,
    /// The leader's term; 0: nobody leads.
    pub term: Term,
    /// Cluster addresses of all heads.
    pub heads: Vec<String>,
    /// What is wrong with etcd; empty: nothing.
    pub trouble: String,
    /// The records are those of a cluster with another authority: this head never leads it.
    pub is_stranger: bool,
}

/// Hears that another head leads; this one must end at once.
pub type Deposed = Box<dyn FnOnce(String) + Send>;

/// A head's way to the lead.
pub struct Campaign {
    /// The heads, as they are seen now.
    pub seen: watch::Receiver<HeadsSeen>,
    won: oneshot::Receiver<EtcdStore>,
    resign: Arc<Notify>,
    thread: JoinHandle<()>,
}

impl Campaign {
    /// Begins to stand for the lead.
    ///
    /// # Errors
    /// The system gives no thread or runtime.
    pub fn start(place: EtcdPlace, card: HeadCard, deposed: Deposed) -> io::Result<Self> {
        let (seen_by_us, seen) = watch::channel(HeadsSeen::default());
        let (winner, won) = oneshot::channel();
        let resign = Arc::new(Notify::new());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let resigns = Arc::clone(&resign);
        let stand = move || {
            let handle = runtime.handle().clone();
            runtime.block_on(async {
                let client = match Client::new(place.endpoints()) {
                    Ok(client) => client,
                    Err(error) => return seen_by_us.send_modify(|seen| seen.trouble = error.to_string()),
                };
                let mut candidate = Candidate { client, place, card, lease: None, seen: seen_by_us, resign: resigns };
                candidate.run(handle, winner, deposed).await;
            });
        };
        let thread = std::thread::Builder::new().name("lease".into()).spawn(stand)?;
        Ok(Self { seen, won, resign, thread })
    }

    /// Resolves when this head leads; never where it ends before. Whatever waits for it may be dropped.
    pub async fn won(&mut self) -> EtcdStore {
        match (&mut self.won).await {
            Ok(store) => store,
            Err(_) => std::future::pending().await,
        }
    }

    /// Gives the lead, or the wish for it, back: another head need not wait for the lease to end.
    pub async fn resign(self) {
        self.resign.notify_one();
        let thread = self.thread;
        let ended = tokio::task::spawn_blocking(move || thread.join());
        // A lease that could not be given back ends by itself.
        let _ = tokio::time::timeout(TTL, ended).await;
    }
}

/// The lead, as those see it who act by it.
#[derive(Debug)]
pub struct Leadership {
    client: Client,
    place: EtcdPlace,
    /// The revision in which the leader's key was made.
    created: AtomicI64,
    acts_until: Mutex<Instant>,
    /// The highest term that somebody has seen a head lead by.
    seen_term: AtomicU64,
    doubted: Notify,
}

impl Leadership {
    /// The term of the lead.
    pub fn term(&self) -> Term {
        Term(self.created.load(Ordering::Acquire).unsigned_abs())
    }

    /// What a write must ask for; none while this head may not act.
    pub(super) fn fence(&self) -> Option<i64> {
        let until = *self.acts_until.lock().unwrap_or_else(PoisonError::into_inner);
        (Instant::now() < until).then(|| self.created.load(Ordering::Acquire))
    }

    /// Somebody has seen a head lead by this term: where it is a higher one, look at once.
    pub fn heard_of(&self, term: Term) {
        if term > self.term() {
            self.seen_term.fetch_max(term.0, Ordering::AcqRel);
            self.doubt();
        }
    }

    /// Another head may lead: look at once.
    pub(super) fn doubt(&self) {
        self.doubted.notify_one();
    }

    /// Whether a higher term was seen.
    fn is_outdated(&self) -> bool {
        self.seen_term.load(Ordering::Acquire) > self.term().0
    }

    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    pub(super) fn place(&self) -> &EtcdPlace {
        &self.place
    }

    fn hold(&self, created: i64, until: Instant) {
        self.created.store(created, Ordering::Release);
        *self.acts_until.lock().unwrap_or_else(PoisonError::into_inner) = until;
    }
}

impl EtcdStore {
    /// The lead that its writes are fenced by.
    pub fn leadership(&self) -> Arc<Leadership> {
        Arc::clone(&self.leadership)
    }
}

/// Why a lead could not be renewed.
enum Lapse {
    /// Another head leads, or has led.
    Deposed(String),
    /// etcd does not answer; nobody knows.
    Unknown(EtcdError),
    /// etcd answers, but does not have what it should.
    Emptied,
}

impl From<EtcdError> for Lapse {
    fn from(error: EtcdError) -> Self {
        Self::Unknown(error)
    }
}

/// The beginning of a pin, in words.
fn in_short(authority: &str) -> String {
    authority.get(..16).map_or_else(|| "none (--insecure)".to_owned(), str::to_owned)
}

/// A lease that was renewed: this head may act until then.
#[derive(Clone, Copy)]
struct Lease {
    id: i64,
    until: Instant,
}

struct Candidate {
    client: Client,
    place: EtcdPlace,
    card: HeadCard,
    lease: Option<i64>,
    seen: watch::Sender<HeadsSeen>,
    resign: Arc<Notify>,
}

impl Candidate {
    /// Waits for the lead, then holds it, until it is lost or given back.
    async fn run(&mut self, runtime: tokio::runtime::Handle, winner: oneshot::Sender<EtcdStore>, deposed: Deposed) {
        let Some((leadership, records)) = self.stand().await else { return self.revoke().await };
        info!(term = leadership.term().0, "this head leads");
        let leadership = Arc::new(leadership);
        if winner.send(EtcdStore { leadership: Arc::clone(&leadership), records, runtime }).is_err() {
            return self.revoke().await;
        }
        match self.lead(&leadership).await {
            Some(why) => deposed(why),
            None => self.revoke().await,
        }
    }

    /// Waits for the lead; none where this head has resigned.
    async fn stand(&mut self) -> Option<(Leadership, Records)> {
        loop {
            match self.attempt().await {
                Ok(Some(won)) => return Some(won),
                Ok(None) => self.note(String::new()),
                Err(error) => {
                    self.note(error.to_string());
                    let is_stranger = matches!(error, EtcdError::OtherAuthority { .. });
                    self.seen
                        .send_if_modified(|seen| std::mem::replace(&mut seen.is_stranger, is_stranger) != is_stranger);
                }
            }
            tokio::select! {
                () = self.resign.notified() => return None,
                () = tokio::time::sleep(LOOK) => {}
            }
        }
    }

    /// Takes the lead where nobody has it; reads what the last leader has left.
    async fn attempt(&mut self) -> Result<Option<(Leadership, Records)>, EtcdError> {
        self.check_authority().await?;
        let lease = self.renewed().await?;
        let vacant = Check::Created(self.place.leader(), 0);
        let created = match self.client.write_if(&[vacant], self.claim(lease.id)).await? {
            Done::Yes { revision } => revision,
            // The answer to an earlier attempt may have been lost.
            Done::No => match self.look().await? {
                Some((created, card)) if card.id == self.card.id => created,
                _ => return Ok(None),
            },
        };
        let mut records = Records::new();
        for table in Table::ALL {
            let prefix = self.place.records(table);
            let record = |entry: Entry| Some((table, entry.key.strip_prefix(&prefix)?.to_owned(), entry.value));
            records.extend(self.client.below(&prefix).await?.into_iter().filter_map(record));
        }
        let leadership = Leadership {
            client: self.client.clone(),
            place: self.place.clone(),
            created: AtomicI64::new(created),
            acts_until: Mutex::new(lease.until),
            seen_term: AtomicU64::new(0),
            doubted: Notify::new(),
        };
        self.look().await?;
        Ok(Some((leadership, records)))
    }

    /// Agents and ranks of the head before would not know a head with another authority, and their records are not its business.
    async fn check_authority(&self) -> Result<(), EtcdError> {
        let last = self.client.one(&self.place.last_leader()).await?;
        match last.and_then(|last| serde_json::from_slice::<HeadCard>(&last.value).ok()) {
            Some(last) if last.authority != self.card.authority => Err(EtcdError::OtherAuthority {
                endpoints: self.client.names().to_owned(),
                leader: last.address,
                known: in_short(&last.authority),
                own: in_short(&self.card.authority),
            }),
            _ => Ok(()),
        }
    }

    /// Holds the lead. Says why it was lost; none where this head has resigned.
    async fn lead(&mut self, leadership: &Leadership) -> Option<String> {
        let mut lapsed = false;
        loop {
            tokio::select! {
                () = self.resign.notified() => return None,
                () = leadership.doubted.notified() => {}
                () = tokio::time::sleep(BEAT) => {}
            }
            let trouble = match self.renew(leadership).await {
                Ok(()) => String::new(),
                Err(Lapse::Deposed(why)) => return Some(why),
                Err(Lapse::Unknown(error)) => error.to_string(),
                Err(Lapse::Emptied) => "etcd has lost the records of this cluster".to_owned(),
            };
            let may_act = leadership.fence().is_some();
            if !may_act && leadership.is_outdated() {
                return Some("an agent has seen another head lead, and etcd does not answer here".to_owned());
            }
            if may_act == lapsed {
                lapsed = !may_act;
                match lapsed {
                    true => warn!(reason = trouble, "this head may not change anything; what runs goes on"),
                    false => info!(term = leadership.term().0, "this head may act again"),
                }
            }
            // A renewal that failed once, within the lease, is nobody's trouble.
            self.note(if lapsed { format!("nothing can be changed: {trouble}") } else { String::new() });
        }
    }

    async fn renew(&mut self, leadership: &Leadership) -> Result<(), Lapse> {
        let lease = self.renewed().await?;
        match self.look().await? {
            Some((created, card)) if card.id == self.card.id => leadership.hold(created, lease.until),
            Some((_, card)) => return Err(Lapse::Deposed(format!("the head at {} leads", card.address))),
            None => self.retake(leadership, lease).await?,
        }
        Ok(())
    }

    /// Takes up a lead that lapsed, if nobody has led in between.
    async fn retake(&mut self, leadership: &Leadership, lease: Lease) -> Result<(), Lapse> {
        let ours = leadership.created.load(Ordering::Acquire);
        let last = self.place.last_leader();
        let checks = [Check::Created(self.place.leader(), 0), Check::Changed(last.clone(), ours)];
        match self.client.write_if(&checks, self.claim(lease.id)).await? {
            Done::Yes { revision } => {
                leadership.hold(revision, lease.until);
                Ok(())
            }
            Done::No if self.client.one(&last).await?.is_none() => Err(Lapse::Emptied),
            Done::No => Err(Lapse::Deposed("another head has led meanwhile".to_owned())),
        }
    }

    fn claim(&self, lease: i64) -> Vec<Write> {
        let card = self.card_bytes();
        vec![
            Write::Put { key: self.place.leader(), value: card.clone(), lease },
            Write::Put { key: self.place.last_leader(), value: card, lease: 0 },
        ]
    }

    /// This head's lease, renewed, or a new one with this head's card.
    async fn renewed(&mut self) -> Result<Lease, EtcdError> {
        let asked = Instant::now();
        if let Some(id) = self.lease {
            match self.client.keep_alive(id).await? {
                Some(ttl) => return Ok(Lease { id, until: asked + ttl.saturating_sub(MARGIN) }),
                None => self.lease = None,
            }
        }
        let asked = Instant::now();
        let id = self.client.grant(TTL).await?;
        let key = format!("{}{}", self.place.heads(), self.card.id);
        self.client.write_if(&[], vec![Write::Put { key, value: self.card_bytes(), lease: id }]).await?;
        self.lease = Some(id);
        Ok(Lease { id, until: asked + TTL.saturating_sub(MARGIN) })
    }

    fn card_bytes(&self) -> Vec<u8> {
        serde_json::json!(self.card).to_string().into_bytes()
    }

    /// Who leads, and since which revision; everybody learns it.
    async fn look(&self) -> Result<Option<(i64, HeadCard)>, EtcdError> {
        let leader = self.client.one(&self.place.leader()).await?;
        let leader = leader.and_then(|entry| Some((entry.created, serde_json::from_slice(&entry.value).ok()?)));
        let cards = self.client.below(&self.place.heads()).await?;
        let cards = cards.iter().filter_map(|entry| serde_json::from_slice::<HeadCard>(&entry.value).ok());
        let mut heads: Vec<String> = cards.map(|card| card.address).collect();
        heads.sort();
        heads.dedup();
        let now = HeadsSeen {
            leads: leader.as_ref().is_some_and(|(_, card): &(i64, HeadCard)| card.id == self.card.id),
            leader: leader.as_ref().map(|(_, card)| card.clone()),
            term: Term(leader.as_ref().map_or(0, |(created, _)| created.unsigned_abs())),
            heads,
            trouble: self.seen.borrow().trouble.clone(),
            is_stranger: false,
        };
        self.seen.send_if_modified(|seen| std::mem::replace(seen, now.clone()) != now);
        Ok(leader)
    }

    fn note(&self, trouble: String) {
        self.seen.send_if_modified(|seen| std::mem::replace(&mut seen.trouble, trouble.clone()) != trouble);
    }

    async fn revoke(&mut self) {
        if let Some(lease) = self.lease.take()
            && let Err(error) = self.client.revoke(lease).await
        {
            info!(%error, "the lease ends by itself");
        }
    }
}
