//! `coordinator token`: who may join and command; asked of the running head.
//!
//! **Invariant:** a token's text is printed once, by `create`, and kept nowhere.

use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::json;

use super::connection::{self, AddressFlag};
use super::launch::runtime;
use super::status_text::duration;
use super::{CliError, Outcome, Surroundings};
use crate::cluster::membership::HeadClient;
use crate::config::parse_duration;
use crate::security::keys::unix_seconds;
use crate::security::tokens::{NodeRecord, TokenRecord, TokenScope, TokenWish};

/// How long a token is valid where nothing else is said.
pub const TOKEN_TTL: Duration = Duration::from_secs(24 * 60 * 60);

/// Tokens that let machines join and commands be given from elsewhere
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:\n  coordinator token create\n  coordinator token create --ttl 1h --note rack-7\n  \
                        coordinator token list\n  coordinator token revoke 1f2e3d4c\n\nExample:\n  coordinator token create")]
pub struct TokenFlags {
    #[command(subcommand)]
    action: TokenAction,
}

/// What each of them takes.
#[derive(Debug, Clone, Args)]
struct CommonFlags {
    #[command(flatten)]
    address: AddressFlag,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Subcommand)]
enum TokenAction {
    Create(CreateFlags),
    List(ListFlags),
    Revoke(RevokeFlags),
}

/// List tokens, without their text, and the nodes that have certificates
#[derive(Debug, Clone, Args)]
struct ListFlags {
    #[command(flatten)]
    common: CommonFlags,
}

/// Make a token; its text is shown this once
#[derive(Debug, Clone, Args)]
struct CreateFlags {
    #[command(flatten)]
    common: CommonFlags,
    /// How long it may be used: 30m, 24h, or "never" for until it is revoked
    #[arg(long, value_name = "DURATION", default_value = "24h", value_parser = parse_ttl)]
    ttl: Ttl,
    /// What it opens: join (machines), admin (commands from elsewhere)
    #[arg(long = "scope", value_name = "SCOPE", value_delimiter = ',', default_value = "join")]
    scopes: Vec<TokenScope>,
    /// A word for the list
    #[arg(long, value_name = "TEXT", default_value = "")]
    note: String,
}

#[derive(Debug, Clone, Copy)]
struct Ttl(Option<Duration>);

fn parse_ttl(text: &str) -> Result<Ttl, String> {
    if text == "never" { Ok(Ttl(None)) } else { parse_duration(text).map(|ttl| Ttl(Some(ttl))) }
}

/// Take a token back, or send a node away for good
#[derive(Debug, Clone, Args)]
struct RevokeFlags {
    #[command(flatten)]
    common: CommonFlags,
    /// The token's id
    #[arg(required_unless_present = "node", conflicts_with = "node")]
    id: Option<String>,
    /// A node instead: its certificate counts no more and its streams are closed
    #[arg(long, value_name = "NODE")]
    node: Option<String>,
}

impl TokenFlags {
    fn common(&self) -> &CommonFlags {
        match &self.action {
            TokenAction::Create(CreateFlags { common, .. })
            | TokenAction::List(ListFlags { common })
            | TokenAction::Revoke(RevokeFlags { common, .. }) => common,
        }
    }

    pub(super) fn json(&self) -> bool {
        self.common().json
    }
}

pub(super) fn run(surroundings: &Surroundings, flags: &TokenFlags) -> Outcome {
    runtime()?.block_on(async {
        let CommonFlags { address, json } = flags.common();
        let client = connection::require(address.address.as_deref(), surroundings).await?;
        match &flags.action {
            TokenAction::Create(wish) => create(&client, wish, *json).await,
            TokenAction::List(_) => list(&client, *json).await,
            TokenAction::Revoke(RevokeFlags { id: Some(id), .. }) => revoke_token(&client, id, *json).await,
            TokenAction::Revoke(RevokeFlags { node: Some(node), .. }) => revoke_node(&client, node, *json).await,
            TokenAction::Revoke(_) => Err(CliError::usage("give a token's id, or --node")),
        }
    })
}

async fn create(client: &HeadClient, flags: &CreateFlags, as_json: bool) -> Outcome {
    let mut scopes = flags.scopes.clone();
    scopes.dedup();
    let wish = TokenWish { scopes, ttl: flags.ttl.0, note: flags.note.clone() };
    let token = client.create_token(&wish).await?;
    let address = client.status().await?.head.address;
    let join = join_line(&address, &token.text);
    if as_json {
        println!("{}", json!({"id": token.id, "token": token.text, "expires": token.expires, "join": join}));
        return Ok(());
    }
    println!("{}", token.text);
    let until = token.expires.map_or("until it is revoked".to_owned(), |at| format!("for {}", left(at)));
    eprintln!("Keep it: it cannot be shown again. It is good {until}.");
    if wish.scopes.contains(&TokenScope::Join) {
        eprintln!("On another machine: {join}");
    }
    if wish.scopes.contains(&TokenScope::Admin) {
        eprintln!("From elsewhere: PHALANX_TOKEN=... coordinator status --address {address}");
    }
    Ok(())
}

/// What is typed on another machine.
pub fn join_line(address: &str, token: &str) -> String {
    format!("worker join --address {address} --token {token}")
}

fn left(until: u64) -> String {
    duration(until.saturating_sub(unix_seconds()) as f64)
}

async fn list(client: &HeadClient, as_json: bool) -> Outcome {
    let list = client.tokens().await?;
    if as_json {
        let tokens: Vec<_> = list.tokens.iter().map(described).collect();
        println!("{}", json!({"tokens": tokens, "nodes": list.nodes}));
        return Ok(());
    }
    println!("{:<10} {:<12} {:<9} {:<12} NOTE", "TOKEN", "SCOPES", "STATE", "ENDS IN");
    for token in &list.tokens {
        let scopes = token.scopes.iter().map(|scope| scope.as_str()).collect::<Vec<_>>().join(",");
        let ends = token.expires.filter(|_| token.state() == "valid").map_or_else(|| "-".to_owned(), left);
        println!("{:<10} {scopes:<12} {:<9} {ends:<12} {}", token.id, token.state(), token.note);
    }
    println!("\n{:<28} {:<9} {:<12} {:<10} CERTIFICATE", "NODE", "STATE", "ENDS IN", "TOKEN");
    for node in &list.nodes {
        let (state, ends) = (node_state(node), left(node.not_after));
        println!("{:<28} {state:<9} {ends:<12} {:<10} {}", node.node_id, node.token, node.serial);
    }
    Ok(())
}

fn described(token: &TokenRecord) -> serde_json::Value {
    json!({
        "id": token.id, "scopes": token.scopes, "note": token.note, "state": token.state(), "created": token.created,
        "expires": token.expires, "revoked": token.revoked,
    })
}

fn node_state(node: &NodeRecord) -> &'static str {
    match node.revoked {
        Some(_) => "revoked",
        None if node.not_after <= unix_seconds() => "expired",
        None => "valid",
    }
}

async fn revoke_token(client: &HeadClient, id: &str, as_json: bool) -> Outcome {
    client.revoke_token(id).await?;
    if as_json {
        println!("{}", json!({"revoked": id}));
    } else {
        eprintln!("{id} opens nothing any more; machines that joined with it stay (revoke --node sends one away)");
    }
    Ok(())
}

async fn revoke_node(client: &HeadClient, node: &str, as_json: bool) -> Outcome {
    let token = client.revoke_node(node).await?;
    if as_json {
        println!("{}", json!({"revoked": node, "token": token}));
        return Ok(());
    }
    eprintln!("{node} is cut off, and does not come back under this name");
    if let Some(token) = token {
        eprintln!("it joined with token {token}, which still opens the cluster: coordinator token revoke {token}");
    }
    Ok(())
}
