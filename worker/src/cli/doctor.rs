//! `worker doctor`: whether this machine can serve, said to a person or as one object.

use anyhow::{Context, bail};
use clap::Args;

use crate::agent::doctor::{self, Doctor};
use crate::config::{Config, Environment, Flags};

#[derive(Args)]
pub(super) struct DoctorArgs {
    /// Print one object in place of lines
    #[arg(long)]
    json: bool,
}

/// Prints each check as it ends; fails where one does.
pub(super) fn doctor(args: &DoctorArgs, flags: Flags) -> anyhow::Result<()> {
    let config = Config::load(flags, Environment::read())?;
    let doctor = Doctor { config, program: std::env::current_exe().context("this program's path")? };
    let mut checks = Vec::new();
    doctor.examine(|check| {
        if !args.json {
            println!("{}", check.line());
        }
        checks.push(check);
    });
    if args.json {
        println!("{}", doctor::object(&checks));
    } else {
        println!("{}", doctor::summary(&checks));
    }
    let num_failed = checks.iter().filter(|check| check.state == doctor::State::Fail).count();
    if num_failed > 0 { bail!("{num_failed} checks failed") } else { Ok(()) }
}
