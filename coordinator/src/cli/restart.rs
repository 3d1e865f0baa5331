//! `coordinator restart`: new processes for a deployment, replica by replica.

use clap::Args;
use serde_json::json;

use super::connection::{self, AddressFlag};
use super::launch::runtime;
use super::{Outcome, Surroundings};

/// Start the processes of a deployment again, replica by replica; requests go on
#[derive(Debug, Clone, Args)]
#[command(after_help = "Example:\n  coordinator restart Qwen2.5-7B-Instruct")]
pub struct RestartFlags {
    /// Served name
    name: String,
    #[command(flatten)]
    address: AddressFlag,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

pub(super) fn run(surroundings: &Surroundings, flags: &RestartFlags) -> Outcome {
    runtime()?.block_on(async {
        let client = connection::require(flags.address.address.as_deref(), surroundings).await?;
        let waits_for = format!("{} starts again, one replica after the other; requests go on", flags.name);
        connection::patiently((!flags.json).then_some(&waits_for), client.restart(&flags.name)).await?;
        if flags.json {
            println!("{}", json!({"restarted": flags.name}));
        } else {
            eprintln!("every replica of {} has started again", flags.name);
        }
        Ok(())
    })
}
