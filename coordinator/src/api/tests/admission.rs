//! Who is let in, and how long they wait.

use super::*;

const TEXT: &str = "/v1/completions";

async fn timed(server: &Server, timeout: &str, body: &str) -> Answer {
    let request = Request::post(TEXT).header("x-request-timeout", timeout).body(Body::from(body.to_owned())).unwrap();
    Answer::read(server.send(request).await).await
}

#[tokio::test]
async fn a_client_says_how_long_it_waits() {
    let server = Server::new(|_| Says::open("one two three"));
    let late = timed(&server, "200ms", r#"{"prompt":"x"}"#).await;
    assert_eq!((late.status, &late.json()["error"]["code"]), (504, &"deadline_exceeded".into()));
    assert_eq!(late.headers["x-should-retry"], "false");
    let streamed = timed(&server, "200ms", r#"{"prompt":"x","stream":true}"#).await;
    assert_eq!(streamed.status, 200);
    let frames = streamed.frames();
    assert!(frames[frames.len() - 2].contains("deadline_exceeded") && frames.last() == Some(&"[DONE]"), "{frames:?}");
    settled(|| server.cancelled.count() == 2).await;
    let bad = timed(&server, "soon", r#"{"prompt":"x"}"#).await;
    assert_eq!((bad.status, &bad.json()["error"]["param"]), (400, &"x-request-timeout".into()));
}

#[tokio::test]
async fn a_wait_in_the_queue_ends() {
    let setup = Setup { queue_timeout: Some(Duration::from_millis(100)), ..Setup::default() };
    // The scripted engine starts no sequence: all of them wait.
    let server = Server::with(setup, |_| Says::open(""));
    for stream in ["false", "true"] {
        let answer = server.post(TEXT, &format!(r#"{{"prompt":"x","stream":{stream}}}"#)).await;
        assert_eq!((answer.status, &answer.json()["error"]["code"]), (503, &"queue_timeout".into()));
        assert_eq!(answer.headers["retry-after"], "5");
    }
    settled(|| server.cancelled.count() == 2).await;
}

#[tokio::test]
async fn a_model_that_is_on_its_way_is_not_unknown() {
    let deployment = |name: &str, state: &str, reason: &str| phalanx_proto::DeploymentStatus {
        name: name.into(),
        state: state.into(),
        reason: reason.into(),
        ..Default::default()
    };
    let status = StatusSnapshot {
        deployments: vec![deployment("big", "starting", "rank 1 loads weights"), deployment("old", "stopping", "")],
        ..StatusSnapshot::default()
    };
    let server = Server::with(Setup { status, ..Setup::default() }, |_| Says::stop("x"));
    for (model, message) in
        [("big", "the model `big` is starting: rank 1 loads weights"), ("old", "the model `old` is stopping")]
    {
        let answer = server.post(TEXT, &format!(r#"{{"model":"{model}","prompt":"x"}}"#)).await;
        assert_eq!((answer.status, &answer.json()["error"]["message"]), (503, &message.into()));
        assert_eq!(answer.headers["retry-after"], "2");
    }
}

#[tokio::test]
async fn keys_of_the_store_have_scopes_rates_and_usage() {
    use crate::security::key_file::KeyFile;
    use crate::security::keys::{KeyRecord, KeyWish, Scope};
    let dir = tempfile::tempdir().unwrap();
    let wish = |name: &str, scopes: &[Scope], rate: Option<&str>| KeyWish {
        name: name.into(),
        scopes: scopes.to_vec(),
        rate: rate.map(|rate| rate.parse().unwrap()),
        tokens_per_day: Some(1000),
    };
    let (alice, alices) = KeyRecord::new(wish("alice-of-the-test", &[Scope::Inference], Some("2/h")));
    let (scraper, scrapers) = KeyRecord::new(wish("scraper", &[Scope::Metrics], None));
    KeyFile::new(dir.path()).change(|keys| keys.extend([alice, scraper])).unwrap();
    let keys = KeyRing::new(&["root".to_owned()], Some(KeyFile::new(dir.path()))).unwrap();
    let server = Server::with(Setup { keys: Some(keys), ..Setup::default() }, |_| Says::stop("Hello there"));
    let ask = async |method: &str, path: &str, key: &str| {
        let request = Request::builder().method(method).uri(path).header("authorization", format!("Bearer {key}"));
        Answer::read(server.send(request.body(Body::from(r#"{"prompt":"x"}"#)).unwrap()).await).await
    };
    assert_eq!(ask("POST", TEXT, "phx-none").await.status, 401);
    let wrong = ask("POST", TEXT, &scrapers).await;
    assert_eq!((wrong.status, &wrong.json()["error"]["code"]), (403, &"insufficient_scope".into()));
    assert_eq!(ask("GET", "/metrics", &alices).await.status, 403);
    assert_eq!(ask("GET", "/v1/models", &alices).await.status, 200);
    assert_eq!(ask("POST", TEXT, &alices).await.status, 200);
    assert_eq!(ask("POST", TEXT, &alices).await.status, 200);
    let often = ask("POST", TEXT, &alices).await;
    assert_eq!((often.status, &often.json()["error"]["code"]), (429, &"rate_limit_exceeded".into()));
    assert!(often.headers["retry-after"].to_str().unwrap().parse::<u64>().unwrap() > 1700);
    let text = ask("GET", "/metrics", &scrapers).await.body;
    assert!(text.contains(r#"phalanx_key_requests_total{key="alice-of-the-test"} 2"#), "{text}");
    assert!(text.contains(r#"phalanx_admission_rejections_total{reason="key_rate"}"#), "{text}");
    assert_eq!(ask("GET", "/metrics", "root").await.status, 200);
}
