//! Values that have a form of their own: which devices, how logs look, where the head is.

use std::str::FromStr;

use phalanx_proto::DeviceKind;
use serde::Deserialize;

use super::{ConfigError, defaults};

/// Which devices to offer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceChoice {
    /// GPUs where there are any, else CPU.
    #[default]
    Auto,
    /// These, or nothing.
    #[serde(untagged)]
    Only(DeviceKind),
}

impl FromStr for DeviceChoice {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        let bad = |_| ConfigError::Value { key: "--device", value: text.into(), expected: "auto, cuda, rocm or cpu" };
        text.parse().map(Self::Only).map_err(bad)
    }
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One object a line.
    Json,
}

impl LogFormat {
    /// The word of the flag.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Json => "json",
        }
    }
}

impl FromStr for LogFormat {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err(ConfigError::Value { key: "--log-format", value: text.into(), expected: "text or json" }),
        }
    }
}

/// Where the head listens: `host:port`, as given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeadAddress(String);

impl HeadAddress {
    /// `host:port`.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for HeadAddress {
    type Err = ConfigError;

    /// Takes `host`, `host:port`, `[v6]:port` and the same behind `http://`.
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let bad = || ConfigError::Value { key: "--address", value: text.into(), expected: "HOST:PORT" };
        let bare = text.strip_prefix("http://").unwrap_or(text).trim_end_matches('/');
        let (host, port) = match bare.rsplit_once(':') {
            Some((host, port)) if !host.contains(':') || host.ends_with(']') => {
                (host, port.parse().map_err(|_| bad())?)
            }
            Some(_) => return Err(bad()),
            None => (bare, defaults::CLUSTER_PORT),
        };
        if host.is_empty() || port == 0 || host.contains(['/', ' ', '@', '?', '#']) {
            return Err(bad());
        }
        Ok(Self(format!("{host}:{port}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, expected: Option<&str>) {
        let parsed: Result<HeadAddress, _> = text.parse();
        assert_eq!(parsed.as_ref().ok().map(HeadAddress::as_str), expected, "{text}");
    }

    #[test]
    fn addresses_are_read_as_people_write_them() {
        check("head:8001", Some("head:8001"));
        check("http://10.0.0.1:9/", Some("10.0.0.1:9"));
        check("head", Some("head:8001"));
        check("[::1]:8001", Some("[::1]:8001"));
        check("::1", None);
        check("head:", None);
        check("head:0", None);
        check("head:99999", None);
        check("", None);
        check("a/b:1", None);
    }
}
