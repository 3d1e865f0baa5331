//! `coordinator events`: what happened, in plain words.

use std::io::Write;

use clap::Args;
use phalanx_proto::EventRecord;

use super::connection::{self, AddressFlag};
use super::launch::runtime;
use super::{Outcome, Surroundings};

/// Show what happened: nodes, deployments, failures and recoveries, oldest first
#[derive(Debug, Clone, Args)]
#[command(after_help = "Example:\n  coordinator events --tail 20\n  coordinator events --follow --deployment chat")]
pub struct EventsFlags {
    /// Go on with what happens
    #[arg(long, short)]
    follow: bool,
    /// Only of this deployment
    #[arg(long, value_name = "NAME")]
    deployment: Option<String>,
    /// Only the last of what has happened so far
    #[arg(long, value_name = "N")]
    tail: Option<usize>,
    #[command(flatten)]
    address: AddressFlag,
    /// Print one JSON object a line
    #[arg(long)]
    pub json: bool,
}

pub(super) fn run(surroundings: &Surroundings, flags: &EventsFlags) -> Outcome {
    runtime()?.block_on(async {
        let client = connection::require(flags.address.address.as_deref(), surroundings).await?;
        let only = flags.deployment.as_deref();
        let mut past = Vec::new();
        let mut stream = client.events(only, false).await?;
        while let Some(event) = stream.next().await? {
            past.push(event);
        }
        let last = past.last().map_or(0, |event| event.sequence);
        let num_left_out = flags.tail.map_or(0, |tail| past.len().saturating_sub(tail));
        for event in &past[num_left_out..] {
            if !print(event, flags.json)? {
                return Ok(());
            }
        }
        if !flags.follow {
            return Ok(());
        }
        let mut stream = client.events(only, true).await?;
        while let Some(event) = stream.next().await? {
            if event.sequence > last && !print(&event, flags.json)? {
                return Ok(());
            }
        }
        Ok(())
    })
}

/// False where the reader has gone (`| head`): it has what it wants.
fn print(event: &EventRecord, json: bool) -> Result<bool, super::CliError> {
    let line = if json { serde_json::to_string(event).map_err(std::io::Error::other)? } else { text(event) };
    Ok(writeln!(std::io::stdout(), "{line}").is_ok())
}

/// One line: when, how bad, what about, what, and where it stood.
fn text(event: &EventRecord) -> String {
    let about = [&event.deployment, &event.placement_group, &event.node].into_iter().flatten().next();
    let about = about.map_or("head", String::as_str);
    let number = |name: &str, value: Option<u64>| value.map(|value| format!("{name} {value}"));
    let standing: Vec<String> = [
        number("replica", event.replica.map(u64::from)),
        number("epoch", event.epoch),
        number("rank", event.rank.map(u64::from)),
        number("step", event.step),
        event.node.as_ref().filter(|_| event.deployment.is_some()).map(|node| format!("node {node}")),
    ]
    .into_iter()
    .flatten()
    .collect();
    let standing = if standing.is_empty() { String::new() } else { format!("  [{}]", standing.join(", ")) };
    // 2026-11-22T10:02:11.123Z
    let at = event.at.get(..19).map_or_else(|| event.at.clone(), |at| at.replace('T', " "));
    format!("{at}  {:5}  {about}: {}{standing}", event.level, event.text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_when_what_and_where_it_stood() {
        let event = EventRecord {
            at: "2026-11-22T10:02:11.123Z".into(),
            level: "warn".into(),
            text: "the group ends".into(),
            deployment: Some("m".into()),
            epoch: Some(2),
            rank: Some(1),
            node: Some("a".into()),
            ..EventRecord::default()
        };
        assert_eq!(text(&event), "2026-11-22 10:02:11  warn   m: the group ends  [epoch 2, rank 1, node a]");
        let event = EventRecord { level: "info".into(), text: "started".into(), ..EventRecord::default() };
        assert_eq!(text(&event), "  info   head: started");
    }
}
