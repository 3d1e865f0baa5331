//! Groups of threads and of processes: sums, gathers, deadlines, aborts, deaths.

use std::time::{Duration, Instant};

use phalanx_kernels::{Collective, CollectiveError};
use phalanx_proto::{Epoch, LoadModel, NodeId, Rank, Term};
use proptest::prelude::*;

use super::{PendingGroup, prepare};

const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Transport {
    Shm,
    Tcp,
}

fn load(world_size: usize, transport: Transport) -> LoadModel {
    let node = |rank: usize| NodeId(if transport == Transport::Shm { "a".into() } else { format!("n{rank}") });
    LoadModel {
        term: Term(1),
        epoch: Epoch(1),
        model_path: String::new(),
        load_format: "dummy".into(),
        dtype: "float32".into(),
        kv_cache_dtype: "auto".into(),
        world_size: world_size as u32,
        block_size: 16,
        max_model_len: 16,
        max_num_seqs: 1,
        max_num_batched_tokens: 16,
        memory_utilization: 0.5,
        num_blocks_override: None,
        seed: 0,
        group_key: uuid::Uuid::new_v4().as_bytes().to_vec(),
        rank_nodes: (0..world_size).map(node).collect(),
        steps_in_flight_max: 2,
        enforce_eager: true,
        disable_custom_all_reduce: false,
        collective_interface: "127.0.0.1".into(),
        collective_ports: (0, 0),
    }
}

fn pending(load: &LoadModel) -> (Vec<PendingGroup>, Vec<String>) {
    let all: Vec<PendingGroup> = (0..load.world_size).map(|rank| prepare(load, Rank(rank)).unwrap()).collect();
    let addresses = all.iter().map(PendingGroup::address).collect();
    (all, addresses)
}

/// Runs `f` on every rank of a fresh group, one thread each.
fn on_ranks<T: Send>(
    world_size: usize,
    transport: Transport,
    adjust: impl Fn(PendingGroup) -> PendingGroup + Sync,
    f: impl Fn(&mut dyn Collective) -> T + Sync,
) -> Vec<T> {
    let (all, addresses) = pending(&load(world_size, transport));
    std::thread::scope(|scope| {
        let threads: Vec<_> = all
            .into_iter()
            .map(|one| {
                let (f, adjust, addresses) = (&f, &adjust, &addresses);
                scope.spawn(move || f(adjust(one).connect(addresses, PATIENCE).unwrap().as_mut()))
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Cheap numbers of all magnitudes, the same wherever they are made.
fn term(rank: usize, seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(31).wrapping_add(rank as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        ((state >> 40) as f32 - 8e6) * [1e-6, 1.0, 1e5][(state % 3) as usize]
    };
    std::iter::repeat_with(next).take(len).collect()
}

fn expected_sum(world_size: usize, seed: u64, len: usize) -> Vec<f32> {
    let mut sum = term(0, seed, len);
    for rank in 1..world_size {
        for (s, x) in sum.iter_mut().zip(term(rank, seed, len)) {
            *s += x;
        }
    }
    sum
}

fn bits(data: &[f32]) -> Vec<u32> {
    data.iter().map(|x| x.to_bits()).collect()
}

fn check_calls(world_size: usize, transport: Transport, sizes: &[usize]) {
    on_ranks(
        world_size,
        transport,
        |p| p,
        |group| {
            for (i, &len) in sizes.iter().enumerate() {
                let mut data = term(group.rank(), i as u64, len);
                group.all_reduce_sum(&mut data).unwrap();
                assert!(
                    bits(&data) == bits(&expected_sum(world_size, i as u64, len)),
                    "sum of {len} on {}",
                    group.rank()
                );
                let part = vec![group.rank() as u8 + 1; len];
                let mut out = vec![0; len * world_size];
                group.all_gather(&part, &mut out).unwrap();
                assert!(out.chunks(len.max(1)).enumerate().all(|(r, c)| c.iter().all(|b| *b == r as u8 + 1)));
            }
        },
    );
}

fn sizes() -> impl Strategy<Value = Vec<usize>> {
    let size = prop_oneof![4 => 1usize..5000, 3 => 5000usize..300_000, 1 => 300_000usize..2_000_000];
    prop::collection::vec(size, 1..5)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn shm_sums_are_the_same_bits_on_all_ranks(world_size in 2usize..5, sizes in sizes()) {
        check_calls(world_size, Transport::Shm, &sizes);
    }

    #[test]
    fn tcp_sums_are_the_same_bits_on_all_ranks(world_size in 2usize..5, sizes in sizes()) {
        check_calls(world_size, Transport::Tcp, &sizes);
    }
}

#[test]
fn odd_sizes_and_many_small_calls() {
    let mut sizes = vec![0, 1, 2_000_000, 3, 8_192, 8_193, 4_096, 4_097, 131_072, 131_073];
    sizes.extend(std::iter::repeat_n(7, 500));
    for transport in [Transport::Shm, Transport::Tcp] {
        check_calls(3, transport, &sizes);
    }
}

#[test]
fn a_group_of_one_needs_nobody() {
    let (mut all, addresses) = pending(&load(1, Transport::Shm));
    let mut group = all.remove(0).connect(&addresses, PATIENCE).unwrap();
    let mut data = [1.0, 2.0];
    group.all_reduce_sum(&mut data).unwrap();
    assert_eq!(data, [1.0, 2.0]);
}

#[test]
fn a_rank_that_does_not_come_is_named_at_the_deadline() {
    for transport in [Transport::Shm, Transport::Tcp] {
        let (mut all, addresses) = pending(&load(2, transport));
        let started = Instant::now();
        let result = all.remove(0).connect(&addresses, Duration::from_millis(200));
        assert!(matches!(result, Err(CollectiveError::Deadline { rank: 0, peer: 1, .. })));
        assert!(started.elapsed() < Duration::from_secs(2));
    }
}

/// Terms that came before the group broke still make a true sum; the next call must fail.
fn call_twice(group: &mut dyn Collective) -> Result<(), CollectiveError> {
    group.all_reduce_sum(&mut [0.0; 8])?;
    group.all_reduce_sum(&mut [0.0; 8])
}

#[test]
fn a_rank_that_sleeps_breaks_the_group_at_the_deadline() {
    for transport in [Transport::Shm, Transport::Tcp] {
        let adjust = |p: PendingGroup| p.with_call_deadline(Duration::from_millis(150));
        let results = on_ranks(3, transport, adjust, |group| {
            if group.rank() == 2 {
                std::thread::sleep(Duration::from_millis(700));
                return call_twice(group);
            }
            let started = Instant::now();
            let result = group.all_reduce_sum(&mut [0.0; 8]);
            assert!(started.elapsed() < Duration::from_millis(600), "{transport:?}: {:?}", started.elapsed());
            result
        });
        assert!(results.iter().all(Result::is_err), "{transport:?}: {results:?}");
        let named = |r: &Result<(), CollectiveError>| matches!(r, Err(CollectiveError::Deadline { peer: 2, .. }));
        assert!(results.iter().any(named), "{transport:?}: {results:?}");
    }
}

#[test]
fn a_rank_that_leaves_is_seen_at_once() {
    for transport in [Transport::Shm, Transport::Tcp] {
        let (mut all, addresses) = pending(&load(2, transport));
        let (second, first) = (all.remove(1), all.remove(0));
        std::thread::scope(|scope| {
            scope.spawn(|| drop(second.connect(&addresses, PATIENCE).unwrap()));
            let mut group = first.connect(&addresses, PATIENCE).unwrap();
            let started = Instant::now();
            let result = group.all_reduce_sum(&mut [0.0; 8]);
            assert!(matches!(result, Err(CollectiveError::PeerGone { peer: 1, .. })), "{transport:?}: {result:?}");
            assert!(started.elapsed() < Duration::from_secs(1));
            assert!(group.all_gather(&[1], &mut [0; 2]).is_err(), "a broken group stays broken");
        });
    }
}

#[test]
fn an_abort_ends_the_wait_on_every_rank() {
    for transport in [Transport::Shm, Transport::Tcp] {
        let (all, addresses) = pending(&load(3, transport));
        let abort = all[0].abort_handle();
        std::thread::scope(|scope| {
            for (rank, one) in all.into_iter().enumerate() {
                let addresses = &addresses;
                scope.spawn(move || {
                    let mut group = one.connect(addresses, PATIENCE).unwrap();
                    // Rank 2 makes no call until the others are free again.
                    if rank == 2 {
                        std::thread::sleep(Duration::from_millis(600));
                    }
                    let started = Instant::now();
                    let result = call_twice(group.as_mut());
                    assert!(result.is_err() && started.elapsed() < Duration::from_millis(500), "{rank}: {result:?}");
                });
            }
            std::thread::sleep(Duration::from_millis(200));
            abort.abort();
        });
    }
}

#[test]
fn ranks_at_different_calls_say_so() {
    for transport in [Transport::Shm, Transport::Tcp] {
        let results = on_ranks(
            2,
            transport,
            |p| p,
            |group| {
                if group.rank() == 0 {
                    group.all_reduce_sum(&mut [0.0; 8])
                } else {
                    group.all_gather(&[0; 8], &mut [0; 16])
                }
            },
        );
        assert!(results.iter().all(Result::is_err), "{transport:?}: {results:?}");
    }
}

#[test]
fn strangers_and_short_keys_are_kept_out() {
    let mut weak = load(2, Transport::Tcp);
    weak.group_key = vec![1; 4];
    assert!(matches!(prepare(&weak, Rank(0)), Err(CollectiveError::Setup { .. })));
    let (mut all, addresses) = pending(&load(2, Transport::Tcp));
    let stranger = prepare(&load(2, Transport::Tcp), Rank(1)).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| assert!(stranger.connect(&addresses, Duration::from_secs(5)).is_err()));
        let result = all.remove(0).connect(&addresses, Duration::from_millis(500));
        assert!(matches!(result, Err(CollectiveError::Deadline { peer: 1, .. })));
    });
}

#[test]
fn ports_stay_in_their_range() {
    let mut load = load(2, Transport::Tcp);
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    load.collective_ports = (free, free);
    let first = prepare(&load, Rank(0)).unwrap();
    assert_eq!(first.address(), format!("127.0.0.1:{free}"));
    assert!(matches!(prepare(&load, Rank(1)), Err(CollectiveError::Setup { .. })));
}

/// A process that runs `f` and ends without unwinding into the test's own machinery.
fn fork(f: impl FnOnce() -> i32) -> nix::unistd::Pid {
    // SAFETY: the child touches only its own group, then leaves by `_exit`.
    match unsafe { nix::unistd::fork() }.unwrap() {
        nix::unistd::ForkResult::Parent { child } => child,
        nix::unistd::ForkResult::Child => {
            let code = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)).unwrap_or(101);
            // SAFETY: ends the process at once.
            unsafe { libc::_exit(code) }
        }
    }
}

#[test]
fn processes_share_sums_and_see_each_other_die() {
    for transport in [Transport::Shm, Transport::Tcp] {
        let (mut all, addresses) = pending(&load(2, transport));
        let (second, first) = (all.remove(1), all.remove(0));
        let child = fork(|| {
            let mut group = second.connect(&addresses, PATIENCE).unwrap();
            for i in 0..200 {
                let len = 100 + 997 * i as usize;
                let mut data = term(1, i, len);
                group.all_reduce_sum(&mut data).unwrap();
                assert!(bits(&data) == bits(&expected_sum(2, i, len)));
            }
            // SAFETY: the death that the other side must see: no destructor runs.
            unsafe { libc::kill(libc::getpid(), libc::SIGKILL) }
        });
        let mut group = first.connect(&addresses, PATIENCE).unwrap();
        for i in 0..200 {
            let len = 100 + 997 * i as usize;
            let mut data = term(0, i, len);
            group.all_reduce_sum(&mut data).unwrap();
            assert!(bits(&data) == bits(&expected_sum(2, i, len)));
        }
        let started = Instant::now();
        let result = group.all_reduce_sum(&mut [0.0; 8]);
        assert!(matches!(result, Err(CollectiveError::PeerGone { peer: 1, .. })), "{transport:?}: {result:?}");
        assert!(started.elapsed() < Duration::from_secs(1));
        nix::sys::wait::waitpid(child, None).unwrap();
    }
}
