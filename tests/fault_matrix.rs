//! One cell of the fault matrix for each fault, with real processes and real streams; `cargo xtask soak` runs all of them.

#![expect(clippy::expect_used, reason = "helpers of tests are test code too")]

mod faults;

use faults::{Cell, Fault, Moment, Verdict, Victim};

fn check(fault: Fault, victim: Victim, moment: Moment) {
    let wanted = |cell: &Cell| (cell.fault, cell.victim, cell.moment) == (fault, victim, moment);
    let cells: Vec<Cell> = faults::cells().into_iter().filter(wanted).collect();
    assert_eq!(cells.len(), 1, "the table has this cell once");
    let report = faults::run(&cells, |_| ());
    assert_eq!(report.count(Verdict::Wrong), 0, "as the table says:{report}");
}

#[test]
fn a_killed_agent_loses_its_ranks_and_another_machine_goes_on() {
    check(Fault::Kill, Victim::Agent, Moment::Decode);
}

#[test]
fn a_head_that_stood_still_goes_on() {
    check(Fault::Freeze, Victim::Head, Moment::Decode);
}

#[test]
fn a_rank_that_ends_in_a_step_is_replaced() {
    check(Fault::Exit, Victim::OtherRank, Moment::Decode);
}

#[test]
fn a_machine_that_is_cut_off_is_given_up_and_disturbs_nobody_when_it_is_back() {
    check(Fault::Cut, Victim::OtherRank, Moment::Decode);
}

#[test]
fn a_slow_link_is_named() {
    check(Fault::SlowLink, Victim::OtherRank, Moment::Idle);
}

#[test]
fn a_full_disk_refuses_what_is_new_and_keeps_what_was_acknowledged() {
    check(Fault::DiskFull, Victim::Head, Moment::Decode);
}

#[test]
fn a_wall_clock_that_jumps_changes_nothing() {
    check(Fault::ClockJump, Victim::Head, Moment::Decode);
}
