//! One life of a head in a simulation: the real reconciler and schedulers, and what would be tasks, threads and a disk.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::mpsc as std_mpsc;
use std::time::{Duration, Instant};

use phalanx_proto::{DeploymentName, DesiredRank, HeadStatus, NodeId, RankKey, Term};
use tokio::sync::{mpsc, oneshot};

use super::super::super::StatusBoard;
use super::super::super::deployment::{Deployment, DeploymentState};
use super::super::super::event::{ClusterEvent, GroupKey, ServingChange, StartedGroup};
use super::super::super::handle::ClusterSettings;
use super::super::super::launch::simulated::{self, Asked};
use super::super::super::named_group::GroupRecord;
use super::super::super::placement_group::Place;
use super::super::super::record::{DeploymentRecord, Restored};
use super::super::super::replica::{Replica, Stage};
use super::super::Reconciler;
use super::NUM_BLOCKS;
use super::machine::{Machine, RankSim, SILENCE_MS};
use crate::engine::EngineHandle;
use crate::engine::group::RankLink;
use crate::engine::simulated_engine::SimulatedEngine;
use crate::store::{Change, StoreError, StoreWriter, Table};
use crate::stories::Random;

/// A step that is not answered breaks its group.
const STEP_DEADLINE_MS: u64 = 5_000;
/// Events that may wait.
const QUEUE: usize = 1 << 14;

/// What survives a head: records by name.
#[derive(Default)]
pub struct Disk {
    pub is_full: bool,
    deployments: BTreeMap<String, Vec<u8>>,
    groups: BTreeMap<String, Vec<u8>>,
}

impl Disk {
    fn apply(&mut self, change: Change) -> Box<dyn FnOnce(Result<(), StoreError>) + Send> {
        let Change { table, name, record, done } = change;
        let records = match table {
            Table::Deployments => &mut self.deployments,
            Table::PlacementGroups => &mut self.groups,
        };
        match record {
            Some(record) => records.insert(name, record),
            None => records.remove(&name),
        };
        done
    }

    fn restored(&self) -> Restored {
        let deployments =
            self.deployments.values().map(|record| DeploymentRecord::from_bytes(record).expect("a record"));
        let groups = self.groups.values().map(|record| GroupRecord::from_bytes(record).expect("a record"));
        Restored { deployments: deployments.collect(), groups: groups.collect() }
    }
}

/// A rank of a group, by its process.
struct Member {
    node: NodeId,
    key: RankKey,
    pid: u32,
    slot: u32,
}

impl Member {
    fn process<'a>(&self, machines: &'a mut [Machine]) -> Option<&'a mut RankSim> {
        let machine = machines.iter_mut().find(|machine| machine.node == self.node)?;
        machine.ranks.get_mut(&self.key).filter(|rank| rank.pid == self.pid)
    }
}

/// Ranks that start, or serve, as the head sees them.
struct Group {
    key: GroupKey,
    epoch: u64,
    members: Vec<Member>,
    /// The head's ends of their streams: with them the ranks end.
    _links: Vec<RankLink>,
    given_up: oneshot::Receiver<String>,
    /// The engine that waits for it, and when it is ready; none once it serves.
    starting: Option<(Option<EngineHandle>, u64)>,
    silent_since: Option<u64>,
}

impl Group {
    /// Why it is broken, if it is.
    fn break_cause(&mut self, now: u64, machines: &mut [Machine], random: &mut Random) -> Option<String> {
        if let Ok(reason) = self.given_up.try_recv() {
            return Some(reason);
        }
        let mut is_silent = false;
        for member in &self.members {
            let is_cut = machines.iter().any(|machine| machine.node == member.node && machine.is_cut(now));
            match member.process(machines) {
                _ if is_cut => is_silent = true,
                Some(rank) if rank.is_frozen && !rank.is_dead => is_silent = true,
                Some(rank) if !rank.is_dead => {}
                _ => return Some(format!("rank {} went away", member.key.rank)),
            }
        }
        if !is_silent {
            self.silent_since = None;
            return None;
        }
        let since = *self.silent_since.get_or_insert(now);
        let patience = if random.one_in(2) { STEP_DEADLINE_MS } else { SILENCE_MS };
        (now > since + patience).then(|| "late".to_owned())
    }
}

/// A head that lives.
pub struct Head {
    pub events: mpsc::Sender<ClusterEvent>,
    reconciler: Reconciler,
    inbox: mpsc::Receiver<ClusterEvent>,
    serving: mpsc::Receiver<ServingChange>,
    changes: std_mpsc::Receiver<Change>,
    groups: Vec<Group>,
    engines: Vec<SimulatedEngine>,
    stopping: Vec<(u64, GroupKey, EngineHandle)>,
}

impl Head {
    pub fn start(term: u64, disk: &Disk, now: Instant) -> Self {
        let (changes_in, changes) = std_mpsc::sync_channel(64);
        let (serving_in, serving) = mpsc::channel(64);
        let (events, inbox) = mpsc::channel(QUEUE);
        let mut settings = ClusterSettings::new(Term(term), HeadStatus::default(), None, Duration::from_secs(60));
        settings.store = Some(StoreWriter::to(changes_in));
        settings.restarts_max = usize::MAX;
        let board = StatusBoard::new(now);
        let mut reconciler = Reconciler::new(settings, Restored::default(), events.clone(), serving_in, board);
        reconciler.started = now;
        reconciler.restore(disk.restored(), now);
        Self {
            events,
            reconciler,
            inbox,
            serving,
            changes,
            groups: Vec::new(),
            engines: Vec::new(),
            stopping: Vec::new(),
        }
    }

    /// Its end: of what waits for the disk, some is written.
    pub fn die(self, disk: &mut Disk, random: &mut Random) {
        let waiting: Vec<Change> = self.changes.try_iter().collect();
        let num_written = random.below(waiting.len() as u64 + 1) as usize;
        for change in waiting.into_iter().take(num_written) {
            drop(disk.apply(change));
        }
    }

    pub fn tell(&self, event: ClusterEvent) {
        assert!(self.events.try_send(event).is_ok(), "the queue is long enough for a simulation");
    }

    /// The disk takes what waits, or some of it, or says that it is full.
    pub fn write(&mut self, disk: &mut Disk, unwritten: &mut BTreeSet<String>, random: &mut Random) {
        while !random.one_in(4)
            && let Ok(change) = self.changes.try_recv()
        {
            if disk.is_full {
                unwritten.insert(change.name);
                let source = std::io::Error::from(std::io::ErrorKind::StorageFull);
                (change.done)(Err(StoreError::Folder { path: "/made-up".into(), source }));
            } else {
                unwritten.remove(&change.name);
                disk.apply(change)(Ok(()));
            }
        }
    }

    /// Groups get ready, or break.
    pub fn drive_groups(&mut self, now: u64, machines: &mut [Machine], random: &mut Random) {
        for mut group in std::mem::take(&mut self.groups) {
            let is_wanted = self.reconciler.replica_mut(&group.key).is_some_and(|replica| replica.wants_processes());
            let cause = group.break_cause(now, machines, random);
            let is_starting = group.starting.is_some();
            match cause {
                // A start that is not wanted any more is aborted, mostly before it can say anything.
                _ if is_starting && !is_wanted && !random.one_in(8) => {}
                Some(cause) if is_starting => {
                    self.tell(ClusterEvent::GroupStarted { group: group.key, result: Err(cause) });
                }
                Some(reason) => {
                    if let Some(engine) = self.engine_of(&group.key) {
                        engine.break_group();
                    }
                    self.tell(ClusterEvent::GroupFailed { group: group.key, reason });
                }
                None => {
                    self.get_ready(&mut group, now, machines);
                    self.groups.push(group);
                }
            }
        }
    }

    fn get_ready(&mut self, group: &mut Group, now: u64, machines: &mut [Machine]) {
        let Some((waiting, _)) = group.starting.take_if(|(_, ready_at)| now >= *ready_at) else { return };
        for member in &group.members {
            if let Some(rank) = member.process(machines) {
                rank.was_ready = true;
            }
        }
        let adopting = waiting.and_then(|handle| self.engines.iter_mut().find(|engine| engine.is(&handle)));
        let (engine, is_new) = match adopting.filter(|engine| !engine.has_ended()) {
            Some(engine) => {
                engine.break_group();
                engine.adopt(group.epoch, NUM_BLOCKS);
                (engine.handle(), false)
            }
            None => {
                let engine = SimulatedEngine::new(group.epoch, NUM_BLOCKS);
                let handle = engine.handle();
                self.engines.push(engine);
                (handle, true)
            }
        };
        let epoch = phalanx_proto::Epoch(group.epoch);
        let started = StartedGroup { engine, num_blocks: NUM_BLOCKS, epoch, is_new };
        self.tell(ClusterEvent::GroupStarted { group: group.key.clone(), result: Ok(started) });
    }

    /// The engine that the reconciler holds for a replica.
    fn engine_of(&mut self, key: &GroupKey) -> Option<&mut SimulatedEngine> {
        let handle = self.reconciler.replica_mut(key)?.engine.clone()?;
        self.engines.iter_mut().find(|engine| engine.is(&handle))
    }

    /// Engines take steps where their group serves, and requests come and go.
    pub fn drive_engines(&mut self, is_calm: bool, random: &mut Random) {
        for engine in &mut self.engines {
            if engine.has_ended() {
                continue;
            }
            engine.listen();
            if engine.has_ended() {
                continue;
            }
            if !is_calm && random.one_in(3) {
                engine.submit(random.below(40) as u32, 1 + random.below(30) as u32, 1 + random.below(20) as u32);
            }
            if !is_calm && random.one_in(12) {
                engine.cancel(random.below(1 << 20));
            }
            for _ in 0..random.below(if is_calm { 80 } else { 12 }) {
                engine.step(random.one_in(2));
            }
            engine.check();
        }
        self.engines.retain(|engine| !engine.has_ended());
    }

    /// The cluster's task takes what has come.
    pub fn reconcile(&mut self, now: Instant, random: &mut Random) {
        while let Ok(change) = self.serving.try_recv() {
            if let ServingChange::Ready { checked, .. } = change {
                self.tell(ClusterEvent::Published { deployment: checked.spec.name.clone(), result: Ok(()) });
            }
        }
        if random.one_in(2) {
            self.reconciler.turn(now);
        }
        while let Ok(event) = self.inbox.try_recv() {
            self.reconciler.handle(event, now);
            if random.one_in(3) {
                self.reconciler.turn(now);
            }
        }
        self.reconciler.turn(now);
    }

    /// Does what the reconciler has asked of engines and groups.
    pub fn take_orders(
        &mut self,
        term: u64,
        now: u64,
        epochs: &mut BTreeMap<(String, u32), (u64, u64, u64)>,
        random: &mut Random,
    ) {
        for asked in simulated::take() {
            match asked {
                Asked::Stop(key, engine) => self.stopping.push((now + random.below(3_000), key, engine)),
                Asked::Discard(engine) => self.end_engine(&engine),
                Asked::Start(start) => {
                    let (key, epoch) = (start.key, start.load.epoch.0);
                    let order = self.reconciler.deployment_mut(&key.deployment).map_or(0, |known| known.order);
                    let place = (key.deployment.to_string(), key.replica);
                    let before = epochs.insert(place, (term, order, epoch));
                    assert!(
                        before.is_none_or(|before| before < (term, order, epoch)),
                        "epochs grow: {before:?}, {epoch}"
                    );
                    let members = self.members(&key);
                    let starting = Some((start.engine, now + 30 + random.below(2_000)));
                    let (links, given_up) = (start.links, start.given_up);
                    self.groups.push(Group {
                        key,
                        epoch,
                        members,
                        _links: links,
                        given_up,
                        starting,
                        silent_since: None,
                    });
                }
            }
        }
        let (due, later) = std::mem::take(&mut self.stopping).into_iter().partition(|(at, ..)| *at <= now);
        self.stopping = later;
        let due: Vec<(u64, GroupKey, EngineHandle)> = due;
        for (_, key, engine) in due {
            self.end_engine(&engine);
            self.groups.retain(|group| group.key != key);
            self.tell(ClusterEvent::GroupStopped { group: key });
        }
    }

    fn end_engine(&mut self, handle: &EngineHandle) {
        if let Some(engine) = self.engines.iter_mut().find(|engine| engine.is(handle) && !engine.has_ended()) {
            engine.stop();
        }
    }

    fn members(&mut self, key: &GroupKey) -> Vec<Member> {
        let Some(replica) = self.reconciler.replica_mut(key) else { return Vec::new() };
        let member = |(rank, record): (usize, &super::super::super::replica::RankRecord)| Member {
            node: record.place.node.clone(),
            slot: record.place.slot,
            pid: record.pid(),
            key: RankKey {
                deployment: key.deployment.clone(),
                replica: key.replica,
                rank: phalanx_proto::Rank(rank as u32),
                incarnation: key.incarnation,
            },
        };
        replica.ranks.iter().enumerate().map(member).collect()
    }

    /// No slot is in two groups, neither as it is wished nor as it is, and none that is reserved is given to others.
    pub fn check(&self) {
        let mut reserved = BTreeSet::new();
        let outside =
            self.reconciler.deployments.iter().filter(|(_, known)| known.checked.spec.placement_group.is_none());
        let slots = outside.flat_map(|(name, known)| known.group.slots().map(move |place| (name.to_string(), place)));
        let named = self.reconciler.groups.iter();
        let seats = named.flat_map(|named| named.group.slots().map(|place| (named.spec.name.clone(), place)));
        for (name, place) in slots.chain(seats) {
            assert!(reserved.insert((place.node.clone(), place.slot)), "{place:?} is reserved twice, once for {name}");
        }
        let mut wished = BTreeSet::new();
        for (name, deployment) in &self.reconciler.deployments {
            for replica in deployment.replicas.iter().filter(|replica| replica.wants_processes()) {
                for rank in &replica.ranks {
                    let place = (rank.place.node.clone(), rank.place.slot);
                    assert!(wished.insert(place.clone()), "{place:?} has two ranks, one of {name}");
                }
            }
        }
        let mut serving = BTreeSet::new();
        for group in self.groups.iter().filter(|group| group.starting.is_none()) {
            for member in &group.members {
                let place = (member.node.clone(), member.slot);
                assert!(serving.insert(place), "two groups take steps on slot {} of {}", member.slot, member.node);
            }
        }
    }

    /// Deployments and placement groups that it knows.
    pub fn names(&self) -> BTreeSet<String> {
        let deployments = self.reconciler.deployments.iter().map(|(name, _)| name.to_string());
        deployments.chain(self.reconciler.groups.iter().map(|named| named.spec.name.clone())).collect()
    }

    /// Slots that are needed for all that was asked for; what runs in a placement group needs none of its own.
    pub fn num_slots_wanted(&self) -> u32 {
        let outside =
            self.reconciler.deployments.iter().filter(|(_, known)| known.checked.spec.placement_group.is_none());
        let deployments: u32 = outside.map(|(_, known)| known.size * known.replicas.len() as u32).sum();
        deployments + self.reconciler.groups.iter().map(|named| named.spec.bundles.len() as u32).sum::<u32>()
    }

    /// Deployments in a placement group.
    pub fn deployments_in(&self, group: &str) -> Vec<String> {
        self.inside(group).map(|(name, _)| name.to_string()).collect()
    }

    fn inside<'a>(&'a self, group: &'a str) -> impl Iterator<Item = &'a (DeploymentName, Deployment)> {
        self.reconciler.deployments.iter().filter(move |(_, known)| known.checked.spec.placement_group() == Some(group))
    }

    /// Slots of a placement group that nobody has asked for.
    pub fn num_slots_free_in(&self, group: &str) -> u32 {
        let known = self.reconciler.groups.iter().find(|named| named.spec.name == group && !named.removing);
        let asked: u32 = self.inside(group).map(|(_, known)| known.size * known.replicas.len() as u32).sum();
        known.map_or(0, |named| named.spec.bundles.len() as u32).saturating_sub(asked)
    }

    /// Whether a deployment is ready, or a placement group stands.
    pub fn serves(&self, name: &str) -> bool {
        let is_ready = |known: &Deployment| known.state == DeploymentState::Ready;
        self.reconciler.deployments.iter().any(|(other, known)| other.0 == name && is_ready(known))
            || self.reconciler.groups.iter().any(|named| named.spec.name == name && named.is_created())
    }

    /// No request is left, and nothing waits for the disk or an end.
    pub fn is_quiet(&self) -> bool {
        let idle = self.engines.iter().all(SimulatedEngine::is_idle);
        idle && self.stopping.is_empty() && !self.reconciler.is_keeping()
    }

    pub fn check_end(&self) {
        self.engines.iter().for_each(SimulatedEngine::check_end);
        for named in &self.reconciler.groups {
            let theirs: Vec<Place> = named.group.slots().collect();
            for (name, known) in self.inside(&named.spec.name) {
                let mut ranks =
                    known.replicas.iter().filter(|replica| replica.wants_processes()).flat_map(|r| &r.ranks);
                assert!(ranks.all(|rank| theirs.contains(&rank.place)), "{name} runs outside of {}", named.spec.name);
            }
        }
    }

    /// Words about what is not as it should be.
    pub fn describe(&self) -> String {
        let replica = |replica: &Replica| {
            let stage = match replica.stage {
                Stage::Starting { .. } => "starting".to_owned(),
                Stage::Connecting { .. } => "connecting".to_owned(),
                Stage::Broken { .. } => "broken".to_owned(),
                Stage::Yielding { .. } => "yielding".to_owned(),
                Stage::Ended { .. } => "ended".to_owned(),
                ref other => format!("{other:?}"),
            };
            format!("incarnation {} {stage} because {}", replica.incarnation.0, replica.cause)
        };
        let words = self.reconciler.deployments.iter().map(|(name, known)| {
            let replicas: Vec<String> = known.replicas.iter().map(replica).collect();
            format!("{name}: {:?} ({}), {replicas:?}", known.state, known.reason)
        });
        let idle: Vec<bool> = self.engines.iter().map(SimulatedEngine::is_idle).collect();
        let groups = self.reconciler.groups.iter();
        let groups =
            groups.map(|named| format!("{}: {:?} ({})", named.spec.name, named.group.state(), named.group.reason()));
        let (words, groups): (Vec<String>, Vec<String>) = (words.collect(), groups.collect());
        format!("{words:?}, {groups:?}; engines idle {idle:?}, {} stopping", self.stopping.len())
    }
}

/// Whatever an agent is told to run is on disk, so that the next head knows it. Excused: what is being removed is forgotten
/// before it ends, and a full disk keeps nothing that serves from serving.
pub fn check_told(ranks: &[DesiredRank], disk: &Disk, excused: impl Fn(&str) -> bool) {
    for rank in ranks {
        let name = rank.key.deployment.0.as_str();
        let record = disk.deployments.get(name).map(|record| String::from_utf8_lossy(record));
        let is_known = record.is_some_and(|record| record.contains(&rank.launch_token));
        assert!(is_known || excused(name), "{} runs, and is not on disk", rank.key);
    }
}
