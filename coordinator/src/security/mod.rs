//! Secrets: of one life of the head, launch tokens for ranks and keys for groups; of the store, API keys and join tokens.
//!
//! **Invariant:** a secret comes from the operating system's random numbers, is never logged and never leaves the
//! process except to the agent or rank that it is for.

pub mod access;
pub mod key_file;
pub mod keys;
pub mod tokens;

use std::path::PathBuf;
use std::{fmt, io};

use sha2::{Digest, Sha256};

/// Why a file of the store cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The file cannot be read or written.
    #[error("cannot use {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The file is not what was written.
    #[error("{path} is damaged: {source}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
}

/// What an agent gives to the rank that it starts; proves to the head that the rank was asked for.
#[derive(Clone)]
pub struct LaunchToken(String);

impl LaunchToken {
    /// A new one.
    pub fn new() -> Self {
        Self(format!("{}{}", uuid::Uuid::new_v4().simple(), uuid::Uuid::new_v4().simple()))
    }

    /// One that was given to a rank earlier.
    pub fn known(text: String) -> Self {
        Self(text)
    }

    /// The text for the agent.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// Whether `shown` is this token, in a time that does not depend on how much of it is right.
    pub fn matches(&self, shown: &str) -> bool {
        Sha256::digest(self.0.as_bytes()) == Sha256::digest(shown.as_bytes())
    }
}

impl Default for LaunchToken {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for LaunchToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LaunchToken(..)")
    }
}

/// 32 bytes that name a group's shared memory and authenticate its connections.
pub fn group_key() -> Vec<u8> {
    let mut hash = Sha256::new();
    hash.update(uuid::Uuid::new_v4().as_bytes());
    hash.update(uuid::Uuid::new_v4().as_bytes());
    hash.finalize().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_matches_itself_only_and_hides() {
        let (one, other) = (LaunchToken::new(), LaunchToken::new());
        assert!(one.matches(one.reveal()));
        assert!(!one.matches(other.reveal()) && !one.matches("") && !one.matches(&one.reveal()[1..]));
        assert!(!format!("{one:?}").contains(one.reveal()));
        assert_ne!(group_key(), group_key());
        assert_eq!(group_key().len(), 32);
    }
}
