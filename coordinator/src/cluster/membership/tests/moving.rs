//! Drain, rolling restart, replicas that follow the machines, and the story that is told of it.

use phalanx_proto::{DeploymentName, NodeId};

use super::super::super::ClusterError;
use super::rig::{self, FakeAgent, Rig, spec};

fn name(text: &str) -> DeploymentName {
    DeploymentName(text.into())
}

#[tokio::test]
async fn a_node_that_leaves_hands_its_work_over_and_ends() {
    let rig = Rig::start().await;
    let a = FakeAgent::join(&rig, "a", 1).await;
    let _b = FakeAgent::join(&rig, "b", 1).await;
    rig.deploy_ready(spec("m", 1)).await;
    assert_eq!(rig.cluster_status().ranks[0].node, "a");
    rig.cluster.leave(NodeId("a".into())).await.expect("leaves");
    assert!(a.has_ended().await);
    rig.until("it serves on b", |status| {
        status.deployments[0].state == "ready" && status.ranks.iter().all(|rank| rank.node == "b")
    })
    .await;
    let status = rig.cluster_status();
    assert_eq!((status.nodes[0].state.as_str(), status.deployments[0].incarnation), ("left", 2));
    let story: Vec<String> = rig.chronicle.after(0, Some("m")).into_iter().map(|event| event.kind).collect();
    let expected = [
        "deployment_accepted",
        "placed",
        "group_ready",
        "deployment_ready",
        "group_ends",
        "starts_again",
        "placed",
        "group_ready",
    ];
    assert_eq!(story, expected);
}

#[tokio::test]
async fn a_restart_goes_from_replica_to_replica() {
    let rig = Rig::start().await;
    let _a = FakeAgent::join(&rig, "a", 2).await;
    let mut wanted = spec("m", 1);
    wanted.replicas = 2;
    rig.deploy_ready(wanted).await;
    let serving = {
        let rig = &rig;
        async move {
            // At no time are both away.
            loop {
                let ready = rig.cluster_status().ranks.iter().filter(|rank| rank.state == "ready").count();
                assert!(ready >= 1, "{:#?}", rig.cluster_status().ranks);
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        }
    };
    tokio::select! {
        restarted = rig.cluster.restart(name("m")) => restarted.expect("restarts"),
        () = serving => {}
    }
    let status = rig.cluster_status();
    let pids: Vec<u32> = status.ranks.iter().map(|rank| rank.pid).collect();
    assert_eq!(pids.len(), 2);
    assert!(pids.iter().all(|pid| *pid >= 1002), "new processes: {pids:?}");
    let unknown = rig.cluster.restart(name("other")).await.expect_err("unknown");
    assert!(matches!(unknown, ClusterError::UnknownDeployment { .. }));
}

#[tokio::test]
async fn replicas_follow_the_machines() {
    let rig = Rig::start_with(|settings| settings.no_machine_deadline = std::time::Duration::from_millis(100)).await;
    let _a = FakeAgent::join(&rig, "a", 1).await;
    let mut wanted = spec("m", 1);
    wanted.replicas_auto = true;
    rig.deploy_ready(wanted).await;
    let b = FakeAgent::join(&rig, "b", 2).await;
    rig.until("it fills what joined", |status| {
        let ready = status.ranks.iter().filter(|rank| rank.state == "ready").count();
        status.deployments[0].replicas == 3 && status.deployments[0].state == "ready" && ready == 3
    })
    .await;
    b.die().await;
    rig.until("it shrinks to what is left", |status| {
        status.deployments[0].replicas == 1 && status.deployments[0].state == "ready"
    })
    .await;
    let mut wanted = spec("n", 1);
    wanted.wait = Some(std::time::Duration::from_secs(20));
    let mut events = rig.deploy(wanted).await;
    rig.until("another waits", |status| status.deployments.len() == 2).await;
    let _c = FakeAgent::join(&rig, "c", 1).await;
    assert!(
        matches!(rig::last(&mut events).await, super::super::super::DeployEvent::Ready(_)),
        "who waits comes first"
    );
    assert_eq!(rig.cluster_status().deployments[0].replicas, 1);
}

#[tokio::test]
async fn a_failure_is_told_with_rank_node_and_epoch() {
    let rig = Rig::start().await;
    let a = FakeAgent::join(&rig, "a", 2).await;
    rig.deploy_ready(spec("m", 2)).await;
    a.kill(1).await;
    rig.until("it serves again", |status| {
        status.deployments[0].incarnation == 2 && status.deployments[0].state == "ready"
    })
    .await;
    let story = rig.chronicle.after(0, Some("m"));
    let again = story.iter().find(|event| event.kind == "starts_again").expect("told");
    assert!(again.text.starts_with("rank 1 (pid 1001 on a) was ended by signal 9 (SIGKILL)"), "{}", again.text);
    assert_eq!((again.rank, again.node.as_deref(), again.epoch, again.replica), (Some(1), Some("a"), Some(1), Some(0)));
    let mut stream = rig.client().await.events(Some("m"), true).await.expect("a stream");
    for expected in &story {
        let event = stream.next().await.expect("no error").expect("an event");
        assert_eq!(event.sequence, expected.sequence);
    }
    rig.cluster.undeploy(name("m")).await.expect("goes");
    assert_eq!(stream.next().await.expect("no error").expect("an event").kind, "deployment_stops");
}
