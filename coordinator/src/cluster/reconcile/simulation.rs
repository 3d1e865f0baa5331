//! A whole cluster in one thread and without a clock: the real state machines of membership, placement, epochs, scheduling and
//! replay, with machines, networks, disks and lives of the head that are made up, and go wrong, as a seed says.
//!
//! Not simulated: sockets, threads, the starting of ranks in its phases, the database file.
//!
//! **Invariant:** a seed plays the same story each time; what it finds is kept as a seed in [`SEEDS_KEPT`].

mod head;
mod machine;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use phalanx_proto::DeploymentName;
use tokio::sync::{mpsc, oneshot};

use super::super::ClusterError;
use super::super::deployment::DeployEvent;
use super::super::event::ClusterEvent;
use super::super::launch::simulated;
use super::super::membership::tests::checked;
use super::super::strategy::Strategy;
use head::Head;
use machine::{Machine, Surroundings};

/// Stories that once went wrong.
const SEEDS_KEPT: &[u64] = &[
    // While a store that had been full was left alone, agents were told of ranks that nobody had tried to write down.
    2208,
];
/// Stories that every run of the tests plays.
const NUM_SEEDS: u64 = 200;

const NUM_MACHINES: u32 = 4;
const NUM_SLOTS: u32 = 2;
const NUM_BLOCKS: u32 = 48;
/// Moments in which something may go wrong.
const NUM_MOMENTS: u32 = 120;
/// Moments until everything must be well again once nothing goes wrong any more, and how long each is.
const NUM_CALM_MOMENTS: u32 = 1_500;
const CALM_MOMENT_MS: u64 = 250;

/// A small generator: the whole story is in its seed.
pub struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound.max(1)
    }

    fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }
}

/// What the head has promised to users, and to itself.
#[derive(Default)]
struct Promises {
    /// Deployments that were called ready.
    acknowledged: BTreeSet<String>,
    /// Those whose end was asked for, and not answered.
    removing: BTreeSet<String>,
    /// The last epoch of each replica, by the life of the head that counted it.
    epochs: BTreeMap<(String, u32), (u64, u64, u64)>,
    /// Deployments that a full disk has kept from being written down.
    unwritten: BTreeSet<String>,
}

/// Everything.
struct World {
    random: Random,
    start: Instant,
    now: u64,
    is_calm: bool,
    head: Option<Head>,
    head_back_at: u64,
    term: u64,
    disk: BTreeMap<String, Vec<u8>>,
    disk_is_full: bool,
    machines: Vec<Machine>,
    promises: Promises,
    watchers: Vec<(String, mpsc::Receiver<DeployEvent>)>,
    ends: Vec<(String, oneshot::Receiver<Result<(), ClusterError>>)>,
}

impl World {
    fn new(seed: u64) -> Self {
        Self {
            random: Random(seed),
            start: Instant::now(),
            now: 1_000,
            is_calm: false,
            head: None,
            head_back_at: 0,
            term: 0,
            disk: BTreeMap::new(),
            disk_is_full: false,
            machines: (0..NUM_MACHINES).map(Machine::new).collect(),
            promises: Promises::default(),
            watchers: Vec::new(),
            ends: Vec::new(),
        }
    }

    fn instant(&self) -> Instant {
        self.start + Duration::from_millis(self.now)
    }

    /// One moment of everybody's life.
    fn live(&mut self) {
        self.now += if self.is_calm { CALM_MOMENT_MS } else { 5 + self.random.below(400) };
        if self.head.is_none() && self.now >= self.head_back_at {
            self.start_head();
        }
        if !self.is_calm {
            self.go_wrong();
            self.use_it();
        }
        let head = self.head.as_ref().map(|head| (head.events.clone(), self.term));
        for machine in &mut self.machines {
            let head = head.clone();
            machine.live(&mut Surroundings { now: self.now, random: &mut self.random, head, calm: self.is_calm });
        }
        let now = self.instant();
        let Some(head) = &mut self.head else { return };
        head.write(&mut self.disk, self.disk_is_full, &mut self.promises.unwritten, &mut self.random);
        head.drive_groups(self.now, &mut self.machines, &mut self.random);
        head.drive_engines(self.is_calm, &mut self.random);
        head.reconcile(now, &mut self.random);
        head.take_orders(self.term, self.now, &mut self.promises.epochs, &mut self.random);
        for machine in &mut self.machines {
            let (disk, promises) = (&self.disk, &self.promises);
            let excused = |name: &str| promises.unwritten.contains(name) || promises.removing.contains(name);
            machine.collect(self.now, &mut self.random, |ranks| head::check_told(ranks, disk, excused));
        }
        head.check();
        self.hear();
    }

    fn start_head(&mut self) {
        self.term += 1;
        let head = Head::start(self.term, &self.disk, self.instant());
        let names = head.names();
        for name in &self.promises.acknowledged {
            let may_be_gone = self.promises.removing.contains(name);
            assert!(may_be_gone || names.contains(name), "{name} was acknowledged and does not come back");
        }
        // What became of an end that was asked for is known now.
        self.promises.acknowledged.retain(|name| names.contains(name));
        self.promises.removing.clear();
        self.head = Some(head);
    }

    fn kill_head(&mut self) {
        let Some(head) = self.head.take() else { return };
        head.die(&mut self.disk, &mut self.random);
        self.watchers.clear();
        self.ends.clear();
        self.head_back_at = self.now + 50 + self.random.below(5_000);
    }

    /// Something bad happens, now and then.
    fn go_wrong(&mut self) {
        let now = self.now;
        let number = self.random.below(self.machines.len() as u64) as usize;
        let length = 300 + self.random.below(15_000);
        let machine = &mut self.machines[number];
        match self.random.below(120) {
            0..=5 => {
                let pick = self.random.below(4) as usize;
                if let Some(rank) = machine.ranks.values_mut().nth(pick) {
                    rank.kill();
                }
            }
            6 => {
                if let Some(rank) = machine.ranks.values_mut().next() {
                    rank.is_frozen = true;
                }
            }
            7 | 8 if machine.agent_pid != 0 => machine.kill_agent(now, now + length / 3),
            9 => machine.frozen_until = now + length,
            10..=12 if !machine.is_cut(now) => (machine.cut_since, machine.cut_until) = (now, now + length),
            13 | 14 => self.kill_head(),
            15 => self.disk_is_full = !self.disk_is_full,
            // The head stands still.
            16 => self.now += length,
            _ => {}
        }
    }

    /// Somebody wants something, now and then.
    fn use_it(&mut self) {
        let Some(head) = &mut self.head else { return };
        let names = head.names();
        let name = ["a", "b", "c"][self.random.below(3) as usize].to_owned();
        match self.random.below(30) {
            0..=2 if !names.contains(&name) => {
                let (size, replicas) = (1 + self.random.below(2) as u32, 1 + self.random.below(2) as u32);
                if head.num_slots_wanted() + size * replicas > NUM_MACHINES * NUM_SLOTS {
                    return;
                }
                let mut checked = checked(&name, size);
                checked.spec.replicas = replicas;
                checked.spec.strategy = Strategy::Pack;
                checked.spec.wait = Some(Duration::from_secs(3_600));
                let (watcher, events) = mpsc::channel(64);
                head.tell(ClusterEvent::Deploy { checked: Box::new(checked), watcher });
                self.watchers.push((name, events));
            }
            3 if names.contains(&name) => {
                let (reply, answer) = oneshot::channel();
                self.promises.removing.insert(name.clone());
                head.tell(ClusterEvent::Undeploy { name: DeploymentName(name.clone()), reply });
                self.ends.push((name, answer));
            }
            _ => {}
        }
    }

    /// Users hear what has become of their wishes.
    fn hear(&mut self) {
        let promises = &mut self.promises;
        self.watchers.retain_mut(|(name, events)| {
            loop {
                match events.try_recv() {
                    Ok(DeployEvent::Ready(_)) => drop(promises.acknowledged.insert(name.clone())),
                    Ok(_) => {}
                    Err(mpsc::error::TryRecvError::Empty) => return true,
                    Err(mpsc::error::TryRecvError::Disconnected) => return false,
                }
            }
        });
        self.ends.retain_mut(|(name, answer)| match answer.try_recv() {
            Ok(Ok(())) => {
                promises.acknowledged.remove(name);
                promises.removing.remove(name);
                false
            }
            Err(oneshot::error::TryRecvError::Empty) => true,
            _ => false,
        });
    }

    /// Nothing goes wrong any more: what was promised must hold in the end.
    fn calm_down(&mut self) {
        self.is_calm = true;
        self.disk_is_full = false;
        self.head_back_at = self.now;
        self.machines.iter_mut().for_each(|machine| machine.heal(self.now));
        for _ in 0..NUM_CALM_MOMENTS {
            self.live();
            if self.is_well() {
                return self.check_end();
            }
        }
        let head = self.head.as_ref().map(Head::describe).unwrap_or_default();
        panic!("promised {:?}, in the end: {head}", self.promises.acknowledged);
    }

    fn is_well(&self) -> bool {
        let Some(head) = &self.head else { return false };
        let promised = self.promises.acknowledged.difference(&self.promises.removing);
        head.is_quiet() && promised.into_iter().all(|name| head.serves(name))
    }

    fn check_end(&self) {
        if let Some(head) = &self.head {
            head.check_end();
        }
    }
}

/// Plays one story.
fn play(seed: u64) {
    struct Named(u64);
    impl Drop for Named {
        fn drop(&mut self) {
            simulated::turn(false);
            if std::thread::panicking() {
                eprintln!("this was seed {}", self.0);
            }
        }
    }
    let _named = Named(seed);
    // Tasks are spawned into it and never run: the simulation does what they would.
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let _entered = runtime.enter();
    simulated::turn(true);
    let mut world = World::new(seed);
    for _ in 0..NUM_MOMENTS {
        world.live();
    }
    world.calm_down();
}

#[test]
fn stories_that_once_went_wrong() {
    SEEDS_KEPT.iter().for_each(|seed| play(*seed));
}

/// As many stories as `PHALANX_SIMULATION_SEEDS` says, from `PHALANX_SIMULATION_FIRST` on, on two threads.
#[test]
fn stories_end_well() {
    #[expect(clippy::disallowed_methods, reason = "a test that is made longer by hand")]
    let said = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let (first, count) = (said("PHALANX_SIMULATION_FIRST"), said("PHALANX_SIMULATION_SEEDS"));
    let (first, count) = (first.unwrap_or(0), count.unwrap_or(NUM_SEEDS));
    let started = Instant::now();
    std::thread::scope(|scope| {
        let half = first + count / 2;
        scope.spawn(move || (first..half).for_each(play));
        scope.spawn(move || (half..first + count).for_each(play));
    });
    let seconds = started.elapsed().as_secs_f64();
    println!("{count} seeds from {first} on in {seconds:.1} s: {:.0} a second", count as f64 / seconds);
}
