//! `worker join` without `--block`: starts the agent as a process of its own, and returns when it is known how that went.

use std::fs::OpenOptions;
use std::io::{self, BufRead, BufReader};
use std::process::{ChildStdout, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use super::Report;
use crate::config::Home;

/// What the background process says about its start, one line on its standard output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Started {
    /// The head took this node in.
    Joined,
    /// The head does not answer yet.
    Waiting(String),
    /// The process has ended; the end of its standard error.
    Failed {
        /// Its exit code, 1 where a signal ended it.
        code: i32,
        /// What it said.
        words: String,
    },
}

/// Starts `command` in the background and waits for its first report.
///
/// The process leaves this session by itself (`setsid`): it stays when the terminal goes.
///
/// # Errors
/// It cannot be started.
pub fn start(mut command: Command, home: &Home, patience: Duration) -> io::Result<(u32, Started)> {
    std::fs::create_dir_all(home.log_dir())?;
    let errors = home.log_dir().join("agent.stderr");
    let sink = OpenOptions::new().create(true).write(true).truncate(true).open(&errors)?;
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(sink).spawn()?;
    let pid = child.id();
    let reports = follow(child.stdout.take())?;
    let mut last = Started::Waiting("the head did not answer yet".into());
    let deadline = std::time::Instant::now() + patience;
    loop {
        match reports.recv_timeout(deadline.saturating_duration_since(std::time::Instant::now())) {
            Ok(Started::Joined) => return Ok((pid, Started::Joined)),
            Ok(other) => last = other,
            Err(mpsc::RecvTimeoutError::Timeout) => return Ok((pid, last)),
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                let code = child.wait()?.code().unwrap_or(1);
                let words = std::fs::read_to_string(&errors).unwrap_or_default().trim().to_owned();
                return Ok((pid, Started::Failed { code, words }));
            }
        }
    }
}

/// The line for a report.
pub fn line(report: &Report) -> String {
    match report {
        Report::Joined => "joined".into(),
        Report::Waiting { reason } => format!("waiting {}", reason.replace('\n', " ")),
    }
}

fn follow(output: Option<ChildStdout>) -> io::Result<mpsc::Receiver<Started>> {
    let (sender, receiver) = mpsc::sync_channel(8);
    let output = output.ok_or_else(|| io::Error::other("no pipe to the background process"))?;
    let read = move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            let started = match line.split_once(' ') {
                Some(("waiting", reason)) => Started::Waiting(reason.into()),
                _ => Started::Joined,
            };
            if sender.send(started).is_err() {
                return;
            }
        }
    };
    std::thread::Builder::new().name("report".into()).spawn(read)?;
    Ok(receiver)
}
