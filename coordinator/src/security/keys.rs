//! API keys: who may ask for what, how often, and how much of it they have used.
//!
//! Keys live in one file of the store, hashed. The command line writes it under a lock; the head reads it again when it has
//! changed. Keys have 256 bits from the operating system's random numbers, so a plain hash cannot be guessed back.
//!
//! **Invariant:** a key's text exists in the answer to `key create` only; neither file nor log holds it.
//! **Invariant:** once a key has been made, no route but health answers without one, revoked or not.

use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::FileError;
use super::key_file::KeyFile;

/// How often a changed file is looked for.
const REREAD_INTERVAL: Duration = Duration::from_millis(500);
/// How every key begins.
const PREFIX: &str = "phx-";
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// SHA-256 of a key's text.
type KeyHash = [u8; 32];

/// What a key opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Generation and tokenizing.
    Inference,
    /// `/metrics`.
    Metrics,
}

impl Scope {
    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Inference => "inference",
            Self::Metrics => "metrics",
        }
    }
}

impl FromStr for Scope {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Self::Inference, Self::Metrics]
            .into_iter()
            .find(|scope| scope.as_str() == text)
            .ok_or_else(|| format!("{text} is no scope; there are inference and metrics"))
    }
}

/// So many requests in so much time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rate {
    /// Requests.
    pub requests: u32,
    /// The time, seconds.
    pub seconds: u32,
}

impl FromStr for Rate {
    type Err = String;

    /// `60/min`, `5/s`, `1000/h`; a number alone is per minute.
    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text} is not a rate; write 5/s, 60/min or 1000/h");
        let (requests, unit) = text.split_once('/').unwrap_or((text, "min"));
        let seconds = match unit {
            "s" | "sec" => 1,
            "m" | "min" => 60,
            "h" | "hour" => 3600,
            _ => return Err(bad()),
        };
        let requests = requests.parse().ok().filter(|requests| *requests > 0).ok_or_else(bad)?;
        Ok(Self { requests, seconds })
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = match self.seconds {
            1 => "second",
            60 => "minute",
            _ => "hour",
        };
        write!(f, "{} requests a {unit}", self.requests)
    }
}

/// One key, without its text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyRecord {
    /// A short word that tells keys apart; the beginning of the text.
    pub id: String,
    /// Whose it is.
    pub name: String,
    /// SHA-256 of the text, in hexadecimal digits.
    pub hash: String,
    /// What it opens.
    pub scopes: Vec<Scope>,
    /// How often.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<Rate>,
    /// How many tokens in a day (UTC), prompts and answers together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_per_day: Option<u64>,
    /// When it was made, seconds since 1970.
    pub created: u64,
    /// When it was taken back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revoked: Option<u64>,
}

/// What a new key is made from.
#[derive(Debug, Clone)]
pub struct KeyWish {
    /// Whose it is.
    pub name: String,
    /// What it opens.
    pub scopes: Vec<Scope>,
    /// How often.
    pub rate: Option<Rate>,
    /// How many tokens in a day.
    pub tokens_per_day: Option<u64>,
}

impl KeyRecord {
    /// A new key and its text, which is known here only.
    pub fn new(wish: KeyWish) -> (Self, String) {
        let text = format!("{PREFIX}{}{}", uuid::Uuid::new_v4().simple(), uuid::Uuid::new_v4().simple());
        let KeyWish { name, scopes, rate, tokens_per_day } = wish;
        let id = text[..PREFIX.len() + 8].to_owned();
        let hash = hex(&digest(&text));
        (Self { id, name, hash, scopes, rate, tokens_per_day, created: unix_seconds(), revoked: None }, text)
    }
}

/// Seconds since 1970.
pub fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn digest(text: &str) -> KeyHash {
    Sha256::digest(text.as_bytes()).into()
}

fn hex(hash: &KeyHash) -> String {
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Why a request may not pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// No key, a wrong one or one that was taken back.
    Unknown,
    /// The key does not open the route.
    Scope(Scope),
    /// Too often.
    Rate {
        /// What is allowed.
        rate: Rate,
        /// When the next one is.
        retry_after: Duration,
    },
    /// The tokens of the day are used.
    Quota {
        /// What is allowed.
        tokens_per_day: u64,
        /// When the next day begins.
        retry_after: Duration,
    },
}

impl Refusal {
    /// One word for metrics.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Unknown => "key_unknown",
            Self::Scope(_) => "key_scope",
            Self::Rate { .. } => "key_rate",
            Self::Quota { .. } => "key_quota",
        }
    }
}

/// A key of the store and what was done with it.
#[derive(Debug)]
pub struct KeyEntry {
    record: KeyRecord,
    used: Arc<Mutex<Used>>,
}

/// What a key has used.
#[derive(Debug)]
struct Used {
    /// Requests that it may make at once.
    allowance: f64,
    counted: Instant,
    day: u64,
    tokens: u64,
}

impl Used {
    fn new(day: u64, tokens: u64) -> Self {
        Self { allowance: f64::INFINITY, counted: Instant::now(), day, tokens }
    }

    fn turn_to(&mut self, day: u64) {
        if self.day != day {
            (self.day, self.tokens) = (day, 0);
        }
    }

    /// Takes one request from the allowance, which grows with time up to a full one.
    fn take(&mut self, rate: Rate, now: Instant) -> Result<(), Duration> {
        let (full, period) = (f64::from(rate.requests), f64::from(rate.seconds));
        let grown = now.saturating_duration_since(self.counted).as_secs_f64() * full / period;
        (self.allowance, self.counted) = ((self.allowance + grown).min(full), now);
        if self.allowance < 1.0 {
            return Err(Duration::from_secs_f64((1.0 - self.allowance) * period / full));
        }
        self.allowance -= 1.0;
        Ok(())
    }
}

impl KeyEntry {
    /// Whose it is.
    pub fn name(&self) -> &str {
        &self.record.name
    }

    /// Counts tokens of a prompt or an answer.
    pub fn add_tokens(&self, num_tokens: u64) {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        used.turn_to(unix_seconds() / DAY.as_secs());
        used.tokens += num_tokens;
    }

    fn admit(&self, scope: Scope) -> Result<(), Refusal> {
        if !self.record.scopes.contains(&scope) {
            return Err(Refusal::Scope(scope));
        }
        if scope != Scope::Inference {
            return Ok(());
        }
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let now = unix_seconds();
        used.turn_to(now / DAY.as_secs());
        if let Some(tokens_per_day) = self.record.tokens_per_day.filter(|share| used.tokens >= *share) {
            let retry_after = Duration::from_secs(DAY.as_secs() - now % DAY.as_secs());
            return Err(Refusal::Quota { tokens_per_day, retry_after });
        }
        match self.record.rate {
            Some(rate) => used.take(rate, Instant::now()).map_err(|retry_after| Refusal::Rate { rate, retry_after }),
            None => Ok(()),
        }
    }
}

/// The keys that a head knows.
#[derive(Debug, Default)]
pub struct KeyRing {
    /// Keys of the command line: they open everything.
    plain: Vec<KeyHash>,
    file: Option<KeyFile>,
    table: RwLock<Table>,
    looked: Mutex<Option<Instant>>,
}

#[derive(Debug, Default)]
struct Table {
    entries: HashMap<String, Arc<KeyEntry>>,
    /// True once a key was made.
    is_needed: bool,
}

impl KeyRing {
    /// Keys of the command line, and those of a file.
    ///
    /// # Errors
    /// The file is damaged: nobody is let in on a guess.
    pub fn new(plain: &[String], file: Option<KeyFile>) -> Result<Self, FileError> {
        let plain = plain.iter().map(|key| digest(key)).collect();
        let ring = Self { plain, file, ..Self::default() };
        if let Some(file) = &ring.file {
            let used = file.read_usage();
            let day = unix_seconds() / DAY.as_secs();
            let seen = |id: &str| used.tokens.get(id).copied().filter(|_| used.day == day).unwrap_or(0);
            ring.replace(file.read()?, |id| Arc::new(Mutex::new(Used::new(day, seen(id)))));
        }
        Ok(ring)
    }

    fn replace(&self, records: Vec<KeyRecord>, fresh: impl Fn(&str) -> Arc<Mutex<Used>>) {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let is_needed = table.is_needed || !records.is_empty();
        let entries = records.into_iter().filter(|record| record.revoked.is_none()).map(|record| {
            let known = table.entries.get(&record.hash);
            let used = known.map_or_else(|| fresh(&record.id), |entry| Arc::clone(&entry.used));
            (record.hash.clone(), Arc::new(KeyEntry { record, used }))
        });
        let entries = entries.collect();
        *table = Table { entries, is_needed };
    }

    /// Reads the file again where it has changed.
    fn refresh(&self) {
        let Some(file) = &self.file else { return };
        {
            let mut looked = self.looked.lock().unwrap_or_else(PoisonError::into_inner);
            if looked.is_some_and(|at| at.elapsed() < REREAD_INTERVAL) {
                return;
            }
            *looked = Some(Instant::now());
        }
        if !file.has_changed() {
            return;
        }
        match file.read() {
            Ok(records) => {
                let day = unix_seconds() / DAY.as_secs();
                self.replace(records, |_| Arc::new(Mutex::new(Used::new(day, 0))));
            }
            Err(error) => tracing::warn!(%error, "keys stay as they were"),
        }
    }

    /// Lets a request with the key `presented` pass to a route that needs `scope`.
    ///
    /// # Errors
    /// It may not pass.
    pub fn admit(&self, presented: Option<&str>, scope: Option<Scope>) -> Result<Option<Arc<KeyEntry>>, Refusal> {
        self.refresh();
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        if self.plain.is_empty() && !table.is_needed {
            return Ok(None);
        }
        let hash = digest(presented.ok_or(Refusal::Unknown)?);
        // What is compared are hashes: time tells nothing about the text.
        if self.plain.contains(&hash) {
            return Ok(None);
        }
        let entry = table.entries.get(&hex(&hash)).cloned().ok_or(Refusal::Unknown)?;
        drop(table);
        if let Some(scope) = scope {
            entry.admit(scope)?;
        }
        Ok(Some(entry))
    }

    /// Writes what keys have used today, so that a restart does not forget it.
    pub fn save_usage(&self) {
        let Some(file) = &self.file else { return };
        let day = unix_seconds() / DAY.as_secs();
        let tokens: HashMap<String, u64> = {
            let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
            let of = |entry: &Arc<KeyEntry>| {
                let used = entry.used.lock().unwrap_or_else(PoisonError::into_inner);
                (entry.record.id.clone(), if used.day == day { used.tokens } else { 0 })
            };
            table.entries.values().map(of).filter(|(_, tokens)| *tokens > 0).collect()
        };
        file.write_usage(day, tokens);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish(name: &str) -> KeyWish {
        KeyWish { name: name.into(), scopes: vec![Scope::Inference], rate: None, tokens_per_day: None }
    }

    #[test]
    fn keys_are_needed_from_the_first_on_even_when_all_are_taken_back() {
        let dir = tempfile::tempdir().unwrap();
        let file = || KeyFile::new(dir.path());
        let ring = KeyRing::new(&[], Some(file())).unwrap();
        assert!(ring.admit(None, Some(Scope::Inference)).unwrap().is_none());
        let (record, text) = KeyRecord::new(wish("a"));
        assert!(text.starts_with("phx-") && !format!("{record:?}").contains(&text));
        file().change(|records| records.push(record.clone())).unwrap();
        let ring = KeyRing::new(&[], Some(file())).unwrap();
        assert_eq!(ring.admit(None, None).unwrap_err(), Refusal::Unknown);
        assert_eq!(ring.admit(Some("phx-other"), None).unwrap_err(), Refusal::Unknown);
        assert_eq!(ring.admit(Some(&text), Some(Scope::Inference)).unwrap().unwrap().name(), "a");
        assert_eq!(ring.admit(Some(&text), Some(Scope::Metrics)).unwrap_err(), Refusal::Scope(Scope::Metrics));
        file().change(|records| records.iter_mut().for_each(|record| record.revoked = Some(1))).unwrap();
        let ring = KeyRing::new(&[], Some(file())).unwrap();
        assert_eq!(ring.admit(Some(&text), None).unwrap_err(), Refusal::Unknown);
    }

    #[test]
    fn a_running_ring_follows_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let ring = KeyRing::new(&[], Some(KeyFile::new(dir.path()))).unwrap();
        assert!(ring.admit(None, None).is_ok());
        let (record, text) = KeyRecord::new(wish("a"));
        KeyFile::new(dir.path()).change(|records| records.push(record)).unwrap();
        std::thread::sleep(REREAD_INTERVAL + Duration::from_millis(50));
        assert_eq!(ring.admit(None, None).unwrap_err(), Refusal::Unknown);
        assert!(ring.admit(Some(&text), None).is_ok());
    }

    #[test]
    fn rates_and_shares_of_the_day_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let rate = Some("2/h".parse().unwrap());
        let (record, text) = KeyRecord::new(KeyWish { rate, tokens_per_day: Some(10), ..wish("a") });
        KeyFile::new(dir.path()).change(|records| records.push(record)).unwrap();
        let ring = KeyRing::new(&[], Some(KeyFile::new(dir.path()))).unwrap();
        let ask = |ring: &KeyRing| ring.admit(Some(&text), Some(Scope::Inference));
        let entry = ask(&ring).unwrap().unwrap();
        ask(&ring).unwrap();
        let Err(Refusal::Rate { retry_after, .. }) = ask(&ring) else { panic!("a third request") };
        assert!(retry_after > Duration::from_secs(1700) && retry_after <= Duration::from_secs(1800));
        entry.add_tokens(10);
        assert!(matches!(ask(&ring), Err(Refusal::Quota { tokens_per_day: 10, .. })));
        ring.save_usage();
        let ring = KeyRing::new(&[], Some(KeyFile::new(dir.path()))).unwrap();
        assert!(matches!(ask(&ring), Err(Refusal::Quota { .. })), "a restart forgets nothing");
    }

    #[test]
    fn rates_are_read_as_people_write_them() {
        let check = |text: &str, told: &str| assert_eq!(text.parse::<Rate>().unwrap().to_string(), told);
        check("5/s", "5 requests a second");
        check("60/min", "60 requests a minute");
        check("60", "60 requests a minute");
        check("1000/h", "1000 requests a hour");
        for text in ["", "0/s", "5/y", "x/s", "-1/s"] {
            assert!(text.parse::<Rate>().is_err(), "{text}");
        }
    }
}
