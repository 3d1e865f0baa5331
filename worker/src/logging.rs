//! Where log lines go: stderr, and files that cannot grow without end.
//!
//! **Invariant:** a log takes at most twice its limit on disk.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use crate::config::LogFormat;

/// A log file that starts anew at its limit and keeps the one before beside it, as `NAME.1`.
#[derive(Debug)]
pub struct BoundedLog {
    path: PathBuf,
    bytes_max: u64,
    file: File,
    bytes: u64,
}

impl BoundedLog {
    /// Opens a log, behind what it holds already.
    ///
    /// # Errors
    /// The file cannot be opened for writing.
    pub fn open(path: &Path, bytes_max: u64) -> io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        let bytes = file.metadata()?.len();
        Ok(Self { path: path.to_path_buf(), bytes_max, file, bytes })
    }

    fn turn_over(&mut self) -> io::Result<()> {
        let mut old = self.path.clone().into_os_string();
        old.push(".1");
        std::fs::rename(&self.path, old)?;
        self.file = OpenOptions::new().create(true).append(true).open(&self.path)?;
        self.bytes = 0;
        Ok(())
    }
}

impl Write for BoundedLog {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.bytes > 0 && self.bytes + line.len() as u64 > self.bytes_max {
            self.turn_over()?;
        }
        let written = self.file.write(line)?;
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Writes each line to stderr, to a file, or to both.
#[derive(Clone)]
pub struct LogTarget {
    to_stderr: bool,
    file: Option<Arc<Mutex<BoundedLog>>>,
}

impl LogTarget {
    /// Lines go to stderr.
    pub fn stderr() -> Self {
        Self { to_stderr: true, file: None }
    }

    /// Lines go to this file too, or only there.
    pub fn file(log: BoundedLog, to_stderr: bool) -> Self {
        Self { to_stderr, file: Some(Arc::new(Mutex::new(log))) }
    }
}

impl Write for LogTarget {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if let Some(file) = &self.file {
            file.lock().unwrap_or_else(PoisonError::into_inner).write_all(line)?;
        }
        if self.to_stderr {
            io::stderr().write_all(line)?;
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for LogTarget {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

/// Starts logging in this process. `level`: a word, or a filter as `tracing` reads it.
///
/// # Errors
/// A filter that is not understood, or logging that was started before.
pub fn start(
    level: &str,
    format: LogFormat,
    target: LogTarget,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let filter = EnvFilter::try_new(level)?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(target).with_ansi(false);
    match format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().try_init(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_turns_over_at_its_limit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.log");
        for _ in 0..2 {
            let mut log = BoundedLog::open(&path, 100).unwrap();
            for i in 0..30 {
                writeln!(log, "line {i:04}").unwrap();
            }
        }
        let size = |name: &str| std::fs::metadata(dir.path().join(name)).unwrap().len();
        assert!(size("x.log") <= 100 && size("x.log.1") <= 100);
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.ends_with("line 0029\n"), "{text}");
    }
}
