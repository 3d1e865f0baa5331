//! What goes wrong with keys, certificates and their files.

use std::io;
use std::path::PathBuf;

/// Why there is no key or certificate.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// A file cannot be read or written.
    #[error("cannot use {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A file is not what was written.
    #[error("{path} is damaged: {what}. Remove it to have it made anew")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A certificate cannot be made.
    #[error("cannot make a certificate: {0}")]
    Certificate(#[from] rcgen::Error),
    /// TLS does not take a key or a certificate.
    #[error("cannot use a certificate: {0}")]
    Tls(#[from] rustls::Error),
    /// A public key that is none.
    #[error("{num_bytes} bytes are no Ed25519 public key")]
    PublicKey {
        /// Its length.
        num_bytes: usize,
    },
}
