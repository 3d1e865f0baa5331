//! `coordinator placement-group`: bundles of devices and processors, reserved by hand.
//!
//! **Invariant:** what can never fit ends with exit code 3 and the arithmetic; nothing waits longer than it was told.

use std::collections::BTreeMap;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::json;

use super::connection::{self, AddressFlag};
use super::launch::{parse_pair, runtime};
use super::status_text::{self, GROUP_HEADS};
use super::{CliError, Outcome, Surroundings};
use crate::cluster::GroupSpec;
use crate::cluster::bundle::BundleSpec;
use crate::cluster::membership::HeadClient;
use crate::cluster::strategy::Strategy;
use crate::config::parse_duration;

/// Reserve bundles of devices, to be used with serve --placement-group
#[derive(Debug, Clone, Args)]
#[command(after_help = "Example:\n  coordinator placement-group create --name pair --bundle cpu=1,gpu=1 --bundle \
                        cpu=1,gpu=1 --strategy strict-pack\n  coordinator placement-group wait pair --timeout 30s\n  \
                        coordinator serve MODEL --tensor-parallel-size 2 --placement-group pair")]
pub struct PlacementGroupFlags {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Clone, Subcommand)]
enum Action {
    /// Reserve bundles: all at once, now or when they are free
    #[command(
        after_help = "Example:\n  coordinator placement-group create --name g --bundle cpu=1,gpu=1 --strategy pack"
    )]
    Create(CreateFlags),
    /// Wait until a group is created
    Wait(WaitFlags),
    /// List all groups
    List(ListFlags),
    /// Show one group and its bundles
    Show(NameFlags),
    /// Give the bundles of a group back
    Remove(RemoveFlags),
}

#[derive(Debug, Clone, Args)]
struct CreateFlags {
    /// Name of the group
    #[arg(long, value_name = "NAME")]
    name: String,
    /// What one bundle takes of one node, such as cpu=1,gpu=1 or gpu=1,label.zone=a; repeat it for each bundle
    #[arg(long = "bundle", value_name = "RESOURCES", required = true, value_parser = |s: &str| s.parse::<BundleSpec>())]
    bundles: Vec<BundleSpec>,
    /// How bundles lie on nodes: pack, spread, strict-pack, strict-spread
    #[arg(long, value_name = "STRATEGY", default_value = "pack", value_parser = |s: &str| s.parse::<Strategy>())]
    strategy: Strategy,
    /// Label that the node of every bundle must have
    #[arg(long = "selector", value_name = "KEY=VALUE", value_parser = parse_pair)]
    selectors: Vec<(String, String)>,
    /// Label of the group itself, for list
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = parse_pair)]
    labels: Vec<(String, String)>,
    /// Keep a group that does not fit on the machines that are there for so long [default: refuse it]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    wait: Option<Duration>,
    #[command(flatten)]
    address: AddressFlag,
    /// Print the group as one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Args)]
struct WaitFlags {
    #[command(flatten)]
    name: NameFlags,
    /// Longest wait
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = parse_duration)]
    timeout: Duration,
}

#[derive(Debug, Clone, Args)]
struct ListFlags {
    /// Only groups with this label
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = parse_pair)]
    labels: Vec<(String, String)>,
    #[command(flatten)]
    address: AddressFlag,
    /// Print one JSON array
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Args)]
struct NameFlags {
    /// Name of the group
    name: String,
    #[command(flatten)]
    address: AddressFlag,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Args)]
struct RemoveFlags {
    #[command(flatten)]
    name: NameFlags,
    /// End what runs in it, too
    #[arg(long)]
    force: bool,
}

impl PlacementGroupFlags {
    /// Whether errors are wanted as JSON.
    pub fn json(&self) -> bool {
        match &self.action {
            Action::Create(flags) => flags.json,
            Action::Wait(flags) => flags.name.json,
            Action::List(flags) => flags.json,
            Action::Show(flags) => flags.json,
            Action::Remove(flags) => flags.name.json,
        }
    }

    fn address(&self) -> Option<&str> {
        let flag = match &self.action {
            Action::Create(flags) => &flags.address,
            Action::Wait(flags) => &flags.name.address,
            Action::List(flags) => &flags.address,
            Action::Show(flags) => &flags.address,
            Action::Remove(flags) => &flags.name.address,
        };
        flag.address.as_deref()
    }
}

pub(super) fn run(surroundings: &Surroundings, flags: &PlacementGroupFlags) -> Outcome {
    runtime()?.block_on(async {
        let client = connection::require(flags.address(), surroundings).await?;
        match &flags.action {
            Action::Create(flags) => create(&client, flags).await,
            Action::Wait(flags) => wait(&client, flags).await,
            Action::List(flags) => list(&client, flags).await,
            Action::Show(flags) => {
                let group = client.wait_group(&flags.name, Duration::ZERO).await?;
                if flags.json { print_json(&group) } else { print(&status_text::group(&group)) }
            }
            Action::Remove(RemoveFlags { name: NameFlags { name, json, .. }, force }) => {
                let waits_for = format!("what runs in {name} drains, then its slots are free");
                connection::patiently((!json).then_some(&waits_for), client.remove_group(name, *force)).await?;
                if *json {
                    println!("{}", json!({"removed": name}));
                } else {
                    eprintln!("{name} is gone; its slots are free");
                }
                Ok(())
            }
        }
    })
}

async fn create(client: &HeadClient, flags: &CreateFlags) -> Outcome {
    let mut bundles = flags.bundles.clone();
    for bundle in &mut bundles {
        for (key, value) in &flags.selectors {
            bundle.labels.entry(key.clone()).or_insert_with(|| value.clone());
        }
    }
    let spec = GroupSpec {
        name: flags.name.clone(),
        bundles,
        strategy: flags.strategy,
        labels: flags.labels.iter().cloned().collect::<BTreeMap<_, _>>(),
        wait: flags.wait,
    };
    let group = client.create_group(&spec).await??;
    if flags.json {
        return print_json(&group);
    }
    print(&status_text::group(&group))?;
    if group.state != "created" {
        eprintln!("it is created as soon as it fits: coordinator placement-group wait {} --timeout 60s", group.name);
    }
    Ok(())
}

async fn wait(client: &HeadClient, flags: &WaitFlags) -> Outcome {
    let NameFlags { name, json, .. } = &flags.name;
    let now = client.wait_group(name, Duration::ZERO).await?;
    if now.state != "created" && !json {
        eprintln!("{name} is {}: {}", now.state, now.reason);
    }
    let group = client.wait_group(name, flags.timeout).await?;
    if group.state == "created" {
        return if *json { print_json(&group) } else { print(&status_text::group(&group)) };
    }
    let code = if group.state == "infeasible" { "infeasible" } else { "busy" };
    let message = format!("{name} is still {} after {} s: {}", group.state, flags.timeout.as_secs(), group.reason);
    Err(CliError { exit: CliError::NOT_PLACED, code: code.to_owned(), message, hint: String::new() })
}

async fn list(client: &HeadClient, flags: &ListFlags) -> Outcome {
    let mut groups = client.status().await?.placement_groups;
    groups.retain(|group| flags.labels.iter().all(|(key, value)| group.labels.get(key) == Some(value)));
    if flags.json {
        return print_json(&groups);
    }
    let mut out = String::new();
    status_text::section(&mut out, "PLACEMENT GROUPS", &GROUP_HEADS, status_text::groups(&groups));
    print(out.trim_start())
}

fn print_json(value: &impl serde::Serialize) -> Outcome {
    println!("{}", serde_json::to_string(value).map_err(std::io::Error::other)?);
    Ok(())
}

fn print(text: &str) -> Outcome {
    println!("{}", text.trim_end());
    Ok(())
}
