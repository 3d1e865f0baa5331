//! Other people's programs: their packages from the registries, and how they are run.
//!
//! Each folder of `tests/clients` names its packages by version, all of them. They come once, into `.cache/clients`; where they
//! cannot be had, tests fail: that they ran is the point.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Cluster, golden};

/// A folder of `tests/clients`.
pub struct Suite {
    sources: PathBuf,
    packages: PathBuf,
}

impl Suite {
    /// A suite in Python, its packages listed in `requirements.txt`.
    pub fn python(name: &str) -> Self {
        Self::with_packages(name, "requirements.txt", |folder| {
            let mut pip = Command::new("python3");
            // The list is whole: nothing is left to be chosen.
            pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--target"]);
            pip.arg(folder).arg("-r").arg(folder.join("requirements.txt"));
            pip
        })
    }

    /// A suite for Node, its packages listed in `package.json`.
    pub fn node(name: &str) -> Self {
        Self::with_packages(name, "package.json", |folder| {
            let mut npm = Command::new("npm");
            npm.args(["install", "--no-audit", "--no-fund", "--loglevel=error"]).current_dir(folder);
            npm
        })
    }

    /// The suite with the packages that `list` names, installed by `install` where they are not there yet.
    fn with_packages(name: &str, list: &str, install: impl FnOnce(&Path) -> Command) -> Self {
        let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
        let (sources, packages) = (tests.join("clients").join(name), tests.join("../.cache/clients").join(name));
        let (wanted, mark) = (fs::read_to_string(sources.join(list)).expect("a list"), packages.join("installed"));
        if !fs::read_to_string(&mark).is_ok_and(|installed| installed == wanted) {
            let _ = fs::remove_dir_all(&packages);
            fs::create_dir_all(&packages).expect("a folder");
            fs::copy(sources.join(list), packages.join(list)).expect("a copy");
            let mut command = install(&packages);
            let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
            assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
            fs::write(mark, wanted).expect("a mark");
        }
        Self { sources, packages }
    }

    /// Where its files are.
    pub fn sources(&self) -> &Path {
        &self.sources
    }

    /// Where its packages are.
    pub fn packages(&self) -> &Path {
        &self.packages
    }

    /// A Python that finds the packages and writes nothing beside the sources.
    pub fn interpreter(&self) -> Command {
        let mut python = Command::new("python3");
        python.env("PYTHONPATH", &self.packages).env("PYTHONDONTWRITEBYTECODE", "1");
        python
    }
}

/// Runs a program to its end and gives what it said.
///
/// # Panics
/// When it fails.
pub fn pass(mut program: Command) -> String {
    let output = program.output().unwrap_or_else(|e| panic!("{program:?}: {e}"));
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program:?}: {said}");
    said
}

/// Holds a server to its own `/openapi.json`: no request that the document allows or forbids brings it down, and every answer
/// is as the document says. `examples` bounds the cases of each operation and phase.
pub fn keep_document(examples: u32) -> String {
    let suite = Suite::python("schemathesis");
    let cluster = Cluster::start(1);
    cluster.serve(&golden("tiny-llama").folder, "m", &["--max-model-len", "128"]);
    let mut program = suite.interpreter();
    program.arg(suite.packages().join("bin/schemathesis"));
    // It looks for its files where it runs; what it keeps for its next run goes with the cluster.
    for file in ["schemathesis.toml", "hooks.py"] {
        fs::copy(suite.sources().join(file), cluster.node.home().join(file)).expect("a copy");
    }
    program.current_dir(cluster.node.home()).arg("run").arg(format!("{}/openapi.json", cluster.http.base()));
    program.args(["--max-examples", &examples.to_string()]);
    let said = pass(program);
    assert_eq!(cluster.http.get("/health").0, 200);
    said
}
