//! Starts the processes of a run, listens to them, and sees to it that none stays.

use std::io::{BufRead, BufReader, Write};
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use phalanx_proto::DeviceKind;

use super::{BYTES, BenchError, BenchLaunch, BenchLine, Timing, WORLD_MAX, Ways, sizes};
use crate::agent::devices::{DeviceSlot, Devices};
use crate::config::Config;

/// Lines that may wait to be read.
const LINES_MAX: usize = 256;
/// Longest that all ways and sizes may take.
const DEADLINE: Duration = Duration::from_secs(600);
/// How long the others may go on when one process has given up.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// A run.
#[derive(Debug, Clone)]
pub struct Setup {
    /// This program.
    pub program: PathBuf,
    /// What it computes on.
    pub device: DeviceKind,
    /// One for each process: what makes it see its device only, as a variable and its value.
    pub slots: Vec<Option<(String, String)>>,
    /// Further variables.
    pub env: Vec<(&'static str, String)>,
    /// What is measured.
    pub ways: Ways,
    /// For which sizes, in bytes of one rank's data.
    pub sizes: Vec<usize>,
    /// Folder that keeps device code which was compiled here.
    pub kernel_cache_dir: PathBuf,
    /// The toolkit that the user has named.
    pub cuda_home: Option<PathBuf>,
    /// Longest that all of it may take.
    pub deadline: Duration,
}

/// What was measured.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Measured {
    /// Figures, in the order in which they were found.
    pub timings: Vec<Timing>,
    /// What a person should know of them.
    pub notes: Vec<String>,
}

impl Setup {
    /// Every way and size over devices that this machine offers, and what they are called.
    ///
    /// # Errors
    /// Fewer devices than asked for, or only one: nothing is exchanged then.
    pub fn of_this_machine(
        config: &Config,
        offered: &Devices,
        world_size: Option<NonZeroU32>,
    ) -> Result<(Self, Vec<String>), BenchError> {
        let on_cpus = offered.kind == DeviceKind::Cpu;
        let num_here = if on_cpus { WORLD_MAX } else { offered.slots.len().min(WORLD_MAX) };
        let usual = if on_cpus { 2 } else { num_here };
        let num = world_size.map_or(usual, |num| num.get() as usize);
        if num < 2 || num > num_here {
            return Err(BenchError::WorldSize { asked: num, kind: offered.kind, here: num_here });
        }
        let slots: Vec<DeviceSlot> = offered.slots.iter().cycle().take(num).cloned().collect();
        let of_slot = |slot: &DeviceSlot| slot.env.as_ref().map(|(name, value)| ((*name).to_owned(), value.clone()));
        let setup = Self {
            program: std::env::current_exe()?,
            device: offered.kind,
            slots: slots.iter().map(of_slot).collect(),
            env: config.nccl_defaults(),
            ways: Ways::All,
            sizes: sizes(BYTES.0, BYTES.1),
            kernel_cache_dir: config.home.kernel_cache_dir(),
            cuda_home: config.cuda_home.clone(),
            deadline: DEADLINE,
        };
        Ok((setup, slots.into_iter().map(|slot| slot.name).collect()))
    }

    /// Runs it. `heard` is told of each figure as it comes.
    ///
    /// # Errors
    /// A process that cannot be started or gives up before there is any figure, or the deadline. What gives up after that is a note.
    pub fn run(&self, mut heard: impl FnMut(&Timing)) -> Result<Measured, BenchError> {
        let key = [uuid::Uuid::new_v4(), uuid::Uuid::new_v4()].map(uuid::Uuid::into_bytes).concat();
        let (sender, lines) = sync_channel(LINES_MAX);
        let mut processes = Vec::new();
        for rank in 0..self.slots.len() {
            processes.push(Process::start(self, rank, &key, sender.clone())?);
        }
        drop(sender);
        listen(&lines, self.slots.len(), self.deadline, &mut heard)
    }

    fn launch(&self, rank: usize, group_key: &[u8]) -> BenchLaunch {
        BenchLaunch {
            parent_pid: std::process::id(),
            group_key: group_key.to_vec(),
            rank,
            world_size: self.slots.len(),
            device: self.device,
            ways: self.ways,
            sizes: self.sizes.clone(),
            kernel_cache_dir: self.kernel_cache_dir.clone(),
            cuda_home: self.cuda_home.clone(),
        }
    }
}

/// Takes lines until all processes are done, one has given up, or the time is over.
fn listen(
    lines: &Receiver<(usize, BenchLine)>,
    num_processes: usize,
    deadline: Duration,
    heard: &mut impl FnMut(&Timing),
) -> Result<Measured, BenchError> {
    let mut measured = Measured::default();
    let (mut num_done, mut failure) = (0, None);
    let mut end = Instant::now() + deadline;
    while num_done < num_processes {
        match lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok((0, BenchLine::Timing(timing))) => {
                heard(&timing);
                measured.timings.push(timing);
            }
            Ok((0, BenchLine::Note(note))) => measured.notes.push(note),
            Ok((_, BenchLine::Timing(_) | BenchLine::Note(_))) => {}
            Ok((_, BenchLine::Done)) => num_done += 1,
            Ok((rank, BenchLine::Failed(reason))) => {
                // The first has the cause; what the others say is that a peer is gone.
                num_done += 1;
                failure.get_or_insert(BenchError::Rank { rank, reason });
                end = end.min(Instant::now() + LAST_WORDS);
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                failure.get_or_insert(BenchError::Late(deadline));
                break;
            }
        }
    }
    match failure {
        Some(failure) if measured.timings.is_empty() => Err(failure),
        Some(failure) => {
            measured.notes.push(format!("it ended early: {failure}"));
            Ok(measured)
        }
        None => Ok(measured),
    }
}

/// One process; it is ended when this is dropped.
struct Process {
    child: Child,
    /// Open for as long as the process may live.
    _pipe: Option<ChildStdin>,
}

impl Process {
    fn start(
        setup: &Setup,
        rank: usize,
        group_key: &[u8],
        lines: SyncSender<(usize, BenchLine)>,
    ) -> Result<Self, BenchError> {
        let mut launch = serde_json::to_vec(&setup.launch(rank, group_key)).map_err(std::io::Error::from)?;
        launch.push(b'\n');
        let slot = setup.slots.get(rank).cloned().flatten();
        let mut command = Command::new(&setup.program);
        command.arg("reduce-bench-rank").envs(setup.env.iter().map(|(name, value)| (*name, value))).envs(slot);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (mut pipe, stdout) = (child.stdin.take(), child.stdout.take());
        if let Some(pipe) = &mut pipe {
            // A process that ended already is known by the end of its output. The line fits the pipe, so this does not wait.
            let _ = pipe.write_all(&launch);
        }
        let process = Self { child, _pipe: pipe };
        let read = move || {
            let mut said_its_last = false;
            let printed = stdout.into_iter().flat_map(|stdout| BufReader::new(stdout).lines().map_while(Result::ok));
            for line in printed {
                // Whatever else is printed there is a library's.
                let Ok(line) = serde_json::from_str::<BenchLine>(&line) else { continue };
                said_its_last |= matches!(line, BenchLine::Done | BenchLine::Failed(_));
                if lines.send((rank, line)).is_err() {
                    return;
                }
            }
            if !said_its_last {
                // Nobody listens where the run is over already.
                let _ = lines.send((rank, BenchLine::Failed("the process ended without a word".into())));
            }
        };
        std::thread::Builder::new().name("reduce-bench".into()).spawn(read)?;
        Ok(process)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // One that has ended already is only waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timing(us: f64) -> Timing {
        Timing { way: "own".into(), blocks: 0, bytes: 8192, us, right: true }
    }

    fn heard(said: Vec<(usize, BenchLine)>) -> Result<Measured, BenchError> {
        let (sender, lines) = sync_channel(LINES_MAX);
        for line in said {
            sender.send(line).unwrap();
        }
        listen(&lines, 2, Duration::from_millis(20), &mut |_| ())
    }

    #[test]
    fn figures_are_those_of_rank_0_and_the_first_failure_counts() {
        let measured = heard(vec![
            (1, BenchLine::Timing(timing(9.0))),
            (0, BenchLine::Timing(timing(3.0))),
            (0, BenchLine::Done),
            (1, BenchLine::Done),
        ]);
        assert_eq!(measured.unwrap().timings, [timing(3.0)]);
        let failed = |rank, words: &str| (rank, BenchLine::Failed(words.into()));
        let error = heard(vec![failed(1, "no device"), failed(0, "rank 1 is gone")]).unwrap_err();
        assert_eq!(error.to_string(), "rank 1: no device");
        let half = heard(vec![(0, BenchLine::Timing(timing(3.0))), failed(0, "late")]).unwrap();
        assert_eq!((half.timings.len(), half.notes.len()), (1, 1), "{half:?}");
        assert!(matches!(heard(vec![(0, BenchLine::Done)]), Err(BenchError::Late(_))));
    }
}
