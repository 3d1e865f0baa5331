//! A cluster's own authority: its key signs the certificates of the head and of every node.
//!
//! **Invariant:** its key is made once, lies in the head's home and leaves it never. A node's certificate cannot be taken for
//! the head's: each says what it is for.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ED25519, PublicKeyData, SanType, SerialNumber, SignatureAlgorithm,
};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use rustls::sign::CertifiedKey;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use crate::files::{private_dir, write_private};
use crate::{CLOCK_SKEW_MAX, Pin, TrustError, from_hex, secret, to_hex, unix_seconds};

/// The name in the head's certificates.
pub(crate) const HEAD_NAME: &str = "head.phalanx";
/// What stands before the node's id in its certificates.
pub(crate) const NODE_URI: &str = "phalanx://node/";
/// How long the authority itself is valid: longer than any cluster.
const AUTHORITY_LIFETIME: Duration = Duration::from_secs(30 * 365 * 24 * 60 * 60);

#[derive(Serialize, Deserialize)]
struct Stored {
    name: String,
    certificate: String,
    key: String,
}

/// The authority of one cluster.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
}

/// A certificate that was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IssuedCertificate {
    /// In DER.
    pub certificate: Vec<u8>,
    /// Its number, in hexadecimal digits.
    pub serial: String,
    /// When it ends, seconds since 1970.
    pub not_after: u64,
}

/// The public key of a node.
struct NodeKey<'a>(&'a [u8]);

impl PublicKeyData for NodeKey<'_> {
    fn der_bytes(&self) -> &[u8] {
        self.0
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_ED25519
    }
}

impl Authority {
    /// The authority in a folder; made where there is none.
    ///
    /// # Errors
    /// The folder cannot be used, or its file is damaged.
    pub fn open(folder: &Path) -> Result<Self, TrustError> {
        let path = folder.join("authority.json");
        let io = |source| TrustError::Io { path: path.clone(), source };
        match fs::read(&path) {
            Ok(text) => Self::read(&path, &text),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let (authority, stored) = Self::create()?;
                let text = serde_json::to_vec(&stored).map_err(|error| io(error.into()))?;
                private_dir(folder).and_then(|()| write_private(&path, &text)).map_err(io)?;
                Ok(authority)
            }
            Err(source) => Err(io(source)),
        }
    }

    fn create() -> Result<(Self, Stored), TrustError> {
        let name = format!("phalanx cluster {}", &secret()[..16]);
        let key = KeyPair::generate_for(&PKCS_ED25519)?;
        let params = authority_params(&name)?;
        let certificate = params.self_signed(&key)?.der().clone();
        let stored = Stored { name, certificate: to_hex(&certificate), key: to_hex(key.serialized_der()) };
        Ok((Self { issuer: Issuer::new(params, key), certificate }, stored))
    }

    fn read(path: &Path, text: &[u8]) -> Result<Self, TrustError> {
        let damaged = |what: &str| TrustError::Damaged { path: PathBuf::from(path), what: what.to_owned() };
        let stored: Stored = serde_json::from_slice(text).map_err(|error| damaged(&error.to_string()))?;
        let certificate = from_hex(&stored.certificate).ok_or_else(|| damaged("its certificate"))?;
        let key = from_hex(&stored.key).ok_or_else(|| damaged("its key"))?;
        let key = KeyPair::from_pkcs8_der_and_sign_algo(&PrivatePkcs8KeyDer::from(key), &PKCS_ED25519)?;
        let issuer = Issuer::new(authority_params(&stored.name)?, key);
        Ok(Self { issuer, certificate: certificate.into() })
    }

    /// By what others know it.
    pub fn pin(&self) -> Pin {
        Pin::of(&self.certificate)
    }

    /// Its own certificate, in DER.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// A key and a certificate for the head.
    ///
    /// # Errors
    /// The system gives no random numbers.
    pub fn certify_head(&self, lifetime: Duration) -> Result<Arc<CertifiedKey>, TrustError> {
        let key = KeyPair::generate_for(&PKCS_ED25519)?;
        let mut params = params("phalanx head", lifetime)?;
        params.subject_alt_names = vec![SanType::DnsName(HEAD_NAME.try_into()?)];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let certificate = params.signed_by(&key, &self.issuer)?.der().clone();
        let chain = vec![certificate, self.certificate.clone()];
        Ok(Arc::new(CertifiedKey::new(chain, signing_key(key.serialized_der())?)))
    }

    /// A certificate for a node that holds the other half of this public key.
    ///
    /// # Errors
    /// It is no public key, or the node's id cannot stand in a certificate.
    pub fn certify_node(
        &self,
        node_id: &str,
        public_key: &[u8],
        lifetime: Duration,
    ) -> Result<IssuedCertificate, TrustError> {
        if public_key.len() != 32 {
            return Err(TrustError::PublicKey { num_bytes: public_key.len() });
        }
        let mut params = params("phalanx node", lifetime)?;
        params.subject_alt_names = vec![SanType::URI(format!("{NODE_URI}{node_id}").try_into()?)];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let serial = params.serial_number.as_ref().map(|serial| to_hex(&serial.to_bytes())).unwrap_or_default();
        let certificate = params.signed_by(&NodeKey(public_key), &self.issuer)?;
        Ok(IssuedCertificate {
            certificate: certificate.der().to_vec(),
            serial,
            not_after: unix_seconds() + lifetime.as_secs(),
        })
    }
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Authority({})", self.pin())
    }
}

fn authority_params(name: &str) -> Result<CertificateParams, TrustError> {
    let mut params = params(name, AUTHORITY_LIFETIME)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

fn params(name: &str, lifetime: Duration) -> Result<CertificateParams, TrustError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    let now = OffsetDateTime::now_utc();
    (params.not_before, params.not_after) = (now - CLOCK_SKEW_MAX, now + lifetime);
    let mut serial = from_hex(&secret()[..32]).unwrap_or_default();
    // A serial number is positive and has no leading zero.
    serial.iter_mut().take(1).for_each(|first| *first = (*first & 0x7f) | 0x40);
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    Ok(params)
}

/// A private key in PKCS #8, for TLS.
pub(crate) fn signing_key(pkcs8: &[u8]) -> Result<Arc<dyn rustls::sign::SigningKey>, TrustError> {
    Ok(rustls::crypto::ring::sign::any_eddsa_type(&PrivatePkcs8KeyDer::from(pkcs8.to_vec()))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_home_keeps_its_authority() {
        let dir = tempfile::tempdir().expect("a folder");
        let (first, again) = (Authority::open(dir.path()).expect("made"), Authority::open(dir.path()).expect("read"));
        assert_eq!(first.pin(), again.pin());
        let other = tempfile::tempdir().expect("a folder");
        assert_ne!(Authority::open(other.path()).expect("made").pin(), first.pin());
        let key = KeyPair::generate_for(&PKCS_ED25519).expect("a key");
        let issued = again.certify_node("node-1", key.public_key_raw(), Duration::from_secs(60)).expect("signs");
        assert_eq!(issued.serial.len(), 32);
        assert!(again.certify_node("node-1", b"short", Duration::from_secs(60)).is_err());
        fs::write(dir.path().join("authority.json"), "{").expect("writes");
        assert!(Authority::open(dir.path()).expect_err("damaged").to_string().contains("authority.json"));
    }
}
