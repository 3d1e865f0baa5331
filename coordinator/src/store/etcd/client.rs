//! A small client of etcd: keys, transactions, leases, on whichever endpoint answers.
//!
//! **Invariant:** every call has a deadline, and an endpoint that does not answer costs one attempt, then the next is asked.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use phalanx_proto::etcd as wire;
use tokio_stream::StreamExt;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};
use wire::compare::{CompareResult, CompareTarget, TargetUnion};
use wire::request_op::Request as Op;

/// Time for one endpoint to answer.
const CALL_DEADLINE: Duration = Duration::from_secs(1);
/// Largest answer: all records of a cluster, bytes.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// Why etcd has not done what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum EtcdError {
    /// No endpoint answers, or none has a majority behind it.
    #[error("etcd at {endpoints} does not answer: {reason}")]
    Unreachable {
        /// Where it was looked for.
        endpoints: String,
        /// What the last one did.
        reason: String,
    },
    /// Its records are those of a cluster that is not this head's.
    #[error(
        "the cluster in etcd at {endpoints} has the authority {known} (last led by the head at {leader}), this head has {own}"
    )]
    OtherAuthority {
        /// Where.
        endpoints: String,
        /// Who led it last.
        leader: String,
        /// The beginning of its pin.
        known: String,
        /// The beginning of this head's.
        own: String,
    },
    /// It refuses, and would do so again.
    #[error("etcd at {endpoints} refuses: {reason}")]
    Refused {
        /// Which.
        endpoints: String,
        /// Its words.
        reason: String,
    },
}

/// What a key must be for a transaction to be done.
#[derive(Debug, Clone)]
pub(super) enum Check {
    /// It was made in this revision; 0: it is not there.
    Created(String, i64),
    /// It was changed last in this revision.
    Changed(String, i64),
}

/// One change of a transaction.
#[derive(Debug, Clone)]
pub(super) enum Write {
    /// Puts a value, gone with its lease where there is one.
    Put { key: String, value: Vec<u8>, lease: i64 },
    /// Removes a key.
    Delete { key: String },
}

/// A key as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub key: String,
    pub value: Vec<u8>,
    /// The revision in which it was made.
    pub created: i64,
}

/// How a transaction ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Done {
    /// All checks held; written in this revision.
    Yes { revision: i64 },
    /// One did not; nothing is changed.
    No,
}

/// Connections to all endpoints; made when they are first used.
#[derive(Debug, Clone)]
pub(super) struct Client {
    channels: Arc<[Channel]>,
    /// The one that answered last.
    preferred: Arc<AtomicUsize>,
    names: Arc<str>,
}

impl Client {
    /// A client of these `host:port`s; must be called inside the runtime that drives its connections.
    ///
    /// # Errors
    /// One of them is no address.
    pub fn new(endpoints: &[String]) -> Result<Self, EtcdError> {
        let names: Arc<str> = endpoints.join(", ").into();
        let channel = |endpoint: &String| {
            let endpoint = Endpoint::from_shared(format!("http://{endpoint}"))?;
            Ok(endpoint.connect_timeout(CALL_DEADLINE).tcp_nodelay(true).connect_lazy())
        };
        let channels: Result<Vec<Channel>, tonic::transport::Error> = endpoints.iter().map(channel).collect();
        let refused = |error: tonic::transport::Error| EtcdError::Refused {
            endpoints: names.to_string(),
            reason: error.to_string(),
        };
        Ok(Self { channels: channels.map_err(refused)?.into(), preferred: Arc::default(), names })
    }

    /// Where it looks.
    pub fn names(&self) -> &str {
        &self.names
    }

    /// One key.
    ///
    /// # Errors
    /// etcd does not answer.
    pub async fn one(&self, key: &str) -> Result<Option<Entry>, EtcdError> {
        Ok(self.range(key.to_owned().into(), Vec::new()).await?.pop())
    }

    /// Everything below a prefix.
    ///
    /// # Errors
    /// etcd does not answer.
    pub async fn below(&self, prefix: &str) -> Result<Vec<Entry>, EtcdError> {
        self.range(prefix.to_owned().into(), end_of(prefix)).await
    }

    async fn range(&self, key: Vec<u8>, end: Vec<u8>) -> Result<Vec<Entry>, EtcdError> {
        let request = wire::RangeRequest { key: key.into(), range_end: end.into() };
        let reply = self
            .call(|channel| {
                let request = request.clone();
                async move {
                    let mut client = wire::kv_client::KvClient::new(channel);
                    client = client.max_decoding_message_size(ANSWER_BYTES_MAX);
                    client.range(request).await
                }
            })
            .await?;
        let entry = |kv: wire::KeyValue| Entry {
            key: String::from_utf8_lossy(&kv.key).into_owned(),
            value: kv.value.to_vec(),
            created: kv.create_revision,
        };
        Ok(reply.into_inner().kvs.into_iter().map(entry).collect())
    }

    /// Writes, if every check holds.
    ///
    /// # Errors
    /// etcd does not answer (the writes may have been done), or refuses them.
    pub async fn write_if(&self, checks: &[Check], writes: Vec<Write>) -> Result<Done, EtcdError> {
        let request = wire::TxnRequest {
            compare: checks.iter().map(comparison).collect(),
            success: writes.into_iter().map(operation).collect(),
            failure: Vec::new(),
        };
        let reply = self
            .call(|channel| {
                let request = request.clone();
                async move { wire::kv_client::KvClient::new(channel).txn(request).await }
            })
            .await?
            .into_inner();
        let revision = reply.header.map_or(0, |header| header.revision);
        Ok(if reply.succeeded { Done::Yes { revision } } else { Done::No })
    }

    /// A new lease.
    ///
    /// # Errors
    /// etcd does not answer, or refuses.
    pub async fn grant(&self, ttl: Duration) -> Result<i64, EtcdError> {
        let request = wire::LeaseGrantRequest { ttl: ttl.as_secs().try_into().unwrap_or(i64::MAX), id: 0 };
        let grant = |channel| async move { wire::lease_client::LeaseClient::new(channel).lease_grant(request).await };
        Ok(self.call(grant).await?.into_inner().id)
    }

    /// Renews a lease: how long it lives from now on; none: it has ended.
    ///
    /// # Errors
    /// etcd does not answer.
    pub async fn keep_alive(&self, lease: i64) -> Result<Option<Duration>, EtcdError> {
        let renew = |channel| async move {
            let requests = tokio_stream::once(wire::LeaseKeepAliveRequest { id: lease });
            let replies = wire::lease_client::LeaseClient::new(channel).lease_keep_alive(requests).await?;
            replies.into_inner().next().await.unwrap_or_else(|| Err(Status::unavailable("it closed the stream")))
        };
        let ttl = self.call(renew).await?.ttl;
        Ok(u64::try_from(ttl).ok().filter(|&ttl| ttl > 0).map(Duration::from_secs))
    }

    /// Ends a lease, and what is bound to it.
    ///
    /// # Errors
    /// etcd does not answer; the lease ends by itself later.
    pub async fn revoke(&self, lease: i64) -> Result<(), EtcdError> {
        let request = wire::LeaseRevokeRequest { id: lease };
        let revoke = |channel| async move { wire::lease_client::LeaseClient::new(channel).lease_revoke(request).await };
        self.call(revoke).await.map(drop)
    }

    /// Asks the endpoint that answered last, then the others.
    async fn call<T, F>(&self, ask: impl Fn(Channel) -> F) -> Result<T, EtcdError>
    where
        F: Future<Output = Result<T, Status>>,
    {
        let first = self.preferred.load(Ordering::Relaxed);
        let mut reason = "no endpoint is named".to_owned();
        for turn in 0..self.channels.len() {
            let index = (first + turn) % self.channels.len();
            match tokio::time::timeout(CALL_DEADLINE, ask(self.channels[index].clone())).await {
                Ok(Ok(reply)) => {
                    self.preferred.store(index, Ordering::Relaxed);
                    return Ok(reply);
                }
                Ok(Err(status)) if is_final(status.code()) => {
                    return Err(EtcdError::Refused {
                        endpoints: self.names.to_string(),
                        reason: status.message().into(),
                    });
                }
                Ok(Err(status)) => reason = words(&status),
                Err(_) => reason = format!("no answer in {} s", CALL_DEADLINE.as_secs()),
            }
        }
        Err(EtcdError::Unreachable { endpoints: self.names.to_string(), reason })
    }
}

/// Whether asking again, or elsewhere, cannot help.
fn is_final(code: Code) -> bool {
    matches!(
        code,
        Code::InvalidArgument
            | Code::ResourceExhausted
            | Code::PermissionDenied
            | Code::Unauthenticated
            | Code::FailedPrecondition
            | Code::Unimplemented
    )
}

fn words(status: &Status) -> String {
    let mut cause: &dyn std::error::Error = status;
    while let Some(source) = cause.source() {
        cause = source;
    }
    let words = cause.to_string();
    if status.message().is_empty() || !words.starts_with("status:") { words } else { status.message().to_owned() }
}

/// The first key behind all those with a prefix.
fn end_of(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    // A prefix ends with a slash here, so the last byte can always be raised.
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end
}

fn comparison(check: &Check) -> wire::Compare {
    let (target, key, revision) = match check {
        Check::Created(key, revision) => (CompareTarget::Create, key, TargetUnion::CreateRevision(*revision)),
        Check::Changed(key, revision) => (CompareTarget::Mod, key, TargetUnion::ModRevision(*revision)),
    };
    wire::Compare {
        result: CompareResult::Equal.into(),
        target: target.into(),
        key: key.clone().into(),
        target_union: Some(revision),
    }
}

fn operation(write: Write) -> wire::RequestOp {
    let request = match write {
        Write::Put { key, value, lease } => {
            Op::RequestPut(wire::PutRequest { key: key.into(), value: value.into(), lease })
        }
        Write::Delete { key } => {
            Op::RequestDeleteRange(wire::DeleteRangeRequest { key: key.into(), ..Default::default() })
        }
    };
    wire::RequestOp { request: Some(request) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_ends_before_its_neighbour() {
        assert_eq!(end_of("phalanx/heads/"), b"phalanx/heads0");
    }
}
