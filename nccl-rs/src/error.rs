//! What can go wrong, and what the library's codes are called.

use std::path::PathBuf;
use std::time::Duration;

use crate::types::Version;

/// Why a library cannot be used, or a call of it failed.
#[derive(Debug, thiserror::Error)]
pub enum NcclError {
    /// No library was found. The caller can go without, or say where one is.
    #[error("no library found: {}", tried.join("; "))]
    NotFound {
        /// What was tried, each with the loader's answer.
        tried: Vec<String>,
    },
    /// A library lacks a function that every version has.
    #[error("{} has no {symbol}", path.display())]
    Symbol {
        /// The library.
        path: PathBuf,
        /// The function.
        symbol: &'static str,
    },
    /// A function answered with an error.
    #[error("{function} of {version}: {name} (code {code}){}{detail}", if detail.is_empty() { "" } else { ": " })]
    Call {
        /// The function.
        function: &'static str,
        /// The library's version.
        version: Version,
        /// Its code.
        code: i32,
        /// What the code is called.
        name: &'static str,
        /// What the library says of it.
        detail: String,
    },
    /// A wait was longer than allowed.
    #[error("{phase} was not done after {waited:?}")]
    Deadline {
        /// What was waited for.
        phase: &'static str,
        /// How long.
        waited: Duration,
    },
    /// An earlier failure ended the communicator; a new one must be made, by all ranks.
    #[error("the communicator failed before: {reason}")]
    Failed {
        /// The first failure.
        reason: String,
    },
    /// The thread that ends a communicator could not be started.
    #[error("the thread for teardown could not be started")]
    Thread {
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// An argument that the library would not survive.
    #[error("{what}")]
    Argument {
        /// What is wrong with it.
        what: String,
    },
}

/// The codes of the interface.
pub(crate) const SUCCESS: i32 = 0;
pub(crate) const IN_PROGRESS: i32 = 7;

/// What a code is called; a code that is not known yet is called so.
pub(crate) fn code_name(code: i32) -> &'static str {
    match code {
        SUCCESS => "success",
        1 => "unhandled device error",
        2 => "system error",
        3 => "internal error",
        4 => "invalid argument",
        5 => "invalid usage",
        6 => "remote error",
        IN_PROGRESS => "in progress",
        8 => "timeout",
        _ => "unknown code",
    }
}
