//! Which head a command talks to: the one that was named, else the one in this home.

use std::time::Duration;

use clap::Args;
use phalanx_trust::{TokenError, Trust, dial, rendezvous};

use super::launch::local_address;
use super::{CliError, Surroundings};
use crate::cluster::membership::{CallError, HeadAddress, HeadClient};
use crate::config::{Home, defaults};
use crate::head::running_head;
use crate::security::tokens::home_token;

/// Names a head.
#[derive(Debug, Clone, Args)]
pub struct AddressFlag {
    /// The head's cluster address [default: the head of this PHALANX_HOME]
    #[arg(long, value_name = "HOST:PORT", env = "PHALANX_ADDRESS")]
    pub address: Option<String>,
}

/// Finds and connects the head; `None` where none is named and none runs in this home.
///
/// # Errors
/// A head is named and does not answer.
pub async fn find(address: Option<&str>, surroundings: &Surroundings) -> Result<Option<HeadClient>, CliError> {
    if let Some(address) = address.filter(|address| !address.is_empty()) {
        return Ok(Some(HeadClient::connect(trusted(&parse(address)?, surroundings).await?).await?));
    }
    let Some(record) = running_head(&surroundings.environment.home) else { return Ok(None) };
    match HeadClient::connect(local_address(&record)).await {
        Ok(client) => Ok(Some(client)),
        // It ended between the look at its record and the call.
        Err(CallError::Unreachable { .. }) if !record.process.is_alive() => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// How the head at an address is known, and what is shown to it: what was said, else what lies in this home, else what a head
/// of this user on this machine has left for others.
async fn trusted(address: &str, surroundings: &Surroundings) -> Result<HeadAddress, CliError> {
    let Surroundings { environment, global } = surroundings;
    let tls = |token| HeadAddress::Tls { address: address.to_owned(), token: Box::new(token) };
    if global.insecure {
        return Ok(HeadAddress::Tcp(address.to_owned()));
    }
    if let Some(text) = global.token.as_ref().or(environment.token.as_ref()) {
        return text.parse().map(tls).map_err(|error: TokenError| CliError::usage(format!("--token: {error}")));
    }
    let own = running_head(&environment.home)
        .filter(|head| [&head.address, &head.local_address].contains(&&address.to_owned()));
    if own.is_some_and(|head| head.insecure) {
        return Ok(HeadAddress::Tcp(address.to_owned()));
    }
    let beside = rendezvous::of_address(address).map(|home| Home::new(home).trust_dir());
    let known =
        beside.and_then(|trust_dir| home_token(&trust_dir)).or_else(|| home_token(&environment.home.trust_dir()));
    match known {
        Some(token) => Ok(tls(token)),
        None => Err(no_token(address).await),
    }
}

/// Whether somebody listens at all makes the difference between exit codes 4 and 1.
async fn no_token(address: &str) -> CliError {
    if let Err(error) = dial(address, &Trust::Plain, defaults::CALL_CONNECT_DEADLINE).await {
        let (address, reason) = (HeadAddress::Tcp(address.to_owned()), error.to_string());
        return CallError::Unreachable { address, reason }.into();
    }
    let message = format!("no token for the head at {address}: it takes commands with --token or PHALANX_TOKEN only");
    CliError::failed("no_token", message)
        .with_hint("On its machine, `coordinator token create --scope admin` makes one; a head that was started with --insecure wants --insecure here too")
}

/// The same where a head must be there.
///
/// # Errors
/// None is, or it does not answer.
pub async fn require(address: Option<&str>, surroundings: &Surroundings) -> Result<HeadClient, CliError> {
    find(address, surroundings).await?.ok_or_else(|| {
        let home = surroundings.environment.home.path().display();
        CliError::no_head(
            format!("no head runs in {home}"),
            "Start one with: coordinator start --head; or name one with --address HOST:PORT",
        )
    })
}

/// How long a call may take before the terminal is told what it waits for.
const SILENCE_MAX: Duration = Duration::from_secs(1);

/// Waits for a call; where that takes long, says what for. `None` for scripts.
pub async fn patiently<T>(waits_for: Option<&str>, call: impl Future<Output = T>) -> T {
    let mut call = std::pin::pin!(call);
    match tokio::time::timeout(SILENCE_MAX, &mut call).await {
        Ok(done) => done,
        Err(_) => {
            waits_for.inspect(|text| eprintln!("{text}"));
            call.await
        }
    }
}

/// Takes `host`, `host:port`, `[v6]:port` and the same behind `http://`.
fn parse(text: &str) -> Result<String, CliError> {
    let bad = || CliError::usage(format!("--address {text} is not HOST:PORT"));
    let bare = text.strip_prefix("http://").unwrap_or(text).trim_end_matches('/');
    let (host, port) = match bare.rsplit_once(':') {
        Some((host, port)) if !host.contains(':') || host.ends_with(']') => (host, port.parse().map_err(|_| bad())?),
        Some(_) => return Err(bad()),
        None => (bare, defaults::CLUSTER_PORT),
    };
    if host.is_empty() || port == 0 || host.contains(['/', ' ', '@']) {
        return Err(bad());
    }
    Ok(format!("{host}:{port}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, expected: Option<&str>) {
        assert_eq!(parse(text).ok(), expected.map(str::to_owned), "{text}");
    }

    #[test]
    fn addresses_are_read_as_people_write_them() {
        check("head:9", Some("head:9"));
        check("head", Some("head:8001"));
        check("http://10.0.0.1:8001/", Some("10.0.0.1:8001"));
        check("[::1]:8001", Some("[::1]:8001"));
        check("::1", None);
        check("head:x", None);
        check("head:0", None);
        check(":1", None);
    }
}
