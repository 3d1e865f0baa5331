//! The agent's stream to the head.

use phalanx_proto::pb::agents_client::AgentsClient;
use phalanx_proto::{AgentCommand, AgentEvent, AgentHello, AgentWelcome, WireError, pb};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

use super::credentials::Credentials;
use crate::config::defaults;
use crate::session::SessionError;

/// Why there is no link.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The head does not answer.
    #[error("{reason}")]
    Unreachable {
        /// What was seen.
        reason: String,
    },
    /// The head does not want this node.
    #[error("refused: {message}")]
    Refused {
        /// Its words.
        message: String,
        /// Whether asking again cannot help.
        is_final: bool,
    },
    /// The stream ended or broke.
    #[error("{reason}")]
    Lost {
        /// How it was seen.
        reason: String,
    },
    /// The head sent something that cannot be taken.
    #[error("from the head: {0}")]
    Wire(#[from] WireError),
}

/// An open stream.
pub struct Link {
    commands: tonic::Streaming<pb::HeadToAgent>,
    events: mpsc::Sender<pb::AgentMessage>,
}

impl Link {
    /// Dials the head and says hello; the head's first message is its welcome.
    pub async fn open(
        credentials: &Credentials,
        head: &str,
        hello: AgentHello,
    ) -> Result<(Self, AgentWelcome), LinkError> {
        credentials.ready().await?;
        let channel = credentials.target(head).dial().await?;
        let (events, outbox) = mpsc::channel(defaults::OUTBOX);
        let mut client = AgentsClient::new(channel);
        let greeting = async {
            let _ = events.send(AgentEvent::Hello(hello).into()).await;
            let joined = client.join(ReceiverStream::new(outbox)).await;
            let commands = joined.inspect_err(|status| {
                if is_about_certificate(status) {
                    credentials.forget();
                }
            });
            let commands = commands.map_err(refusal)?.into_inner();
            let mut link = Self { commands, events };
            match link.next().await? {
                AgentCommand::Welcome(welcome) => Ok((link, welcome)),
                _ => Err(LinkError::Lost { reason: "its first message is no welcome".into() }),
            }
        };
        let late = |_| LinkError::Unreachable { reason: "it did not answer the hello".into() };
        tokio::time::timeout(defaults::WELCOME_DEADLINE, greeting).await.map_err(late)?
    }

    /// The head's next message.
    pub async fn next(&mut self) -> Result<AgentCommand, LinkError> {
        match self.commands.message().await {
            Ok(Some(message)) => Ok(message.try_into()?),
            Ok(None) => Err(LinkError::Lost { reason: "it closed the stream".into() }),
            Err(status) => Err(refusal(status)),
        }
    }

    /// Tells the head something.
    pub async fn send(&mut self, event: AgentEvent) -> Result<(), LinkError> {
        let sent = self.events.send_timeout(event.into(), defaults::SEND_DEADLINE).await;
        sent.map_err(|_| LinkError::Lost { reason: "it takes no messages".into() })
    }

    /// Lets the last messages reach the head: it closes the stream when it has read them.
    pub async fn close(self) {
        let Self { mut commands, events } = self;
        drop(events);
        let drained = async { while matches!(commands.message().await, Ok(Some(_))) {} };
        // A head that does not close in time loses nothing but this courtesy.
        let _ = tokio::time::timeout(defaults::FLUSH_DEADLINE, drained).await;
    }
}

impl From<SessionError> for LinkError {
    fn from(error: SessionError) -> Self {
        match error {
            SessionError::Refused { message } => Self::Refused { message, is_final: false },
            other => Self::Unreachable { reason: other.to_string() },
        }
    }
}

/// Whether TLS ended because of what this node has shown.
fn is_about_certificate(status: &tonic::Status) -> bool {
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        let words = error.to_string();
        if words.contains("fatal alert") && (words.contains("Certificate") || words.contains("UnknownCA")) {
            return true;
        }
        cause = error.source();
    }
    false
}

/// Reads a status: some cannot change by asking again.
pub(super) fn refusal(status: tonic::Status) -> LinkError {
    let message = status.message().to_owned();
    match status.code() {
        // How HTTP/2 says that a connection is not secure enough.
        Code::PermissionDenied if message.starts_with("h2 protocol error") => {
            let message = "it speaks TLS: leave --insecure away, and give --token".into();
            LinkError::Refused { message, is_final: true }
        }
        Code::FailedPrecondition | Code::InvalidArgument | Code::PermissionDenied | Code::Unauthenticated => {
            LinkError::Refused { message, is_final: true }
        }
        // A server of another kind listens there.
        Code::Unimplemented | Code::Internal => LinkError::Lost { reason: format!("it is not a head ({message})") },
        // The head may not have seen yet that this node's last stream is gone.
        Code::AlreadyExists => LinkError::Refused { message, is_final: false },
        _ => LinkError::Lost { reason: if message.is_empty() { status.code().to_string() } else { message } },
    }
}
