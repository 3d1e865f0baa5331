//! Times the host collectives of two ranks on this machine: `cargo run --release --example allreduce [shm|tcp] [threads]`.

use std::time::{Duration, Instant};

use phalanx_kernels::{Collective, CollectiveError};
use phalanx_proto::{Epoch, LoadModel, NodeId, Rank, Term};
use phalanx_worker::collective::prepare;

const WARM_UP: usize = 50;

fn main() -> Result<(), CollectiveError> {
    let mut args = std::env::args().skip(1);
    let over_tcp = args.next().is_some_and(|transport| transport == "tcp");
    let num_threads = args.next().and_then(|text| text.parse().ok()).unwrap_or(1);
    let load = load(over_tcp);
    let first = prepare(&load, Rank(0))?.with_threads(num_threads);
    let second = prepare(&load, Rank(1))?.with_threads(num_threads);
    let addresses = [first.address(), second.address()];
    println!("{:>10} {:>10} {:>10} {:>10} {:>10}", "bytes", "mean us", "median us", "p99 us", "GB/s");
    std::thread::scope(|scope| {
        let other = scope.spawn(|| run(second.connect(&addresses, Duration::from_secs(5))?.as_mut()));
        run(first.connect(&addresses, Duration::from_secs(5))?.as_mut())?;
        other.join().unwrap_or(Ok(()))
    })
}

fn load(over_tcp: bool) -> LoadModel {
    let node = |rank: u32| NodeId(if over_tcp { format!("n{rank}") } else { "n".into() });
    LoadModel {
        term: Term(1),
        epoch: Epoch(1),
        model_path: String::new(),
        load_format: "dummy".into(),
        dtype: "auto".into(),
        kv_cache_dtype: "auto".into(),
        world_size: 2,
        block_size: 16,
        max_model_len: 16,
        max_num_seqs: 1,
        max_num_batched_tokens: 16,
        memory_utilization: 0.5,
        num_blocks_override: None,
        seed: 0,
        group_key: uuid::Uuid::new_v4().as_bytes().to_vec(),
        rank_nodes: vec![node(0), node(1)],
        steps_in_flight_max: 2,
        enforce_eager: true,
        collective_interface: "127.0.0.1".into(),
        collective_ports: (0, 0),
    }
}

fn run(group: &mut dyn Collective) -> Result<(), CollectiveError> {
    let mut bytes = 2048;
    while bytes <= 4 << 20 {
        let num_rounds = (64_000_000 / bytes).clamp(100, 2000);
        let mut data = vec![1.0f32; bytes / 4];
        let mut times = Vec::with_capacity(num_rounds);
        for round in 0..WARM_UP + num_rounds {
            let started = Instant::now();
            group.all_reduce_sum(&mut data)?;
            if round >= WARM_UP {
                times.push(started.elapsed());
            }
            data.fill(1.0);
        }
        times.sort_unstable();
        if group.rank() == 0 {
            let us = |at: usize| times[at.min(times.len() - 1)].as_secs_f64() * 1e6;
            let mean = times.iter().sum::<Duration>().as_secs_f64() * 1e6 / times.len() as f64;
            let (median, p99) = (us(times.len() / 2), us(times.len() * 99 / 100));
            println!("{bytes:>10} {mean:>10.1} {median:>10.1} {p99:>10.1} {:>10.2}", bytes as f64 / mean / 1e3);
        }
        bytes *= 2;
    }
    Ok(())
}
