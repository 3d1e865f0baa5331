//! `worker doctor`: whether this machine can serve, and what to do where it cannot.
//!
//! Owns the list of checks, in the order in which one needs the other: the host, the devices and their libraries, the links
//! between devices. Holds no opinion about clusters: what a head knows, it tells itself.
//!
//! **Invariant:** each check ends in one line with a state, whatever happens in it, and within a deadline; what can break a
//! process (a device, a communicator) is tried in another one.

mod cuda;
mod host;
mod links;
mod rocm;

use std::path::PathBuf;

use phalanx_proto::VERSION;
use serde::Serialize;
use serde_json::{Value, json};

use super::node;
use crate::config::Config;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// As it should be.
    Ok,
    /// It serves, but not as it could.
    Warn,
    /// It does not serve.
    Fail,
}

impl State {
    /// The word in front of a line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "FAIL",
        }
    }
}

/// One line of the report.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Check {
    /// What was looked at.
    pub name: String,
    /// How it is.
    pub state: State,
    /// What was found.
    pub found: String,
    /// What to do; empty where nothing is to do.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub fix: String,
    /// The same for programs.
    #[serde(skip_serializing_if = "Value::is_null")]
    pub data: Value,
}

impl Check {
    fn ok(name: impl Into<String>, found: impl Into<String>) -> Self {
        Self { name: name.into(), state: State::Ok, found: found.into(), fix: String::new(), data: Value::Null }
    }

    fn warn(name: impl Into<String>, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { state: State::Warn, fix: fix.into(), ..Self::ok(name, found) }
    }

    fn fail(name: impl Into<String>, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { state: State::Fail, ..Self::warn(name, found, fix) }
    }

    fn with_data(self, data: Value) -> Self {
        Self { data, ..self }
    }

    /// The line for people.
    pub fn line(&self) -> String {
        let fix = if self.fix.is_empty() { String::new() } else { format!("\n      to do: {}", self.fix) };
        format!("{:<5} {}: {}{fix}", self.state.as_str(), self.name, self.found)
    }
}

/// What the checks are made with.
#[derive(Debug, Clone)]
pub struct Doctor {
    /// What this program was told.
    pub config: Config,
    /// This program, which is started again where a check may break a process.
    pub program: PathBuf,
}

impl Doctor {
    /// Makes every check; each is given out when it is known.
    pub fn examine(&self, mut report: impl FnMut(Check)) {
        let report: &mut dyn FnMut(Check) = &mut report;
        host::examine(self, report);
        let devices = cuda::examine(self, report);
        rocm::examine(report);
        links::examine(self, &devices, report);
    }
}

/// The report as one object.
pub fn object(checks: &[Check]) -> Value {
    let count = |state| checks.iter().filter(|check| check.state == state).count();
    json!({
        "host": node::hostname(),
        "version": VERSION,
        "num_warned": count(State::Warn),
        "num_failed": count(State::Fail),
        "checks": checks,
    })
}

/// The last line for people.
pub fn summary(checks: &[Check]) -> String {
    let count = |state| checks.iter().filter(|check| check.state == state).count();
    let (warned, failed) = (count(State::Warn), count(State::Fail));
    match (warned, failed) {
        (0, 0) => format!("{} checks, all well", checks.len()),
        _ => format!("{} checks, {warned} warnings, {failed} failed", checks.len()),
    }
}

fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_what_is_wrong_and_what_to_do() {
        assert_eq!(Check::ok("CPU", "2 of them").line(), "ok    CPU: 2 of them");
        let bad = Check::fail("driver", "none", "install one");
        assert_eq!(bad.line(), "FAIL  driver: none\n      to do: install one");
        let all = [Check::ok("a", "b"), Check::warn("c", "d", "e"), bad];
        assert_eq!(summary(&all), "3 checks, 1 warnings, 1 failed");
        let object = object(&all);
        assert_eq!((&object["num_warned"], &object["num_failed"]), (&json!(1), &json!(1)));
        assert_eq!(object["checks"][0], json!({"name": "a", "state": "ok", "found": "b"}));
        assert_eq!(object["checks"][2]["fix"], "install one");
    }
}
