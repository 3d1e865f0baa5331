//! Join tokens, and the nodes that have certificates: who may come in, until when, and who not any more.
//!
//! Owns the cluster's authority and one file of the store, which this process alone writes. Tokens have 128 bits from the
//! operating system's random numbers, so a plain hash cannot be guessed back.
//!
//! **Invariant:** a token's text is in the answer to its creation and, for the home's own, in a file of mode 0600; the store
//! has its hash. What was taken back is on disk before that is answered.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use phalanx_trust::files::{private_dir, write_private};
use phalanx_trust::{Authority, IssuedCertificate, NodeCertificate, Token, TrustError, unix_seconds};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::FileError;
use super::access::AccessError;

/// How long a token that is of no use any more stays in the list.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(7 * 24 * 60 * 60);
/// The note of a home's own token.
const HOME_NOTE: &str = "this home";

/// What a token opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TokenScope {
    /// A machine may join.
    Join,
    /// The command line may do everything.
    Admin,
}

impl TokenScope {
    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Join => "join",
            Self::Admin => "admin",
        }
    }
}

impl FromStr for TokenScope {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = [Self::Join, Self::Admin].into_iter().find(|scope| scope.as_str() == text);
        known.ok_or_else(|| format!("{text} is no scope; there are join and admin"))
    }
}

/// One token, without its text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRecord {
    /// Its name.
    pub id: String,
    /// SHA-256 of its secret.
    pub hash: String,
    /// What it opens.
    pub scopes: Vec<TokenScope>,
    /// Whose it is or what for.
    #[serde(default)]
    pub note: String,
    /// When it was made, seconds since 1970.
    pub created: u64,
    /// When it ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<u64>,
    /// When it was taken back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revoked: Option<u64>,
}

impl TokenRecord {
    /// `valid`, `expired` or `revoked`.
    pub fn state(&self) -> &'static str {
        match (self.revoked, self.expires) {
            (Some(_), _) => "revoked",
            (None, Some(expires)) if expires <= unix_seconds() => "expired",
            _ => "valid",
        }
    }
}

/// One node with a certificate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRecord {
    /// The node.
    pub node_id: String,
    /// The number of its certificate.
    pub serial: String,
    /// The token that it joined with.
    pub token: String,
    /// When its certificate was made, seconds since 1970.
    pub issued: u64,
    /// When that ends.
    pub not_after: u64,
    /// When it was taken back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revoked: Option<u64>,
}

/// All tokens and nodes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccessList {
    /// In the order in which they were made.
    pub tokens: Vec<TokenRecord>,
    /// In the order in which they came.
    pub nodes: Vec<NodeRecord>,
}

/// What a new token is made from.
#[derive(Debug, Clone)]
pub struct TokenWish {
    /// What it opens.
    pub scopes: Vec<TokenScope>,
    /// How long; `None`: until it is taken back.
    pub ttl: Option<Duration>,
    /// Whose it is or what for.
    pub note: String,
}

/// Why tokens cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum TokenBookError {
    /// Keys or certificates cannot be used.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// The store's file of tokens, or the home's own token: nobody is let in on a guess.
    #[error(transparent)]
    File(#[from] FileError),
}

/// The tokens and nodes of one head.
pub struct TokenBook {
    authority: Arc<Authority>,
    lifetime: Duration,
    path: PathBuf,
    home_token: PathBuf,
    list: Mutex<AccessList>,
    revocations: watch::Sender<u64>,
}

/// The file of a home's own token.
fn home_token_path(trust_dir: &Path) -> PathBuf {
    trust_dir.join("home.token")
}

/// The token that a head has left in its home, for commands and the agent of the same home.
pub fn home_token(trust_dir: &Path) -> Option<Token> {
    fs::read_to_string(home_token_path(trust_dir)).ok()?.parse().ok()
}

impl TokenBook {
    /// Opens what a home holds: its authority and its tokens; what is missing is made.
    ///
    /// # Errors
    /// A file cannot be used, or is damaged.
    pub fn open(trust_dir: &Path, store_dir: &Path, lifetime: Duration) -> Result<Self, TokenBookError> {
        let authority = Arc::new(Authority::open(trust_dir)?);
        let path = store_dir.join("tokens.json");
        private_dir(store_dir).map_err(|source| FileError::Io { path: path.clone(), source })?;
        let list = match fs::read(&path) {
            Ok(text) => {
                serde_json::from_slice(&text).map_err(|source| FileError::Damaged { path: path.clone(), source })?
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => AccessList::default(),
            Err(source) => return Err(FileError::Io { path, source }.into()),
        };
        let (list, revocations) = (Mutex::new(list), watch::Sender::new(0));
        let home_token = home_token_path(trust_dir);
        let book = Self { authority, lifetime, path, home_token, list, revocations };
        book.keep_home_token()?;
        Ok(book)
    }

    /// The authority.
    pub fn authority(&self) -> &Arc<Authority> {
        &self.authority
    }

    /// Leaves a token in the home, unless a good one lies there.
    fn keep_home_token(&self) -> Result<(), TokenBookError> {
        let known = fs::read_to_string(&self.home_token).ok().and_then(|text| text.parse::<Token>().ok());
        if known.is_some_and(|token| self.check(&token, TokenScope::Admin).is_ok()) {
            return Ok(());
        }
        let scopes = vec![TokenScope::Join, TokenScope::Admin];
        let (_, token) = self.create(TokenWish { scopes, ttl: None, note: HOME_NOTE.to_owned() })?;
        let written = write_private(&self.home_token, token.reveal().as_bytes());
        Ok(written.map_err(|source| FileError::Io { path: self.home_token.clone(), source })?)
    }

    fn list(&self) -> MutexGuard<'_, AccessList> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the list; it is on disk when this returns, or unchanged.
    fn change<T>(&self, change: impl FnOnce(&mut AccessList) -> T) -> Result<T, TokenBookError> {
        let mut list = self.list();
        let mut next = list.clone();
        let result = change(&mut next);
        let written = serde_json::to_vec_pretty(&next).map_err(io::Error::from);
        let written = written.and_then(|text| write_private(&self.path, &text));
        written.map_err(|source| FileError::Io { path: self.path.clone(), source })?;
        *list = next;
        Ok(result)
    }

    /// A new token; its text is known here only.
    ///
    /// # Errors
    /// The store cannot be written.
    pub fn create(&self, wish: TokenWish) -> Result<(TokenRecord, Token), TokenBookError> {
        let token = Token::new(self.authority.pin());
        let now = unix_seconds();
        let TokenWish { scopes, ttl, note } = wish;
        let expires = ttl.map(|ttl| now.saturating_add(ttl.as_secs()));
        let (id, hash) = (token.id().to_owned(), token.hash());
        let record = TokenRecord { id, hash, scopes, note, created: now, expires, revoked: None };
        let kept = record.clone();
        self.change(|list| {
            let horizon = now.saturating_sub(FORGOTTEN_AFTER.as_secs());
            list.tokens.retain(|token| token.revoked.or(token.expires).is_none_or(|end| end > horizon));
            list.nodes.retain(|node| node.not_after > horizon || node.revoked.is_some());
            list.tokens.push(kept);
        })?;
        Ok((record, token))
    }

    /// All tokens and nodes, without secrets.
    pub fn snapshot(&self) -> AccessList {
        let mut list = self.list().clone();
        list.tokens.iter_mut().for_each(|token| token.hash.clear());
        list
    }

    /// Whether a token opens something.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self, token: &Token, scope: TokenScope) -> Result<(), AccessError> {
        let (id, hash) = (token.id().to_owned(), token.hash());
        let list = self.list();
        let known = list.tokens.iter().find(|known| known.id == id && known.hash == hash);
        let known = known.ok_or(AccessError::UnknownToken)?;
        match known.state() {
            "revoked" => Err(AccessError::RevokedToken { id }),
            "expired" => Err(AccessError::ExpiredToken { id }),
            _ if !known.scopes.contains(&scope) => Err(AccessError::Scope { id, scope: scope.as_str() }),
            _ => Ok(()),
        }
    }

    /// A certificate for a machine that shows a token.
    ///
    /// # Errors
    /// The token does not let it in, the node was sent away for good, or the store cannot be written.
    pub fn enroll(&self, text: &str, node_id: &str, public_key: &[u8]) -> Result<IssuedCertificate, AccessError> {
        let token: Token = text.parse().map_err(|_| AccessError::UnknownToken)?;
        self.check(&token, TokenScope::Join)?;
        self.certify(node_id, token.id(), public_key)
    }

    /// The next certificate for a node that shows its current one.
    ///
    /// # Errors
    /// The node was sent away for good, or the store cannot be written.
    pub fn renew(&self, node: &NodeCertificate, public_key: &[u8]) -> Result<IssuedCertificate, AccessError> {
        let known = |list: &AccessList| list.nodes.iter().find(|known| known.node_id == node.node_id).cloned();
        let token = known(&self.list()).map(|known| known.token).unwrap_or_default();
        self.certify(&node.node_id, &token, public_key)
    }

    fn certify(&self, node_id: &str, token: &str, public_key: &[u8]) -> Result<IssuedCertificate, AccessError> {
        let is_id = |letter: char| letter.is_ascii_alphanumeric() || "-_.".contains(letter);
        if node_id.is_empty() || node_id.len() > 64 || !node_id.chars().all(is_id) {
            return Err(AccessError::NodeName);
        }
        self.node_may(node_id)?;
        let issued = self.authority.certify_node(node_id, public_key, self.lifetime).map_err(failed)?;
        let record = NodeRecord {
            node_id: node_id.to_owned(),
            serial: issued.serial.clone(),
            token: token.to_owned(),
            issued: unix_seconds(),
            not_after: issued.not_after,
            revoked: None,
        };
        let added = self.change(|list| {
            list.nodes.retain(|known| known.node_id != record.node_id);
            list.nodes.push(record);
        });
        added.map_err(failed)?;
        Ok(issued)
    }

    /// Whether a node was not sent away.
    ///
    /// # Errors
    /// It was.
    pub fn node_may(&self, node_id: &str) -> Result<(), AccessError> {
        let is_revoked = self.list().nodes.iter().any(|node| node.node_id == node_id && node.revoked.is_some());
        if is_revoked { Err(AccessError::RevokedNode { node: node_id.to_owned() }) } else { Ok(()) }
    }

    /// Takes a token back; machines that joined with it stay.
    ///
    /// # Errors
    /// The store cannot be written. `false`: there is none that is valid.
    pub fn revoke_token(&self, id: &str) -> Result<bool, TokenBookError> {
        self.change(|list| {
            let known = list.tokens.iter_mut().find(|token| token.id == id && token.revoked.is_none());
            known.map(|token| token.revoked = Some(unix_seconds())).is_some()
        })
    }

    /// Sends a node away for good: its certificates count no more. Gives the token that it came with, if that is valid.
    ///
    /// # Errors
    /// The store cannot be written. `None`: there is no such node.
    pub fn revoke_node(&self, node_id: &str) -> Result<Option<String>, TokenBookError> {
        let revoked = self.change(|list| {
            let node = list.nodes.iter_mut().find(|node| node.node_id == node_id)?;
            node.revoked.get_or_insert(unix_seconds());
            let token = node.token.clone();
            let is_valid = list.tokens.iter().any(|known| known.id == token && known.state() == "valid");
            Some(if is_valid { token } else { String::new() })
        })?;
        self.revocations.send_modify(|number| *number += 1);
        Ok(revoked)
    }

    /// Resolves when a node is sent away.
    pub async fn revoked(&self, node_id: &str) {
        let mut changes = self.revocations.subscribe();
        while self.node_may(node_id).is_ok() {
            // The sender lives as long as `self`.
            let _ = changes.changed().await;
        }
    }
}

fn failed(error: impl Into<TokenBookError>) -> AccessError {
    AccessError::Failed { reason: error.into().to_string() }
}

#[cfg(test)]
mod tests {
    use phalanx_trust::Enrollment;

    use super::*;

    const LIFETIME: Duration = Duration::from_secs(3600);

    fn open(dir: &Path) -> TokenBook {
        TokenBook::open(&dir.join("trust"), &dir.join("store"), LIFETIME).expect("opens")
    }

    fn wish(scope: TokenScope, ttl: Option<Duration>) -> TokenWish {
        TokenWish { scopes: vec![scope], ttl, note: String::new() }
    }

    #[test]
    fn tokens_open_what_they_say_until_they_end() {
        let dir = tempfile::tempdir().expect("a folder");
        let book = open(dir.path());
        let (join, token) = book.create(wish(TokenScope::Join, Some(LIFETIME))).expect("made");
        assert_eq!(book.check(&token, TokenScope::Join), Ok(()));
        assert!(matches!(book.check(&token, TokenScope::Admin), Err(AccessError::Scope { .. })));
        let (_, old) = book.create(wish(TokenScope::Join, Some(Duration::ZERO))).expect("made");
        assert!(matches!(book.check(&old, TokenScope::Join), Err(AccessError::ExpiredToken { .. })));
        assert!(!book.revoke_token("nobody").expect("asks"));
        assert!(book.revoke_token(&join.id).expect("writes"));
        let book = open(dir.path());
        assert!(matches!(book.check(&token, TokenScope::Join), Err(AccessError::RevokedToken { .. })));
        let stranger = Token::new(book.authority().pin());
        assert_eq!(book.check(&stranger, TokenScope::Join), Err(AccessError::UnknownToken));
        let stored = fs::read_to_string(dir.path().join("store/tokens.json")).expect("text");
        assert!(!stored.contains(token.reveal().split('-').nth(2).expect("a secret")));
    }

    #[test]
    fn a_home_has_a_token_of_its_own_which_is_made_anew_when_it_was_taken_back() {
        let dir = tempfile::tempdir().expect("a folder");
        let token = |book: &TokenBook| {
            let token = home_token(&dir.path().join("trust")).expect("a token");
            book.check(&token, TokenScope::Admin).expect("opens");
            token
        };
        let first = token(&open(dir.path()));
        let book = open(dir.path());
        assert_eq!(token(&book), first);
        book.revoke_token(first.id()).expect("writes");
        assert_ne!(token(&open(dir.path())), first);
    }

    #[tokio::test]
    async fn a_node_that_is_sent_away_stays_away() {
        let dir = tempfile::tempdir().expect("a folder");
        let book = open(dir.path());
        let (record, token) = book.create(wish(TokenScope::Join, None)).expect("made");
        let key = Enrollment::new().expect("a key").public_key();
        let issued = book.enroll(&token.reveal(), "node-1", &key).expect("enrols");
        let node = NodeCertificate { node_id: "node-1".into(), serial: issued.serial };
        book.renew(&node, &key).expect("renews");
        assert!(matches!(book.enroll("phxt-no", "node-1", &key), Err(AccessError::UnknownToken)));
        assert!(matches!(book.enroll(&token.reveal(), "a b", &key), Err(AccessError::NodeName)));
        assert!(matches!(book.enroll(&token.reveal(), "node-2", b"x"), Err(AccessError::Failed { .. })));
        assert_eq!(book.revoke_node("node-2").expect("asks"), None);
        assert_eq!(book.revoke_node("node-1").expect("writes"), Some(record.id));
        book.revoked("node-1").await;
        assert!(matches!(book.renew(&node, &key), Err(AccessError::RevokedNode { .. })));
        assert!(matches!(book.enroll(&token.reveal(), "node-1", &key), Err(AccessError::RevokedNode { .. })));
        assert!(open(dir.path()).node_may("node-1").is_err());
    }
}
