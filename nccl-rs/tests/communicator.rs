//! Loader and communicator against the stand-in library: what a machine without a GPU can show.

#![expect(clippy::expect_used, reason = "helpers of tests are test code too")]

mod standin;

use std::thread;
use std::time::{Duration, Instant};

use nccl_rs::{
    Communicator, DataType, DevicePtr, Elements, Library, Membership, NcclError, ReduceOp, Search, Stream, UniqueId,
    Vendor,
};
use standin::StandIn;

const SHORT: Duration = Duration::from_millis(100);
const LONG: Duration = Duration::from_secs(10);

fn open(standin: &StandIn) -> Library {
    Library::open(&Search { vendor: None, folders: vec![standin.folder()] }).expect("the stand-in opens")
}

fn nccl() -> (StandIn, Library) {
    let standin = StandIn::build("libnccl.so.2", &[]);
    let library = open(&standin);
    (standin, library)
}

/// A communicator of one rank.
fn alone(library: &Library) -> Communicator {
    let id = library.unique_id().expect("an id");
    let membership = Membership::new(id, 0, 1).with_init_deadline(LONG).with_call_deadline(SHORT);
    Communicator::join(library, &membership).expect("one rank joins")
}

/// Runs `body` as `world_size` ranks, each on a thread of its own, and gives their answers in rank order.
fn ranks<T: Send>(library: &Library, world_size: u32, body: impl Fn(&Communicator) -> T + Sync) -> Vec<T> {
    let id = library.unique_id().expect("an id");
    let rank_thread = |rank| {
        let membership = Membership::new(id, rank, world_size).with_init_deadline(LONG).with_call_deadline(LONG);
        let communicator = Communicator::join(library, &membership).expect("all ranks join");
        let result = body(&communicator);
        communicator.close(LONG).expect("all ranks leave");
        result
    };
    let rank_thread = &rank_thread;
    thread::scope(|scope| {
        let threads: Vec<_> = (0..world_size).map(|rank| scope.spawn(move || rank_thread(rank))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    })
}

fn at<T>(values: &mut [T]) -> DevicePtr {
    DevicePtr(values.as_mut_ptr().expose_provenance() as u64)
}

fn f32s(count: usize) -> Elements {
    Elements::new(count, DataType::F32)
}

/// A call that adds a value to nothing.
fn call(communicator: &Communicator) -> Result<(), NcclError> {
    let mut value = [1.0f32];
    let value = at(&mut value);
    // SAFETY: the stand-in works on host memory and is done when it returns.
    unsafe { communicator.all_reduce(value, value, f32s(1), ReduceOp::Sum, Stream::null()) }
}

#[test]
fn both_vendors_are_found_under_their_names() {
    let check = |name, vendor, version: &str, define: &str| {
        let standin = StandIn::build(name, &[define]);
        let library = open(&standin);
        assert_eq!((library.vendor(), library.version().to_string().as_str()), (vendor, version));
        assert_eq!(library.path(), standin.file());
    };
    check("libnccl.so.2", Vendor::Nccl, "2.28.3", "-DVERSION=22803");
    check("libnccl.so", Vendor::Nccl, "2.8.4", "-DVERSION=2804");
    check("librccl.so.1", Vendor::Rccl, "2.22.3", "-DVERSION=22203");
    check("librccl.so", Vendor::Rccl, "2.18.6", "-DVERSION=21806");
}

#[test]
fn what_is_missing_is_a_value_that_says_what_was_tried() {
    let empty = tempfile::tempdir().expect("a folder");
    let search = Search { vendor: Some(Vendor::Rccl), folders: vec![empty.path().to_path_buf()] };
    let error = Library::open(&search).expect_err("nothing is there");
    let NcclError::NotFound { tried } = &error else { panic!("{error}") };
    assert_eq!(tried.len(), 4, "{error}");
    assert!(error.to_string().contains("librccl.so.1"), "{error}");

    let standin = StandIn::build("libnccl.so.2", &["-DNO_ALL_REDUCE"]);
    let error =
        Library::open(&Search { vendor: None, folders: vec![standin.folder()] }).expect_err("a function is missing");
    assert!(matches!(error, NcclError::Symbol { symbol: "ncclAllReduce", .. }), "{error}");
}

#[test]
fn ranks_reduce_gather_scatter_and_broadcast() {
    let (standin, library) = nccl();
    standin.set("call_polls", 3);
    let results = ranks(&library, 3, |communicator| {
        let rank = communicator.rank() as f32;
        let (mut sum, mut largest, mut all, mut part, mut root) = ([rank, 10.0], [rank], [0.0f32; 3], [0.0f32], [rank]);
        let mut terms = [rank, 1.0, 2.0 * rank];
        let mut words = [communicator.rank(), 7];
        // SAFETY: the stand-in works on host memory and is done when it returns.
        unsafe {
            let none = Stream::null();
            let to = at(&mut sum);
            communicator.all_reduce(to, to, f32s(2), ReduceOp::Sum, none)?;
            let to = at(&mut largest);
            communicator.all_reduce(to, to, f32s(1), ReduceOp::Max, none)?;
            let to = at(&mut words);
            communicator.all_reduce(to, to, Elements::new(2, DataType::U32), ReduceOp::Sum, none)?;
            communicator.all_gather(at(&mut [rank]), at(&mut all), f32s(1), none)?;
            communicator.reduce_scatter(at(&mut terms), at(&mut part), f32s(1), ReduceOp::Sum, none)?;
            let to = at(&mut root);
            communicator.broadcast(to, to, f32s(1), 2, none)?;
        }
        communicator.async_error()?;
        Ok::<_, NcclError>((sum, largest, words, all, part, root))
    });
    for (rank, result) in results.into_iter().enumerate() {
        let (sum, largest, words, all, part, root) = result.expect("all calls succeed");
        assert_eq!((sum, largest, words, all, root), ([3.0, 30.0], [2.0], [3, 21], [0.0, 1.0, 2.0], [2.0]));
        assert_eq!(part, [[3.0], [3.0], [6.0]][rank]);
    }
    assert_eq!((standin.get("finalizes"), standin.get("destroys"), standin.get("aborts")), (3, 3, 0));
    assert_eq!((standin.get("config_size"), standin.get("config_version"), standin.get("blocking")), (24, 21400, 0));
}

#[test]
fn crossing_pairs_travel_in_one_group() {
    let (standin, library) = nccl();
    let results = ranks(&library, 2, |communicator| {
        let other = 1 - communicator.rank();
        let (mut mine, mut theirs) = ([communicator.rank() + 40], [0u32]);
        let one = Elements::new(1, DataType::U32);
        let (from, to) = (at(&mut mine), at(&mut theirs));
        // SAFETY: the stand-in works on host memory, which lives until the group's end.
        communicator.group(|| unsafe {
            communicator.send(from, one, other, Stream::null())?;
            communicator.recv(to, one, other, Stream::null())
        })?;
        // SAFETY: never carried out.
        let outside = unsafe { communicator.send(from, one, 2, Stream::null()) };
        assert!(matches!(outside, Err(NcclError::Argument { .. })));
        assert!(matches!(communicator.group(|| communicator.group(|| Ok(()))), Err(NcclError::Argument { .. })));
        Ok::<_, NcclError>(theirs)
    });
    assert_eq!(results.into_iter().map(|result| result.expect("both pass")).collect::<Vec<_>>(), [[41], [40]]);
    assert_eq!(standin.get("group_starts"), standin.get("group_ends"));
}

#[test]
fn a_rank_that_never_comes_ends_joining_by_the_deadline() {
    let (standin, library) = nccl();
    let id = library.unique_id().expect("an id");
    let begin = Instant::now();
    let joined = Communicator::join(&library, &Membership::new(id, 0, 2).with_init_deadline(SHORT));
    let error = joined.err().expect("rank 1 is missing");
    assert!(matches!(error, NcclError::Deadline { phase: "ncclCommInitRankConfig", .. }), "{error}");
    assert!(begin.elapsed() >= SHORT && begin.elapsed() < LONG);
    assert_eq!((standin.get("aborts"), standin.get("destroys")), (1, 0));
}

#[test]
fn errors_have_the_librarys_words_and_its_code() {
    let (standin, library) = nccl();
    standin.set("init_result", 2);
    let membership = Membership::new(UniqueId::from_bytes([7; UniqueId::BYTES]), 0, 1);
    let error = Communicator::join(&library, &membership).err().expect("refused");
    let expected = "ncclCommInitRankConfig of 2.28.9: system error (code 2): stand-in system error: said of none";
    assert_eq!(error.to_string(), expected);
    assert_eq!(standin.get("aborts"), 0, "there was nothing to abort");

    standin.set("init_result", 0);
    standin.set("async_error", 6);
    let error = Communicator::join(&library, &membership).err().expect("failed while joining");
    assert!(error.to_string().contains("remote error (code 6)"), "{error}");
    assert_eq!(standin.get("aborts"), 1);

    standin.set("async_error", 0);
    let communicator = alone(&library);
    standin.set("call_result", 9999);
    let error = call(&communicator).expect_err("a code from the future");
    assert!(matches!(error, NcclError::Call { code: 9999, name: "unknown code", .. }), "{error}");
}

#[test]
fn a_communicator_that_failed_refuses_all_and_is_aborted() {
    let (standin, library) = nccl();
    let communicator = alone(&library);
    call(&communicator).expect("it works");
    standin.set("async_error", 6);
    communicator.async_error().expect_err("a peer is gone");
    standin.set("async_error", 0);
    let refused = call(&communicator).expect_err("too late");
    assert!(matches!(&refused, NcclError::Failed { reason } if reason.contains("remote error")), "{refused}");
    assert!(matches!(communicator.group(|| Ok(())), Err(NcclError::Failed { .. })));
    drop(communicator);
    assert_eq!((standin.get("aborts"), standin.get("destroys"), standin.get("finalizes")), (1, 0, 0));

    let communicator = alone(&library);
    standin.set("call_polls", i32::MAX);
    let error = call(&communicator).expect_err("the call never ends");
    assert!(matches!(error, NcclError::Deadline { phase: "ncclAllReduce", .. }), "{error}");
    communicator.abort(LONG).expect("aborted");
    assert_eq!(standin.get("aborts"), 2);
}

#[test]
fn teardown_that_hangs_is_left_behind_at_the_deadline() {
    let (standin, library) = nccl();
    let communicator = alone(&library);
    standin.set("finalize_hold", 1);
    let error = communicator.close(SHORT).expect_err("a graph is still alive");
    assert!(matches!(error, NcclError::Deadline { phase: "ncclCommFinalize", .. }), "{error}");
    assert_eq!((standin.get("destroys"), standin.get("aborts")), (0, 0));

    standin.set("finalize_hold", 0);
    standin.set("end_ms", 60_000);
    let begin = Instant::now();
    let error = alone(&library).close(SHORT).expect_err("destroying hangs");
    assert!(matches!(error, NcclError::Deadline { phase: "ncclCommDestroy", .. }), "{error}");
    let error = alone(&library).abort(SHORT).expect_err("aborting hangs");
    assert!(matches!(error, NcclError::Deadline { phase: "ncclCommAbort", .. }), "{error}");
    assert!(begin.elapsed() < LONG);
}

#[test]
fn an_abort_that_was_begun_is_waited_for_when_the_communicator_goes() {
    let (standin, library) = nccl();
    let mut communicator = alone(&library);
    standin.set("end_ms", 200);
    let begin = Instant::now();
    communicator.begin_abort().expect("a thread");
    communicator.begin_abort().expect("nothing more to do");
    assert!(begin.elapsed() < SHORT, "what holds the communicator's work can be dropped meanwhile");
    assert!(matches!(call(&communicator), Err(NcclError::Failed { .. })));
    drop(communicator);
    assert!(begin.elapsed() >= 2 * SHORT);
    assert_eq!((standin.get("aborts"), standin.get("destroys"), standin.get("finalizes")), (1, 0, 0));
}

#[test]
fn an_old_library_works_and_says_that_it_has_no_deadlines() {
    let standin = StandIn::build("libnccl.so.2", &["-DNO_CONFIG", "-DVERSION=21212"]);
    let library = open(&standin);
    let results = ranks(&library, 2, |communicator| (communicator.has_deadlines(), call(communicator).is_ok()));
    assert_eq!(results, [(false, true); 2]);
    assert_eq!((standin.get("finalizes"), standin.get("destroys")), (0, 2));
    standin.set("call_result", 2);
    let error = call(&alone(&library)).expect_err("injected");
    assert_eq!(error.to_string(), "ncclAllReduce of 2.12.12: system error (code 2): stand-in system error");
}

#[test]
fn a_rank_outside_its_group_is_refused_before_the_library_sees_it() {
    let (_standin, library) = nccl();
    let id = library.unique_id().expect("an id");
    for (rank, world_size) in [(1, 1), (0, 0), (u32::MAX, 2)] {
        let joined = Communicator::join(&library, &Membership::new(id, rank, world_size));
        assert!(matches!(joined.err(), Some(NcclError::Argument { .. })), "{rank} of {world_size}");
    }
}
