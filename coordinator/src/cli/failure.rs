//! How a command fails: an exit code, a kind, a sentence, what to do.

use std::process::ExitCode;

use serde_json::json;

use crate::cluster::membership::CallError;
use crate::cluster::{DeployFailure, DeployFailureCode};
use crate::head::{HeadError, HomeError, PortError};
use crate::security::FileError;

/// What a command comes to.
pub type Outcome = Result<(), CliError>;

/// Why a command did not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CliError {
    /// Exit code.
    pub exit: u8,
    /// Kind, a word for scripts.
    pub code: String,
    /// What happened.
    pub message: String,
    /// What to do; may be empty.
    pub hint: String,
}

impl CliError {
    /// Exit code where it just failed.
    pub const FAILED: u8 = 1;
    /// Exit code of wrong usage.
    pub const USAGE: u8 = 2;
    /// Exit code where a deployment cannot be placed.
    pub const NOT_PLACED: u8 = 3;
    /// Exit code where no head answers.
    pub const NO_HEAD: u8 = 4;

    /// It failed.
    pub fn failed(code: &str, message: impl Into<String>) -> Self {
        Self { exit: Self::FAILED, code: code.to_owned(), message: message.into(), hint: String::new() }
    }

    /// It was asked for in a wrong way.
    pub fn usage(message: impl Into<String>) -> Self {
        Self { exit: Self::USAGE, code: "usage".to_owned(), message: message.into(), hint: String::new() }
    }

    /// Nobody answers.
    pub fn no_head(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { exit: Self::NO_HEAD, code: "no_head".to_owned(), message: message.into(), hint: hint.into() }
    }

    /// The same with what to do.
    #[must_use]
    pub fn with_hint(self, hint: impl Into<String>) -> Self {
        Self { hint: hint.into(), ..self }
    }

    /// The error as one JSON object.
    pub fn to_json(&self) -> serde_json::Value {
        json!({"error": {"code": self.code, "message": self.message, "hint": self.hint}})
    }

    /// Prints itself as one line on stderr and gives the exit code.
    pub fn report(&self, as_json: bool) -> ExitCode {
        if as_json {
            eprintln!("{}", self.to_json());
        } else if self.hint.is_empty() {
            eprintln!("error: {}", self.message);
        } else {
            eprintln!("error: {}. {}", self.message.trim_end_matches('.'), self.hint);
        }
        ExitCode::from(self.exit)
    }
}

impl From<DeployFailure> for CliError {
    fn from(failure: DeployFailure) -> Self {
        let exit = match failure.code {
            DeployFailureCode::Infeasible | DeployFailureCode::Busy | DeployFailureCode::Timeout => Self::NOT_PLACED,
            DeployFailureCode::Invalid => Self::USAGE,
            DeployFailureCode::Model
            | DeployFailureCode::StartFailed
            | DeployFailureCode::NameTaken
            | DeployFailureCode::Stopped => Self::FAILED,
        };
        Self { exit, code: failure.code.as_str().to_owned(), message: failure.message, hint: failure.hint }
    }
}

impl From<CallError> for CliError {
    fn from(error: CallError) -> Self {
        let message = error.to_string();
        match error {
            CallError::Unreachable { .. } => Self::no_head(message, "Start one with: coordinator start --head"),
            CallError::Refused(_) => Self::failed("refused", message),
            CallError::Distrusted { .. } => Self::failed("distrusted", message),
            CallError::Unreadable(_) => Self::failed("version", message),
            CallError::Lost { .. } => Self::failed("head_lost", message),
        }
    }
}

impl From<HeadError> for CliError {
    fn from(error: HeadError) -> Self {
        let message = error.to_string();
        match error {
            HeadError::Home(HomeError::Running { .. }) => Self::failed("already_running", message)
                .with_hint("coordinator stop ends it; another PHALANX_HOME is another cluster"),
            HeadError::Port(PortError::Taken { .. }) => Self::failed("port_taken", message),
            HeadError::Port(PortError::Host { .. }) => Self::failed("host", message),
            HeadError::Home(_)
            | HeadError::Store(_)
            | HeadError::Socket { .. }
            | HeadError::Keys(_)
            | HeadError::Tokens(_)
            | HeadError::Trust(_) => Self::failed("io", message),
        }
    }
}

impl From<FileError> for CliError {
    fn from(error: FileError) -> Self {
        Self::failed("io", error.to_string())
    }
}

impl From<std::io::Error> for CliError {
    fn from(error: std::io::Error) -> Self {
        Self::failed("io", error.to_string())
    }
}
