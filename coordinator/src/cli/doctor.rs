//! `coordinator doctor`: whether this machine can serve, and what the cluster knows of itself.
//!
//! The `worker` program beside this one looks at the machine; a head that runs adds what `status` shows.

use std::process::{Command, Stdio};

use clap::Args;
use serde_json::{Value, json};

use super::connection::{self, AddressFlag};
use super::launch::{runtime, worker_program};
use super::status_text::text;
use super::{CliError, Outcome, Surroundings};

/// Check driver, libraries, devices, links between them, ports, clock and limits, and say what to fix
#[derive(Debug, Clone, Args)]
#[command(after_help = "Example:\n  coordinator doctor\n  coordinator doctor --json")]
pub struct DoctorFlags {
    #[command(flatten)]
    address: AddressFlag,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

pub(super) fn run(surroundings: &Surroundings, flags: &DoctorFlags) -> Outcome {
    let machine = examine(surroundings, flags.json)?;
    let snapshot = runtime()?.block_on(async {
        match connection::find(flags.address.address.as_deref(), surroundings).await? {
            Some(client) => Ok::<_, CliError>(Some(client.status().await?)),
            None => Ok(None),
        }
    })?;
    match (&machine, snapshot) {
        (Machine::Object(object), snapshot) => println!("{}", json!({"machine": object, "cluster": snapshot})),
        (Machine::Shown { .. }, Some(snapshot)) => println!("\n{}", text(&snapshot).trim_end()),
        (Machine::Shown { .. }, None) => println!("\nno head runs here; nothing is known of a cluster"),
    }
    if machine.is_well() {
        return Ok(());
    }
    Err(CliError::failed("unfit", "this machine cannot serve as it is")
        .with_hint("The lines marked FAIL say what to do"))
}

/// What the worker program found.
enum Machine {
    /// It printed its lines itself.
    Shown { is_well: bool },
    /// Its report.
    Object(Value),
}

impl Machine {
    fn is_well(&self) -> bool {
        match self {
            Self::Shown { is_well } => *is_well,
            Self::Object(object) => object["num_failed"] == 0,
        }
    }
}

fn examine(surroundings: &Surroundings, as_json: bool) -> Result<Machine, CliError> {
    let program = worker_program()?;
    let mut command = Command::new(&program);
    command.arg("doctor").env("PHALANX_HOME", surroundings.environment.home.path()).stdin(Stdio::null());
    let cannot = |error| CliError::failed("doctor_failed", format!("cannot start {}: {error}", program.display()));
    if !as_json {
        let status = command.status().map_err(cannot)?;
        return Ok(Machine::Shown { is_well: status.success() });
    }
    // What it fails with is in its object; its own last line would say it twice.
    let output = command.arg("--json").stderr(Stdio::null()).output().map_err(cannot)?;
    let object: Option<Value> = serde_json::from_slice(&output.stdout).ok();
    object.map(Machine::Object).ok_or_else(|| {
        CliError::failed("doctor_failed", format!("{} gave no report ({})", program.display(), output.status))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_check_is_a_machine_that_cannot_serve() {
        assert!(Machine::Object(json!({"num_failed": 0, "num_warned": 3})).is_well());
        assert!(!Machine::Object(json!({"num_failed": 1})).is_well());
        assert!(!Machine::Object(json!({})).is_well());
    }
}
