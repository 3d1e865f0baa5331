//! Who may do what at the cluster's port.
//!
//! A machine is known by its certificate, a command line by being of this user on this machine or by a token with the scope
//! `admin`. With `--insecure` everybody may do everything.
//!
//! **Invariant:** every call is judged by itself, so what was taken back ends at the next one at the latest.

use std::sync::Arc;

use phalanx_trust::{HeadTls, NodeCertificate, Peer, Token, TrustError};

use super::tokens::{TokenBook, TokenScope};

/// Why somebody may not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AccessError {
    /// No token was shown where one is needed.
    #[error(
        "this head does as it is told by tokens with the scope admin only: give one with --token or PHALANX_TOKEN (`coordinator token create --scope admin` in the head's home makes one)"
    )]
    NoToken,
    /// A text that is no token of this head.
    #[error("the token is not one of this head: `coordinator token create` in the head's home makes one")]
    UnknownToken,
    /// Its time is over.
    #[error("token {id} has expired: `coordinator token create` makes another")]
    ExpiredToken {
        /// The token.
        id: String,
    },
    /// It was taken back.
    #[error("token {id} was revoked")]
    RevokedToken {
        /// The token.
        id: String,
    },
    /// It opens something else.
    #[error("token {id} does not have the scope {scope}")]
    Scope {
        /// The token.
        id: String,
        /// What is needed.
        scope: &'static str,
    },
    /// No certificate was shown.
    #[error("this head takes machines with a certificate of its cluster only: `worker join --token` gets one")]
    NoCertificate,
    /// The certificate is of another node.
    #[error("the certificate is of node {shown}, not of {said}")]
    OtherNode {
        /// Whose it is.
        shown: String,
        /// Who it says it is.
        said: String,
    },
    /// The node was sent away.
    #[error("node {node} was revoked: it joins again only as a new node (another home) and with a token")]
    RevokedNode {
        /// The node.
        node: String,
    },
    /// A name that cannot stand in a certificate.
    #[error("a node's id has 1 to 64 letters, digits, dashes, dots and underscores")]
    NodeName,
    /// The head started with `--insecure`: it has neither tokens nor certificates.
    #[error("this head was started with --insecure: there are no tokens and no certificates")]
    Insecure,
    /// It should work and does not.
    #[error("the head cannot do this now: {reason}")]
    Failed {
        /// What went wrong.
        reason: String,
    },
}

/// Judges whoever comes.
#[derive(Clone)]
pub enum Gate {
    /// Everybody may (`--insecure`).
    Open,
    /// By certificates and tokens.
    Guarded {
        /// Those that count.
        book: Arc<TokenBook>,
        /// The head's end of TLS.
        tls: HeadTls,
    },
}

impl Gate {
    /// By certificates and tokens.
    ///
    /// # Errors
    /// The head's certificate cannot be made.
    pub fn guarded(book: TokenBook) -> Result<Self, TrustError> {
        let tls = HeadTls::new(book.authority())?;
        Ok(Self::Guarded { book: Arc::new(book), tls })
    }

    /// The head's end of TLS, where there is one.
    pub fn tls(&self) -> Option<HeadTls> {
        match self {
            Self::Open => None,
            Self::Guarded { tls, .. } => Some(tls.clone()),
        }
    }

    /// Tokens and nodes.
    ///
    /// # Errors
    /// There are none with `--insecure`.
    pub fn book(&self) -> Result<&Arc<TokenBook>, AccessError> {
        match self {
            Self::Open => Err(AccessError::Insecure),
            Self::Guarded { book, .. } => Ok(book),
        }
    }

    /// Whether whoever is at the other end may speak for this node.
    ///
    /// # Errors
    /// Why not.
    pub fn node(&self, peer: Option<&Peer>, node_id: &str) -> Result<(), AccessError> {
        let Self::Guarded { book, .. } = self else { return Ok(()) };
        match peer {
            Some(Peer::Local) => {}
            Some(Peer::Tls(_, Some(shown))) if shown.node_id == node_id => {}
            Some(Peer::Tls(_, Some(shown))) => {
                let (shown, said) = (shown.node_id.clone(), node_id.to_owned());
                return Err(AccessError::OtherNode { shown, said });
            }
            _ => return Err(AccessError::NoCertificate),
        }
        book.node_may(node_id)
    }

    /// Whether whoever is at the other end is a node of this cluster.
    ///
    /// # Errors
    /// Why not.
    pub fn any_node(&self, peer: Option<&Peer>) -> Result<(), AccessError> {
        match (self, peer) {
            (Self::Open, _) | (_, Some(Peer::Local)) => Ok(()),
            (Self::Guarded { book, .. }, peer) => book.node_may(&self.shown(peer)?.node_id),
        }
    }

    /// By what nodes know this head's authority; empty with `--insecure`.
    pub fn authority(&self) -> String {
        match self {
            Self::Open => String::new(),
            Self::Guarded { book, .. } => book.authority().pin().to_string(),
        }
    }

    /// The node at the other end.
    ///
    /// # Errors
    /// It has shown no certificate.
    pub fn shown<'a>(&self, peer: Option<&'a Peer>) -> Result<&'a NodeCertificate, AccessError> {
        match peer {
            Some(Peer::Tls(_, Some(shown))) => Ok(shown),
            _ => Err(AccessError::NoCertificate),
        }
    }

    /// Whether whoever is at the other end may do everything.
    ///
    /// # Errors
    /// Why not.
    pub fn admin(&self, peer: Option<&Peer>, token: Option<&str>) -> Result<(), AccessError> {
        let Self::Guarded { book, .. } = self else { return Ok(()) };
        if peer == Some(&Peer::Local) {
            return Ok(());
        }
        let token: Token = token.ok_or(AccessError::NoToken)?.parse().map_err(|_| AccessError::UnknownToken)?;
        book.check(&token, TokenScope::Admin)
    }

    /// Resolves when a node is sent away.
    pub async fn revoked(&self, node_id: &str) {
        match self {
            Self::Open => std::future::pending().await,
            Self::Guarded { book, .. } => book.revoked(node_id).await,
        }
    }
}
