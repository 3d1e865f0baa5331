//! Embeddings: fields, encodings and refusals. The engine says the token ids of an input as its hidden state, four wide.

use phalanx_formats::{EmbeddingPooling, EmbeddingSettings, EmbeddingWidths};
use phalanx_proto::Pooling;
use serde_json::json;

use super::*;

const PATH: &str = "/v1/embeddings";

fn server(settings: EmbeddingSettings) -> Server {
    Server::with(Setup { embedding: settings, ..Setup::default() }, |_| Says {
        text: "",
        ending: Ending::Finished(FinishReason::Complete),
        logprob: 0.0,
    })
}

#[tokio::test]
async fn vectors_are_cut_then_normalised_then_encoded() {
    let server = server(EmbeddingSettings { widths: EmbeddingWidths::Any, ..EmbeddingSettings::default() });
    let answer = server.post(PATH, r#"{"model":"tiny","input":[[3,4],[0,0,8]],"user":"me"}"#).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert_eq!(answer.headers["x-phalanx-ignored"], "user");
    let expected = json!({
        "id": "embd-t", "object": "list", "created": 0, "model": "tiny",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [0.6, 0.8, 0.0, 0.0]},
            {"object": "embedding", "index": 1, "embedding": [0.0, 0.0, 1.0, 0.0]},
        ],
        "usage": {"prompt_tokens": 5, "total_tokens": 5},
    });
    let rounded = |mut answer: serde_json::Value| {
        for value in answer["data"][0]["embedding"].as_array_mut().unwrap() {
            *value = json!((value.as_f64().unwrap() * 1e6).round() / 1e6);
        }
        answer
    };
    assert_eq!(rounded(answer.json()), expected);
    assert_eq!(server.sampling().pooling, Some(Pooling::Last));
    let body = r#"{"input":[3,4,12],"dimensions":2,"encoding_format":"base64","normalize":false}"#;
    let answer = server.post(PATH, body).await.json();
    assert_eq!(answer["data"][0]["embedding"], "AABAQAAAgEA=", "3 and 4 as little-endian floats");
    let answer = server.post(PATH, r#"{"input":[1,2,3,4],"truncate_prompt_tokens":1,"normalize":false}"#).await.json();
    assert_eq!(answer["data"][0]["embedding"][0], 4.0);
    assert_eq!(answer["usage"]["prompt_tokens"], 1);
    let whole: Vec<u32> = vec![1; 256];
    assert_eq!(server.post(PATH, &json!({"input": whole}).to_string()).await.status, 200, "the whole context");
}

#[tokio::test]
async fn embeddings_are_refused_by_the_name_of_the_field() {
    let server = server(EmbeddingSettings::default());
    let long = json!({"input": vec![1; 257]}).to_string();
    for (body, param) in [
        ("{}", "input"),
        (r#"{"input":""}"#, "input"),
        (r#"{"input":["x",""]}"#, "input"),
        (r#"{"input":[]}"#, "input"),
        (r#"{"input":[[]]}"#, "input"),
        (r#"{"input":[515]}"#, "input"),
        (r#"{"input":["x",1]}"#, "input[1]"),
        (&long, "input"),
        (r#"{"input":"x","encoding_format":"hex"}"#, "encoding_format"),
        (r#"{"input":"x","dimensions":0}"#, "dimensions"),
        (r#"{"input":"x","dimensions":2}"#, "dimensions"),
        (r#"{"input":"x","truncate_prompt_tokens":257}"#, "truncate_prompt_tokens"),
        (r#"{"input":"x","truncation_side":"both"}"#, "truncation_side"),
        (r#"{"input":"x","priority":"high"}"#, "priority"),
        (r#"{"input":"x","normalize":1}"#, "normalize"),
        (r#"{"model":"none","input":"x"}"#, "model"),
    ] {
        let answer = server.post(PATH, body).await;
        assert_eq!(answer.json()["error"]["param"], param, "{body}: {}", answer.body);
        assert_eq!(answer.status, if param == "model" { 404 } else { 400 }, "{body}");
    }
    assert_eq!(server.post(PATH, &long).await.json()["error"]["code"], "context_length_exceeded");
    let many: Vec<Vec<u32>> = vec![vec![1]; 17];
    let answer = server.post(PATH, &json!({"input": many}).to_string()).await;
    assert_eq!((answer.status, &answer.json()["error"]["param"]), (400, &json!("input")));
}

#[tokio::test]
async fn a_model_decides_how_its_vectors_are_made() {
    let mean = server(EmbeddingSettings {
        pooling: EmbeddingPooling::Mean,
        normalizes: false,
        widths: EmbeddingWidths::Only(vec![2, 9]),
    });
    let answer = mean.post(PATH, r#"{"input":[3,4],"dimensions":2}"#).await.json();
    assert_eq!(answer["data"][0]["embedding"], json!([3.0, 4.0]));
    assert_eq!(mean.sampling().pooling, Some(Pooling::Mean));
    for dimensions in [3, 9] {
        let answer = mean.post(PATH, &json!({"input": [3], "dimensions": dimensions}).to_string()).await;
        assert_eq!((answer.status, &answer.json()["error"]["param"]), (400, &json!("dimensions")), "{}", answer.body);
    }
    let other = EmbeddingPooling::Other("pooling mode cls".into());
    let other = server(EmbeddingSettings { pooling: other, ..EmbeddingSettings::default() });
    let answer = other.post(PATH, r#"{"input":"x"}"#).await;
    assert_eq!((answer.status, &answer.json()["error"]["param"]), (400, &json!("model")), "{}", answer.body);
    assert!(answer.body.contains("pooling mode cls"), "{}", answer.body);
}
