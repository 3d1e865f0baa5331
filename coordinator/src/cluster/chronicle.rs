//! What happened to the cluster, in plain words: the last events in memory, and in a file that outlives the head.
//!
//! Whoever changes something notes it here; `coordinator events` reads. The file is written by a thread of its own.
//!
//! **Invariant:** memory and file are bounded; noting an event never waits.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use phalanx_proto::EventRecord;
use phalanx_trust::files::private_dir;
use tokio::sync::watch;
use tracing::warn;

use super::report;
use crate::config::defaults;

/// Events that may wait for the disk.
const WRITES_MAX: usize = 256;

/// The story of a cluster. Cheap to clone.
#[derive(Clone)]
pub struct Chronicle {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Chronicle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Chronicle").field("newest", &*self.shared.newest.borrow()).finish_non_exhaustive()
    }
}

struct Shared {
    events: Mutex<VecDeque<EventRecord>>,
    newest: watch::Sender<u64>,
    file: Option<SyncSender<EventRecord>>,
}

impl Default for Chronicle {
    fn default() -> Self {
        Self::new(VecDeque::new(), None)
    }
}

impl Chronicle {
    /// Goes on where the last head of this file ended. Where it cannot be written, events are kept in memory only.
    pub fn open(path: &Path) -> Self {
        let events = remembered(path);
        match writer(path.to_owned()) {
            Ok(file) => Self::new(events, Some(file)),
            Err(error) => {
                warn!(path = %path.display(), %error, "events are kept in memory only");
                Self::new(events, None)
            }
        }
    }

    fn new(events: VecDeque<EventRecord>, file: Option<SyncSender<EventRecord>>) -> Self {
        let newest = watch::Sender::new(events.back().map_or(0, |event| event.sequence));
        Self { shared: Arc::new(Shared { events: Mutex::new(events), newest, file }) }
    }

    /// Adds an event; its number and time are filled in here.
    pub fn note(&self, event: EventRecord) {
        let mut events = self.shared.events.lock().unwrap_or_else(PoisonError::into_inner);
        let sequence = events.back().map_or(0, |event| event.sequence) + 1;
        let event = EventRecord { sequence, at: report::timestamp(SystemTime::now()), ..event };
        if events.len() == defaults::EVENTS_MAX {
            events.pop_front();
        }
        events.push_back(event.clone());
        drop(events);
        if let Some(file) = &self.shared.file {
            // Where the disk is that slow, memory has it still.
            let _ = file.try_send(event);
        }
        self.shared.newest.send_replace(sequence);
    }

    /// Events after this number, of one deployment where one is named.
    pub fn after(&self, sequence: u64, deployment: Option<&str>) -> Vec<EventRecord> {
        let events = self.shared.events.lock().unwrap_or_else(PoisonError::into_inner);
        let is_its = |event: &&EventRecord| deployment.is_none() || event.deployment.as_deref() == deployment;
        events.iter().filter(|event| event.sequence > sequence).filter(is_its).cloned().collect()
    }

    /// Tells the number of the newest event whenever there is one.
    pub fn newest(&self) -> watch::Receiver<u64> {
        self.shared.newest.subscribe()
    }
}

/// The last events of the file and of the one before it.
fn remembered(path: &Path) -> VecDeque<EventRecord> {
    let mut events = VecDeque::new();
    for path in [older(path), path.to_owned()] {
        let Ok(file) = File::open(&path) else { continue };
        // A line that was cut by a crash is passed over.
        let lines = BufReader::new(file).lines().map_while(Result::ok);
        for event in lines.filter_map(|line| serde_json::from_str::<EventRecord>(&line).ok()) {
            if events.len() == defaults::EVENTS_MAX {
                events.pop_front();
            }
            events.push_back(event);
        }
    }
    events
}

fn older(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    PathBuf::from(name)
}

/// The thread that writes the file and turns it over at its limit; it ends with the last sender.
fn writer(path: PathBuf) -> io::Result<SyncSender<EventRecord>> {
    if let Some(folder) = path.parent() {
        private_dir(folder)?;
    }
    let open = |path: &Path| OpenOptions::new().create(true).append(true).mode(0o600).open(path);
    let mut file = open(&path)?;
    let (events, inbox) = mpsc::sync_channel::<EventRecord>(WRITES_MAX);
    let write = move || {
        let mut has_failed = false;
        for event in inbox {
            let written = (|| {
                if file.metadata()?.len() > defaults::EVENT_BYTES_MAX {
                    fs::rename(&path, older(&path))?;
                    file = open(&path)?;
                }
                let mut line = serde_json::to_vec(&event)?;
                line.push(b'\n');
                file.write_all(&line)
            })();
            if let Err(error) = &written
                && !has_failed
            {
                warn!(path = %path.display(), %error, "events cannot be written");
            }
            has_failed = written.is_err();
        }
    };
    std::thread::Builder::new().name("events".into()).spawn(write)?;
    Ok(events)
}

/// An event of a level and a kind.
pub(super) fn event(level: Level, kind: &str, text: impl Into<String>) -> EventRecord {
    EventRecord { level: level.as_str().to_owned(), kind: kind.to_owned(), text: text.into(), ..EventRecord::default() }
}

/// How much an event matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Level {
    /// The course of things.
    Info,
    /// It went on, worse.
    Warn,
    /// A person must act.
    Error,
}

impl Level {
    /// The word in events.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warn => "warn",
            Self::Error => "error",
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    fn note(chronicle: &Chronicle, text: &str, deployment: &str) {
        let deployment = (!deployment.is_empty()).then(|| deployment.to_owned());
        chronicle.note(EventRecord { deployment, ..event(Level::Info, "test", text) });
    }

    #[test]
    fn the_last_events_stay_and_are_found_by_deployment() {
        let chronicle = Chronicle::default();
        for number in 0..defaults::EVENTS_MAX + 5 {
            note(&chronicle, &number.to_string(), if number % 2 == 0 { "m" } else { "" });
        }
        let all = chronicle.after(0, None);
        assert_eq!((all.len(), all[0].text.as_str()), (defaults::EVENTS_MAX, "5"));
        let newest = *chronicle.newest().borrow();
        assert_eq!(newest, defaults::EVENTS_MAX as u64 + 5);
        assert_eq!(chronicle.after(newest - 4, Some("m")).len(), 2);
    }

    #[test]
    fn a_head_that_is_started_again_remembers() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("logs/events.jsonl");
        let first = Chronicle::open(&path);
        note(&first, "one", "m");
        note(&first, "two", "");
        let started = Instant::now();
        while fs::read_to_string(&path).unwrap_or_default().lines().count() < 2 {
            assert!(started.elapsed() < Duration::from_secs(10), "it is not written");
            std::thread::sleep(Duration::from_millis(5));
        }
        fs::write(&path, fs::read_to_string(&path).expect("reads") + "{\"cut\n").expect("writes");
        let second = Chronicle::open(&path);
        note(&second, "three", "");
        let story: Vec<(u64, String)> =
            second.after(0, None).into_iter().map(|event| (event.sequence, event.text)).collect();
        assert_eq!(story, [(1, "one".to_owned()), (2, "two".to_owned()), (3, "three".to_owned())]);
    }
}
