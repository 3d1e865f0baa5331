//! `worker reduce-bench`: the timing of sums over this machine's devices, and the processes that form them.

use std::num::NonZeroU32;

use anyhow::bail;
use clap::Args;

use super::offer;
use crate::config::{Config, DeviceChoice, Environment, Flags};
use crate::{rank, reduce_bench};

#[derive(Args)]
pub(super) struct ReduceBenchArgs {
    /// Devices that exchange [default: all GPUs, or two processes on the CPU]
    #[arg(long, value_name = "N")]
    world: Option<NonZeroU32>,
    /// auto, cuda or cpu
    #[arg(long, value_name = "KIND")]
    device: Option<DeviceChoice>,
}

/// Times the sums and prints one object; fails where a sum is wrong.
pub(super) fn reduce_bench(args: &ReduceBenchArgs, flags: Flags) -> anyhow::Result<()> {
    let config = Config::load(Flags { device: args.device, ..flags }, Environment::read())?;
    let devices = offer(&config)?;
    let (setup, names) = reduce_bench::Setup::of_this_machine(&config, &devices, args.world)?;
    let measured = setup.run(|timing| {
        let blocks = if timing.blocks > 0 { format!(" ({})", timing.blocks) } else { String::new() };
        let mark = if timing.right { "" } else { "  WRONG SUMS" };
        eprintln!("{}{blocks} {} bytes: {:.1} us{mark}", timing.way, timing.bytes, timing.us);
    })?;
    let object = serde_json::json!({
        "device": setup.device,
        "devices": names,
        "world_size": setup.slots.len(),
        "notes": devices.note.into_iter().chain(measured.notes).collect::<Vec<_>>(),
        "timings": measured.timings,
    });
    println!("{object}");
    if measured.timings.iter().all(|timing| timing.right) { Ok(()) } else { bail!("some sums are wrong") }
}

/// One process of those sums, as its parent asked on stdin.
pub(super) fn reduce_bench_rank() -> anyhow::Result<()> {
    let launch = rank::bind_to_parent(|launch: &reduce_bench::BenchLaunch| launch.parent_pid)?;
    reduce_bench::child::run(&launch)?;
    Ok(())
}
