//! What one bundle of a placement group asks for: resources of one node, and labels that the node must have.
//!
//! **Invariant:** a [`BundleSpec`] that was parsed asks for something, in amounts that can be counted.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::strategy::Room;

/// Prefix of a label among a bundle's words.
const LABEL: &str = "label.";
/// Most devices or processors of one bundle.
const AMOUNT_MAX: u32 = 4096;

/// One bundle as it was asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BundleSpec {
    /// Device slots.
    pub slots: u32,
    /// Thousandths of a processor.
    pub millicpus: u32,
    /// Labels that its node must have.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

impl BundleSpec {
    /// The bundle of one rank: one device.
    pub fn of_rank() -> Self {
        Self { slots: 1, ..Self::default() }
    }

    /// What it takes of its node.
    pub fn room(&self) -> Room {
        Room { slots: self.slots, millicpus: self.millicpus }
    }

    /// Whether a node with these labels may hold it.
    pub fn allows(&self, labels: &BTreeMap<String, String>) -> bool {
        self.labels.iter().all(|(key, value)| labels.get(key) == Some(value))
    }
}

/// `cpu=1,gpu=1,label.zone=a`.
impl fmt::Display for BundleSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut words = Vec::new();
        if self.millicpus > 0 {
            words.push(format!("cpu={}", f64::from(self.millicpus) / 1000.0));
        }
        if self.slots > 0 {
            words.push(format!("gpu={}", self.slots));
        }
        words.extend(self.labels.iter().map(|(key, value)| format!("{LABEL}{key}={value}")));
        f.write_str(&words.join(","))
    }
}

impl FromStr for BundleSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut bundle = Self::default();
        for word in text.split(',').map(str::trim).filter(|word| !word.is_empty()) {
            let (key, value) = word.split_once('=').ok_or_else(|| format!("{word} is not NAME=AMOUNT"))?;
            match key.to_ascii_lowercase().as_str() {
                "gpu" | "slot" => bundle.slots = devices(value)?,
                "cpu" => bundle.millicpus = millicpus(value)?,
                _ if key.starts_with(LABEL) && key.len() > LABEL.len() => {
                    bundle.labels.insert(key[LABEL.len()..].to_owned(), value.to_owned());
                }
                _ => return Err(format!("{key} is no resource here; known are cpu, gpu and label.NAME=VALUE")),
            }
        }
        if bundle.room() == Room::default() {
            return Err(format!("bundle {text:?} asks for nothing; write cpu=1,gpu=1"));
        }
        Ok(bundle)
    }
}

fn devices(value: &str) -> Result<u32, String> {
    let amount = value.parse().ok().filter(|amount| *amount <= AMOUNT_MAX);
    amount.ok_or_else(|| format!("gpu={value}: devices are whole, at most {AMOUNT_MAX}"))
}

fn millicpus(value: &str) -> Result<u32, String> {
    let amount = value.parse::<f64>().ok().filter(|amount| (0.0..=f64::from(AMOUNT_MAX)).contains(amount));
    let amount = amount.ok_or_else(|| format!("cpu={value} is not a number of processors up to {AMOUNT_MAX}"))?;
    Ok((amount * 1000.0).round() as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, expected: Result<&str, &str>) {
        match (text.parse::<BundleSpec>(), expected) {
            (Ok(bundle), Ok(expected)) => assert_eq!(bundle.to_string(), expected),
            (Err(error), Err(expected)) => assert!(error.contains(expected), "{error}"),
            (parsed, _) => panic!("{text}: {parsed:?}"),
        }
    }

    #[test]
    fn bundles_are_read_as_people_write_them() {
        check("cpu=1,gpu=1", Ok("cpu=1,gpu=1"));
        check("GPU=2, CPU=0.5", Ok("cpu=0.5,gpu=2"));
        check("slot=1,label.zone=a,label.node=n-1", Ok("gpu=1,label.node=n-1,label.zone=a"));
        check("gpu=0.5", Err("devices are whole"));
        check("cpu=-1", Err("not a number of processors"));
        check("tpu=1", Err("tpu is no resource"));
        check("gpu", Err("not NAME=AMOUNT"));
        check("gpu=0", Err("asks for nothing"));
        check("label.=a,gpu=1", Err("no resource"));
    }
}
