//! A whole cluster in one thread and without a clock: the real state machines of membership, placement, epochs, scheduling and
//! replay, with machines, networks, disks and lives of the head that are made up, and go wrong, as a seed says.
//!
//! Not simulated: sockets, threads, the starting of ranks in its phases, the database file.
//!
//! **Invariant:** a seed plays the same story each time; what it finds is kept as a seed in [`SEEDS_KEPT`].

mod head;
mod machine;
mod users;

use std::time::{Duration, Instant};

use super::super::launch::simulated;
use head::{Disk, Head};
use machine::{Machine, Surroundings};
use users::Users;

use crate::stories::{self, Random};

/// Stories that once went wrong.
const SEEDS_KEPT: &[u64] = &[
    // An engine was called idle with a step on its way, and its blocks were counted.
    25_501,
    // A placement group was refused by a full disk, and what had been asked for in it meanwhile was not.
    30_700,
    // A deployment was removed and came again by the same name, with incarnations that had been counted before: the new one
    // heard what was still said of the old one.
    977_003,
    // While a store that had been full was left alone, agents were told of ranks that nobody had tried to write down.
    2208,
    // A deployment that waited for slots was called removed before its record was off the disk, and came back.
    118, 138,
    // A node that was to leave waited for processes of a deployment that was refused, which nobody had ever started.
    34, 55,
    // A placement group that a full disk refused was on disk nevertheless when a later change of it got there.
    54,
    // What had moved away and could not be written down claimed its old slots again, which others had been given since.
    245,
    // A rank had dialed the next head before its agent did, and the agent died: nobody spoke of that process again, and its
    // node waited for it for ever.
    10_420, 12_543, 14_643, 23_856, 49_133,
    // A replica without slots was waited for on the node where it had been, of whose ranks nobody spoke any more.
    56_456, 184_339, 190_939, 338_786, 403_043, 458_567, 609_386, 648_376, 653_739, 661_018,
    // A placement group that was removed by force left the disk before what ran in it, which could never run again.
    60_233, 61_018, 64_876,
];
/// Stories that every run of the tests plays.
const NUM_SEEDS: u64 = 500;

const NUM_MACHINES: u32 = 4;
const NUM_SLOTS: u32 = 2;
const NUM_BLOCKS: u32 = 48;
/// Moments in which something may go wrong.
const NUM_MOMENTS: u32 = 120;
/// Moments until everything must be well again once nothing goes wrong any more, and how long each is.
const NUM_CALM_MOMENTS: u32 = 1_500;
const CALM_MOMENT_MS: u64 = 250;

/// Everything.
struct World {
    random: Random,
    start: Instant,
    now: u64,
    is_calm: bool,
    head: Option<Head>,
    head_back_at: u64,
    term: u64,
    disk: Disk,
    machines: Vec<Machine>,
    users: Users,
}

impl World {
    fn new(seed: u64) -> Self {
        Self {
            random: Random::new(seed),
            start: Instant::now(),
            now: 1_000,
            is_calm: false,
            head: None,
            head_back_at: 0,
            term: 0,
            disk: Disk::default(),
            machines: (0..NUM_MACHINES).map(Machine::new).collect(),
            users: Users::default(),
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
            if let Some(head) = &self.head {
                self.users.wish(head, &mut self.random);
            }
        }
        let head = self.head.as_ref().map(|head| (head.events.clone(), self.term));
        for machine in &mut self.machines {
            let head = head.clone();
            machine.live(&mut Surroundings { now: self.now, random: &mut self.random, head, calm: self.is_calm });
        }
        let now = self.instant();
        let Some(head) = &mut self.head else { return };
        let promises = &mut self.users.promises;
        head.write(&mut self.disk, &mut promises.unwritten, &mut self.random);
        head.drive_groups(self.now, &mut self.machines, &mut self.random);
        head.drive_engines(self.is_calm, &mut self.random);
        head.reconcile(now, &mut self.random);
        head.take_orders(self.term, self.now, &mut promises.epochs, &mut self.random);
        for machine in &mut self.machines {
            let (disk, promises) = (&self.disk, &self.users.promises);
            let excused = |name: &str| promises.unwritten.contains(name) || promises.removing.contains(name);
            machine.collect(self.now, &mut self.random, |ranks| head::check_told(ranks, disk, excused));
        }
        head.check();
        self.users.hear();
    }

    fn start_head(&mut self) {
        self.term += 1;
        let head = Head::start(self.term, &self.disk, self.instant());
        self.users.meet_head(&head.names());
        self.head = Some(head);
    }

    fn kill_head(&mut self) {
        let Some(head) = self.head.take() else { return };
        head.die(&mut self.disk, &mut self.random);
        self.users.lose_head();
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
            15 => self.disk.is_full = !self.disk.is_full,
            // The head stands still.
            16 => self.now += length,
            _ => {}
        }
    }

    /// Nothing goes wrong any more: what was promised must hold in the end.
    fn calm_down(&mut self) {
        self.is_calm = true;
        self.disk.is_full = false;
        self.head_back_at = self.now;
        self.machines.iter_mut().for_each(|machine| machine.heal(self.now));
        for _ in 0..NUM_CALM_MOMENTS {
            self.live();
            if self.is_well() {
                return self.check_end();
            }
        }
        let head = self.head.as_ref().map(Head::describe).unwrap_or_default();
        let (promised, asked) = (&self.users.promises.acknowledged, self.users.unanswered());
        panic!("promised {promised:?}, without an answer {asked:?}, in the end: {head}");
    }

    fn is_well(&self) -> bool {
        let Some(head) = &self.head else { return false };
        let promises = &self.users.promises;
        let mut promised = promises.acknowledged.difference(&promises.removing);
        head.is_quiet() && self.users.unanswered().is_empty() && promised.all(|name| head.serves(name))
    }

    fn check_end(&self) {
        if let Some(head) = &self.head {
            head.check_end();
        }
    }
}

/// Plays one story; gives a sign of all that happened in it.
fn play(seed: u64) -> (u64, u64) {
    struct Simulated;
    impl Drop for Simulated {
        fn drop(&mut self) {
            simulated::turn(false);
        }
    }
    let _simulated = Simulated;
    // Tasks are spawned into it and never run: the simulation does what they would.
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let _entered = runtime.enter();
    simulated::turn(true);
    let mut world = World::new(seed);
    for _ in 0..NUM_MOMENTS {
        world.live();
    }
    world.calm_down();
    (world.random.trace(), world.now)
}

#[test]
fn cluster_stories_that_once_went_wrong() {
    stories::play_kept(SEEDS_KEPT, |seed| {
        play(seed);
    });
}

#[test]
fn a_seed_plays_the_same_story_each_time() {
    (0..20).for_each(|seed| assert_eq!(play(seed), play(seed), "seed {seed}"));
}

#[test]
fn cluster_stories_end_well() {
    stories::play_range("cluster", NUM_SEEDS, |seed| {
        play(seed);
    });
}
