//! Other people's clients against a real server: `openai` and `anthropic` for Python and Node, and schemathesis.
//!
//! The packages come from their registries by pinned version, once, into `.cache/clients`. Where they cannot be had these
//! tests fail: that they ran is the point.

#![expect(clippy::expect_used, clippy::panic, reason = "helpers of tests are test code too")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use harness::{Cluster, golden, smollm2};

/// Cases for each of a document's operations and phases in this test; a longer run by hand takes thousands.
const EXAMPLES: &str = "12";

fn sources(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("clients").join(name)
}

/// The folder with the packages that `list` names, installed by `install` where they are not there yet.
fn packages(name: &str, list: &str, install: impl FnOnce(&Path) -> Command) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.cache/clients").join(name);
    let (wanted, mark) = (fs::read_to_string(sources(name).join(list)).expect("a list"), folder.join("installed"));
    if fs::read_to_string(&mark).is_ok_and(|installed| installed == wanted) {
        return folder;
    }
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).expect("a folder");
    fs::copy(sources(name).join(list), folder.join(list)).expect("a copy");
    let mut command = install(&folder);
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    fs::write(mark, wanted).expect("a mark");
    folder
}

fn python_packages(name: &str) -> PathBuf {
    packages(name, "requirements.txt", |folder| {
        let mut pip = Command::new("python3");
        pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target"]).arg(folder);
        pip.arg("-r").arg(folder.join("requirements.txt"));
        pip
    })
}

/// Runs a suite to its end and shows what it said.
fn pass(mut suite: Command) {
    let output = suite.output().unwrap_or_else(|e| panic!("{suite:?}: {e}"));
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("{said}");
    assert!(output.status.success(), "{suite:?}: {said}");
}

/// SmolLM2 where it is there, else a model of a few weights, which says nothing of sense but says it in the same form.
fn served() -> (Cluster, String) {
    let cluster = Cluster::start(1);
    let model = smollm2().map_or_else(|| golden("tiny-llama").folder, |model| model.folder);
    cluster.serve(&model, "m", &[]);
    let path = format!("{}/", model.display());
    (cluster, path)
}

#[test]
fn python_programs_run_unchanged() {
    let folder = python_packages("python");
    let (cluster, path) = served();
    let mut suite = Command::new("python3");
    suite.arg(sources("python").join("suite.py")).args([cluster.http.base(), "m", &path]);
    suite.env("PYTHONPATH", folder);
    pass(suite);
}

#[test]
fn node_programs_run_unchanged() {
    let folder = packages("node", "package.json", |folder| {
        let mut npm = Command::new("npm");
        npm.args(["install", "--no-audit", "--no-fund", "--loglevel=error"]).current_dir(folder);
        npm
    });
    // Modules are looked for beside the file that asks for them.
    let suite_file = folder.join("suite.mjs");
    fs::copy(sources("node").join("suite.mjs"), &suite_file).expect("a copy");
    let (cluster, path) = served();
    let mut suite = Command::new("node");
    suite.arg(suite_file).args([cluster.http.base(), "m", &path]);
    pass(suite);
}

/// No request that the document allows or forbids brings the server down, and every answer is as it says.
#[test]
fn the_document_is_kept() {
    let folder = python_packages("schemathesis");
    let cluster = Cluster::start(1);
    cluster.serve(&golden("tiny-llama").folder, "m", &["--max-model-len", "128"]);
    let mut suite = Command::new("python3");
    suite.arg(folder.join("bin/schemathesis")).arg("run").arg(format!("{}/openapi.json", cluster.http.base()));
    suite.args(["--max-examples", EXAMPLES, "--seed", "1", "--no-color", "--continue-on-failure"]);
    // What fields mean together (a stream's options without a stream, a conversation that the model's template refuses)
    // is in no schema, so a request that fits it may be refused.
    suite.args(["--exclude-checks", "positive_data_acceptance", "--request-timeout", "60"]);
    suite.env("PYTHONPATH", folder).current_dir(cluster.node.home());
    pass(suite);
    assert_eq!(cluster.http.get("/health").0, 200);
}
