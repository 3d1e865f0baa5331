//! Beam search over HTTP; that its outputs are right is tested against references, by real ranks.

use super::*;

const TEXT: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";
const MESSAGES: &str = r#""messages":[{"role":"user","content":"x"}]"#;

#[tokio::test]
async fn beams_are_choices_of_a_whole_answer() {
    let server = Server::new(|_| Says::length("a"));
    let body = r#"{"prompt":[1,2],"use_beam_search":true,"n":2,"max_tokens":2,"temperature":0.5,"logprobs":1,
        "return_token_ids":true,"early_stopping":null}"#;
    let answer = server.post(TEXT, body).await;
    assert_eq!((answer.status, answer.headers["x-phalanx-ignored"].to_str().unwrap()), (200, "temperature"));
    let json = answer.json();
    let a = tiny_text(None).encode("a", false).unwrap()[0].0;
    assert_eq!(json["choices"][0]["token_ids"], serde_json::json!([a, a]));
    assert_eq!(json["choices"][1]["token_ids"], serde_json::json!([a, 40]));
    assert_eq!((&json["choices"][0]["text"], &json["choices"][0]["finish_reason"]), (&"aa".into(), &"length".into()));
    assert_eq!(json["choices"][1]["logprobs"]["token_logprobs"], serde_json::json!([-0.5, -1.25]));
    assert_eq!((&json["usage"]["prompt_tokens"], &json["usage"]["completion_tokens"]), (&2.into(), &4.into()));
    assert_eq!(server.submitted.lock().unwrap().len(), 3, "one step behind the prompt, one behind each beam");
}

#[tokio::test]
async fn the_best_of_more_beams_are_kept_in_chat_too() {
    let server = Server::new(|_| Says::length("a"));
    let body = format!(r#"{{{MESSAGES},"use_beam_search":true,"n":1,"best_of":3,"max_tokens":3,"temperature":0}}"#);
    let answer = server.post(CHAT, &body).await.json();
    assert_eq!(answer["choices"].as_array().unwrap().len(), 1);
    assert_eq!(answer["choices"][0]["message"]["content"], "aaa");
    assert_eq!(answer["usage"]["completion_tokens"], 3);
}

#[tokio::test]
async fn what_a_search_cannot_do_is_refused_by_name() {
    let server = Server::new(|_| Says::length("a"));
    for (field, param) in [
        (r#""stream":true"#, "stream"),
        (r#""stop":"x""#, "stop"),
        (r#""prompt_logprobs":1"#, "prompt_logprobs"),
        (r#""presence_penalty":1"#, "presence_penalty"),
        (r#""min_tokens":2"#, "min_tokens"),
        (r#""guided_choice":["a","b"]"#, "guided_choice"),
        (r#""n":11"#, "n"),
        (r#""n":2,"best_of":11"#, "best_of"),
        (r#""early_stopping":"soon""#, "early_stopping"),
        (r#""length_penalty":"long""#, "length_penalty"),
        (r#""echo":true"#, "echo"),
    ] {
        let answer = server.post(TEXT, &format!(r#"{{"prompt":"x","use_beam_search":true,{field}}}"#)).await;
        let error = &answer.json()["error"];
        assert_eq!((answer.status, error["param"].as_str()), (400, Some(param)), "{field}: {}", answer.body);
    }
    assert!(server.submitted.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_client_that_leaves_ends_its_search() {
    let server = Server::new(|number| if number == 0 { Says::length("a") } else { Says::open("") });
    let body = r#"{"prompt":"x","use_beam_search":true,"n":2,"max_tokens":9}"#;
    let answer = tokio::time::timeout(Duration::from_millis(300), server.post(TEXT, body)).await;
    assert!(answer.is_err(), "no step behind the first one ends");
    settled(|| server.cancelled.count() == 2).await;
}

#[tokio::test]
async fn priorities_are_for_models_that_look_at_them() {
    let server = Server::new(|_| Says::length("a"));
    assert_eq!(server.post(TEXT, r#"{"prompt":"x","priority":-5}"#).await.status, 200);
    let limits = EngineLimits { policy: crate::engine::policy::Policy::Fcfs, ..limits() };
    let server = Server::with(Setup { limits, ..Setup::default() }, |_| Says::length("a"));
    assert_eq!(server.post(TEXT, r#"{"prompt":"x","priority":0}"#).await.status, 200);
    let refused = server.post(TEXT, r#"{"prompt":"x","priority":1}"#).await;
    assert_eq!((refused.status, &refused.json()["error"]["param"]), (400, &"priority".into()));
}
