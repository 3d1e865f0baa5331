//! Who may speak to whom between machines: a cluster's own authority, tokens that pin it, certificates of nodes, TLS.
//!
//! Owns keys, certificates, tokens' text, and the two ends of an encrypted connection. Knows no message of the wire, no
//! cluster and no device: who may do what with a proven name is decided by the head.
//!
//! **Invariant:** a secret comes from the operating system's random numbers, lies in files of mode 0600 and is never logged.
//! **Invariant:** nothing is said over a connection before the other end has proven what it is.
#![forbid(unsafe_code)]

mod authority;
mod dial;
mod error;
pub mod files;
mod identity;
mod incoming;
mod pinned;
pub mod rendezvous;
mod stream;
mod token;
pub mod variables;

pub use authority::{Authority, IssuedCertificate};
pub use dial::{DialError, Trust, channel, dial, speaks_tls};
pub use error::TrustError;
pub use identity::{Enrollment, Identity};
pub use incoming::{HeadTls, incoming};
pub use stream::{NodeCertificate, Peer, Stream};
pub use token::{Pin, Token, TokenError, secret};

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How far clocks of two machines may differ: certificates are valid from so long before they were made.
pub const CLOCK_SKEW_MAX: Duration = Duration::from_secs(24 * 60 * 60);
/// How long a node's certificate is valid; its agent renews it when a third of that is left.
pub const CERTIFICATE_LIFETIME: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// Seconds since 1970.
pub fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// Bytes as hexadecimal digits.
fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Hexadecimal digits as bytes.
fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    if !digits.len().is_multiple_of(2) || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
}
