//! A long run of schemathesis: a server is held to its own `/openapi.json` with as many cases as it is told to.
//!
//! Not part of the tests, which make a short run: `cargo xtask document --examples 400` runs it.

#![expect(clippy::print_stdout, clippy::expect_used, reason = "a program for engineers")]

fn main() {
    let examples = std::env::args().nth(1).map_or(400, |text| text.parse().expect("a number of examples"));
    println!("{}", harness::keep_document(examples));
}
