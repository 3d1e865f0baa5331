//! Spans of requests, as a collector gets them.

use tokio::sync::watch;
use tokio::time::timeout;

use super::*;
use crate::traces::{Attribute, Seen, TraceSink, collector};

const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

/// Asks for a completion and gives its status.
async fn ask(server: &Server, body: &str, parent: Option<&str>) -> u16 {
    let mut request = Request::post("/v1/completions").header("x-request-id", "t");
    if let Some(parent) = parent {
        request = request.header("traceparent", parent);
    }
    Answer::read(server.send(request.body(Body::from(body.to_owned())).unwrap()).await).await.status
}

async fn next(spans: &mut tokio::sync::mpsc::Receiver<Seen>) -> Seen {
    timeout(Duration::from_secs(20), spans.recv()).await.expect("a span in time").unwrap()
}

#[tokio::test]
async fn a_request_is_one_span_of_its_callers_trace() {
    let (endpoint, mut spans) = collector::start().await;
    let (end, ended) = watch::channel(false);
    let (sink, export) = TraceSink::new(&endpoint, ended);
    let export = tokio::spawn(export);
    let setup = Setup { traces: Some(sink), ..Setup::default() };
    let server = Server::with(setup, |number| if number < 2 { Says::length("ab cd") } else { Says::open("ab") });

    let body = r#"{"prompt":[1,2,3],"n":2,"temperature":0.5,"top_p":0.75,"max_tokens":9}"#;
    assert_eq!(ask(&server, body, Some(PARENT)).await, 200);
    let seen = next(&mut spans).await;
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    assert_eq!((seen.name.as_str(), seen.service), ("llm_request", "phalanx".into()));
    assert_eq!(format!("00-{}-{}-01", hex(&seen.trace), hex(&seen.parent)), PARENT);
    assert!(seen.span.len() == 8 && seen.failure.is_none() && seen.nanos > 0);
    let tokens = tiny_text(None).encode("ab cd", false).unwrap().len() as u64;
    for (key, value) in [
        ("gen_ai.request.id", Attribute::from("t")),
        ("gen_ai.response.model", "tiny".into()),
        ("gen_ai.request.n", 2_u64.into()),
        ("gen_ai.request.max_tokens", 9_u64.into()),
        ("gen_ai.request.temperature", 0.5_f32.into()),
        ("gen_ai.request.top_p", 0.75_f32.into()),
        ("gen_ai.usage.prompt_tokens", 3_u64.into()),
        ("gen_ai.usage.completion_tokens", (2 * tokens).into()),
        ("gen_ai.usage.num_sequences", 2_u64.into()),
    ] {
        assert_eq!(seen.attributes.get(key), Some(&value), "{key}");
    }
    let time = |key: &str| match seen.attributes.get(key) {
        Some(Attribute::Number(seconds)) => *seconds,
        other => panic!("{key}: {other:?}"),
    };
    let (first, decode) = (time("gen_ai.latency.time_to_first_token"), time("gen_ai.latency.time_in_model_decode"));
    assert!(first > 0.0 && decode > 0.0 && first + decode <= time("gen_ai.latency.e2e"));

    // A caller that records nothing wants nothing recorded; one without a trace gets one; who goes away is told.
    let unsampled = PARENT.replace("-01", "-00");
    let streamed = r#"{"prompt":[1],"stream":true}"#;
    let request = |parent: &str| {
        let request = Request::post("/v1/completions").header("traceparent", parent.to_owned());
        request.body(Body::from(streamed)).unwrap()
    };
    drop(server.send(request(&unsampled)).await);
    drop(server.send(request("nonsense")).await);
    let seen = next(&mut spans).await;
    assert!(seen.parent.is_empty() && seen.trace.len() == 16 && seen.trace != [0; 16]);
    assert_eq!(seen.failure.as_deref(), Some("the client went away"));

    // What is left is sent when the server ends.
    drop(server.send(request("")).await);
    end.send(true).unwrap();
    assert!(next(&mut spans).await.parent.is_empty());
    timeout(Duration::from_secs(20), export).await.expect("the end in time").unwrap();
    assert!(spans.try_recv().is_err(), "no span of a request that is not sampled");
}

#[tokio::test]
async fn a_collector_that_is_away_hurts_no_request() {
    let (_end, ended) = watch::channel(false);
    let (sink, export) = TraceSink::new(&"127.0.0.1:1".parse().unwrap(), ended);
    tokio::spawn(export);
    let setup = Setup { traces: Some(sink), ..Setup::default() };
    let server = Server::with(setup, |_| Says::length("a"));
    for _ in 0..3 {
        assert_eq!(ask(&server, r#"{"prompt":[1]}"#, None).await, 200);
    }
}
