//! Agents and ranks that are made up, over the real sockets and the real cluster task, with engines that are real but for
//! their devices.

mod groups;
mod moving;
mod rig;

pub use rig::checked;

use std::time::Duration;

use phalanx_proto::{DeploymentName, NodeId};
use tokio::time::timeout;

use super::super::strategy::Strategy;
use super::super::{DeployEvent, DeployFailureCode, TensorParallelSize};
use rig::{FakeAgent, Rig, spec};

#[tokio::test]
async fn a_deployment_becomes_ready_and_goes_without_a_trace() {
    let rig = Rig::start().await;
    let agent = FakeAgent::join(&rig, "a", 2).await;
    let mut events = rig.deploy(spec("m", 2)).await;
    assert!(matches!(rig::last(&mut events).await, DeployEvent::Ready(status) if status.state == "ready"));
    let status = rig.cluster_status();
    assert_eq!(status.nodes[0].slots_used, 2);
    assert_eq!(status.placement_groups[0].state, "created");
    let ranks: Vec<_> = status.ranks.iter().map(|r| (r.rank, r.state.as_str(), r.phase.as_str(), r.pid > 0)).collect();
    assert_eq!(ranks, [(0, "ready", "ready", true), (1, "ready", "ready", true)]);
    assert!(status.ranks.iter().all(|rank| rank.weight_bytes == 1000));
    assert_eq!(rig.served(), ["m"]);
    rig.cluster.undeploy(DeploymentName("m".into())).await.expect("goes");
    let status = rig.cluster_status();
    assert!(status.deployments.is_empty() && status.ranks.is_empty() && status.nodes[0].slots_used == 0);
    assert!(rig.served().is_empty());
    assert_eq!(agent.num_running().await, 0);
}

#[tokio::test]
async fn what_can_never_fit_is_refused_at_once_and_leaves_nothing() {
    let rig = Rig::start().await;
    let _agent = FakeAgent::join(&rig, "a", 2).await;
    let mut events = rig.deploy(spec("m", 4)).await;
    let event = timeout(Duration::from_secs(1), rig::last(&mut events)).await.expect("at once");
    let DeployEvent::Failed(failure) = event else { panic!("{event:?}") };
    assert_eq!(failure.code, DeployFailureCode::Infeasible);
    assert_eq!(failure.message, "needs 4 CPU slots on one node; the largest node has 2 (a)");
    assert!(rig.cluster_status().deployments.is_empty());
}

#[tokio::test]
async fn a_busy_cluster_names_the_holder() {
    let rig = Rig::start().await;
    let _agent = FakeAgent::join(&rig, "a", 2).await;
    rig.deploy_ready(spec("first", 2)).await;
    let event = rig::last(&mut rig.deploy(spec("second", 1)).await).await;
    let DeployEvent::Failed(failure) = event else { panic!("{event:?}") };
    assert_eq!(failure.code, DeployFailureCode::Busy);
    assert!(failure.message.contains("held by deployment first since"), "{}", failure.message);
    let event = rig::last(&mut rig.deploy(spec("first", 1)).await).await;
    assert!(matches!(event, DeployEvent::Failed(failure) if failure.code == DeployFailureCode::NameTaken));
}

#[tokio::test]
async fn who_waits_is_woken_by_a_machine_that_joins() {
    let rig = Rig::start().await;
    let _a = FakeAgent::join(&rig, "a", 2).await;
    let mut wanted = spec("m", 4);
    (wanted.wait, wanted.strategy) = (Some(Duration::from_secs(30)), Strategy::StrictPack);
    let mut events = rig.deploy(wanted).await;
    rig.until("it is pending", |status| status.deployments.first().is_some_and(|d| d.state == "pending")).await;
    let _b = FakeAgent::join(&rig, "b", 2).await;
    let why = "needs 4 CPU slots on one node; the largest node has 2 (a)";
    rig.until("both joined", |status| status.nodes.len() == 2).await;
    let status = rig.cluster_status();
    assert_eq!((status.deployments[0].state.as_str(), status.deployments[0].reason.as_str()), ("pending", why));
    assert_eq!(status.placement_groups[0].reason, why);
    let _c = FakeAgent::join(&rig, "c", 4).await;
    assert!(matches!(rig::last(&mut events).await, DeployEvent::Ready(_)));
    assert!(rig.cluster_status().ranks.iter().all(|rank| rank.node == "c"));
}

#[tokio::test]
async fn a_wait_in_vain_ends_with_the_arithmetic() {
    let rig = Rig::start().await;
    let mut wanted = spec("m", 2);
    wanted.wait = Some(Duration::from_millis(200));
    let event = rig::last(&mut rig.deploy(wanted).await).await;
    let DeployEvent::Failed(failure) = event else { panic!("{event:?}") };
    assert_eq!(failure.code, DeployFailureCode::Timeout);
    assert!(failure.message.contains("needs 2 device slots; no machine is in the cluster"), "{}", failure.message);
    let status = rig.cluster_status();
    assert_eq!(
        (status.deployments[0].state.as_str(), status.placement_groups[0].state.as_str()),
        ("failed", "infeasible")
    );
}

#[tokio::test]
async fn ranks_of_one_group_may_lie_on_two_nodes() {
    let rig = Rig::start().await;
    let _a = FakeAgent::join(&rig, "a", 1).await;
    let _b = FakeAgent::join(&rig, "b", 1).await;
    let mut wanted = spec("m", 2);
    wanted.strategy = Strategy::Spread;
    rig.deploy_ready(wanted).await;
    let nodes: Vec<String> = rig.cluster_status().ranks.into_iter().map(|rank| rank.node).collect();
    assert_eq!(nodes, ["a", "b"]);
}

#[tokio::test]
async fn a_killed_rank_fails_the_deployment_which_starts_again() {
    let rig = Rig::start().await;
    let agent = FakeAgent::join(&rig, "a", 2).await;
    rig.deploy_ready(spec("m", 2)).await;
    let pid = rig.cluster_status().ranks[1].pid;
    agent.kill(1).await;
    let why = format!("rank 1 (pid {pid} on a) was ended by signal 9 (SIGKILL)");
    rig.until("it says why", |s| s.deployments[0].state == "recovering" && s.deployments[0].reason.starts_with(&why))
        .await;
    rig.until("it is ready again", |s| s.deployments[0].state == "ready").await;
    let status = rig.cluster_status();
    assert_eq!((status.deployments[0].incarnation, status.deployments[0].reason.as_str()), (2, ""));
    assert!(status.ranks.iter().all(|rank| rank.pid != pid && rank.state == "ready"));
    assert_eq!(rig.served(), ["m"]);
}

#[tokio::test]
async fn restarts_have_a_limit() {
    let rig = Rig::start_with(|settings| settings.restarts_max = 1).await;
    let agent = FakeAgent::join(&rig, "a", 1).await;
    rig.deploy_ready(spec("m", 1)).await;
    agent.kill(0).await;
    rig.until("it starts again", |s| s.deployments[0].incarnation == 2 && s.deployments[0].state == "ready").await;
    agent.kill(0).await;
    rig.until("it gives up", |s| s.deployments[0].reason.contains("gave up after 1 restarts")).await;
    rig.until("its slot is free", |s| s.nodes[0].slots_used == 0 && s.deployments[0].state == "failed").await;
    rig.deploy_ready(spec("m", 1)).await;
}

#[tokio::test]
async fn a_dead_agent_is_seen_at_once_and_its_group_moves() {
    let rig = Rig::start().await;
    let a = FakeAgent::join(&rig, "a", 1).await;
    rig.deploy_ready(spec("m", 1)).await;
    a.die().await;
    rig.until("the node is dead", |s| s.nodes[0].state == "dead" && !s.nodes[0].reason.is_empty()).await;
    rig.until("the deployment says so", |s| {
        s.deployments[0].state == "recovering" && s.deployments[0].reason.contains("node a")
    })
    .await;
    rig.until("its group waits", |s| s.placement_groups[0].state == "rescheduling").await;
    let _b = FakeAgent::join(&rig, "b", 1).await;
    rig.until("it serves elsewhere", |s| s.deployments[0].state == "ready" && s.ranks[0].node == "b").await;
}

#[tokio::test]
async fn a_frozen_agent_is_suspect_then_dead() {
    let rig = Rig::start_with(|settings| {
        settings.patience.suspect_after = Duration::from_millis(300);
        settings.patience.dead_after = Duration::from_millis(900);
    })
    .await;
    let agent = FakeAgent::join(&rig, "a", 1).await;
    agent.freeze().await;
    rig.until("it is suspect", |s| s.nodes[0].state == "suspect").await;
    let event = rig::last(&mut rig.deploy(spec("m", 1)).await).await;
    assert!(matches!(event, DeployEvent::Failed(failure) if failure.code == DeployFailureCode::Infeasible));
    rig.until("it is dead", |s| s.nodes[0].state == "dead").await;
}

#[tokio::test]
async fn a_rank_that_cannot_start_says_its_last_words() {
    let rig = Rig::start().await;
    let agent = FakeAgent::join(&rig, "a", 2).await;
    agent.fail_starts("out of memory").await;
    let event = rig::last(&mut rig.deploy(spec("m", 1)).await).await;
    let DeployEvent::Failed(failure) = event else { panic!("{event:?}") };
    assert_eq!(failure.code, DeployFailureCode::StartFailed);
    assert!(failure.message.ends_with("ended with exit code 1: out of memory"), "{}", failure.message);
    rig.until("its slot is free", |s| s.nodes[0].slots_used == 0 && s.deployments[0].state == "failed").await;
}

#[tokio::test]
async fn replicas_are_groups_of_their_own() {
    let rig = Rig::start().await;
    let agent = FakeAgent::join(&rig, "a", 4).await;
    let mut wanted = spec("m", 2);
    wanted.replicas = 2;
    rig.deploy_ready(wanted).await;
    assert_eq!(rig.cluster_status().ranks.len(), 4);
    agent.kill(1).await;
    rig.until("one still serves", |s| s.deployments[0].state == "recovering").await;
    rig.until("both serve", |s| s.deployments[0].state == "ready").await;
}

#[tokio::test]
async fn all_free_slots_of_a_node_can_be_asked_for() {
    let rig = Rig::start().await;
    let _a = FakeAgent::join(&rig, "a", 3).await;
    let mut wanted = spec("m", 1);
    wanted.tensor_parallel_size = TensorParallelSize::Auto;
    rig.deploy_ready(wanted).await;
    assert_eq!(rig.cluster_status().deployments[0].tensor_parallel_size, 3);
}

#[tokio::test]
async fn strangers_are_refused() {
    let rig = Rig::start().await;
    let _agent = FakeAgent::join(&rig, "a", 1).await;
    let message = FakeAgent::try_join(&rig, "a", 1, "same").await.expect_err("a second of that id");
    assert!(message.contains("node a has joined already"), "{message}");
    let message = FakeAgent::try_join(&rig, "b", 1, "0.0.0").await.expect_err("another version");
    assert!(message.contains("version 0.0.0 cannot join"), "{message}");
    let message = rig.dial_stranger().await.expect_err("nobody asked for it");
    assert!(message.contains("is not asked for"), "{message}");
}

#[tokio::test]
async fn a_node_that_is_sent_away_is_drained_first() {
    let rig = Rig::start().await;
    let _a = FakeAgent::join(&rig, "a", 1).await;
    rig.deploy_ready(spec("m", 1)).await;
    let _b = FakeAgent::join(&rig, "b", 1).await;
    timeout(Duration::from_secs(20), rig.cluster.leave(NodeId("a".into()))).await.expect("in time").expect("leaves");
    rig.until("it left", |s| s.nodes[0].state == "left").await;
    rig.until("it serves elsewhere", |s| s.deployments[0].state == "ready" && s.ranks[0].node == "b").await;
    assert!(rig.cluster.leave(NodeId("z".into())).await.is_err());
}

#[tokio::test]
async fn stop_ends_everything_and_then_the_task() {
    let rig = Rig::start().await;
    let agent = FakeAgent::join(&rig, "a", 2).await;
    rig.deploy_ready(spec("m", 2)).await;
    timeout(Duration::from_secs(20), rig.cluster.stop()).await.expect("in time").expect("stops");
    assert!(agent.has_ended().await);
    timeout(Duration::from_secs(5), rig.cluster.stopped()).await.expect("ends");
    assert!(rig.cluster.stop().await.is_err());
}

#[tokio::test]
async fn the_command_line_hears_the_same_words() {
    let rig = Rig::start().await;
    let client = rig.client().await;
    let mut wanted = spec("m", 2);
    wanted.model_path = "/nonexistent".into();
    let mut events = client.deploy(&wanted).await.expect("answers");
    let event = events.next().await.expect("an event");
    assert!(matches!(event, DeployEvent::Failed(failure) if failure.code == DeployFailureCode::Model));
    let error = client.undeploy("m").await.expect_err("none").to_string();
    assert!(error.contains("no deployment is named m"), "{error}");
    assert!(client.status().await.expect("answers").nodes.is_empty());
}
