//! `/v1/responses` and `/v1/messages`: the same outputs in two other forms.

use super::*;

const RESPONSES: &str = "/v1/responses";
const MESSAGES: &str = "/v1/messages";
const HI: &str = r#""messages":[{"role":"user","content":"Hi"}],"max_tokens":20"#;

/// Names and data of the events of a stream.
fn events(answer: &Answer) -> Vec<(String, serde_json::Value)> {
    let event = |frame: &str| {
        let (name, data) = frame.strip_prefix("event: ").unwrap().split_once("\ndata: ").unwrap();
        let data: serde_json::Value = serde_json::from_str(data).unwrap();
        assert_eq!(data["type"], name);
        (name.to_owned(), data)
    };
    answer.body.split_terminator("\n\n").map(event).collect()
}

#[tokio::test]
async fn a_whole_response_is_the_last_event_of_its_stream() {
    let server = Server::new(|_| Says::stop("Hello there"));
    let body = r#""input":"Hi","instructions":"Be kind","temperature":0,"max_output_tokens":20,"metadata":{"a":"b"}"#;
    let whole = server.post(RESPONSES, &format!("{{{body}}}")).await;
    assert_eq!(whole.status, 200);
    insta::assert_snapshot!("whole_response", whole.body.replace(&whole.json()["created_at"].to_string(), "0"));
    let stream = server.post(RESPONSES, &format!(r#"{{{body},"stream":true}}"#)).await;
    let events = events(&stream);
    let numbers: Vec<_> = events.iter().map(|(_, data)| data["sequence_number"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (0..events.len() as u64).collect::<Vec<_>>());
    let mut names: Vec<&str> = events.iter().map(|(name, _)| name.as_str()).collect();
    names.dedup();
    assert_eq!(
        names,
        [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.completed",
        ]
    );
    let text: String = events.iter().filter_map(|(_, data)| data["delta"].as_str()).collect();
    assert_eq!(text, "Hello there");
    let mut last = events.last().unwrap().1["response"].clone();
    last["created_at"] = whole.json()["created_at"].clone();
    assert_eq!(last, whole.json());
}

#[tokio::test]
async fn a_response_that_is_cut_says_so() {
    let server = Server::new(|_| Says::length("Hello"));
    let cut = server.post(RESPONSES, r#"{"input":"Hi"}"#).await.json();
    assert_eq!(
        (&cut["status"], &cut["incomplete_details"]["reason"]),
        (&"incomplete".into(), &"max_output_tokens".into())
    );
    let stream = server.post(RESPONSES, r#"{"input":"Hi","stream":true}"#).await;
    assert_eq!(events(&stream).last().unwrap().0, "response.incomplete");
}

#[tokio::test]
async fn a_response_that_fails_ends_with_its_error() {
    let gone = || EngineError::GroupFailed { reason: "rank 1 died".into() };
    let server = Server::new(move |_| Says { text: "Hello", ending: Ending::Failed(gone()), logprob: 0.0 });
    let stream = server.post(RESPONSES, r#"{"input":"Hi","stream":true}"#).await;
    let names: Vec<String> = events(&stream).into_iter().map(|(name, _)| name).collect();
    assert_eq!(names[names.len() - 2..], ["error", "response.failed"]);
    let stream = server.post(MESSAGES, &format!(r#"{{{HI},"stream":true}}"#)).await;
    let (name, data) = events(&stream).pop().unwrap();
    assert_eq!((name.as_str(), &data["error"]["type"]), ("error", &"overloaded_error".into()));
}

#[tokio::test]
async fn what_fails_before_the_first_event_has_a_status_of_its_own() {
    let gone = || EngineError::GroupFailed { reason: "rank 1 died".into() };
    let server = Server::new(move |_| Says { text: "", ending: Ending::Failed(gone()), logprob: 0.0 });
    for (path, body) in [(RESPONSES, r#""input":"Hi""#), (MESSAGES, HI), ("/v1/chat/completions", HI)] {
        let answer = server.post(path, &format!(r#"{{{body},"stream":true}}"#)).await;
        assert_eq!((answer.status, answer.headers["retry-after"].to_str().unwrap()), (503, "2"), "{path}");
        assert_eq!(answer.json()["error"]["code"], "group_failed", "{path}");
    }
}

#[tokio::test]
async fn a_message_is_whole_or_in_events() {
    let server = Server::new(|_| Says::stop("Hello there"));
    let whole = server.post(MESSAGES, &format!("{{{HI}}}")).await;
    assert_eq!(whole.status, 200);
    insta::assert_snapshot!("whole_message", whole.body);
    let stream = server.post(MESSAGES, &format!(r#"{{{HI},"stream":true}}"#)).await;
    let events = events(&stream);
    let mut names: Vec<&str> = events.iter().map(|(name, _)| name.as_str()).collect();
    names.dedup();
    let expected = [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ];
    assert_eq!(names, expected);
    let text: String = events.iter().filter_map(|(_, data)| data["delta"]["text"].as_str()).collect();
    assert_eq!(text, "Hello there");
    let told = server.post(MESSAGES, &format!(r#"{{{HI},"stop_sequences":["lo"]}}"#)).await.json();
    assert_eq!((&told["stop_reason"], &told["stop_sequence"]), (&"stop_sequence".into(), &"lo".into()));
    let counted = server.post("/v1/messages/count_tokens", r#"{"messages":[{"role":"user","content":"Hi"}]}"#).await;
    assert_eq!(counted.json()["input_tokens"], whole.json()["usage"]["input_tokens"]);
}

const THINKER: &str = "{% for m in messages %}{{ m.content }}{% endfor %}<think>\n";
const SAID: &str = "hm</think>I look.\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Ulm\"}}\n\
                    </tool_call>\n<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>";

fn thinking_caller() -> Server {
    let limits = EngineLimits { num_blocks: 256, max_model_len: 2048, max_queue: 100, ..limits() };
    Server::with(Setup { template: Some(THINKER), limits, ..Setup::default() }, |_| Says::stop(SAID))
}

#[tokio::test]
async fn thoughts_text_and_calls_are_items_of_a_response() {
    let server = thinking_caller();
    let tools = r#"[{"type":"function","name":"weather","parameters":{}},{"type":"function","name":"now"}]"#;
    let body = format!(r#""input":"Hi","tools":{tools},"include":["message.output_text.logprobs"]"#);
    let whole = server.post(RESPONSES, &format!("{{{body}}}")).await.json();
    let output = whole["output"].as_array().unwrap();
    let kinds: Vec<&str> = output.iter().map(|item| item["type"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["reasoning", "message", "function_call", "function_call"], "{whole}");
    assert_eq!(output[0]["content"][0]["text"], "hm");
    assert_eq!(output[1]["content"][0]["text"], "I look.");
    assert!(!output[1]["content"][0]["logprobs"].as_array().unwrap().is_empty());
    assert_eq!((&output[2]["name"], &output[2]["arguments"]), (&"weather".into(), &r#"{"city": "Ulm"}"#.into()));
    assert_eq!((&output[3]["name"], &output[3]["arguments"]), (&"now".into(), &"{}".into()));
    assert!(output[3]["call_id"].as_str().unwrap().starts_with("call_"));
    assert!(whole["usage"]["output_tokens_details"]["reasoning_tokens"].as_u64() > Some(0));

    let stream = server.post(RESPONSES, &format!(r#"{{{body},"stream":true}}"#)).await;
    let events = events(&stream);
    let mut deltas = vec![String::new(); 4];
    let mut open = None;
    for (name, data) in &events {
        let at = data["output_index"].as_u64().map(|at| at as usize);
        match name.as_str() {
            "response.output_item.added" => assert_eq!(open.replace(at.unwrap()), None, "one item at a time"),
            "response.output_item.done" => assert_eq!(open.take(), at),
            _ if name.ends_with(".delta") => deltas[at.unwrap()] += data["delta"].as_str().unwrap(),
            _ => {}
        }
    }
    assert_eq!(deltas, ["hm", "I look.", r#"{"city": "Ulm"}"#, "{}"]);
    let mut last = events.last().unwrap().1["response"]["output"].clone();
    for at in [2, 3] {
        last[at]["call_id"] = output[at]["call_id"].clone();
    }
    assert_eq!(last, whole["output"]);
}

#[tokio::test]
async fn thoughts_text_and_calls_are_blocks_of_a_message() {
    let server = thinking_caller();
    let body = format!(r#"{HI},"tools":[{{"name":"weather","input_schema":{{}}}},{{"name":"now"}}]"#);
    let whole = server.post(MESSAGES, &format!("{{{body}}}")).await.json();
    assert_eq!(whole["stop_reason"], "tool_use");
    let mut content = whole["content"].clone();
    for at in [2, 3] {
        assert!(content[at]["id"].as_str().unwrap().starts_with("call_"));
        content[at]["id"] = "".into();
    }
    assert_eq!(
        content,
        serde_json::json!([
            {"type": "thinking", "thinking": "hm", "signature": ""},
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "", "name": "weather", "input": {"city": "Ulm"}},
            {"type": "tool_use", "id": "", "name": "now", "input": {}},
        ])
    );
    let stream = server.post(MESSAGES, &format!(r#"{{{body},"stream":true}}"#)).await;
    let mut told = vec![String::new(); 4];
    for (name, data) in events(&stream) {
        if name == "content_block_delta" {
            let delta = &data["delta"];
            let text = ["thinking", "text", "partial_json"].into_iter().find_map(|member| delta[member].as_str());
            told[data["index"].as_u64().unwrap() as usize] += text.unwrap();
        } else if name == "message_delta" {
            assert_eq!(data["delta"]["stop_reason"], "tool_use");
        }
    }
    assert_eq!(told, ["hm", "I look.", r#"{"city": "Ulm"}"#, "{}"]);
}

#[tokio::test]
async fn errors_of_messages_have_their_own_form() {
    let setup = Setup { api_keys: vec!["secret".into()], ..Setup::default() };
    let server = Server::with(setup, |_| Says::stop("x"));
    let closed = server.post(MESSAGES, "{}").await;
    assert_eq!((closed.status, &closed.json()["error"]["type"]), (401, &"authentication_error".into()));
    let request = Request::post(MESSAGES).header("x-api-key", "secret").body(Body::from("{}")).unwrap();
    let bad = Answer::read(server.send(request).await).await;
    assert_eq!((bad.status, &bad.json()["type"]), (400, &"error".into()));
    assert_eq!(bad.json()["error"]["message"], "max_tokens is required");
}

#[tokio::test]
async fn what_only_choices_can_tell_is_refused_by_name() {
    let server = Server::new(|_| Says::stop("x"));
    for (path, body) in [
        ("/v1/responses", r#""input":"x""#),
        ("/v1/messages", r#""max_tokens":4,"messages":[{"role":"user","content":"x"}]"#),
    ] {
        for (field, value) in
            [("detokenize", "false"), ("logprob_token_ids", "[1]"), ("prompt_logprob_token_ids", "[1]")]
        {
            let answer = server.post(path, &format!(r#"{{{body},"{field}":{value}}}"#)).await;
            assert!(answer.status == 400 && answer.body.contains(field), "{path} {field}: {}", answer.body);
        }
        assert_eq!(server.post(path, &format!(r#"{{{body},"detokenize":true}}"#)).await.status, 200);
    }
}
