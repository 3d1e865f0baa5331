//! The fault matrix: every fault of the table against real processes with real streams, cell by cell.
//!
//! Cells of one kind share a scene: machines, a deployment `m`, and streams whose text is known.

mod heads;
mod report;
mod scene;
mod table;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use heads::HeadsScene;
pub use report::{Figures, Played, Report, Verdict};
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

impl Cell {
    /// How it is called in tables, and by who asks for it alone: `kill rank-zero decode`.
    pub fn name(&self) -> String {
        format!("{} {} {}", words(self.fault), words(self.victim), words(self.moment))
    }
}

/// A variant's name in lower case, its words joined by hyphens.
pub fn words(variant: impl std::fmt::Debug) -> String {
    let mut words = String::new();
    for letter in format!("{variant:?}").chars() {
        if letter.is_uppercase() && !words.is_empty() {
            words.push('-');
        }
        words.extend(letter.to_lowercase());
    }
    words
}

/// The cells whose names have all words of a text; all of them for an empty one.
pub fn cells_named(text: &str) -> Vec<Cell> {
    let is_meant = |cell: &Cell| {
        let name = cell.name();
        text.split_whitespace().all(|word| name.split(' ').any(|part| part == word))
    };
    cells().into_iter().filter(is_meant).collect()
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

    fn play(&self, cell: &Cell) -> Figures {
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

/// Plays cells in their order. One that goes wrong does not keep the others from being played, in a scene of their own; `after_each`
/// sees the report as it is so far.
pub fn run(cells: &[Cell], mut after_each: impl FnMut(&Report)) -> Report {
    let mut report = Report::default();
    let mut scene: Option<Stage> = None;
    for cell in cells {
        if scene.as_ref().is_none_or(|scene| !scene.is_of(cell)) {
            drop(scene.take());
        }
        let started = Instant::now();
        let (verdict, figures) = play(cell, &mut scene);
        if verdict == Verdict::Wrong {
            scene = None;
        }
        let played = Played { cell: *cell, verdict, figures, took: started.elapsed() };
        println!("{played}");
        report.cells.push(played);
        after_each(&report);
    }
    report
}

/// Plays one cell in a scene that is there, or is set for it.
fn play(cell: &Cell, scene: &mut Option<Stage>) -> (Verdict, Figures) {
    let wrong = (Verdict::Wrong, Figures::new());
    if scene.is_none() {
        match catch_unwind(|| Stage::set(cell)) {
            Ok(None) => return (Verdict::LeftOut, Figures::new()),
            Ok(set) => *scene = set,
            Err(_) => return wrong,
        }
    }
    let Some(here) = scene else { return wrong };
    let started = Instant::now();
    let played = catch_unwind(AssertUnwindSafe(|| here.play(cell)));
    match played {
        Ok(figures) if started.elapsed() < CELL_DEADLINE => (Verdict::Right, figures),
        _ => {
            println!("{}", here.last_words());
            wrong
        }
    }
}
