//! What a node proves itself with: its key, made on the node, and the certificate that the head gave for it.
//!
//! **Invariant:** a private key never leaves its node.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rcgen::{KeyPair, PKCS_ED25519};
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};

use crate::files::{private_dir, write_private};
use crate::{Pin, TrustError, from_hex, to_hex, unix_seconds};

/// A key that waits for its certificate.
pub struct Enrollment {
    key: KeyPair,
}

impl Enrollment {
    /// A new key.
    ///
    /// # Errors
    /// The system gives no random numbers.
    pub fn new() -> Result<Self, TrustError> {
        Ok(Self { key: KeyPair::generate_for(&PKCS_ED25519)? })
    }

    /// The half that the head signs.
    pub fn public_key(&self) -> Vec<u8> {
        self.key.public_key_raw().to_vec()
    }

    /// The identity, with what the head answered.
    pub fn finish(self, node_id: &str, certificate: Vec<u8>, authority: Vec<u8>, not_after: u64) -> Identity {
        let not_after = not_after.max(unix_seconds());
        let node_id = node_id.to_owned();
        Identity {
            node_id,
            certificate,
            authority,
            key: self.key.serialized_der().to_vec(),
            made: unix_seconds(),
            not_after,
        }
    }
}

/// A node's key and certificate.
#[derive(Clone, PartialEq, Eq)]
pub struct Identity {
    node_id: String,
    certificate: Vec<u8>,
    authority: Vec<u8>,
    key: Vec<u8>,
    made: u64,
    not_after: u64,
}

#[derive(Serialize, Deserialize)]
struct Stored {
    node_id: String,
    certificate: String,
    authority: String,
    key: String,
    made: u64,
    not_after: u64,
}

impl Identity {
    /// The file in a folder.
    fn path(folder: &Path) -> PathBuf {
        folder.join("node.json")
    }

    /// The identity in a folder, if there is one.
    ///
    /// # Errors
    /// The file cannot be read, or is damaged.
    pub fn read(folder: &Path) -> Result<Option<Self>, TrustError> {
        let path = Self::path(folder);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(TrustError::Io { path, source }),
        };
        let damaged = |what: String| TrustError::Damaged { path: path.clone(), what };
        let stored: Stored = serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
        let bytes = |text: &str| from_hex(text).ok_or_else(|| damaged("it holds no hexadecimal digits".to_owned()));
        Ok(Some(Self {
            node_id: stored.node_id.clone(),
            certificate: bytes(&stored.certificate)?,
            authority: bytes(&stored.authority)?,
            key: bytes(&stored.key)?,
            made: stored.made,
            not_after: stored.not_after,
        }))
    }

    /// Writes it, readable by the owner only.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn write(&self, folder: &Path) -> Result<(), TrustError> {
        let path = Self::path(folder);
        let stored = Stored {
            node_id: self.node_id.clone(),
            certificate: to_hex(&self.certificate),
            authority: to_hex(&self.authority),
            key: to_hex(&self.key),
            made: self.made,
            not_after: self.not_after,
        };
        let text = serde_json::to_vec(&stored).map_err(io::Error::from);
        let written = text.and_then(|text| private_dir(folder).and_then(|()| write_private(&path, &text)));
        written.map_err(|source| TrustError::Io { path, source })
    }

    /// Removes it, so that another one is asked for.
    pub fn remove(folder: &Path) {
        let _ = fs::remove_file(Self::path(folder));
    }

    /// Whose it is.
    pub fn node_id(&self) -> &str {
        &self.node_id
    }

    /// The authority that signed it.
    pub fn pin(&self) -> Pin {
        Pin::of(&self.authority)
    }

    /// When it ends, seconds since 1970.
    pub fn not_after(&self) -> u64 {
        self.not_after
    }

    /// Whether it has ended by this machine's clock.
    pub fn has_ended(&self) -> bool {
        unix_seconds() >= self.not_after
    }

    /// How long until it should be renewed: when a third of its time is left.
    pub fn due_in(&self) -> Duration {
        let third = self.not_after.saturating_sub(self.made) / 3;
        Duration::from_secs((self.not_after - third).saturating_sub(unix_seconds()))
    }

    pub(crate) fn chain(&self) -> Vec<CertificateDer<'static>> {
        vec![self.certificate.clone().into()]
    }

    pub(crate) fn key(&self) -> &[u8] {
        &self.key
    }
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Identity(until {}, of {})", self.not_after, self.pin())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Authority;

    #[test]
    fn an_identity_survives_its_file_and_is_renewed_in_time() {
        let dir = tempfile::tempdir().expect("a folder");
        let authority = Authority::open(dir.path()).expect("made");
        assert_eq!(Identity::read(dir.path()).expect("reads"), None);
        let enrollment = Enrollment::new().expect("a key");
        let issued = authority.certify_node("n", &enrollment.public_key(), Duration::from_secs(90)).expect("signs");
        let identity = enrollment.finish("n", issued.certificate, authority.certificate().to_vec(), issued.not_after);
        identity.write(dir.path()).expect("writes");
        assert_eq!(Identity::read(dir.path()).expect("reads"), Some(identity.clone()));
        assert_eq!(identity.pin(), authority.pin());
        assert!(!identity.due_in().is_zero() && !identity.has_ended());
        assert!(identity.due_in() <= Duration::from_secs(60), "{:?}", identity.due_in());
        let old = Identity { made: unix_seconds() - 80, not_after: unix_seconds() + 10, ..identity };
        assert!(old.due_in().is_zero() && !old.has_ended());
        assert!(Identity { not_after: unix_seconds() - 1, ..old }.has_ended());
    }
}
