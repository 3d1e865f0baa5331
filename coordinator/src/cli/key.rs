//! `coordinator key`: API keys of the head in this home.
//!
//! Writes the store's file of keys, which a running head reads again within a second.
//!
//! **Invariant:** a key's text is printed once, by `create`, and kept nowhere.

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::{CliError, Outcome, Surroundings};
use crate::security::key_file::KeyFile;
use crate::security::keys::{KeyRecord, KeyWish, Rate, Scope, unix_seconds};

/// Make, list and revoke the keys that clients of the API send
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Once there is a key, every route but /health needs one.\n\nExample:\n  coordinator key create --name alice \
                        --rate 60/min --tokens-per-day 1000000\n  coordinator key list\n  coordinator key revoke alice"
)]
pub struct KeyFlags {
    #[command(subcommand)]
    action: KeyAction,
}

#[derive(Debug, Clone, Subcommand)]
enum KeyAction {
    Create(CreateFlags),
    List(ListFlags),
    Revoke(RevokeFlags),
}

/// Make a key and print it; it cannot be shown again
#[derive(Debug, Clone, Args)]
struct CreateFlags {
    /// Whose it is; metrics show usage by this name
    #[arg(long, value_name = "NAME")]
    name: String,
    /// What it opens: inference, metrics
    #[arg(long, value_name = "SCOPE", value_delimiter = ',', default_value = "inference")]
    scopes: Vec<Scope>,
    /// How many requests it may make: 5/s, 60/min, 1000/h [default: no limit]
    #[arg(long, value_name = "N/UNIT")]
    rate: Option<Rate>,
    /// How many tokens it may use in a day (UTC), prompts and answers together [default: no limit]
    #[arg(long, value_name = "TOKENS")]
    tokens_per_day: Option<u64>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// List the keys, without their text
#[derive(Debug, Clone, Args)]
struct ListFlags {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Take a key back
#[derive(Debug, Clone, Args)]
struct RevokeFlags {
    /// Its name or its id
    key: String,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

impl KeyFlags {
    pub(super) fn json(&self) -> bool {
        match &self.action {
            KeyAction::Create(flags) => flags.json,
            KeyAction::List(flags) => flags.json,
            KeyAction::Revoke(flags) => flags.json,
        }
    }
}

pub(super) fn run(surroundings: &Surroundings, flags: &KeyFlags) -> Outcome {
    let file = KeyFile::new(&surroundings.environment.home.store_dir());
    match &flags.action {
        KeyAction::Create(flags) => create(&file, flags),
        KeyAction::List(flags) => list(&file, flags.json),
        KeyAction::Revoke(flags) => revoke(&file, flags),
    }
}

fn create(file: &KeyFile, flags: &CreateFlags) -> Outcome {
    if flags.name.is_empty() {
        return Err(CliError::usage("--name is empty"));
    }
    let mut scopes = flags.scopes.clone();
    scopes.dedup();
    let wish = KeyWish { name: flags.name.clone(), scopes, rate: flags.rate, tokens_per_day: flags.tokens_per_day };
    let (record, text) = KeyRecord::new(wish);
    let id = record.id.clone();
    let is_added = file.change(|keys| {
        let is_free = keys.iter().all(|key| key.revoked.is_some() || key.name != record.name);
        if is_free {
            keys.push(record);
        }
        is_free
    })?;
    if !is_added {
        return Err(CliError::failed("name_taken", format!("there is a key named {} already", flags.name))
            .with_hint("coordinator key revoke takes it back"));
    }
    if flags.json {
        println!("{}", json!({"id": id, "name": flags.name, "key": text}));
    } else {
        println!("{text}");
        eprintln!("Keep it: it cannot be shown again. From now on every route but /health needs a key.");
    }
    Ok(())
}

fn described(key: &KeyRecord) -> Value {
    json!({
        "id": key.id, "name": key.name, "scopes": key.scopes, "rate": key.rate.map(|rate| rate.to_string()),
        "tokens_per_day": key.tokens_per_day, "created": key.created, "revoked": key.revoked,
    })
}

fn list(file: &KeyFile, as_json: bool) -> Outcome {
    let keys = file.read()?;
    if as_json {
        println!("{}", json!({"keys": keys.iter().map(described).collect::<Vec<_>>()}));
        return Ok(());
    }
    println!("{:<14} {:<16} {:<18} {:<24} {:<14} STATE", "ID", "NAME", "SCOPES", "RATE", "TOKENS/DAY");
    for key in keys {
        let scopes = key.scopes.iter().map(|scope| scope.as_str()).collect::<Vec<_>>().join(",");
        let rate = key.rate.map_or_else(|| "-".to_owned(), |rate| rate.to_string());
        let tokens = key.tokens_per_day.map_or_else(|| "-".to_owned(), |tokens| tokens.to_string());
        let state = if key.revoked.is_some() { "revoked" } else { "valid" };
        println!("{:<14} {:<16} {scopes:<18} {rate:<24} {tokens:<14} {state}", key.id, key.name);
    }
    Ok(())
}

fn revoke(file: &KeyFile, flags: &RevokeFlags) -> Outcome {
    let revoked: Vec<String> = file.change(|keys| {
        let is_meant = |key: &&mut KeyRecord| key.revoked.is_none() && [&key.id, &key.name].contains(&&flags.key);
        let meant = keys.iter_mut().filter(is_meant);
        meant
            .map(|key| {
                key.revoked = Some(unix_seconds());
                key.id.clone()
            })
            .collect()
    })?;
    if revoked.is_empty() {
        return Err(CliError::failed("no_such_key", format!("there is no valid key {}", flags.key))
            .with_hint("coordinator key list shows them"));
    }
    if flags.json {
        println!("{}", json!({"revoked": revoked}));
    } else {
        eprintln!("{} opens nothing any more; a running head follows within a second", flags.key);
    }
    Ok(())
}
