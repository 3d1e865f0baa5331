//! What this program was told: defaults, then the file, then the environment, then flags.
//!
//! Owns every limit with a default and the one reading of the environment. What is discovered (devices, CPUs, the node's id)
//! is other types.
//!
//! **Invariant:** nothing else in this crate reads the environment, and nothing changes a `Config` later. A key or a value
//! that is not understood stops the start.

pub mod defaults;
mod home;
mod values;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};

use serde::Deserialize;

pub use self::home::Home;
use self::home::head_of_home;
pub use self::values::{DeviceChoice, HeadAddress, LogFormat};
use crate::agent::credentials::TrustWish;

/// Why the start is stopped.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file says something that is not understood.
    #[error("{path}: {source}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// What, and where.
        source: serde_json::Error,
    },
    /// A value that is not understood.
    #[error("{key} is {value:?}, which is not {expected}")]
    Value {
        /// The flag or variable.
        key: &'static str,
        /// What it is.
        value: String,
        /// What it may be.
        expected: &'static str,
    },
    /// There is no folder for this node.
    #[error("no folder for this node's files: set PHALANX_HOME or --home")]
    NoHome,
    /// No head is named.
    #[error("no head runs in this home, and none is named: --address HOST:PORT or PHALANX_ADDRESS says where it is")]
    NoAddress,
}

/// The file: every key may be absent, none may be unknown.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    address: Option<String>,
    num_gpus: Option<NonZeroU32>,
    #[serde(default)]
    device: Option<DeviceChoice>,
    advertise_address: Option<String>,
    token: Option<String>,
    token_file: Option<PathBuf>,
    insecure: Option<bool>,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    log_level: Option<String>,
    log_format: Option<LogFormat>,
}

/// The environment.
#[derive(Debug, Clone, Default)]
pub struct Environment {
    home: Option<PathBuf>,
    state: Option<PathBuf>,
    address: Option<String>,
    token: Option<String>,
    token_file: Option<PathBuf>,
    log_level: Option<String>,
    /// Names of variables that hold secrets of others: no rank gets them.
    pub secrets: Vec<String>,
    /// `CUDA_VISIBLE_DEVICES`.
    pub cuda_visible: Option<String>,
    /// `HIP_VISIBLE_DEVICES`.
    pub hip_visible: Option<String>,
    /// `CUDA_HOME`: a toolkit whose libraries and headers are looked at first.
    pub cuda_home: Option<PathBuf>,
    /// Names of NCCL's own settings that the user has made.
    nccl: BTreeSet<String>,
}

impl Environment {
    /// Reads it.
    #[expect(clippy::disallowed_methods, reason = "this is the one place that reads the environment")]
    pub fn read() -> Self {
        let text = |name| std::env::var(name).ok().filter(|value: &String| !value.is_empty());
        let names = || std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
        let path = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        Self {
            home: path("PHALANX_HOME"),
            state: path("XDG_STATE_HOME").or_else(|| path("HOME").map(|home| home.join(".local/state"))),
            address: text("PHALANX_ADDRESS"),
            token: text("PHALANX_TOKEN"),
            token_file: path("PHALANX_TOKEN_FILE"),
            secrets: names().filter(|name| phalanx_trust::variables::is_secret(name)).collect(),
            log_level: text("PHALANX_LOG"),
            // Empty is a value here: it hides all devices.
            cuda_visible: std::env::var("CUDA_VISIBLE_DEVICES").ok(),
            hip_visible: std::env::var("HIP_VISIBLE_DEVICES").ok(),
            cuda_home: text("CUDA_HOME").map(PathBuf::from),
            nccl: names().filter(|name| name.starts_with("NCCL_")).collect(),
        }
    }
}

/// Flags that were given.
#[derive(Debug, Clone, Default)]
pub struct Flags {
    /// `--home`.
    pub home: Option<PathBuf>,
    /// `--config`.
    pub config: Option<PathBuf>,
    /// `--address`.
    pub address: Option<String>,
    /// `--num-gpus`.
    pub num_gpus: Option<NonZeroU32>,
    /// `--device`.
    pub device: Option<DeviceChoice>,
    /// `--advertise-address`.
    pub advertise_address: Option<String>,
    /// `--token`.
    pub token: Option<String>,
    /// `--token-file`.
    pub token_file: Option<PathBuf>,
    /// `--insecure`.
    pub insecure: bool,
    /// `--label`.
    pub labels: BTreeMap<String, String>,
    /// `--log-level`.
    pub log_level: Option<String>,
    /// `--log-format`.
    pub log_format: Option<LogFormat>,
}

/// Everything that this program was told.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where this node's files are.
    pub home: Home,
    /// The head, where one is named.
    pub address: Option<HeadAddress>,
    /// Slots to offer, where said.
    pub num_gpus: Option<NonZeroU32>,
    /// Which devices.
    pub device: DeviceChoice,
    /// Where other machines reach this one, where said.
    pub advertise_address: Option<String>,
    /// What the user said about trust.
    pub trust: TrustWish,
    /// Names of variables that hold secrets of others.
    pub secrets: Vec<String>,
    /// What this machine is labelled with, for placement.
    pub labels: BTreeMap<String, String>,
    /// Log filter.
    pub log_level: String,
    /// Look of log lines.
    pub log_format: LogFormat,
    /// `CUDA_VISIBLE_DEVICES`.
    pub cuda_visible: Option<String>,
    /// `HIP_VISIBLE_DEVICES`.
    pub hip_visible: Option<String>,
    /// `CUDA_HOME`: a toolkit whose libraries and headers are looked at first.
    pub cuda_home: Option<PathBuf>,
    nccl: BTreeSet<String>,
}

impl Config {
    /// Puts defaults, file, environment and flags together, later ones first.
    ///
    /// # Errors
    /// A file that cannot be read, a key or a value that is not understood.
    pub fn load(flags: Flags, environment: Environment) -> Result<Self, ConfigError> {
        let in_state = environment.state.map(|state| state.join("phalanx"));
        let home = flags.home.or(environment.home).or(in_state).ok_or(ConfigError::NoHome)?;
        let home = Home::new(&home);
        let file = match &flags.config {
            Some(path) => read_file(path)?,
            None => match read_file(&home.path().join("worker.json")) {
                Err(ConfigError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => File::default(),
                other => other?,
            },
        };
        let named = flags.address.or(environment.address).or(file.address);
        let own = head_of_home(&home).unwrap_or_default();
        let is_own_insecure =
            own["insecure"] == true && named.as_deref().is_none_or(|named| own["local_address"] == named);
        let address = named.or_else(|| own["local_address"].as_str().map(str::to_owned));
        let token = flags.token.or(environment.token).or(file.token);
        let token_file = flags.token_file.or(environment.token_file).or(file.token_file);
        let insecure = flags.insecure || file.insecure.unwrap_or_default() || is_own_insecure;
        let log_level = flags.log_level.or(environment.log_level).or(file.log_level);
        Ok(Self {
            home,
            address: address.map(|text| text.parse()).transpose()?,
            num_gpus: flags.num_gpus.or(file.num_gpus),
            device: flags.device.or(file.device).unwrap_or_default(),
            advertise_address: flags.advertise_address.or(file.advertise_address),
            trust: trust(insecure, token, token_file)?,
            secrets: environment.secrets,
            labels: file.labels.into_iter().chain(flags.labels).collect(),
            log_level: log_level.unwrap_or_else(|| "info".into()),
            log_format: flags.log_format.or(file.log_format).unwrap_or_default(),
            cuda_visible: environment.cuda_visible,
            hip_visible: environment.hip_visible,
            cuda_home: environment.cuda_home,
            nccl: environment.nccl,
        })
    }

    /// What processes that use NCCL get to hear besides what the user has set.
    ///
    /// NVLink multicast (`NCCL_NVLS_ENABLE`) is off: its objects live in the switches that all devices of a host share, so a
    /// process that ends badly while it holds one can take devices away from others until somebody resets them. The sums that
    /// it forms in a switch are also not the ranks' in rank order. Whoever sets the variable decides otherwise.
    pub fn nccl_defaults(&self) -> Vec<(&'static str, String)> {
        let defaults = [("NCCL_NVLS_ENABLE", "0")];
        let unset = defaults.into_iter().filter(|(name, _)| !self.nccl.contains(*name));
        unset.map(|(name, value)| (name, value.to_owned())).collect()
    }

    /// The head.
    ///
    /// # Errors
    /// None is named, and none runs in this home.
    pub fn head(&self) -> Result<&HeadAddress, ConfigError> {
        self.address.as_ref().ok_or(ConfigError::NoAddress)
    }
}

fn trust(insecure: bool, token: Option<String>, token_file: Option<PathBuf>) -> Result<TrustWish, ConfigError> {
    let expected = "a token (phxt-ID-SECRET-PIN), as `coordinator token create` prints it";
    Ok(match (insecure, token, token_file) {
        (true, _, _) => TrustWish::Insecure,
        (false, Some(text), _) => {
            let parsed = text.parse();
            // What was given may be a secret with a letter too few: it is not shown.
            TrustWish::Token(parsed.map_err(|_| ConfigError::Value {
                key: "--token",
                value: "...".into(),
                expected,
            })?)
        }
        (false, None, Some(path)) => TrustWish::TokenFile(path),
        (false, None, None) => TrustWish::Home,
    })
}

fn read_file(path: &Path) -> Result<File, ConfigError> {
    let text =
        std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_path_buf(), source })?;
    serde_json::from_str(&text).map_err(|source| ConfigError::Parse { path: path.to_path_buf(), source })
}

#[cfg(test)]
mod tests {
    use phalanx_proto::DeviceKind;

    use super::*;

    fn load(file: &str, flags: Flags, environment: Environment) -> Result<Config, ConfigError> {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("worker.json"), file).unwrap();
        Config::load(Flags { home: Some(home.path().into()), ..flags }, environment)
    }

    #[test]
    fn the_head_of_this_home_is_found_without_an_address() {
        let home = tempfile::tempdir().unwrap();
        let flags = || Flags { home: Some(home.path().into()), ..Flags::default() };
        assert!(Config::load(flags(), Environment::default()).unwrap().head().is_err());
        std::fs::create_dir(home.path().join("run")).unwrap();
        std::fs::write(home.path().join("run/head.json"), r#"{"local_address": "127.0.0.1:8001"}"#).unwrap();
        let config = Config::load(flags(), Environment::default()).unwrap();
        assert_eq!(config.head().unwrap().as_str(), "127.0.0.1:8001");
    }

    #[test]
    fn later_sources_win() {
        let file = r#"{"address": "a:1", "num_gpus": 3, "device": "cpu"}"#;
        let config = load(file, Flags::default(), Environment::default()).unwrap();
        assert_eq!(config.head().unwrap().as_str(), "a:1");
        assert_eq!(config.device, DeviceChoice::Only(DeviceKind::Cpu));
        let environment = Environment { address: Some("b:2".into()), ..Environment::default() };
        let config = load(file, Flags::default(), environment.clone()).unwrap();
        assert_eq!(config.head().unwrap().as_str(), "b:2");
        let flags = Flags { address: Some("c:3".into()), num_gpus: NonZeroU32::new(1), ..Flags::default() };
        let config = load(file, flags, environment).unwrap();
        assert_eq!(config.head().unwrap().as_str(), "c:3");
        assert_eq!(config.num_gpus, NonZeroU32::new(1));
    }

    #[test]
    fn multicast_is_off_unless_the_user_says_otherwise() {
        let defaults = |set: &[&str]| {
            let nccl = set.iter().map(|name| (*name).to_owned()).collect();
            load("{}", Flags::default(), Environment { nccl, ..Environment::default() }).unwrap().nccl_defaults()
        };
        assert_eq!(defaults(&["NCCL_DEBUG"]), [("NCCL_NVLS_ENABLE", "0".to_owned())]);
        assert!(defaults(&["NCCL_NVLS_ENABLE"]).is_empty());
    }

    #[test]
    fn what_is_not_understood_stops_the_start() {
        for file in [r#"{"adress": "a:1"}"#, r#"{"num_gpus": 0}"#, r#"{"device": "tpu"}"#, "{", r#"{"address": "a:b"}"#]
        {
            assert!(load(file, Flags::default(), Environment::default()).is_err(), "{file}");
        }
        let missing = Flags { config: Some("/nonexistent/worker.json".into()), ..Flags::default() };
        assert!(load("{}", missing, Environment::default()).is_err());
        assert!(Config::load(Flags::default(), Environment::default()).is_err());
    }
}
