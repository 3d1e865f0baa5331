//! The fault matrix: every fault of the table against real processes with real streams, cell by cell.
//!
//! Cells of one kind share a scene: machines, a deployment `m`, and streams whose text is known.

mod heads;
mod scene;
mod table;

use std::time::{Duration, Instant};

use heads::HeadsScene;
use scene::{Kind, Scene};
pub use table::{Expected, Fault, Moment, Row, TABLE, Victim};

/// Longest time of a cell; each of its waits is shorter.
const CELL_DEADLINE: Duration = Duration::from_secs(180);

/// One cell of the table.
#[derive(Debug, Clone, Copy)]
pub struct Cell {
    /// What goes wrong.
    pub fault: Fault,
    /// Whom it hits.
    pub victim: Victim,
    /// When.
    pub moment: Moment,
    /// What must come of it.
    pub expected: Expected,
}

/// All cells, those of one scene together.
pub fn cells() -> Vec<Cell> {
    let of_row = |&Row(fault, victim, moments, expected): &Row| {
        moments.iter().map(move |&moment| Cell { fault, victim, moment, expected })
    };
    let mut cells: Vec<Cell> = TABLE.iter().flat_map(of_row).collect();
    cells.sort_by_key(Scene::kind);
    cells
}

/// Where cells are played.
enum Stage {
    One(Box<Scene>),
    Two(Box<HeadsScene>),
}

impl Stage {
    fn set(cell: &Cell) -> Option<Self> {
        match Scene::kind(cell) {
            Kind::TwoHeads | Kind::FarHead => HeadsScene::set(cell).map(|scene| Self::Two(Box::new(scene))),
            _ => Scene::set(cell).map(|scene| Self::One(Box::new(scene))),
        }
    }

    fn is_of(&self, cell: &Cell) -> bool {
        match self {
            Self::One(scene) => scene.is_of(cell),
            Self::Two(scene) => scene.is_of(cell),
        }
    }

    fn play(&self, cell: &Cell) -> String {
        match self {
            Self::One(scene) => scene.play(cell),
            Self::Two(scene) => scene.play(cell),
        }
    }

    fn last_words(&self) -> String {
        match self {
            Self::One(scene) => scene.last_words(),
            Self::Two(scene) => scene.last_words(),
        }
    }
}

/// What became of some cells.
#[derive(Debug, Default)]
pub struct Outcome {
    /// How many went as expected.
    pub num_right: usize,
    /// How many could not be played for want of rights; they are named.
    pub num_left_out: usize,
    /// How many did not go as expected; they are named too.
    pub num_wrong: usize,
}

/// Plays cells in their order. One that goes wrong does not keep the others from being played, in a scene of their own.
pub fn run(cells: &[Cell]) -> Outcome {
    let mut outcome = Outcome::default();
    let mut scene: Option<Stage> = None;
    for cell in cells {
        let Cell { fault, victim, moment, expected } = cell;
        if scene.as_ref().is_none_or(|scene| !scene.is_of(cell)) {
            drop(scene.take());
            scene = Stage::set(cell);
        }
        let Some(here) = &scene else {
            println!("{fault:?} of {victim:?}, {moment:?}: left out, this machine gives no right to do that");
            outcome.num_left_out += 1;
            continue;
        };
        let started = Instant::now();
        let played = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| here.play(cell)));
        let took = started.elapsed();
        let seconds = took.as_secs_f64();
        match played {
            Ok(words) if took < CELL_DEADLINE => {
                println!("{fault:?} of {victim:?}, {moment:?}: {expected:?} as expected; {words} [{seconds:.1} s]");
                outcome.num_right += 1;
            }
            _ => {
                println!(
                    "{fault:?} of {victim:?}, {moment:?}: NOT {expected:?} [{seconds:.1} s]\n{}",
                    here.last_words()
                );
                outcome.num_wrong += 1;
                scene = None;
            }
        }
    }
    outcome
}
