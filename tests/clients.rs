//! Other people's clients against a real server: `openai` and `anthropic` for Python and Node, `langchain-openai` with the
//! standard suite of `langchain-tests`, `pydantic-ai`, `instructor`, `llm`, and schemathesis.

#![expect(clippy::expect_used, reason = "helpers of tests are test code too")]

use std::process::Command;

use harness::{Cluster, Suite, golden, keep_document, pass, smollm2};

/// Cases for each of a document's operations and phases in this test; `cargo xtask document` takes thousands.
const EXAMPLES: u32 = 6;

/// A cluster that serves SmolLM2 as `m`, and the path of its file. Made-up weights would not end what they began.
fn served(slots: u32) -> (Cluster, String) {
    let model = smollm2().expect("`cargo xtask fetch` obtains the model that these programs talk to");
    let cluster = Cluster::start(slots);
    cluster.serve(&model.folder, "m", &[]);
    (cluster, model.folder.display().to_string())
}

#[test]
fn python_programs_run_unchanged() {
    let suite = Suite::python("python");
    let (cluster, path) = served(1);
    let mut program = suite.interpreter();
    program.arg(suite.sources().join("suite.py")).args([cluster.http.base(), "m", &format!("{path}/")]);
    println!("{}", pass(program));
}

#[test]
fn node_programs_run_unchanged() {
    let suite = Suite::node("node");
    // Modules are looked for beside the file that asks for them.
    let file = suite.packages().join("suite.mjs");
    std::fs::copy(suite.sources().join("suite.mjs"), &file).expect("a copy");
    let (cluster, path) = served(1);
    let mut program = Command::new("node");
    program.arg(file).args([cluster.http.base(), "m", &format!("{path}/")]);
    println!("{}", pass(program));
}

#[test]
fn frameworks_run_unchanged() {
    let suite = Suite::python("frameworks");
    let (cluster, _) = served(2);
    cluster.serve(&golden("tiny-llama").folder, "n", &[]);
    let mut program = suite.interpreter();
    // Each test that is not green is told with its reason.
    program.args(["-m", "pytest", "-q", "-rsxX", "--no-header", "--tb=short"]).current_dir(suite.sources());
    program.envs([("BASE_URL", cluster.http.base()), ("MODEL", "m"), ("OTHER_MODEL", "n")]);
    println!("{}", pass(program));
}

#[test]
fn the_document_is_kept() {
    println!("{}", keep_document(EXAMPLES));
}
