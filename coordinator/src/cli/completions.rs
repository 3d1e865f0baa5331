//! `coordinator completions`: completion scripts for shells.

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::{Cli, Outcome};

/// Print a completion script for a shell
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Example:\n  coordinator completions bash > ~/.local/share/bash-completion/completions/coordinator"
)]
pub struct CompletionsFlags {
    /// Which shell
    #[arg(value_enum)]
    shell: Shell,
}

pub(super) fn run(flags: &CompletionsFlags) -> Outcome {
    clap_complete::generate(flags.shell, &mut Cli::command(), "coordinator", &mut std::io::stdout());
    Ok(())
}
