//! `/v1/chat/completions`.

use phalanx_proto::LogitEdits;

use super::*;

const PATH: &str = "/v1/chat/completions";
const HI: &str = r#""model":"tiny","messages":[{"role":"user","content":"Hi"}]"#;

fn body(rest: &str) -> String {
    format!("{{{HI}{rest}}}")
}

#[tokio::test]
async fn a_whole_answer_is_openais_object() {
    let server = Server::new(|_| Says::stop("Hello there"));
    let answer = server.post(PATH, &body("")).await;
    assert_eq!(answer.status, 200);
    insta::assert_snapshot!(answer.body);
}

#[tokio::test]
async fn a_stream_opens_with_the_role_and_ends_with_usage_and_done() {
    let server = Server::new(|_| Says::stop("Hello there"));
    let rest = r#","stream":true,"stream_options":{"include_usage":true}"#;
    let answer = server.post(PATH, &body(rest)).await;
    assert_eq!(answer.headers["content-type"], "text/event-stream; charset=utf-8");
    insta::assert_snapshot!(answer.body);
}

#[tokio::test]
async fn joined_deltas_are_the_whole_text() {
    const TEXT: &str = "Größe 你好 🙂 end";
    let server = Server::new(|_| Says::length(TEXT));
    let whole = server.post(PATH, &body("")).await;
    assert_eq!(whole.json()["choices"][0]["message"]["content"], TEXT);
    assert_eq!(whole.json()["choices"][0]["finish_reason"], "length");
    let stream = server.post(PATH, &body(r#","stream":true"#)).await;
    let frames = stream.frames();
    assert_eq!(frames.last(), Some(&"[DONE]"));
    let joined: String = frames[..frames.len() - 1]
        .iter()
        .map(|frame| serde_json::from_str::<serde_json::Value>(frame).unwrap())
        .filter_map(|chunk| Some(chunk["choices"][0]["delta"]["content"].as_str()?.to_owned()))
        .collect();
    assert_eq!(joined, TEXT);
}

#[tokio::test]
async fn log_probabilities_and_ids_come_with_their_tokens() {
    let server = Server::new(|_| Says::stop("Hi"));
    let rest = r#","logprobs":true,"top_logprobs":2,"return_token_ids":true"#;
    insta::assert_snapshot!("whole_with_logprobs", server.post(PATH, &body(rest)).await.body);
    let rest = format!(r#"{rest},"stream":true"#);
    insta::assert_snapshot!("stream_with_logprobs", server.post(PATH, &body(&rest)).await.body);
}

#[tokio::test]
async fn a_stop_string_across_chunks_ends_text_and_sequence() {
    let server = Server::new(|_| Says::open("one two STOP three"));
    let rest = r#","stop":["STOP","never"],"stream":true,"stream_options":{"include_usage":true}"#;
    let answer = server.post(PATH, &body(rest)).await;
    let text: String = answer
        .frames()
        .iter()
        .filter_map(|frame| serde_json::from_str::<serde_json::Value>(frame).ok())
        .filter_map(|chunk| Some(chunk["choices"][0]["delta"]["content"].as_str()?.to_owned()))
        .collect();
    assert_eq!(text, "one two ");
    assert!(answer.body.contains(r#""finish_reason":"stop","stop_reason":"STOP""#), "{}", answer.body);
    let whole = server.post(PATH, &body(r#","stop":"STOP","include_stop_str_in_output":true"#)).await;
    assert_eq!(whole.json()["choices"][0]["message"]["content"], "one two STOP");
    assert_eq!(whole.json()["choices"][0]["stop_reason"], "STOP");
    settled(|| server.cancelled.count() == 2).await;
}

#[tokio::test]
async fn several_choices_are_interleaved() {
    let server = Server::new(|number| Says::length(["ab cd ef", "xx yy zz"][number]));
    let answer = server.post(PATH, &body(r#","n":2,"stream":true,"seed":5"#)).await;
    let frames = answer.frames();
    let of = |index: usize| {
        let mark = format!(r#""index":{index},"#);
        frames.iter().copied().filter(|frame| frame.contains(&mark)).collect::<Vec<_>>()
    };
    insta::assert_snapshot!("first_choice", of(0).join("\n"));
    insta::assert_snapshot!("second_choice", of(1).join("\n"));
    assert_eq!(frames.len(), of(0).len() + of(1).len() + 1);
    let (opened, ended) =
        (frames.iter().rposition(|f| f.contains("role")), frames.iter().position(|f| f.contains("length")));
    assert!(opened < ended, "neither waits for the other");
    let seeds: Vec<u64> = server.submitted.lock().unwrap().iter().map(|sampling| sampling.seed).collect();
    assert_eq!(seeds, [5, 6]);
}

#[tokio::test]
async fn a_client_that_goes_away_aborts_the_sequence() {
    let server = Server::new(|_| Says::open("Hello"));
    let request = |rest: &str| {
        Request::post(PATH).header("content-type", "application/json").body(Body::from(body(rest))).unwrap()
    };
    let response = server.send(request(r#","stream":true"#)).await;
    settled(|| server.submitted.lock().unwrap().len() == 1).await;
    assert_eq!(server.cancelled.count(), 0);
    drop(response);
    settled(|| server.cancelled.count() == 1).await;

    let pending = tokio::time::timeout(Duration::from_millis(100), server.send(request(""))).await;
    assert!(pending.is_err(), "an open answer is not whole");
    settled(|| server.cancelled.count() == 2).await;
}

#[tokio::test]
async fn an_error_in_a_stream_is_a_frame_before_done() {
    let failed = crate::engine::EngineError::GroupFailed { reason: "rank 1 went away".into() };
    let server = Server::new(move |_| Says { text: "Hi", ending: Ending::Failed(failed.clone()), logprob: 0.0 });
    let answer = server.post(PATH, &body(r#","stream":true"#)).await;
    assert_eq!(answer.status, 200);
    let frames = answer.frames();
    assert_eq!(
        frames[frames.len() - 2..],
        [
            r#"{"error":{"message":"the tensor-parallel group failed: rank 1 went away","type":"service_unavailable_error","param":null,"code":"group_failed"}}"#,
            "[DONE]"
        ]
    );
    let answer = server.post(PATH, &body("")).await;
    assert_eq!((answer.status, answer.json()["error"]["code"].as_str()), (503, Some("group_failed")));
}

#[tokio::test]
async fn sampling_is_request_then_model_then_openai() {
    let defaults = GenerationDefaults { temperature: Some(0.6), top_p: Some(0.9), ..GenerationDefaults::default() };
    let server = Server::with(Setup { defaults, ..Setup::default() }, |_| Says::stop("x"));
    let check = async |rest: &str, temperature: f32, top_k: u32, top_p: f32, min_p: f32| {
        assert_eq!(server.post(PATH, &body(rest)).await.status, 200, "{rest}");
        let told = server.sampling();
        assert_eq!(
            (told.temperature, told.top_k, told.top_p, told.min_p),
            (temperature, top_k, top_p, min_p),
            "{rest}"
        );
    };
    check("", 0.6, 0, 0.9, 0.0).await;
    check(r#","temperature":1.5,"top_k":5,"top_p":1,"min_p":0.1"#, 1.5, 5, 1.0, 0.1).await;
    check(r#","top_k":-1"#, 0.6, 0, 0.9, 0.0).await;
    check(r#","temperature":0.001"#, 0.01, 0, 0.9, 0.0).await;
    check(r#","temperature":0,"top_k":5,"top_p":0.5,"min_p":0.5"#, 0.0, 0, 1.0, 0.0).await;
}

#[tokio::test]
async fn edits_of_logits_reach_the_engine() {
    let defaults = GenerationDefaults { repetition_penalty: Some(1.1), ..GenerationDefaults::default() };
    let server = Server::with(Setup { defaults, ..Setup::default() }, |_| Says::stop("x"));
    let edits = async |rest: &str| {
        let answer = server.post(PATH, &body(rest)).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        server.sampling().edits.map(|edits| LogitEdits::clone(&edits))
    };
    let neutral = LogitEdits::default();
    assert_eq!(edits("").await, Some(LogitEdits { repetition_penalty: 1.1, ..neutral.clone() }));
    assert_eq!(edits(r#","repetition_penalty":1"#).await, None, "the request goes before the model's default");
    let rest = r#","repetition_penalty":1,"presence_penalty":0.5,"frequency_penalty":-0.25,"logit_bias":{"7":-500,"9":1.5},
        "allowed_token_ids":[9,7,9],"min_tokens":3,"stop_token_ids":[40]"#;
    let expected = LogitEdits {
        presence_penalty: 0.5,
        frequency_penalty: -0.25,
        bias: vec![(TokenId(7), -100.0), (TokenId(9), 1.5)],
        allowed: vec![TokenId(7), TokenId(9)],
        min_tokens: 3,
        end_tokens: vec![END, TokenId(40)],
        ..neutral
    };
    assert_eq!(edits(rest).await, Some(expected));
    let words = edits(r#","bad_words":["a"]"#).await.unwrap().bad_words;
    let text = tiny_text(None);
    let forms: Vec<String> = words.iter().map(|word| text.decode(word, false)).collect();
    assert_eq!(forms, ["a", " a"]);
}

#[tokio::test]
async fn no_string_ends_an_output_before_its_least_length() {
    let server = Server::new(|_| Says::stop("aaaa bbb aaaa"));
    let whole = async |rest: &str| {
        let answer = server.post(PATH, &body(rest)).await.json();
        answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
    };
    assert_eq!(whole(r#","stop":"a""#).await, "");
    let later = whole(r#","stop":"a","min_tokens":5"#).await;
    assert!(later.starts_with("aaaa"), "{later}");
    assert_ne!(later, "aaaa bbb aaaa");
}

#[tokio::test]
async fn fields_that_change_nothing_are_accepted_and_unknown_ones_named() {
    let server = Server::new(|_| Says::stop("x"));
    let rest = r#","best_of":1,"use_beam_search":false,"length_penalty":1.0,"early_stopping":false,"presence_penalty":0,
        "frequency_penalty":0.0,"repetition_penalty":1,"logit_bias":{},"tools":[],"tool_choice":"auto","min_tokens":0,
        "response_format":{"type":"text"},"spaces_between_special_tokens":false,"user":"me","strange":{"x":1},"gone":null"#;
    let answer = server.post(PATH, &body(rest)).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert_eq!(answer.headers["x-phalanx-ignored"], "user, strange");
}
