//! The `coordinator` binary.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    phalanx_coordinator::cli::main()
}
