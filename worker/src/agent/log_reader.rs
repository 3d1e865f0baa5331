//! Parts of this node's logs, for whoever asks the head.
//!
//! **Invariant:** one answer is bounded, and only this node's own logs are read: names come from here, never from outside.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use phalanx_proto::{DeploymentName, LogPart, LogRequest, LogSource, LogStart, Rank};

use crate::config::defaults;

/// The agent's own log in its folder.
pub const AGENT_LOG: &str = "agent.log";

/// The log of a rank in its folder.
pub fn rank_log(dir: &Path, deployment: &DeploymentName, replica: u32, rank: Rank) -> PathBuf {
    let fine = |c: char| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' };
    let deployment: String = deployment.0.chars().map(fine).collect();
    dir.join(format!("rank-{deployment}-{replica}-{rank}.log"))
}

/// Reads what was asked for; what goes wrong is part of the answer.
pub fn read(dir: &Path, request: &LogRequest) -> LogPart {
    let path = match &request.source {
        LogSource::Agent => dir.join(AGENT_LOG),
        LogSource::Rank { deployment, replica, rank } => rank_log(dir, deployment, *replica, *rank),
    };
    let bytes_max = u64::from(request.bytes_max.min(defaults::LOG_PART_BYTES_MAX));
    match read_part(&path, request.start, bytes_max) {
        Ok((text, next_offset)) => LogPart { id: request.id, text, next_offset, error: String::new() },
        Err(error) => {
            let error = format!("cannot read {}: {error}", path.display());
            LogPart { id: request.id, error, ..LogPart::default() }
        }
    }
}

fn read_part(path: &Path, start: LogStart, bytes_max: u64) -> io::Result<(Vec<u8>, u64)> {
    let mut file = File::open(path)?;
    let len = file.metadata()?.len();
    let from = match start {
        // A file that is shorter than it was has turned over: it is read from its beginning.
        LogStart::Offset(offset) if offset <= len => offset,
        LogStart::Offset(_) => 0,
        LogStart::Tail(_) => len.saturating_sub(bytes_max),
    };
    file.seek(SeekFrom::Start(from))?;
    let mut text = Vec::new();
    file.take(bytes_max).read_to_end(&mut text)?;
    let next_offset = from + text.len() as u64;
    if let LogStart::Tail(lines) = start {
        text.drain(..before_last_lines(&text, lines as usize));
    }
    Ok((text, next_offset))
}

/// Where the last lines begin.
fn before_last_lines(text: &[u8], num_lines: usize) -> usize {
    let ends: Vec<usize> = text.iter().enumerate().filter(|(_, byte)| **byte == b'\n').map(|(at, _)| at + 1).collect();
    let unended = usize::from(ends.last().copied().unwrap_or_default() < text.len());
    let num_whole = num_lines.saturating_sub(unended);
    match ends.len().checked_sub(num_whole + 1) {
        Some(index) => ends[index],
        None => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(dir: &Path, start: LogStart, bytes_max: u32) -> LogPart {
        read(dir, &LogRequest { id: 7, source: LogSource::Agent, start, bytes_max })
    }

    #[test]
    fn the_end_of_a_log_is_read_and_then_what_comes_after() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(AGENT_LOG);
        assert!(ask(dir.path(), LogStart::Tail(1), 100).error.contains("agent.log"));
        std::fs::write(&path, "one\ntwo\nthree\n").unwrap();
        let part = ask(dir.path(), LogStart::Tail(2), 100);
        assert_eq!((part.id, part.text.as_slice(), part.next_offset), (7, b"two\nthree\n".as_slice(), 14));
        assert_eq!(ask(dir.path(), LogStart::Tail(9), 100).text, b"one\ntwo\nthree\n");
        assert_eq!(ask(dir.path(), LogStart::Offset(14), 100).text, b"");
        std::fs::write(&path, "one\ntwo\nthree\nfour").unwrap();
        assert_eq!(ask(dir.path(), LogStart::Offset(14), 100).text, b"four");
        assert_eq!(ask(dir.path(), LogStart::Offset(0), 5).text, b"one\nt");
        assert_eq!(ask(dir.path(), LogStart::Tail(2), 100).text, b"three\nfour");
        std::fs::write(&path, "new\n").unwrap();
        assert_eq!(ask(dir.path(), LogStart::Offset(18), 100).text, b"new\n", "it turned over");
    }

    #[test]
    fn names_do_not_leave_the_folder() {
        let name = DeploymentName("../../etc/passwd".into());
        let path = rank_log(Path::new("/logs"), &name, 0, Rank(1));
        assert_eq!(path, Path::new("/logs/rank-______etc_passwd-0-1.log"));
    }
}
