//! `coordinator bench allreduce`: how long sums over this machine's devices take, by every way that there is.
//!
//! The `worker` program beside this one measures, one process a device, as ranks are.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use clap::Args;
use serde::{Deserialize, Serialize};

use super::report_as;
use crate::cli::launch::{DeviceChoice, worker_program};
use crate::cli::{CliError, Outcome, Surroundings};

/// Measure sums over this machine's devices, 8 KiB to 64 MiB, by own kernels and by NCCL
#[derive(Debug, Clone, Args)]
#[command(after_help = "Example:\n  coordinator bench allreduce --world 2 --output allreduce.json")]
pub struct AllreduceFlags {
    /// Devices that exchange [default: all GPUs, or two processes on the CPU]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..))]
    world: Option<u32>,
    /// Which devices
    #[arg(long, value_enum, default_value_t)]
    device: DeviceChoice,
    /// Also write the result as JSON
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Print the result as JSON in place of the table
    #[arg(long)]
    json: bool,
}

/// What the worker program measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Measured {
    device: String,
    devices: Vec<String>,
    world_size: usize,
    notes: Vec<String>,
    timings: Vec<Timing>,
}

/// One sum on the slowest rank.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Timing {
    way: String,
    blocks: u32,
    bytes: u64,
    us: f64,
    right: bool,
}

pub(super) fn run(surroundings: &Surroundings, flags: &AllreduceFlags) -> Outcome {
    let program = worker_program()?;
    let mut command = Command::new(&program);
    command.args(["reduce-bench", "--device", flags.device.as_str()]);
    command.args(flags.world.map(|world| format!("--world={world}")));
    command.env("PHALANX_HOME", surroundings.environment.home.path()).stdin(Stdio::null());
    let cannot = |error| CliError::failed("bench_failed", format!("cannot start {}: {error}", program.display()));
    let output = command.stderr(Stdio::inherit()).output().map_err(cannot)?;
    let measured: Option<Measured> = serde_json::from_slice(&output.stdout).ok();
    let Some(measured) = measured else {
        return Err(CliError::failed("bench_failed", format!("nothing was measured ({})", output.status)));
    };
    let title = format!("allreduce over {} {} devices, us of the slowest rank", measured.world_size, measured.device);
    report_as("allreduce", &table(&title, &measured), &measured, flags.output.as_deref(), flags.json)?;
    if measured.timings.iter().all(|timing| timing.right) {
        return Ok(());
    }
    Err(CliError::failed("wrong_sums", "some sums were wrong; they are marked in the table"))
}

/// One row a size, one column a way; where a way has several numbers of blocks, the fastest and its number.
fn table(title: &str, measured: &Measured) -> String {
    let mut ways: Vec<&str> = Vec::new();
    let mut best: BTreeMap<(u64, &str), &Timing> = BTreeMap::new();
    for timing in &measured.timings {
        if !ways.contains(&timing.way.as_str()) {
            ways.push(&timing.way);
        }
        let place = best.entry((timing.bytes, &timing.way)).or_insert(timing);
        // A wrong sum is shown, however fast the right ones are.
        if (timing.right, timing.us) < (place.right, place.us) {
            *place = timing;
        }
    }
    let mut sizes: Vec<u64> = measured.timings.iter().map(|timing| timing.bytes).collect();
    sizes.sort_unstable();
    sizes.dedup();
    let share = 2.0 * (measured.world_size as f64 - 1.0) / measured.world_size.max(1) as f64;
    let mut rows = vec![["size"].into_iter().chain(ways.iter().copied()).chain(["GB/s"]).map(str::to_owned).collect()];
    for bytes in sizes {
        let of_size = || ways.iter().map(|way| best.get(&(bytes, *way)).copied());
        let fastest = of_size().flatten().map(|timing| timing.us).fold(f64::INFINITY, f64::min);
        let mut row = vec![size(bytes)];
        row.extend(of_size().map(|timing| timing.map_or_else(String::new, cell)));
        row.push(format!("{:.1}", share * bytes as f64 / (fastest * 1e3)));
        rows.push(row);
    }
    let notes: String = measured.notes.iter().map(|note| format!("note: {note}\n")).collect();
    format!("{title}\n{}GB/s: what each link carries each way, by the fastest of the row\n{notes}", columns(&rows))
}

fn cell(timing: &Timing) -> String {
    let blocks = if timing.blocks > 0 { format!(" ({})", timing.blocks) } else { String::new() };
    let mark = if timing.right { "" } else { " WRONG" };
    let digits = if timing.us < 100.0 { 1 } else { 0 };
    format!("{:.digits$}{blocks}{mark}", timing.us)
}

fn size(bytes: u64) -> String {
    if bytes >= 1 << 20 { format!("{} MiB", bytes >> 20) } else { format!("{} KiB", bytes >> 10) }
}

/// Columns as wide as they must be, numbers right.
fn columns(rows: &[Vec<String>]) -> String {
    let num = rows.iter().map(Vec::len).max().unwrap_or_default();
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..num).map(|column| width(column).unwrap_or_default()).collect();
    let mut out = String::new();
    for row in rows {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:>width$}")).collect();
        out.push_str(&cells.join("  "));
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timing(way: &str, blocks: u32, bytes: u64, us: f64, right: bool) -> Timing {
        Timing { way: way.into(), blocks, bytes, us, right }
    }

    #[test]
    fn the_fastest_number_of_blocks_stands_in_the_table() {
        let measured = Measured {
            device: "cuda".into(),
            devices: vec!["cuda:0".into(), "cuda:1".into()],
            world_size: 2,
            notes: vec!["n".into()],
            timings: vec![
                timing("pull", 16, 8192, 4.45, true),
                timing("pull", 64, 8192, 5.0, true),
                timing("pull", 16, 64 << 20, 900.0, true),
                timing("nccl", 0, 8192, 6.3, true),
                timing("nccl", 0, 64 << 20, 245.0, false),
            ],
        };
        assert_eq!(
            table("t", &measured),
            "t\n  size      pull       nccl   GB/s\n 8 KiB  4.5 (16)        6.3    1.8\n64 MiB  900 (16)  245 WRONG  273.9\n\
             GB/s: what each link carries each way, by the fastest of the row\nnote: n\n"
        );
    }

    #[test]
    fn the_workers_object_is_understood() {
        let text = r#"{"device":"cpu","devices":["c","c"],"world_size":2,"notes":[],
            "timings":[{"way":"shm","blocks":0,"bytes":8192,"us":3.5,"right":true}]}"#;
        let measured: Measured = serde_json::from_str(text).unwrap();
        assert_eq!(measured.timings, [timing("shm", 0, 8192, 3.5, true)]);
    }
}
