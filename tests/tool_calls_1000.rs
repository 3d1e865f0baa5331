//! A thousand answers that have to be calls, from random weights at temperature 2, in every format.
//!
//! Not part of the tests: `cargo xtask tool-calls` runs it. With the name of a file, every call is written there, one JSON
//! object a line, for another validator to judge.

#![expect(clippy::expect_used, clippy::print_stdout, reason = "a program for engineers")]

use std::fs::File;
use std::io::{BufWriter, Write};

use harness::{Cluster, check_calls};
use serde_json::json;

/// Requests of each format and kind.
const NUM_REQUESTS: u64 = 6;
/// Answers of each request.
const NUM_CHOICES: usize = 10;

fn main() {
    let file = std::env::args().nth(1).map(|path| File::create(path).expect("a file"));
    let mut file = file.map(BufWriter::new);
    let cluster = Cluster::start(1);
    let all = check_calls(&cluster, NUM_REQUESTS, NUM_CHOICES, &mut |schema, arguments, whole| {
        if let Some(file) = &mut file {
            let line = json!({"schema": schema, "arguments": arguments, "whole": whole});
            writeln!(file, "{line}").expect("a line");
        }
    });
    let (mut runs, mut ended, mut calls, mut cut) = (0, 0, 0, 0);
    for (name, figures) in &all {
        println!(
            "{name}: {} runs, {} ended, {} whole calls, {} cut and can go on",
            figures.runs, figures.ended, figures.calls, figures.cut
        );
        runs += figures.runs;
        ended += figures.ended;
        calls += figures.calls;
        cut += figures.cut;
    }
    println!("{runs} runs, {ended} ended, {calls} whole calls, {cut} cut; none breaks its schema");
}
