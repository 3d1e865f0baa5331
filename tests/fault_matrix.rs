//! One cell of the fault matrix for each fault, with real processes and real streams; `cargo xtask soak` runs all of them.

#![expect(clippy::expect_used, reason = "helpers of tests are test code too")]

mod faults;

use faults::Verdict;

fn check(name: &str) {
    let cells = faults::cells_named(name);
    assert_eq!(cells.len(), 1, "the table has this cell once");
    let report = faults::run(&cells, |_| ());
    assert_eq!(report.count(Verdict::Wrong), 0, "as the table says:{report}");
}

#[test]
fn a_killed_agent_loses_its_ranks_and_another_machine_goes_on() {
    check("kill agent decode");
}

#[test]
fn a_head_that_stood_still_goes_on() {
    check("freeze head decode");
}

#[test]
fn a_rank_that_ends_in_a_step_is_replaced() {
    check("exit other-rank decode");
}

#[test]
fn a_machine_that_is_cut_off_is_given_up_and_disturbs_nobody_when_it_is_back() {
    check("cut other-rank decode");
}

#[test]
fn a_slow_link_is_named() {
    check("slow-link other-rank idle");
}

#[test]
fn a_full_disk_refuses_what_is_new_and_keeps_what_was_acknowledged() {
    check("disk-full head decode");
}

#[test]
fn a_wall_clock_that_jumps_changes_nothing() {
    check("clock-jump head decode");
}

#[test]
fn a_head_that_stands_by_takes_over_while_prompts_are_read() {
    check("kill leader prefill");
}

#[test]
fn a_full_etcd_refuses_what_is_new_and_keeps_what_was_acknowledged() {
    check("disk-full leader decode");
}
