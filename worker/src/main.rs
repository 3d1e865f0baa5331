//! The `worker` binary: `join` (node agent), `leave`, `doctor`, and `rank` (one device, one shard; started by the agent).

fn main() -> std::process::ExitCode {
    phalanx_worker::cli::main()
}
