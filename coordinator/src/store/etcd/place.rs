//! Where in which etcd a cluster's records are: `etcd://host:2379,host:2379/prefix`.

use std::fmt;
use std::str::FromStr;

use super::super::Table;

/// The port of an endpoint that names none.
const PORT: u16 = 2379;
/// The prefix where none is named.
const PREFIX: &str = "phalanx";

/// Endpoints and the prefix of all keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdPlace {
    endpoints: Vec<String>,
    prefix: String,
}

impl EtcdPlace {
    /// `host:port` of every endpoint; at least one.
    pub fn endpoints(&self) -> &[String] {
        &self.endpoints
    }

    /// The key of whoever leads.
    pub(super) fn leader(&self) -> String {
        format!("{}/leader", self.prefix)
    }

    /// The key that each head changes when it takes the lead, and that stays.
    pub(super) fn last_leader(&self) -> String {
        format!("{}/last_leader", self.prefix)
    }

    /// Below it: one key for each head.
    pub(super) fn heads(&self) -> String {
        format!("{}/heads/", self.prefix)
    }

    /// Below it: the records of a table.
    pub(super) fn records(&self, table: Table) -> String {
        format!("{}/{}/", self.prefix, table.as_str())
    }

    /// The key of a record.
    pub(super) fn record(&self, table: Table, name: &str) -> String {
        format!("{}{name}", self.records(table))
    }
}

impl FromStr for EtcdPlace {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text} is not etcd://HOST:PORT[,HOST:PORT][/PREFIX]");
        let rest = text.strip_prefix("etcd://").ok_or_else(bad)?;
        let (hosts, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let prefix = prefix.trim_matches('/');
        let endpoints = hosts.split(',').map(endpoint).collect::<Option<Vec<String>>>().ok_or_else(bad)?;
        let prefix = if prefix.is_empty() { PREFIX } else { prefix };
        Ok(Self { endpoints, prefix: prefix.to_owned() })
    }
}

fn endpoint(text: &str) -> Option<String> {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !host.contains(':') || (host.starts_with('[') && host.ends_with(']')) => {
            (host, port.parse().ok().filter(|&port: &u16| port > 0)?)
        }
        Some(_) => return None,
        None => (text, PORT),
    };
    (!host.is_empty() && !host.contains(['@', ' ', '?'])).then(|| format!("{host}:{port}"))
}

impl fmt::Display for EtcdPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "etcd://{}/{}", self.endpoints.join(","), self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, expected: Option<&str>) {
        assert_eq!(text.parse::<EtcdPlace>().ok().map(|place| place.to_string()).as_deref(), expected, "{text}");
    }

    #[test]
    fn places_are_read_as_people_write_them() {
        check("etcd://a", Some("etcd://a:2379/phalanx"));
        check("etcd://a:1,b:2/", Some("etcd://a:1,b:2/phalanx"));
        check("etcd://10.0.0.1:2379/prod/one", Some("etcd://10.0.0.1:2379/prod/one"));
        check("etcd://[::1]:2379", Some("etcd://[::1]:2379/phalanx"));
        check("etcd://", None);
        check("etcd://a,", None);
        check("etcd://a:0", None);
        check("etcd://me:secret@a:1", None);
        check("http://a:2379", None);
        check("a:2379", None);
    }
}
