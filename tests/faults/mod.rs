//! The fault matrix: every fault of the table against real processes with real streams, cell by cell.
//!
//! Cells of one kind share a scene: machines, a deployment `m`, and streams whose text is known.

mod scene;
mod table;

use std::time::{Duration, Instant};

pub use scene::Scene;
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

/// Runs cells in their order. Gives how many ran, and those that could not for want of rights, which are named.
pub fn run(cells: &[Cell]) -> (usize, usize) {
    let (mut num_run, mut num_left_out) = (0, 0);
    let mut scene: Option<Scene> = None;
    for cell in cells {
        let Cell { fault, victim, moment, expected } = cell;
        if scene.as_ref().is_none_or(|scene| !scene.is_of(cell)) {
            drop(scene.take());
            scene = Scene::set(cell);
        }
        let Some(scene) = &scene else {
            println!("{fault:?} of {victim:?}, {moment:?}: left out, this machine gives no right to do that");
            num_left_out += 1;
            continue;
        };
        let started = Instant::now();
        let words = scene.play(cell);
        let took = started.elapsed();
        println!(
            "{fault:?} of {victim:?}, {moment:?}: {expected:?} as expected; {words} [{:.1} s]",
            took.as_secs_f64()
        );
        assert!(took < CELL_DEADLINE, "{cell:?} took {took:?}");
        num_run += 1;
    }
    (num_run, num_left_out)
}
