//! The table: which fault, whom it hits, when, and what is expected then.

use Expected::{
    BackWithText, Closed, ErrorThenText, MovedText, Named, NoBreak, OwnText, Paused, Refused, TakenOver, Unnoticed,
};
use Fault::{ClockJump, Cut, DiskFull, Exit, Freeze, Kill, SlowLink};
use Moment::{Decode, Idle, Prefill, Starting};
use Victim::{Agent, Head, Leader, OtherRank, RankZero, Standby};

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// SIGKILL.
    Kill,
    /// SIGSTOP: the process is there and says nothing.
    Freeze,
    /// The process ends by itself in the middle of its work.
    Exit,
    /// The network loses everything, and tells nobody.
    Cut,
    /// 200 ms there and back.
    SlowLink,
    /// No byte can be written to the store.
    DiskFull,
    /// The wall clock of the whole machine goes a day ahead, and two back.
    ClockJump,
}

/// Whom it hits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Victim {
    /// Rank 0.
    RankZero,
    /// Rank 1.
    OtherRank,
    /// The agent of the machine that the ranks are on; the network: all of that machine.
    Agent,
    /// The only head.
    Head,
    /// The head that leads, of two over etcd; the network: its machine; the store: etcd.
    Leader,
    /// The head that stands by.
    Standby,
}

/// What the deployment is at when the fault comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// A group that broke is being started again, and streams wait for it.
    Starting,
    /// Long prompts.
    Prefill,
    /// Long answers.
    Decode,
    /// Nothing runs.
    Idle,
}

/// What must come of it. None of these hangs: every wait of a cell has its deadline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// Every stream ends with the right text, on the same machine, in a later epoch; no process of the old group is left.
    OwnText,
    /// Every stream ends with the right text, on another machine; the one that is back is alive again and disturbs nobody.
    MovedText,
    /// There is no other machine: the streams wait until this one is back, and end with the right text.
    BackWithText,
    /// Nothing was left to run on: every stream ends with an error event, and once the machine is back a resend gets the text.
    ErrorThenText,
    /// Connections close within a second; ranks wait with their weights and are taken back; a resend gets the right text.
    Closed,
    /// Every stream pauses, and ends with the right text; no machine was given up.
    Paused,
    /// Every stream ends with the right text, and no group broke.
    NoBreak,
    /// `status` names machine and time, requests end with the right text by their deadline, and it is forgotten when it is over.
    Named,
    /// What is new is refused in plain words; what runs goes on; what was acknowledged is there after a restart.
    Refused,
    /// The head that stands by answers new requests with the right text in under ten seconds; connections to one that was killed
    /// close within a second, and none hangs; the head that is back stands by.
    TakenOver,
    /// Every stream ends with the right text, no group broke, and the same head leads; the other one stands by again.
    Unnoticed,
}

/// Cells that differ in their moment only.
#[derive(Debug, Clone, Copy)]
pub struct Row(pub Fault, pub Victim, pub &'static [Moment], pub Expected);

const EVERY: &[Moment] = &[Starting, Prefill, Decode, Idle];

/// The cells that make sense. An agent has no work of its own to be in; a head that is told to end stops the cluster, which is no
/// fault; a disk is the head's, and one that stands by writes nothing; a clock is a machine's.
pub const TABLE: &[Row] = &[
    Row(Kill, RankZero, EVERY, OwnText),
    Row(Kill, OtherRank, EVERY, OwnText),
    Row(Kill, Agent, EVERY, MovedText),
    Row(Kill, Head, EVERY, Closed),
    Row(Freeze, RankZero, EVERY, OwnText),
    Row(Freeze, OtherRank, EVERY, OwnText),
    Row(Freeze, Agent, EVERY, MovedText),
    // A process that stands still closes nothing: its streams go on with it.
    Row(Freeze, Head, EVERY, Paused),
    Row(Exit, RankZero, EVERY, OwnText),
    Row(Exit, OtherRank, EVERY, OwnText),
    Row(Exit, Agent, &[Decode, Idle], MovedText),
    Row(Cut, OtherRank, EVERY, MovedText),
    Row(Cut, Agent, EVERY, BackWithText),
    Row(Cut, Head, &[Decode], ErrorThenText),
    Row(SlowLink, OtherRank, &[Starting, Decode, Idle], Named),
    Row(DiskFull, Head, &[Decode, Idle], Refused),
    Row(ClockJump, Head, EVERY, NoBreak),
    Row(Kill, Leader, EVERY, TakenOver),
    Row(Kill, Standby, EVERY, Unnoticed),
    Row(Freeze, Leader, EVERY, TakenOver),
    Row(Freeze, Standby, EVERY, Unnoticed),
    Row(Cut, Leader, &[Decode, Idle], TakenOver),
    Row(Cut, Standby, &[Decode, Idle], Unnoticed),
    // etcd has no room: its alarm.
    Row(DiskFull, Leader, &[Decode, Idle], Refused),
    // Leases are counted by clocks that do not jump.
    Row(ClockJump, Leader, &[Decode, Idle], Unnoticed),
    Row(ClockJump, Standby, &[Decode, Idle], Unnoticed),
];
