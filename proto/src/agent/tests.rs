//! Agents' messages survive the wire, and what lies is refused.

use super::*;
use crate::pb;

fn key() -> RankKey {
    RankKey { deployment: DeploymentName("m".into()), replica: 0, rank: Rank(1), incarnation: Incarnation(4) }
}

fn hello() -> AgentHello {
    AgentHello {
        node_id: NodeId("host-1".into()),
        version: "1".into(),
        address: String::new(),
        hostname: "host".into(),
        device_kind: DeviceKind::Cpu,
        num_slots: 2,
        num_cpus: 2,
        memory_bytes: 1,
        pid: 7,
        device_names: vec!["cpu".into(), "cpu".into()],
        labels: BTreeMap::from([("zone".into(), "a".into())]),
    }
}

#[test]
fn events_survive_the_wire() {
    let exited = RankProcess::Exited { code: None, signal: Some(9), by_agent: true, last_lines: "x".into() };
    let events = [
        AgentEvent::Hello(hello()),
        AgentEvent::Heartbeat { sequence: 3, round_trip: None },
        AgentEvent::Heartbeat { sequence: 4, round_trip: Some(Duration::from_micros(250)) },
        AgentEvent::Rank(RankObserved { key: key(), pid: 5, state: RankProcess::Spawned }),
        AgentEvent::Rank(RankObserved { key: key(), pid: 5, state: exited }),
        AgentEvent::Leaving("asked".into()),
        AgentEvent::Draining("asked".into()),
        AgentEvent::Log(LogPart { id: 4, text: b"x".to_vec(), next_offset: 9, error: "none".into() }),
    ];
    for event in events {
        assert_eq!(AgentEvent::try_from(pb::AgentMessage::from(event.clone())), Ok(event));
    }
}

#[test]
fn commands_survive_the_wire() {
    let rank = DesiredRank {
        key: key(),
        device_slot: 1,
        num_threads: None,
        launch_token: "t".into(),
        env: BTreeMap::from([("A".into(), "b".into())]),
    };
    let welcome = AgentWelcome {
        term: Term(2),
        heartbeat: Duration::from_secs(1),
        head_grace: Duration::ZERO,
        version: "1".into(),
        socket: Some(HeadSocket { path: "/x".into(), boot_id: "b".into() }),
    };
    let commands = [
        AgentCommand::Welcome(welcome),
        AgentCommand::Desired(DesiredRanks { revision: 8, ranks: vec![rank] }),
        AgentCommand::End("stop".into()),
        AgentCommand::Seen { sequence: 4 },
        AgentCommand::ReadLog(LogRequest {
            id: 4,
            source: LogSource::Rank { deployment: DeploymentName("m".into()), replica: 1, rank: Rank(2) },
            start: LogStart::Offset(0),
            bytes_max: 10,
        }),
        AgentCommand::ReadLog(LogRequest { id: 5, source: LogSource::Agent, start: LogStart::Tail(7), bytes_max: 10 }),
    ];
    for command in commands {
        assert_eq!(AgentCommand::try_from(pb::HeadToAgent::from(command.clone())), Ok(command));
    }
}

#[test]
fn lying_messages_are_refused() {
    for break_it in [
        (|h| h.num_slots = 0) as fn(&mut pb::AgentHello),
        |h| h.node_id.clear(),
        |h| h.device_kind = "tpu".into(),
        |h| h.device_names.clear(),
    ] {
        let mut wire = pb::AgentHello::from(hello());
        break_it(&mut wire);
        assert!(AgentHello::try_from(wire).is_err());
    }
    let wire = pb::RankObserved { state: "asleep".into(), ..Default::default() };
    assert!(RankObserved::try_from(wire).is_err());
    let wire = pb::DesiredRank {
        deployment: "m".into(),
        env: [("A=B".to_string(), String::new())].into(),
        ..Default::default()
    };
    assert!(DesiredRank::try_from(wire).is_err());
}
