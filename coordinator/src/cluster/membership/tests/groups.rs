//! Placement groups that are made by hand, over the real task.

use std::collections::BTreeMap;
use std::time::Duration;

use phalanx_proto::DeploymentName;

use super::super::super::strategy::Strategy;
use super::super::super::{ClusterError, DeployEvent, DeployFailure, DeployFailureCode, GroupSpec};
use super::rig::{self, FakeAgent, Rig, spec};

fn group(name: &str, bundles: &[&str], strategy: Strategy) -> GroupSpec {
    let bundles = bundles.iter().map(|text| text.parse().expect("a bundle")).collect();
    GroupSpec { name: name.into(), bundles, strategy, labels: BTreeMap::new(), wait: None }
}

async fn create(rig: &Rig, spec: GroupSpec) -> Result<phalanx_proto::PlacementGroupStatus, DeployFailure> {
    rig.client().await.create_group(&spec).await.expect("the head answers")
}

#[tokio::test]
async fn a_group_is_created_whole_and_serves_deployments_side_by_side() {
    let rig = Rig::start().await;
    let _a = FakeAgent::join(&rig, "a", 2).await;
    let _b = FakeAgent::join(&rig, "b", 1).await;
    let made = create(&rig, group("g", &["cpu=0.5,gpu=1", "gpu=1,label.zone=b", "gpu=1"], Strategy::Pack)).await;
    let made = made.expect("it fits");
    let nodes: Vec<_> = made.bundles.iter().map(|bundle| bundle.node.clone().unwrap_or_default()).collect();
    assert_eq!((made.state.as_str(), nodes.as_slice()), ("created", ["a", "b", "a"].map(str::to_owned).as_slice()));
    let used = |status: &phalanx_proto::StatusSnapshot| status.nodes.iter().map(|node| node.slots_used).sum::<u32>();
    rig.until("its slots are taken", |status| used(status) == 3).await;

    let inside = |name: &str, size| {
        let mut wanted = spec(name, size);
        wanted.placement_group = Some("g".into());
        wanted
    };
    rig.deploy_ready(inside("first", 2)).await;
    rig.deploy_ready(inside("second", 1)).await;
    let status = rig.cluster_status();
    let places: Vec<_> = status.ranks.iter().map(|rank| (rank.deployment.as_str(), rank.node.as_str())).collect();
    assert_eq!(places, [("first", "a"), ("first", "b"), ("second", "a")]);
    assert_eq!((used(&status), status.placement_groups.len()), (3, 1));
    assert_eq!(status.placement_groups[0].deployments, ["first", "second"]);

    let refused = |event| match event {
        DeployEvent::Failed(DeployFailure { code, message, .. }) => (code, message),
        other => panic!("{other:?}"),
    };
    let (code, message) = refused(rig::last(&mut rig.deploy(inside("third", 1)).await).await);
    assert_eq!(code, DeployFailureCode::Busy);
    assert!(
        message.starts_with("needs 1 slots of placement group g; 0 of 3 are free; 2 held by deployment first since")
    );
    let (code, message) = refused(rig::last(&mut rig.deploy(inside("third", 4)).await).await);
    assert_eq!(
        (code, message.as_str()),
        (DeployFailureCode::Infeasible, "needs 4 slots of placement group g; it has 3")
    );
    let (code, message) = refused(rig::last(&mut rig.deploy(spec("third", 1)).await).await);
    assert_eq!(code, DeployFailureCode::Busy);
    assert!(message.contains("2 on a are held by placement group g since"), "{message}");

    let client = rig.client().await;
    let in_use = client.remove_group("g", false).await.expect_err("in use").to_string();
    assert!(in_use.contains("in use by first, second"), "{in_use}");
    client.remove_group("g", true).await.expect("ends what runs in it");
    let status = rig.cluster_status();
    assert_eq!((used(&status), status.deployments.len(), status.placement_groups.len()), (0, 0, 0));
    assert!(matches!(rig.cluster.remove_group("g".into(), false).await, Err(ClusterError::UnknownGroup { .. })));
}

#[tokio::test]
async fn never_and_not_now_are_told_apart() {
    let rig = Rig::start().await;
    let _a = FakeAgent::join(&rig, "a", 2).await;
    let never = create(&rig, group("never", &["gpu=1"; 3], Strategy::StrictPack)).await.expect_err("three of two");
    assert_eq!(never.code, DeployFailureCode::Infeasible);
    assert!(never.message.starts_with("needs 3 bundles of gpu=1 on one node; the cluster has a:"), "{}", never.message);
    assert!(never.hint.contains("at most 2 of these bundles"), "{}", never.hint);
    assert!(rig.cluster_status().placement_groups.is_empty());

    rig.deploy_ready(spec("m", 1)).await;
    let busy = create(&rig, group("busy", &["gpu=1"; 2], Strategy::Pack)).await.expect("it waits");
    assert_eq!(busy.state, "pending");
    assert!(busy.reason.contains("1 of 2 CPU slots is free; 1 on a is held by deployment m since"), "{}", busy.reason);
    let client = rig.client().await;
    let waited = client.wait_group("busy", Duration::from_millis(100)).await.expect("answers");
    assert_eq!(waited.state, "pending");
    rig.cluster.undeploy(DeploymentName("m".into())).await.expect("goes");
    let waited = client.wait_group("busy", Duration::from_secs(10)).await.expect("answers");
    assert_eq!((waited.state.as_str(), waited.reason.as_str()), ("created", ""));

    let mut later = group("later", &["gpu=4"], Strategy::Pack);
    later.wait = Some(Duration::from_secs(60));
    assert_eq!(create(&rig, later).await.expect("it waits").state, "infeasible");
    let _b = FakeAgent::join(&rig, "b", 4).await;
    assert_eq!(client.wait_group("later", Duration::from_secs(10)).await.expect("answers").state, "created");
    assert!(client.wait_group("other", Duration::ZERO).await.expect_err("unknown").to_string().contains("busy, later"));
    let again = create(&rig, group("busy", &["gpu=1"], Strategy::Pack)).await.expect_err("taken");
    assert_eq!(again.code, DeployFailureCode::NameTaken);
}

#[tokio::test]
async fn bundles_of_a_dead_node_move_and_the_deployment_in_them_follows() {
    let rig = Rig::start().await;
    let _a = FakeAgent::join(&rig, "a", 1).await;
    let b = FakeAgent::join(&rig, "b", 1).await;
    let mut wanted = spec("m", 2);
    wanted.placement_group = Some("g".into());
    wanted.wait = Some(Duration::from_secs(30));
    let mut events = rig.deploy(wanted).await;
    rig.until("it waits for its group", |status| {
        status.deployments.first().is_some_and(|m| m.reason.contains("there is none of this name"))
    })
    .await;
    create(&rig, group("g", &["gpu=1"; 2], Strategy::StrictSpread)).await.expect("it fits");
    assert!(matches!(rig::last(&mut events).await, DeployEvent::Ready(_)));
    b.die().await;
    rig.until("its bundle is lost", |status| status.placement_groups[0].state == "rescheduling").await;
    let why = rig.cluster_status().placement_groups[0].reason.clone();
    assert!(why.contains("needs 2 bundles of gpu=1, each on a node of its own; the cluster has a:"), "{why}");
    let _c = FakeAgent::join(&rig, "c", 1).await;
    rig.until("all serve again", |status| {
        let nodes: Vec<&str> = status.ranks.iter().map(|rank| rank.node.as_str()).collect();
        status.placement_groups[0].state == "created" && status.deployments[0].state == "ready" && nodes == ["a", "c"]
    })
    .await;
}
