//! Which server a command sends its requests to: one that was named, else one where the model is made sure to be served.

use clap::Args;
use serde_json::Value;

use super::api_client::{ApiClient, ClientError};
use super::connection::AddressFlag;
use super::serve::{EngineFlags, OwnHeadFlags, Served, ensure_served};
use super::{CliError, Outcome, Surroundings};

/// Names a server or a model.
#[derive(Debug, Clone, Args)]
pub struct TargetFlags {
    /// Folder in Hugging Face layout, or .gguf file; served here where it is not served yet
    #[arg(value_name = "MODEL", required_unless_present_any = ["model_flag", "base_url"])]
    model: Option<String>,
    /// The same as MODEL
    #[arg(long = "model", value_name = "MODEL", conflicts_with = "model")]
    model_flag: Option<String>,
    /// A server that runs; MODEL is then a name that it serves [default: the head of this PHALANX_HOME]
    #[arg(long, value_name = "URL")]
    base_url: Option<String>,
    /// Key that the server wants
    #[arg(long, value_name = "KEY", env = "OPENAI_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    #[command(flatten)]
    address: AddressFlag,
    #[command(flatten)]
    engine: EngineFlags,
}

/// A server with a model.
pub struct Target {
    /// How to ask it.
    pub client: ApiClient,
    /// The name that the model answers to.
    pub model: String,
    /// What the server says of it.
    pub description: Value,
    served: Option<Served>,
}

impl TargetFlags {
    fn model(&self) -> Option<&str> {
        self.model.as_deref().or(self.model_flag.as_deref())
    }

    /// Finds the server, or starts what is missing.
    ///
    /// # Errors
    /// Nobody answers at the address, or the model cannot be served.
    pub async fn open(&self, surroundings: &Surroundings) -> Result<Target, CliError> {
        let (served, base) = match &self.base_url {
            Some(url) => (None, url.clone()),
            None => {
                let spec = self.engine.spec(self.model().unwrap_or_default())?;
                let address = self.address.address.as_deref();
                let served = ensure_served(surroundings, address, &spec, &OwnHeadFlags::private()).await?;
                let base = served.http.clone();
                (Some(served), base)
            }
        };
        let asked = served.as_ref().map(|served| served.name.as_str()).or(self.model());
        match describe(&base, self.api_key.as_deref(), asked).await {
            Ok((client, description)) => {
                let model = description["id"].as_str().unwrap_or_default().to_owned();
                Ok(Target { client, model, description, served })
            }
            Err(error) => {
                end(served).await?;
                Err(error)
            }
        }
    }
}

/// What the server says of the model that was asked for, or of its first one.
async fn describe(base: &str, key: Option<&str>, asked: Option<&str>) -> Result<(ApiClient, Value), CliError> {
    let client = ApiClient::new(base, key)?;
    let description = match asked {
        Some(name) => client.get(&format!("/v1/models/{}", escaped(name))).await?,
        None => {
            let list = client.get("/v1/models").await?;
            let first = list.pointer("/data/0").cloned();
            first.ok_or_else(|| CliError::failed("no_model", format!("{base} serves no model")))?
        }
    };
    Ok((client, description))
}

/// A name as part of an address; slashes stay, since the server takes the rest of the address whole.
fn escaped(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    for byte in name.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => out.push(char::from(byte)),
            other => out.push_str(&format!("%{other:02X}")),
        }
    }
    out
}

impl Target {
    /// The longest sequence.
    pub fn max_model_len(&self) -> Option<u32> {
        self.number("max_model_len")
    }

    /// The size of the vocabulary, where the server tells.
    pub fn vocab_size(&self) -> Option<u32> {
        self.number("vocab_size")
    }

    fn number(&self, key: &str) -> Option<u32> {
        self.description[key].as_u64().and_then(|number| u32::try_from(number).ok())
    }

    /// Ends what was started for the command, then gives what the command came to.
    ///
    /// # Errors
    /// The command's own; else that something did not end.
    pub async fn end_with(self, outcome: Outcome) -> Outcome {
        let ended = end(self.served).await;
        outcome.and(ended)
    }
}

async fn end(served: Option<Served>) -> Outcome {
    match served {
        Some(served) => served.end().await,
        None => Ok(()),
    }
}

impl From<ClientError> for CliError {
    fn from(error: ClientError) -> Self {
        let message = error.to_string();
        match error {
            ClientError::BadUrl { .. } => Self::usage(message),
            ClientError::Unreachable { .. } => Self::no_head(message, "Serve a model with: coordinator serve MODEL"),
            ClientError::Refused { .. } => Self::failed("refused", message),
            ClientError::Broken(_) | ClientError::Late { .. } => Self::failed("server_lost", message),
            ClientError::Unreadable { .. } => Self::failed("unreadable", message),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_escaped_but_for_slashes() {
        assert_eq!(escaped("/m/a b"), "/m/a%20b");
        assert_eq!(escaped("Qwen1.5-0.5B_chat"), "Qwen1.5-0.5B_chat");
        assert_eq!(escaped("模?"), "%E6%A8%A1%3F");
    }
}
