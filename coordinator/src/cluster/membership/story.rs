//! Events and logs: what happened, and what the processes wrote.
//!
//! **Invariant:** an answer is bounded; a stream of events ends when its reader goes, or the head does.

use std::path::PathBuf;

use phalanx_proto::{DeploymentName, LogPart, LogRequest, LogSource, LogStart, NodeId, Rank, StatusSnapshot, pb};
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio::sync::mpsc;
use tonic::Status;

use super::super::{Chronicle, ClusterHandle};
use super::admin::to_json;
use crate::config::defaults;

/// What is read here.
#[derive(Clone)]
pub struct Story {
    /// The events.
    pub chronicle: Chronicle,
    /// The log of the head; none where it writes to a terminal.
    pub head_log: Option<PathBuf>,
}

/// Whose log.
#[derive(Debug, PartialEq, Eq)]
enum Target {
    Head,
    Node(NodeId, LogSource, String),
}

impl Story {
    /// Sends events until the reader goes; only those that there are, unless it follows.
    pub(super) fn events(&self, request: pb::EventsRequest) -> mpsc::Receiver<Result<pb::EventsReply, Status>> {
        let (replies, stream) = mpsc::channel(defaults::WATCH_QUEUE);
        let chronicle = self.chronicle.clone();
        tokio::spawn(async move {
            let pb::EventsRequest { deployment, mut after, follow } = request;
            let only = (!deployment.is_empty()).then_some(deployment.as_str());
            let mut newest = chronicle.newest();
            loop {
                newest.borrow_and_update();
                for event in chronicle.after(after, only) {
                    after = event.sequence;
                    let reply = to_json(&event).map(|event_json| pb::EventsReply { event_json });
                    if replies.send(reply).await.is_err() {
                        return;
                    }
                }
                let changed = async { follow && newest.changed().await.is_ok() };
                let goes_on = tokio::select! {
                    goes_on = changed => goes_on,
                    () = replies.closed() => false,
                };
                if !goes_on {
                    return;
                }
            }
        });
        stream
    }

    /// A part of a log.
    pub async fn log(
        &self,
        cluster: &ClusterHandle,
        snapshot: &StatusSnapshot,
        request: pb::LogsRequest,
    ) -> Result<pb::LogsReply, Status> {
        let tail = request.tail_lines.unwrap_or(0);
        let start = request.offset.map_or(LogStart::Tail(tail), LogStart::Offset);
        let bytes_max = defaults::LOG_PART_BYTES_MAX;
        match target(&request.target, snapshot).map_err(Status::not_found)? {
            Target::Head => self.head_log(start).await,
            Target::Node(node, source, name) => {
                let asked = LogRequest { id: 0, source, start, bytes_max };
                let read = tokio::time::timeout(defaults::CALL_DEADLINE, cluster.read_log(node.clone(), asked));
                let late = || Status::deadline_exceeded(format!("node {node} does not answer"));
                let part = read.await.map_err(|_| late())?;
                let gone = |_| Status::unavailable(format!("node {node} is not there to read its logs from"));
                let LogPart { text, next_offset, error, .. } = part.map_err(gone)?;
                if error.is_empty() {
                    Ok(pb::LogsReply { text: text.into(), next_offset, name })
                } else {
                    Err(Status::not_found(error))
                }
            }
        }
    }

    async fn head_log(&self, start: LogStart) -> Result<pb::LogsReply, Status> {
        let none = "this head writes its log to the terminal that it was started in";
        let path = self.head_log.as_ref().ok_or_else(|| Status::not_found(none))?;
        let bytes_max = u64::from(defaults::LOG_PART_BYTES_MAX);
        let read = async {
            let mut file = tokio::fs::File::open(path).await?;
            let len = file.metadata().await?.len();
            let from = match start {
                LogStart::Offset(offset) if offset <= len => offset,
                LogStart::Offset(_) => 0,
                LogStart::Tail(_) => len.saturating_sub(bytes_max),
            };
            file.seek(std::io::SeekFrom::Start(from)).await?;
            let mut text = Vec::new();
            file.take(bytes_max).read_to_end(&mut text).await?;
            Ok::<_, std::io::Error>((from + text.len() as u64, text))
        };
        let failed = |error| Status::not_found(format!("cannot read {}: {error}", path.display()));
        let (next_offset, mut text) = read.await.map_err(failed)?;
        if let LogStart::Tail(lines) = start {
            let ends: Vec<usize> = (0..text.len()).filter(|&at| text[at] == b'\n').map(|at| at + 1).collect();
            if let Some(index) = ends.len().checked_sub(lines as usize + 1) {
                text.drain(..ends[index]);
            }
        }
        Ok(pb::LogsReply { text: text.into(), next_offset, name: "head".to_owned() })
    }
}

/// Finds whose log is meant: `head`, a node, or a rank by as much of `DEPLOYMENT/REPLICA/RANK` as is unambiguous.
fn target(asked: &str, snapshot: &StatusSnapshot) -> Result<Target, String> {
    if asked.is_empty() || asked == "head" {
        return Ok(Target::Head);
    }
    if let Some(node) = snapshot.nodes.iter().find(|node| node.id == asked) {
        return Ok(Target::Node(NodeId(node.id.clone()), LogSource::Agent, format!("agent of {}", node.id)));
    }
    let fits = |rank: &&phalanx_proto::RankStatus| {
        let (replica, number) = (rank.replica, rank.rank);
        let whole = format!("{}/{replica}/{number}", rank.deployment);
        [whole, format!("{}/{number}", rank.deployment), format!("{replica}/{number}"), number.to_string()]
            .iter()
            .any(|name| name == asked)
    };
    let whole =
        |rank: &&phalanx_proto::RankStatus| format!("{}/{}/{}", rank.deployment, rank.replica, rank.rank) == asked;
    let exact: Vec<_> = snapshot.ranks.iter().filter(whole).collect();
    let found: Vec<_> = if exact.is_empty() { snapshot.ranks.iter().filter(fits).collect() } else { exact };
    let name = |rank: &phalanx_proto::RankStatus| format!("{}/{}/{}", rank.deployment, rank.replica, rank.rank);
    match found.as_slice() {
        [rank] => {
            let deployment = DeploymentName(rank.deployment.clone());
            let source = LogSource::Rank { deployment, replica: rank.replica, rank: Rank(rank.rank) };
            Ok(Target::Node(NodeId(rank.node.clone()), source, format!("rank {} on {}", name(rank), rank.node)))
        }
        [] => {
            let ranks = snapshot.ranks.iter().map(name);
            let known: Vec<String> = snapshot.nodes.iter().map(|node| node.id.clone()).chain(ranks).collect();
            let known = if known.is_empty() { String::new() } else { format!(", {}", known.join(", ")) };
            Err(format!("{asked} is neither a rank nor a node; there are: head{known}"))
        }
        several => {
            let names: Vec<String> = several.iter().map(|rank| name(rank)).collect();
            Err(format!("{asked} may be any of {}", names.join(", ")))
        }
    }
}

#[cfg(test)]
mod tests {
    use phalanx_proto::{NodeStatus, RankStatus};

    use super::*;

    #[track_caller]
    fn check(asked: &str, expected: Result<&str, &str>) {
        let rank = |deployment: &str, replica, rank| RankStatus {
            deployment: deployment.into(),
            replica,
            rank,
            node: "a".into(),
            ..RankStatus::default()
        };
        let snapshot = StatusSnapshot {
            nodes: vec![NodeStatus { id: "a".into(), ..NodeStatus::default() }],
            ranks: vec![rank("m", 0, 0), rank("m", 0, 1), rank("m", 1, 0), rank("n", 0, 2)],
            ..StatusSnapshot::default()
        };
        let found = target(asked, &snapshot).map(|target| match target {
            Target::Head => "head".to_owned(),
            Target::Node(_, _, name) => name,
        });
        match expected {
            Ok(name) => assert_eq!(found.as_deref(), Ok(name)),
            Err(part) => assert!(found.as_ref().is_err_and(|error| error.contains(part)), "{found:?}"),
        }
    }

    #[test]
    fn a_log_is_found_by_as_much_as_is_enough() {
        check("", Ok("head"));
        check("a", Ok("agent of a"));
        check("m/0/1", Ok("rank m/0/1 on a"));
        check("m/1", Ok("rank m/0/1 on a"));
        check("2", Ok("rank n/0/2 on a"));
        check("0", Err("may be any of m/0/0, m/1/0"));
        check("m/7", Err("there are: head, a, m/0/0"));
    }
}
