//! Tool calls in every format, forced, named and strict, by real ranks with random weights: arguments always meet their schema.

use harness::{Cluster, check_calls};

#[test]
fn calls_meet_their_schemas_in_every_format_at_temperature_2() {
    let cluster = Cluster::start(1);
    let all = check_calls(&cluster, 2, 2, &mut |_, _, _| {});
    assert_eq!(all.iter().map(|(_, figures)| figures.runs).sum::<usize>(), 72);
    for kind in ["required", "named", "strict"] {
        let of_kind = all.iter().filter(|(name, _)| name.ends_with(kind));
        let calls: usize = of_kind.map(|(_, figures)| figures.calls).sum();
        assert!(calls >= 12, "{kind}: {calls} whole calls of 24 runs: {all:?}");
    }
}
