//! What this program was told: defaults, then the file, then the environment, then flags.
//!
//! Owns every limit with a default and the one reading of the environment. What is discovered (devices, CPUs, the node's id)
//! is other types.
//!
//! **Invariant:** nothing else in this crate reads the environment, and nothing changes a `Config` later. A key or a value
//! that is not understood stops the start.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use phalanx_proto::DeviceKind;
use serde::Deserialize;

use crate::agent::credentials::TrustWish;

/// Defaults and limits.
pub mod defaults {
    use std::time::Duration;

    /// Port of the head where an address names none.
    pub const CLUSTER_PORT: u16 = 8001;
    /// Time for one attempt to connect to the head.
    pub const CONNECT_DEADLINE: Duration = Duration::from_secs(3);
    /// Time for the head to answer a hello.
    pub const WELCOME_DEADLINE: Duration = Duration::from_secs(5);
    /// Time for the head that was started together with an agent to listen.
    pub const HEAD_START_DEADLINE: Duration = Duration::from_secs(30);
    /// First pause between two attempts to reach the head; it doubles.
    pub const RETRY_PAUSE_MIN: Duration = Duration::from_millis(100);
    /// Longest pause between two attempts to reach the head.
    pub const RETRY_PAUSE_MAX: Duration = Duration::from_secs(3);
    /// Longest pause between attempts to reach a head that ranks wait for.
    pub const RETRY_PAUSE_ORPHANED: Duration = Duration::from_millis(200);
    /// Looks for the token of a head on this machine that listens already.
    pub const TOKEN_LOOKS: u32 = 20;
    /// Time between two of them.
    pub const TOKEN_LOOK_PAUSE: Duration = Duration::from_millis(100);
    /// Shortest time between two looks at when this node's certificate ends.
    pub const RENEWAL_LOOK: Duration = Duration::from_secs(1);
    /// Longest time between two looks at when this node's certificate ends.
    pub const RENEWAL_PAUSE: Duration = Duration::from_secs(600);
    /// Rest before a renewal that failed is tried again.
    pub const RENEWAL_RETRY: Duration = Duration::from_secs(5);
    /// Attempts of a rank to reach the head that asked for it.
    pub const RANK_CONNECT_ATTEMPTS: u32 = 5;
    /// How long `worker join` waits for its background process to have joined before it returns.
    pub const JOIN_REPORT_DEADLINE: Duration = Duration::from_secs(4);
    /// Time for a rank to end after SIGTERM; then comes SIGKILL.
    pub const RANK_END_DEADLINE: Duration = Duration::from_secs(3);
    /// Most bytes of a log in one answer.
    pub const LOG_PART_BYTES_MAX: u32 = 256 << 10;
    /// Longest wait for the work of this machine to move elsewhere; then the agent is asked to end at once.
    pub const DRAIN_DEADLINE: Duration = Duration::from_secs(120);
    /// Time for an agent to end after SIGTERM, its ranks included; then comes SIGKILL.
    pub const AGENT_END_DEADLINE: Duration = Duration::from_secs(15);
    /// Time for the last messages of a stream to reach the head.
    pub const FLUSH_DEADLINE: Duration = Duration::from_secs(1);
    /// Time for a stream to take one message.
    pub const SEND_DEADLINE: Duration = Duration::from_secs(5);
    /// Time for a GPU library to say how many devices there are.
    pub const PROBE_DEADLINE: Duration = Duration::from_secs(20);
    /// Time between pings on an idle gRPC connection.
    pub const KEEPALIVE: Duration = Duration::from_secs(1);
    /// Silence after a ping that ends a connection.
    pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
    /// HTTP/2 window of a stream, bytes.
    pub const STREAM_WINDOW_BYTES: u32 = 8 << 20;
    /// HTTP/2 window of a connection, bytes.
    pub const CONNECTION_WINDOW_BYTES: u32 = 32 << 20;
    /// Messages that wait for the head.
    pub const OUTBOX: usize = 64;
    /// Orders and events that wait between the agent's threads.
    pub const AGENT_QUEUE: usize = 256;
    /// One log file; a second one of this size holds what came before.
    pub const LOG_BYTES_MAX: u64 = 8 << 20;
    /// Log files of ranks that are kept; the oldest go first.
    pub const RANK_LOGS_MAX: usize = 64;
    /// Last lines of a rank's log that the head is told.
    pub const LAST_LINES: usize = 20;
    /// Longest line of a rank's log that the head is told, bytes.
    pub const LAST_LINE_BYTES_MAX: usize = 512;
}

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

/// The folder of one node, and where things lie in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Home(PathBuf);

impl Home {
    /// A home at this path, made absolute.
    pub fn new(path: &Path) -> Self {
        Self(std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf()))
    }

    /// The folder itself.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Records of running processes.
    pub fn run_dir(&self) -> PathBuf {
        self.0.join("run")
    }

    /// Keys and certificates between machines.
    pub fn trust_dir(&self) -> PathBuf {
        self.0.join("trust")
    }

    /// Whether the head at this address is the one that runs in this home.
    pub fn is_head_at(&self, head: &HeadAddress) -> bool {
        let Some(record) = head_of_home(self) else { return false };
        [&record["address"], &record["local_address"]].into_iter().any(|known| known.as_str() == Some(head.as_str()))
    }

    /// Logs.
    pub fn log_dir(&self) -> PathBuf {
        self.0.join("logs")
    }

    /// Device code that was compiled on this machine.
    pub fn kernel_cache_dir(&self) -> PathBuf {
        self.0.join("cache").join("kernels")
    }

    /// The record of the running agent.
    pub fn agent_record(&self) -> PathBuf {
        self.run_dir().join("agent.json")
    }

    /// Which head leads, for the ranks.
    pub fn head_note(&self) -> PathBuf {
        self.run_dir().join("leading-head.json")
    }

    /// Held by the running agent for as long as it lives.
    pub fn agent_lock(&self) -> PathBuf {
        self.run_dir().join("agent.lock")
    }

    /// The node's id.
    pub fn node_id(&self) -> PathBuf {
        self.0.join("node_id")
    }
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

/// What the head that runs in this home says of itself.
fn head_of_home(home: &Home) -> Option<serde_json::Value> {
    let text = std::fs::read_to_string(home.path().join("run/head.json")).ok()?;
    serde_json::from_str(&text).ok()
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
