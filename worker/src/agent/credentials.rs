//! How this node proves itself to its head: by a certificate, which it gets for a token and renews in time.
//!
//! **Invariant:** nothing is sent to a head that is not the one that the token names, or the one that gave the certificate.

use std::path::PathBuf;

use phalanx_proto::pb::enrollment_client::EnrollmentClient;
use phalanx_proto::{NodeId, pb};
use phalanx_trust::{Enrollment, Identity, Token, Trust, TrustError, rendezvous};
use tokio::sync::watch;
use tonic::transport::Channel;
use tracing::{info, warn};

use super::link::{LinkError, refusal};
use crate::config::{HeadAddress, Home, defaults};
use crate::head_note::HeadNote;
use crate::session::{HeadTarget, HeadTrust, dial_tcp};

/// What the user said about trust.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TrustWish {
    /// `--insecure`.
    Insecure,
    /// `--token` or `PHALANX_TOKEN`.
    Token(Token),
    /// A file that holds a token, or soon will.
    TokenFile(PathBuf),
    /// Nothing: what lies in the home counts.
    Home,
}

/// This node's way to prove itself.
#[derive(Debug, Clone)]
pub struct Credentials {
    /// The node's home.
    pub home: Home,
    /// The head, or one of several, as the user has named it.
    pub head: HeadAddress,
    /// The node.
    pub node_id: NodeId,
    /// What the user said.
    pub wish: TrustWish,
}

impl Credentials {
    /// How any head of this cluster is dialled.
    pub fn target(&self, head: &str) -> HeadTarget {
        let trust = match self.wish {
            TrustWish::Insecure => HeadTrust::Plain,
            _ => HeadTrust::Certificate(self.home.trust_dir()),
        };
        HeadTarget { address: head.to_owned(), socket: None, trust }
    }

    /// Asks for a certificate where there is none that counts: of the head that the user has named, whether or not it leads.
    pub async fn ready(&self) -> Result<(), LinkError> {
        if self.wish == TrustWish::Insecure {
            return Ok(());
        }
        let known = self.identity()?;
        let token = match self.token() {
            None if known.is_none() => Some(self.wait_for_token().await?),
            token => token,
        };
        if let Some(token) = token.filter(|token| known.is_none_or(|known| known.pin() != token.pin())) {
            self.enroll(&token).await?;
        }
        Ok(())
    }

    /// What this node has, where it is for this node and has not ended.
    fn identity(&self) -> Result<Option<Identity>, LinkError> {
        let known = Identity::read(&self.home.trust_dir()).map_err(own)?;
        Ok(known.filter(|known| !known.has_ended() && known.node_id() == self.node_id.0))
    }

    /// A token, where one can be had: the user's, this home's own where its head is meant, or that of a head of this user on
    /// this machine.
    fn token(&self) -> Option<Token> {
        let read = |path: PathBuf| std::fs::read_to_string(path).ok()?.parse().ok();
        match &self.wish {
            TrustWish::Insecure => None,
            TrustWish::Token(token) => Some(token.clone()),
            TrustWish::TokenFile(path) => read(path.clone()),
            TrustWish::Home => {
                let own = self.home.is_head_at(&self.head).then(|| self.home.clone());
                let home = own.or_else(|| rendezvous::of_address(self.head.as_str()).map(|home| Home::new(&home)))?;
                read(home.trust_dir().join("home.token"))
            }
        }
    }

    /// A head that has just begun to listen may not have left its token yet; one that is not there at all is waited for.
    async fn wait_for_token(&self) -> Result<Token, LinkError> {
        let head = self.head.as_str();
        for _ in 0..defaults::TOKEN_LOOKS {
            if let Some(token) = self.token() {
                return Ok(token);
            }
            let TrustWish::TokenFile(path) = &self.wish else {
                phalanx_trust::dial(head, &Trust::Plain, defaults::CONNECT_DEADLINE)
                    .await
                    .map_err(|error| LinkError::Unreachable { reason: error.to_string() })?;
                tokio::time::sleep(defaults::TOKEN_LOOK_PAUSE).await;
                continue;
            };
            return Err(LinkError::Unreachable { reason: format!("{} holds no token yet", path.display()) });
        }
        let message = "it takes machines with a token only: `coordinator token create` on its machine prints one, for --token or PHALANX_TOKEN (a head that was started with --insecure wants --insecure here too)";
        Err(LinkError::Refused { message: message.into(), is_final: true })
    }

    /// Gets a certificate for a token.
    async fn enroll(&self, token: &Token) -> Result<(), LinkError> {
        let channel = dial_tcp(self.head.as_str(), &Trust::Pinned(token.pin())).await?;
        let enrollment = Enrollment::new().map_err(own)?;
        let request = pb::EnrollRequest {
            token: token.reveal(),
            node_id: self.node_id.0.clone(),
            public_key: enrollment.public_key().into(),
        };
        let mut client = EnrollmentClient::new(channel);
        let identity = self.finish(enrollment, client.enroll(request)).await?;
        if identity.pin() != token.pin() {
            let message = "its certificate is signed by another authority than the token names".into();
            return Err(LinkError::Refused { message, is_final: true });
        }
        identity.write(&self.home.trust_dir()).map_err(own)?;
        info!(token = token.id(), ends_in = ?identity.due_in(), "the head gave this node a certificate");
        Ok(())
    }

    /// Gets the next certificate for the current one; any head of this cluster gives it.
    async fn renew(&self, head: &str) -> Result<(), LinkError> {
        let trust_dir = self.home.trust_dir();
        let Some(known) = Identity::read(&trust_dir).map_err(own)? else { return Ok(()) };
        let pin = known.pin();
        let channel: Channel = dial_tcp(head, &Trust::Known(Box::new(known))).await?;
        let enrollment = Enrollment::new().map_err(own)?;
        let request = pb::RenewRequest { public_key: enrollment.public_key().into() };
        let mut client = EnrollmentClient::new(channel);
        let identity = self.finish(enrollment, client.renew(request)).await?;
        if identity.pin() != pin {
            let message = "its next certificate is signed by another authority".into();
            return Err(LinkError::Refused { message, is_final: false });
        }
        identity.write(&trust_dir).map_err(own)?;
        info!("this node has its next certificate");
        Ok(())
    }

    async fn finish(
        &self,
        enrollment: Enrollment,
        call: impl Future<Output = Result<tonic::Response<pb::EnrollReply>, tonic::Status>>,
    ) -> Result<Identity, LinkError> {
        let late = |_| LinkError::Unreachable { reason: "it gave no certificate in time".into() };
        let reply = tokio::time::timeout(defaults::WELCOME_DEADLINE, call).await.map_err(late)?;
        let pb::EnrollReply { certificate, authority, not_after } = reply.map_err(refusal)?.into_inner();
        Ok(enrollment.finish(&self.node_id.0, certificate.to_vec(), authority.to_vec(), not_after))
    }

    /// Renews the certificate for as long as the agent lives, at the head that leads.
    pub async fn keep_renewed(self, leading: watch::Receiver<HeadNote>) {
        if self.wish == TrustWish::Insecure {
            return;
        }
        loop {
            let due_in = match Identity::read(&self.home.trust_dir()) {
                Ok(Some(known)) => known.due_in(),
                // The first one is on its way.
                _ => defaults::RENEWAL_LOOK,
            };
            if due_in.is_zero() {
                let head = leading.borrow().address.clone();
                if let Err(error) = self.renew(&head).await {
                    warn!(%error, "this node's certificate is not renewed; trying on");
                    tokio::time::sleep(defaults::RENEWAL_RETRY).await;
                }
                continue;
            }
            // Clocks jump: a long sleep is cut.
            tokio::time::sleep(due_in.clamp(defaults::RENEWAL_LOOK, defaults::RENEWAL_PAUSE)).await;
        }
    }

    /// The head does not take this node's certificate: the next attempt asks for another one, where there is a token.
    pub fn forget(&self) {
        if self.wish != TrustWish::Insecure && self.token().is_some() {
            Identity::remove(&self.home.trust_dir());
        }
    }
}

fn own(error: TrustError) -> LinkError {
    LinkError::Refused { message: format!("this node's own keys: {error}"), is_final: true }
}
