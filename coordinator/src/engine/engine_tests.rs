//! The engine on its thread, with fake ranks over real channels.

use std::time::Duration;

use phalanx_proto::{Epoch, Incarnation, Phase, Rank, StepId, TokenId};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::fake_rank::{BLOCK_SIZE, Fault, start, start_epoch};
use super::group::GroupError;
use super::request::{EngineError, EngineLimits, FinishReason, GenerateRequest, RecoveryLimits, TokenEvent};
use super::scheduler_tests::{constraint, oracle, prompt, request};
use super::start::StartDeadlines;
use super::{EngineHandle, TokenStream, spawn};

const PATIENCE: Duration = Duration::from_secs(20);

fn limits() -> EngineLimits {
    EngineLimits {
        num_blocks: 60,
        block_size: BLOCK_SIZE,
        max_queue: 60,
        step_deadline_min: Duration::from_millis(200),
        ..super::scheduler_tests::limits()
    }
}

async fn engine(faults: &[Fault], limits: EngineLimits) -> (EngineHandle, Vec<JoinHandle<String>>) {
    let (group, ranks, _) = start(faults, StartDeadlines::default()).await;
    (spawn(group.unwrap().with_incarnation(Incarnation(2)), limits), ranks)
}

async fn read(mut stream: TokenStream) -> (Vec<TokenId>, TokenEvent) {
    let mut tokens = vec![];
    loop {
        match timeout(PATIENCE, stream.next()).await.unwrap().unwrap() {
            TokenEvent::Token { index, token, .. } => {
                assert_eq!(index as usize, tokens.len());
                tokens.push(token);
            }
            TokenEvent::PromptLogprobs(_) => {}
            last => {
                assert!(stream.next().await.is_none(), "one last event");
                return (tokens, last);
            }
        }
    }
}

fn failure(event: TokenEvent) -> String {
    match event {
        TokenEvent::Failed(EngineError::GroupFailed { reason }) => reason,
        other => panic!("{other:?}"),
    }
}

/// An engine that fails with its group.
fn without_recovery() -> EngineLimits {
    EngineLimits { recovery: RecoveryLimits { deadline: Duration::ZERO, ..RecoveryLimits::default() }, ..limits() }
}

/// Runs requests until the group breaks; every stream, and the handle, must give the same reason.
async fn reason_of(faults: &[Fault]) -> String {
    let (engine, _ranks) = engine(faults, without_recovery()).await;
    let streams: Vec<_> = (0..10).map(|family| engine.submit(request(prompt(family, 20), 100)).unwrap()).collect();
    let mut reasons = vec![];
    for stream in streams {
        reasons.push(failure(read(stream).await.1));
    }
    reasons.dedup();
    assert_eq!(reasons.len(), 1, "{reasons:?}");
    let reason = reasons.remove(0);
    let expected = EngineError::GroupFailed { reason: reason.clone() };
    assert_eq!(timeout(PATIENCE, engine.broke(Epoch(3))).await, Ok(Some(reason.clone())));
    assert_eq!(engine.submit(request(prompt(1, 1), 1)).err(), Some(expected));
    reason
}

#[tokio::test]
async fn streams_get_the_text_of_the_oracle_and_all_blocks_are_free_afterwards() {
    let (engine, ranks) = engine(&[Fault::None, Fault::None], limits()).await;
    let requests: Vec<GenerateRequest> = (0..24)
        .map(|at| GenerateRequest {
            stop_token_ids: vec![TokenId(at)],
            constraint: (at % 3 == 0).then(|| constraint(1 + 2 * at)),
            ..request(prompt(at % 5, 1 + 5 * at % 60), 1 + 3 * at)
        })
        .collect();
    let streams: Vec<_> = requests.iter().map(|request| engine.submit(request.clone()).unwrap()).collect();
    for (stream, request) in streams.into_iter().zip(&requests) {
        let (tokens, reason) = oracle(request, request.max_tokens.get());
        let (read_tokens, last) = read(stream).await;
        assert_eq!(read_tokens, tokens);
        assert!(matches!(last, TokenEvent::Finished { reason: read, .. } if read == reason), "{last:?}");
    }
    // Blocks named by a plan in flight are free once it has committed, a step after the last stream ended.
    let all_free = async {
        while engine.snapshot().num_blocks_free < 60 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(PATIENCE, all_free).await.unwrap();
    timeout(PATIENCE, engine.stop(Duration::from_secs(5))).await.unwrap();
    let snapshot = engine.snapshot();
    assert_eq!((snapshot.running, snapshot.waiting, snapshot.epoch), (0, 0, 3));
    assert_eq!(snapshot.num_blocks, 60);
    assert_eq!(snapshot.counters.finished, 24);
    for rank in ranks {
        assert_eq!(timeout(PATIENCE, rank).await.unwrap().unwrap(), "the deployment is stopping");
    }
    assert_eq!(engine.submit(request(prompt(1, 1), 1)).err(), Some(EngineError::Stopping));
}

#[tokio::test]
async fn a_dropped_stream_frees_its_blocks() {
    let (engine, _ranks) = engine(&[Fault::None], limits()).await;
    let mut streams: Vec<_> = (0..10).map(|family| engine.submit(request(prompt(family, 30), 160)).unwrap()).collect();
    let kept = streams.pop().unwrap();
    streams[0].next().await.unwrap();
    drop(streams);
    let (tokens, _) = read(kept).await;
    assert_eq!(tokens, oracle(&request(prompt(9, 30), 160), 160).0);
    while engine.snapshot().num_blocks_free < 60 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(engine.snapshot().counters.finished, 10);
    assert!(engine.snapshot().counters.generated_tokens < 9 * 160);
}

#[tokio::test]
async fn a_client_that_does_not_read_holds_nobody_up() {
    let (engine, _ranks) = engine(&[Fault::None], limits()).await;
    let lazy = engine.submit(request(prompt(1, 3), 150)).unwrap();
    for family in 2..5 {
        assert_eq!(read(engine.submit(request(prompt(family, 9), 150)).unwrap()).await.0.len(), 150);
    }
    assert_eq!(read(lazy).await.0, oracle(&request(prompt(1, 3), 150), 150).0);
}

#[tokio::test]
async fn a_full_queue_is_an_answer() {
    let limits = EngineLimits { max_num_seqs: 1, max_queue: 1, ..limits() };
    let (engine, _ranks) = engine(&[Fault::Freeze(StepId(1))], limits).await;
    let streams = [engine.submit(request(prompt(1, 3), 3)), engine.submit(request(prompt(1, 3), 3))];
    assert!(streams.iter().all(Result::is_ok));
    let refused = engine.submit(request(prompt(1, 3), 3)).err();
    assert!(matches!(refused, Some(EngineError::QueueFull { waiting: 1, max_queue: 1, .. })), "{refused:?}");
}

#[tokio::test]
async fn a_rank_that_dies_ends_every_stream_with_its_name() {
    let reason = reason_of(&[Fault::None, Fault::Die(StepId(9))]).await;
    assert_eq!(reason, "rank 1 went away in phase ready");
}

#[tokio::test]
async fn the_rank_that_died_is_named_and_not_the_one_that_noticed() {
    let reason = reason_of(&[Fault::Complain(StepId(9)), Fault::None, Fault::Die(StepId(9))]).await;
    assert_eq!(reason, "rank 2 went away in phase ready");
}

#[tokio::test]
async fn a_late_rank_breaks_the_group() {
    let reason = reason_of(&[Fault::None, Fault::Freeze(StepId(40))]).await;
    assert!(reason.starts_with("late: no answer to step 40 within"), "{reason}");
    assert!(reason.ends_with("from rank 1"), "{reason}");
}

#[tokio::test]
async fn a_frozen_rank_is_named_and_not_those_that_wait_for_it() {
    let step = StepId(40);
    let reason = reason_of(&[Fault::Wait(step), Fault::Freeze(step), Fault::Wait(step)]).await;
    assert!(reason.starts_with("late: no answer to step 40") && reason.ends_with("from rank 1"), "{reason}");
}

#[tokio::test]
async fn a_rank_that_disagrees_breaks_the_group() {
    let reason = reason_of(&[Fault::None, Fault::Diverge(StepId(5)), Fault::None]).await;
    assert_eq!(reason, "rank 1 disagrees about the tokens of step 5");
}

#[tokio::test]
async fn a_rank_that_dies_while_nothing_runs_breaks_the_group_too() {
    let (engine, ranks) = engine(&[Fault::None, Fault::None], limits()).await;
    ranks[1].abort();
    let reason = timeout(PATIENCE, engine.broke(Epoch(3))).await.unwrap();
    assert_eq!(reason.as_deref(), Some("rank 1 went away in phase ready"));
}

/// Breaks a group under 16 streams and brings the next ones; every stream must end with the text of the oracle.
async fn survives(faults: &[&[Fault]]) -> EngineHandle {
    let (engine, _ranks) = engine(faults[0], limits()).await;
    let constrained = |at| (at % 3 == 0).then(|| constraint(200));
    let requests: Vec<_> = (0..16)
        .map(|at| GenerateRequest {
            constraint: constrained(at),
            ..request(prompt(at % 5, 1 + 5 * at % 60), 40 + 3 * at)
        })
        .collect();
    let mut streams = tokio::task::JoinSet::new();
    for request in requests {
        let stream = engine.submit(request.clone()).unwrap();
        streams.spawn(async move {
            let (tokens, last) = read(stream).await;
            assert_eq!(tokens, oracle(&request, request.max_tokens.get()).0);
            assert!(matches!(last, TokenEvent::Finished { .. }), "{last:?}");
        });
    }
    for (epoch, faults) in (3..).zip(&faults[1..]) {
        let reason = timeout(PATIENCE, engine.broke(Epoch(epoch))).await.unwrap();
        assert!(reason.is_some_and(|reason| reason.contains("rank 1")));
        let (group, ranks, _) = start_epoch(faults, Epoch(epoch + 1)).await;
        assert!(engine.adopt(group.unwrap().with_incarnation(Incarnation(epoch))).is_ok());
        std::mem::forget(ranks);
    }
    while let Some(stream) = timeout(PATIENCE, streams.join_next()).await.unwrap() {
        stream.unwrap();
    }
    engine
}

#[tokio::test]
async fn streams_go_on_in_the_next_epoch_with_the_same_text() {
    let dies = Fault::Die(StepId(40));
    let engine = survives(&[&[Fault::None, dies], &[Fault::None, Fault::None]]).await;
    let snapshot = engine.snapshot();
    assert_eq!((snapshot.epoch, snapshot.recovering, snapshot.progress_at), (4, false, None));
    assert!(snapshot.counters.replays > 0 && snapshot.counters.finished == 16);
}

#[tokio::test]
async fn death_divergence_and_lateness_one_after_the_other_change_no_text() {
    let faults: [&[Fault]; 4] = [
        &[Fault::None, Fault::Diverge(StepId(25))],
        &[Fault::None, Fault::Die(StepId(20))],
        &[Fault::None, Fault::Freeze(StepId(15))],
        &[Fault::None],
    ];
    assert_eq!(survives(&faults).await.snapshot().epoch, 6);
}

#[tokio::test]
async fn requests_that_come_while_no_group_is_there_wait_for_it() {
    let (engine, ranks) = engine(&[Fault::None, Fault::None], limits()).await;
    ranks[1].abort();
    timeout(PATIENCE, engine.broke(Epoch(3))).await.unwrap();
    let stream = engine.submit(request(prompt(1, 9), 20)).unwrap();
    let cancelled = engine.submit(request(prompt(2, 9), 20)).unwrap();
    drop(cancelled);
    while engine.snapshot().waiting != 1 || !engine.snapshot().recovering {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(engine.snapshot().progress_at.is_some(), "work waits");
    let (group, _ranks, _) = start_epoch(&[Fault::None], Epoch(4)).await;
    engine.adopt(group.unwrap()).unwrap();
    assert_eq!(read(stream).await.0, oracle(&request(prompt(1, 9), 20), 20).0);
}

/// A request that ends every group that has it in a step: it is replayed as often as its budget says and then fails, and the others,
/// which were in its first two batches, go on.
#[tokio::test]
async fn a_poisoned_request_fails_by_itself_and_breaks_no_more_groups_than_it_may() {
    const REPLAYS_MAX: u32 = 4;
    let poison = TokenId(1);
    let recovery = RecoveryLimits { replays_max: REPLAYS_MAX, ..RecoveryLimits::default() };
    let faults = [Fault::None, Fault::Poisoned(poison)];
    let (engine, ranks) = engine(&faults, EngineLimits { recovery, ..limits() }).await;
    std::mem::forget(ranks);
    let mut streams = tokio::task::JoinSet::new();
    for family in [2, 3, 4] {
        let (engine, request) = (engine.clone(), request(prompt(family, 9), 60));
        streams.spawn(async move {
            let (tokens, last) = read(engine.submit(request.clone()).unwrap()).await;
            assert_eq!(tokens, oracle(&request, 60).0);
            assert!(matches!(last, TokenEvent::Finished { .. }), "{last:?}");
        });
    }
    let poisoned = engine.submit(request([poison].repeat(7), 30)).unwrap();
    for epoch in 3..=3 + u64::from(REPLAYS_MAX) {
        timeout(PATIENCE, engine.broke(Epoch(epoch))).await.unwrap();
        let (group, ranks, _) = start_epoch(&faults, Epoch(epoch + 1)).await;
        assert!(engine.adopt(group.unwrap()).is_ok());
        std::mem::forget(ranks);
    }
    assert!(failure(read(poisoned).await.1).contains("rank 1 went away"));
    while let Some(stream) = timeout(PATIENCE, streams.join_next()).await.unwrap() {
        stream.unwrap();
    }
    assert_eq!(engine.snapshot().epoch, 4 + u64::from(REPLAYS_MAX), "no group broke after it");
}

#[tokio::test]
async fn requests_of_a_group_that_is_gone_go_on_in_another_engine() {
    let (lost, _ranks) = engine(&[Fault::None, Fault::Die(StepId(20))], limits()).await;
    let (other, _others) = engine(&[Fault::None], limits()).await;
    let requests: Vec<GenerateRequest> = (0..16)
        .map(|at| GenerateRequest {
            constraint: (at % 3 == 0).then(|| constraint(1 + 2 * at)),
            ..request(prompt(at % 5, 1 + 5 * at % 60), 40 + at)
        })
        .collect();
    let mut streams: Vec<_> = requests.iter().map(|request| lost.submit(request.clone()).unwrap()).collect();
    let busy = other.submit(request(prompt(7, 30), 60)).unwrap();
    timeout(PATIENCE, lost.broke(Epoch(3))).await.unwrap();
    drop(streams.pop());
    let late = lost.submit(request(prompt(2, 9), 20)).unwrap();
    let moved = async {
        while lost.num_accepted() > 0 {
            lost.move_to(vec![other.clone()]);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(PATIENCE, moved).await.unwrap();
    drop(streams.pop());
    for (stream, request) in streams.into_iter().zip(&requests) {
        let (tokens, reason) = oracle(request, request.max_tokens.get());
        let (read_tokens, last) = read(stream).await;
        assert_eq!(read_tokens, tokens);
        assert!(matches!(last, TokenEvent::Finished { reason: read, .. } if read == reason), "{last:?}");
    }
    assert_eq!(read(late).await.0, oracle(&request(prompt(2, 9), 20), 20).0);
    assert_eq!(read(busy).await.0, oracle(&request(prompt(7, 30), 60), 60).0);
    let all_free = async {
        while other.num_accepted() > 0 || other.snapshot().num_blocks_free < 60 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(PATIENCE, all_free).await.unwrap();
    let (group, _ranks, _) = start_epoch(&[Fault::None], Epoch(4)).await;
    lost.adopt(group.unwrap()).unwrap();
    let again = lost.submit(request(prompt(1, 9), 20)).unwrap();
    assert_eq!(read(again).await.0, oracle(&request(prompt(1, 9), 20), 20).0);
}

#[tokio::test]
async fn a_stream_hears_of_the_end_of_the_engine_that_it_moved_to() {
    let (lost, _ranks) = engine(&[Fault::Die(StepId(9))], limits()).await;
    let (other, _others) = engine(&[Fault::None], EngineLimits { max_num_seqs: 1, ..limits() }).await;
    let _busy = other.submit(request(prompt(7, 3), 190)).unwrap();
    let stream = lost.submit(request(prompt(1, 9), 180)).unwrap();
    timeout(PATIENCE, lost.broke(Epoch(3))).await.unwrap();
    while lost.num_accepted() > 0 {
        lost.move_to(vec![other.clone()]);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    timeout(PATIENCE, lost.stop(Duration::ZERO)).await.unwrap();
    timeout(PATIENCE, other.stop(Duration::ZERO)).await.unwrap();
    let (_, last) = read(stream).await;
    assert!(matches!(last, TokenEvent::Failed(EngineError::Stopping) | TokenEvent::Finished { .. }), "{last:?}");
}

#[tokio::test]
async fn a_fuse_breaks_a_group_that_looks_well() {
    let (group, _ranks, _) = start(&[Fault::None], StartDeadlines::default()).await;
    let (fuse, given_up) = tokio::sync::oneshot::channel();
    let engine = spawn(group.unwrap().with_fuse(given_up), limits());
    fuse.send("node a is gone".into()).unwrap();
    assert_eq!(timeout(PATIENCE, engine.broke(Epoch(3))).await, Ok(Some("node a is gone".into())));
}

#[tokio::test]
async fn streams_that_no_group_comes_for_end_with_the_reason() {
    let limits = EngineLimits { step_deadline_min: Duration::from_millis(50), ..limits() };
    let (engine, _ranks) = engine(&[Fault::None, Fault::Die(StepId(9))], limits).await;
    let stream = engine.submit(request(prompt(1, 9), 100)).unwrap();
    timeout(PATIENCE, engine.broke(Epoch(3))).await.unwrap();
    engine.give_up("no machine is left".into());
    assert_eq!(failure(read(stream).await.1), "no machine is left");
    let expected = EngineError::GroupFailed { reason: "no machine is left".into() };
    assert_eq!(engine.submit(request(prompt(1, 1), 1)).err(), Some(expected));
}

#[tokio::test]
async fn stopping_fails_what_is_left_after_the_drain() {
    let (engine, _ranks) = engine(&[Fault::None], limits()).await;
    let stream = engine.submit(request(prompt(1, 3), 190)).unwrap();
    timeout(PATIENCE, engine.stop(Duration::ZERO)).await.unwrap();
    let (_, last) = read(stream).await;
    assert!(matches!(last, TokenEvent::Failed(EngineError::Stopping) | TokenEvent::Finished { .. }), "{last:?}");
}

#[tokio::test]
async fn an_engine_that_nobody_holds_ends_its_ranks() {
    let (engine, ranks) = engine(&[Fault::None], limits()).await;
    let stream = engine.submit(request(prompt(1, 3), 50)).unwrap();
    drop(engine);
    let (_, last) = read(stream).await;
    assert!(matches!(last, TokenEvent::Finished { reason: FinishReason::Length, .. }), "{last:?}");
    for rank in ranks {
        timeout(PATIENCE, rank).await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn the_start_takes_the_minimum_of_blocks_and_reports_each_phase() {
    let (group, _ranks, reports) = start(&[Fault::None, Fault::None, Fault::None], StartDeadlines::default()).await;
    let group = group.unwrap();
    assert_eq!(group.num_blocks(), 60);
    let features = group.features();
    assert_eq!((features.masks, features.edits), (true, false), "what every rank can do");
    assert_eq!(group.capacities().iter().map(|capacity| capacity.num_blocks).collect::<Vec<_>>(), [60, 70, 80]);
    for rank in (0..3).map(Rank) {
        let phases: Vec<_> = reports.iter().filter(|report| report.rank == rank).map(|report| report.phase).collect();
        let expected =
            [Phase::Device, Phase::Communicator, Phase::Weights, Phase::Weights, Phase::WarmUp, Phase::Ready];
        assert_eq!(phases, expected);
    }
}

#[tokio::test]
async fn a_start_that_fails_names_rank_and_phase() {
    let quick = StartDeadlines { weights: Duration::from_millis(50), ..StartDeadlines::default() };
    let limit = quick.weights;
    let cases = [
        (Fault::HangInWeights, GroupError::StartLate { rank: Rank(1), phase: Phase::Weights, limit }),
        (Fault::DieInCommunicator, GroupError::Gone { rank: Rank(1), phase: Phase::Communicator }),
    ];
    for (fault, expected) in cases {
        let (group, _ranks, _) = start(&[Fault::None, fault, Fault::None], quick).await;
        assert_eq!(group.err(), Some(expected));
    }
    let (group, _ranks, _) = start(&[Fault::FailWeights, Fault::None], quick).await;
    let expected = "rank 0 failed in phase weights: no tensor model.norm.weight (model)";
    assert_eq!(group.err().map(|error| error.to_string()), Some(expected.into()));
}
