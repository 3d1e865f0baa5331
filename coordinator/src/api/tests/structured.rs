//! What an output is held to: forms of asking, and what is refused.

use serde_json::{Value, json};

use super::*;

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

async fn ask(server: &Server, path: &str, field: &str, value: Value) -> Answer {
    let mut body = if path == CHAT {
        json!({"model": "tiny", "messages": [{"role": "user", "content": "x"}]})
    } else {
        json!({"model": "tiny", "prompt": "x"})
    };
    body[field] = value;
    server.post(path, &body.to_string()).await
}

fn deep(levels: usize) -> Value {
    (1..levels).fold(json!({"type": "string"}), |inner, _| json!({"items": inner}))
}

#[tokio::test]
async fn every_form_of_asking_is_taken() {
    let limits = EngineLimits { max_queue: 100, ..limits() };
    let server = Server::with(Setup { limits, ..Setup::default() }, |_| Says::stop("x"));
    let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]});
    for (field, value) in [
        ("response_format", json!({"type": "text"})),
        ("response_format", json!({"type": "json_object"})),
        (
            "response_format",
            json!({"type": "json_schema", "json_schema": {"name": "n", "strict": true, "schema": schema}}),
        ),
        ("guided_json", schema.clone()),
        ("guided_json", schema.to_string().into()),
        ("guided_regex", "[a-c]+".into()),
        ("guided_choice", json!(["yes", "no"])),
        ("guided_grammar", "start: \"a\"+".into()),
        ("structured_outputs", json!({"json": schema})),
        ("structured_outputs", json!({"regex": "a|b"})),
        ("structured_outputs", json!({"choice": ["a"]})),
        ("structured_outputs", json!({"grammar": "start: /x/"})),
        ("structured_outputs", json!({"json_object": true})),
        ("structured_outputs", json!({})),
    ] {
        for path in [CHAT, TEXT] {
            let answer = ask(&server, path, field, value.clone()).await;
            assert_eq!(answer.status, 200, "{path} {field} {value}: {}", answer.body);
        }
    }
}

#[tokio::test]
async fn what_cannot_be_used_is_refused_for_that_request_alone() {
    let server = Server::new(|_| Says::stop("x"));
    let schema_of = |schema: Value| json!({"type": "json_schema", "json_schema": {"name": "n", "schema": schema}});
    let param = "response_format.json_schema.schema";
    for (field, value, param, code) in [
        ("response_format", schema_of(deep(65)), param, "invalid_grammar"),
        ("response_format", schema_of(json!({"type": "nothing"})), param, "invalid_grammar"),
        ("guided_regex", "(".into(), "guided_regex", "invalid_grammar"),
        ("guided_regex", "x".repeat(10_000).into(), "guided_regex", "invalid_grammar"),
        ("guided_grammar", "start: missing".into(), "guided_grammar", "invalid_grammar"),
        ("guided_grammar", "".into(), "guided_grammar", "invalid_grammar"),
        ("guided_choice", json!(["a", ""]), "guided_choice", "invalid_grammar"),
        (
            "structured_outputs",
            json!({"structural_tag": {}}),
            "structured_outputs.structural_tag",
            "unsupported_parameter",
        ),
    ] {
        for path in [CHAT, TEXT] {
            let answer = ask(&server, path, field, value.clone()).await;
            let error = &answer.json()["error"];
            assert_eq!(
                (answer.status, error["param"].as_str(), error["code"].as_str()),
                (400, Some(param), Some(code)),
                "{}",
                answer.body
            );
        }
    }
    for (field, value) in [
        ("response_format", json!({"type": "xml"})),
        ("response_format", json!({})),
        ("response_format", json!({"type": "json_schema"})),
        ("response_format", json!("json")),
        ("guided_json", json!(7)),
        ("guided_json", json!("{")),
        ("guided_choice", json!("yes")),
        ("guided_choice", json!([1])),
        ("structured_outputs", json!({"regex": "a", "choice": ["b"]})),
    ] {
        let answer = ask(&server, CHAT, field, value.clone()).await;
        assert_eq!(answer.status, 400, "{field} {value}: {}", answer.body);
        assert!(
            answer.json()["error"]["param"].as_str().is_some_and(|param| param.starts_with(field)),
            "{}",
            answer.body
        );
    }
    let body = json!({"model": "tiny", "prompt": "x", "guided_regex": "a", "guided_choice": ["b"]});
    let answer = server.post(TEXT, &body.to_string()).await;
    assert_eq!((answer.status, answer.json()["error"]["param"].as_str()), (400, Some("guided_choice")));
    assert_eq!(ask(&server, TEXT, "guided_choice", json!(["a"])).await.status, 200, "the next one is not hurt");
}

#[tokio::test]
async fn a_model_without_text_is_held_to_nothing() {
    let server = Server::with(Setup { has_text: false, ..Setup::default() }, |_| Says::stop("x"));
    let body = json!({"model": "tiny", "prompt": [1, 2], "guided_regex": "a"});
    let answer = server.post(TEXT, &body.to_string()).await;
    assert_eq!((answer.status, answer.json()["error"]["param"].as_str()), (400, Some("guided_regex")));
}
