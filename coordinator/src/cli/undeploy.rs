//! `coordinator undeploy`: the end of one deployment.

use clap::Args;
use serde_json::json;

use super::connection::{self, AddressFlag};
use super::launch::runtime;
use super::{Outcome, Surroundings};

/// Remove a deployment; returns when its slots are free
#[derive(Debug, Clone, Args)]
#[command(after_help = "Example:\n  coordinator undeploy Qwen2.5-7B-Instruct")]
pub struct UndeployFlags {
    /// Served name
    name: String,
    #[command(flatten)]
    address: AddressFlag,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

pub(super) fn run(surroundings: &Surroundings, flags: &UndeployFlags) -> Outcome {
    runtime()?.block_on(async {
        let client = connection::require(flags.address.address.as_deref(), surroundings).await?;
        let waits_for = format!("{} drains: what runs may still end, then its processes do", flags.name);
        connection::patiently((!flags.json).then_some(&waits_for), client.undeploy(&flags.name)).await?;
        if flags.json {
            println!("{}", json!({"undeployed": flags.name}));
        } else {
            eprintln!("{} is gone; its slots are free", flags.name);
        }
        Ok(())
    })
}
