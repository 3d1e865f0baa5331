//! Certificates for machines; tokens for those who may give them.

use std::time::Duration;

use phalanx_proto::pb;
use phalanx_trust::{IssuedCertificate, Peer};
use tonic::{Request, Response, Status};
use tracing::{info, warn};

use crate::security::access::{AccessError, Gate};
use crate::security::tokens::{TokenBookError, TokenScope, TokenWish};

/// The other end of a call.
pub(super) fn peer<T>(request: &Request<T>) -> Option<&Peer> {
    request.extensions().get()
}

/// Where the other end is, in words.
pub(super) fn address<T>(request: &Request<T>) -> String {
    match peer(request) {
        Some(Peer::Plain(address) | Peer::Tls(address, _)) => address.ip().to_string(),
        _ => "127.0.0.1".to_owned(),
    }
}

impl From<AccessError> for Status {
    fn from(error: AccessError) -> Self {
        let text = error.to_string();
        match error {
            AccessError::Failed { .. } => Self::unavailable(text),
            AccessError::Insecure => Self::failed_precondition(text),
            AccessError::NodeName => Self::invalid_argument(text),
            AccessError::NoToken | AccessError::UnknownToken | AccessError::NoCertificate => {
                Self::unauthenticated(text)
            }
            _ => Self::permission_denied(text),
        }
    }
}

/// Lets calls pass whose sender may do everything.
#[derive(Clone)]
pub(super) struct AdminOnly(pub Gate);

impl tonic::service::Interceptor for AdminOnly {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        let shown = request.metadata().get("authorization").and_then(|value| value.to_str().ok());
        let token = shown.and_then(|value| value.strip_prefix("Bearer "));
        match self.0.admin(peer(&request), token) {
            Ok(()) => Ok(request),
            Err(error) => {
                warn!(address = address(&request), %error, "refused a command");
                Err(error.into())
            }
        }
    }
}

/// Signs certificates.
pub(super) struct EnrollmentService {
    pub gate: Gate,
}

#[tonic::async_trait]
impl pb::enrollment_server::Enrollment for EnrollmentService {
    async fn enroll(&self, request: Request<pb::EnrollRequest>) -> Result<Response<pb::EnrollReply>, Status> {
        let address = address(&request);
        let pb::EnrollRequest { token, node_id, public_key } = request.into_inner();
        let book = self.gate.book()?.clone();
        let (authority, node) = (book.authority().certificate().to_vec(), node_id.clone());
        let issued = blocking(move || book.enroll(&token, &node_id, &public_key)).await?;
        match &issued {
            Ok(issued) => info!(node_id = node, address, serial = issued.serial, "node has a certificate"),
            Err(error) => warn!(node_id = node, address, %error, "refused a machine"),
        }
        Ok(Response::new(reply(issued?, authority)))
    }

    async fn renew(&self, request: Request<pb::RenewRequest>) -> Result<Response<pb::EnrollReply>, Status> {
        let node = self.gate.shown(peer(&request))?.clone();
        let public_key = request.into_inner().public_key;
        let book = self.gate.book()?.clone();
        let (authority, node_id) = (book.authority().certificate().to_vec(), node.node_id.clone());
        let issued = blocking(move || book.renew(&node, &public_key)).await??;
        info!(node_id, serial = issued.serial, "node has its next certificate");
        Ok(Response::new(reply(issued, authority)))
    }
}

fn reply(issued: IssuedCertificate, authority: Vec<u8>) -> pb::EnrollReply {
    let IssuedCertificate { certificate, not_after, .. } = issued;
    pb::EnrollReply { certificate: certificate.into(), authority: authority.into(), not_after }
}

/// Signing and the disk belong on no thread of the runtime.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Status> {
    tokio::task::spawn_blocking(work).await.map_err(|error| Status::internal(error.to_string()))
}

/// Gives tokens and takes them back.
pub(super) struct TokenService {
    pub gate: Gate,
}

fn failed(error: TokenBookError) -> Status {
    tracing::error!(%error, "tokens cannot be changed");
    Status::unavailable(error.to_string())
}

#[tonic::async_trait]
impl pb::tokens_server::Tokens for TokenService {
    async fn create_token(
        &self,
        request: Request<pb::CreateTokenRequest>,
    ) -> Result<Response<pb::CreateTokenReply>, Status> {
        let pb::CreateTokenRequest { scopes, ttl_s, note } = request.into_inner();
        let scopes: Result<Vec<TokenScope>, String> = scopes.iter().map(|scope| scope.parse()).collect();
        let scopes = scopes.map_err(Status::invalid_argument)?;
        if scopes.is_empty() || note.len() > 256 {
            return Err(Status::invalid_argument("a token has a scope, and a note of at most 256 bytes"));
        }
        let wish = TokenWish { scopes, ttl: ttl_s.map(Duration::from_secs), note };
        let book = self.gate.book()?.clone();
        let (record, token) = blocking(move || book.create(wish)).await?.map_err(failed)?;
        info!(token = record.id, "token made");
        let expires = record.expires;
        Ok(Response::new(pb::CreateTokenReply { id: record.id, token: token.reveal(), expires }))
    }

    async fn list_tokens(&self, _: Request<pb::ListTokensRequest>) -> Result<Response<pb::ListTokensReply>, Status> {
        let list = serde_json::to_string(&self.gate.book()?.snapshot());
        let list_json = list.map_err(|error| Status::internal(error.to_string()))?;
        Ok(Response::new(pb::ListTokensReply { list_json }))
    }

    async fn revoke_token(
        &self,
        request: Request<pb::RevokeTokenRequest>,
    ) -> Result<Response<pb::RevokeTokenReply>, Status> {
        let id = request.into_inner().id;
        let (book, wanted) = (self.gate.book()?.clone(), id.clone());
        if !blocking(move || book.revoke_token(&wanted)).await?.map_err(failed)? {
            return Err(Status::not_found(format!("there is no valid token {id}")));
        }
        info!(token = id, "token revoked");
        Ok(Response::new(pb::RevokeTokenReply {}))
    }

    async fn revoke_node(
        &self,
        request: Request<pb::RevokeNodeRequest>,
    ) -> Result<Response<pb::RevokeNodeReply>, Status> {
        let node_id = request.into_inner().node_id;
        let (book, wanted) = (self.gate.book()?.clone(), node_id.clone());
        let revoked = blocking(move || book.revoke_node(&wanted)).await?.map_err(failed)?;
        let token_id = revoked.ok_or_else(|| Status::not_found(format!("no node {node_id} has a certificate")))?;
        warn!(node_id, "node revoked");
        Ok(Response::new(pb::RevokeNodeReply { token_id }))
    }
}
