//! What is refused, and how it is told.

use phalanx_proto::SamplerFeatures;

use super::*;

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

/// Posts a body; the error must have this status, `param`, `code` and message.
async fn check(server: &Server, path: &str, body: &str, status: u16, param: &str, code: &str, message: &str) {
    let answer = server.post(path, body).await;
    let error = &answer.json()["error"];
    let told = |key: &str| error[key].as_str().unwrap_or("null").to_owned();
    assert_eq!((answer.status, told("param"), told("code")), (status, param.into(), code.into()), "{body}: {error}");
    assert_eq!(told("message"), message, "{body}");
}

#[tokio::test]
async fn bad_bodies_are_refused() {
    let server = Server::new(|_| Says::stop("x"));
    let null = "null";
    check(
        &server,
        CHAT,
        "{",
        400,
        null,
        null,
        "the body is not valid JSON: EOF while parsing an object at line 1 column 1",
    )
    .await;
    check(&server, CHAT, "[]", 400, null, null, "the body must be a JSON object; it is a list").await;
    check(
        &server,
        CHAT,
        "",
        400,
        null,
        null,
        "the body is not valid JSON: EOF while parsing a value at line 1 column 0",
    )
    .await;
    check(&server, CHAT, "{}", 400, "messages", null, "messages is required").await;
    check(&server, TEXT, "{}", 400, "prompt", null, "prompt is required").await;
    check(&server, TEXT, r#"{"model":7,"prompt":"x"}"#, 400, "model", null, "model must be a string; it is a number")
        .await;
}

#[tokio::test]
async fn bad_parameters_are_named() {
    let server = Server::new(|_| Says::stop("x"));
    let check = async |field: &str, param: &str, message: &str| {
        check(&server, TEXT, &format!(r#"{{"prompt":"x",{field}}}"#), 400, param, "null", message).await;
    };
    check(r#""temperature":-1"#, "temperature", "temperature must be between 0 and 2; it is -1").await;
    check(r#""temperature":"hot""#, "temperature", "temperature must be a number; it is a string").await;
    check(r#""top_p":0"#, "top_p", "top_p must be above 0 and at most 1; it is 0").await;
    check(r#""min_p":1.5"#, "min_p", "min_p must be between 0 and 1; it is 1.5").await;
    check(r#""top_k":-2"#, "top_k", "top_k must be an integer between -1 and 2147483647; it is -2").await;
    check(r#""n":0"#, "n", "n must be an integer between 1 and 16384; it is 0").await;
    check(r#""n":2,"temperature":0"#, "n", "n and best_of must be 1 at temperature 0: all outputs would be the same")
        .await;
    check(r#""n":2,"best_of":1"#, "best_of", "best_of must be at least n").await;
    check(r#""n":20"#, "n", "n must be such that all prompts together have at most 16 outputs; it is 20").await;
    check(r#""max_tokens":0"#, "max_tokens", "max_tokens must be an integer of at least 1; it is 0").await;
    check(r#""max_tokens":1.5"#, "max_tokens", "max_tokens must be an integer; it is 1.5").await;
    check(r#""logprobs":21"#, "logprobs", "logprobs must be an integer between 0 and 20; it is 21").await;
    let whole = "logprobs must be an integer between 0 and 20, which the whole vocabulary is above; it is -1";
    check(r#""logprobs":-1"#, "logprobs", whole).await;
    check(
        r#""detokenize":false,"stop":"x""#,
        "stop",
        "stop strings are found in text: stop needs detokenize to be true",
    )
    .await;
    check(
        r#""thinking_token_budget":3"#,
        "thinking_token_budget",
        "thinking_token_budget: a budget for the thoughts of a model that marks none is not supported by this server; \
         leave the field out",
    )
    .await;
    check(
        r#""thinking_token_budget":3,"guided_choice":["a"]"#,
        "thinking_token_budget",
        "thinking_token_budget goes with a grammar in chat only",
    )
    .await;
    let room = "truncate_prompt_tokens must be at most 240, which the model's context leaves for it; it is 241";
    check(r#""truncate_prompt_tokens":241"#, "truncate_prompt_tokens", room).await;
    check(r#""logprobs":true"#, "logprobs", "logprobs must be an integer; it is a boolean").await;
    check(r#""seed":1e30"#, "seed", "seed must be an integer; it is 1e+30").await;
    check(r#""stop":["a","b","c","d","e"]"#, "stop", "stop must be at most 4 strings; it is 5").await;
    check(r#""stop":"""#, "stop", r#"stop must be without empty strings; it is """#).await;
    check(r#""stop":[1]"#, "stop[0]", "stop[0] must be a string; it is a number").await;
    check(
        r#""stop_token_ids":[515]"#,
        "stop_token_ids",
        "stop_token_ids must be within the vocabulary of 515; it is 515",
    )
    .await;
    check(r#""stop_token_ids":["x"]"#, "stop_token_ids[0]", "stop_token_ids[0] must be a token id; it is a string")
        .await;
    check(r#""presence_penalty":2.5"#, "presence_penalty", "presence_penalty must be between -2 and 2; it is 2.5")
        .await;
    check(r#""repetition_penalty":0"#, "repetition_penalty", "repetition_penalty must be above 0; it is 0").await;
    check(r#""min_tokens":9,"max_tokens":8"#, "min_tokens", "min_tokens must not be above max_tokens").await;
    check(r#""logit_bias":{"515":1}"#, "logit_bias", "logit_bias must be within the vocabulary of 515; it is 515")
        .await;
    check(r#""logit_bias":{"a":1}"#, "logit_bias.a", "logit_bias.a must be named by a token id; it is a").await;
    check(r#""logit_bias":{"1":"a"}"#, "logit_bias.1", "logit_bias.1 must be a number; it is a string").await;
    check(
        r#""allowed_token_ids":[]"#,
        "allowed_token_ids",
        "allowed_token_ids must be a list of at least one token id; it is []",
    )
    .await;
    check(r#""bad_words":["a"," "]"#, "bad_words[1]", "bad_words[1] must be a word; it is \" \"").await;
    check(r#""stream_options":{}"#, "stream_options", "stream_options needs stream to be true").await;
    check(
        r#""stream":true,"prompt_logprobs":1"#,
        "prompt_logprobs",
        "prompt_logprobs cannot be streamed; set stream to false",
    )
    .await;
    check(
        r#""stream":true,"stream_options":{"include_usage":"yes"}"#,
        "stream_options.include_usage",
        "stream_options.include_usage must be a boolean; it is a string",
    )
    .await;
}

#[tokio::test]
async fn features_that_come_later_are_refused() {
    let server = Server::new(|_| Says::stop("x"));
    let messages = r#""messages":[{"role":"user","content":"x"}]"#;
    for (path, base, field, param) in [
        (TEXT, r#""prompt":"x""#, r#""length_penalty":2"#, "length_penalty"),
        (TEXT, r#""prompt":"x""#, r#""early_stopping":true"#, "early_stopping"),
        ("/v1/responses", r#""input":"x""#, r#""use_beam_search":true"#, "use_beam_search"),
        (TEXT, r#""prompt":"x""#, r#""suffix":"y""#, "suffix"),
        (CHAT, messages, r#""tools":[{"type":"web_search"}]"#, "tools[0].type"),
        (CHAT, messages, r#""response_format":{"type":"structural_tag"}"#, "response_format.type"),
    ] {
        let answer = server.post(path, &format!("{{{base},{field}}}")).await;
        let error = &answer.json()["error"];
        assert_eq!(
            (answer.status, error["param"].as_str(), error["code"].as_str()),
            (400, Some(param), Some("unsupported_parameter")),
            "{field}"
        );
    }
}

#[tokio::test]
async fn devices_that_cannot_edit_or_mask_refuse_what_asks_for_it_and_nothing_else() {
    let limits = EngineLimits { features: SamplerFeatures::default(), ..limits() };
    let defaults = GenerationDefaults { repetition_penalty: Some(1.1), ..GenerationDefaults::default() };
    let server = Server::with(Setup { limits, defaults, ..Setup::default() }, |_| Says::stop("x"));
    for (field, param) in [
        (r#""presence_penalty":0.5"#, "presence_penalty"),
        (r#""frequency_penalty":0.5"#, "frequency_penalty"),
        (r#""repetition_penalty":1.1"#, "repetition_penalty"),
        (r#""logit_bias":{"5":1}"#, "logit_bias"),
        (r#""allowed_token_ids":[5]"#, "allowed_token_ids"),
        (r#""bad_words":["x"]"#, "bad_words"),
        (r#""min_tokens":3"#, "min_tokens"),
    ] {
        let answer = server.post(TEXT, &format!(r#"{{"prompt":"x",{field}}}"#)).await;
        let error = &answer.json()["error"];
        assert_eq!((answer.status, error["param"].as_str()), (400, Some(param)), "{field}");
        assert_eq!(error["code"], "unsupported_parameter", "{field}");
    }
    let json = r#"{"messages":[{"role":"user","content":"x"}],"response_format":{"type":"json_object"}}"#;
    let answer = server.post(CHAT, json).await;
    assert_eq!((answer.status, answer.json()["error"]["param"].as_str()), (400, Some("response_format")));
    let neutral = r#"{"prompt":"x","presence_penalty":0,"repetition_penalty":1,"logit_bias":{},"min_tokens":0}"#;
    assert_eq!(server.post(TEXT, neutral).await.status, 200);
    assert_eq!(server.sampling().edits, None, "the model's own default is no request");
}

#[tokio::test]
async fn prompts_must_fit_the_model() {
    let server = Server::new(|_| Says::stop("x"));
    let ids = vec!["1"; 256].join(",");
    check(
        &server,
        TEXT,
        &format!(r#"{{"prompt":[{ids}]}}"#),
        400,
        "prompt",
        "context_length_exceeded",
        "This model's maximum context length is 256 tokens, but the prompt has 256. Shorten the prompt.",
    )
    .await;
    check(&server, TEXT, r#"{"prompt":[515]}"#, 400, "prompt", "null", "token id 515 is outside the vocabulary of 515")
        .await;
    check(
        &server,
        TEXT,
        r#"{"prompt":[[]]}"#,
        400,
        "prompt",
        "null",
        "prompt must be at least one token long; it is empty",
    )
    .await;
}

#[tokio::test]
async fn models_answer_to_name_alias_path_and_last_part() {
    let server = Server::new(|_| Says::stop("x"));
    for name in ["tiny", "alias", "/models/tiny-llama", "/models/tiny-llama/", "tiny-llama", "tiny-llama/"] {
        let answer = server.post(TEXT, &format!(r#"{{"model":"{name}","prompt":"x"}}"#)).await;
        assert_eq!((answer.status, answer.json()["model"].as_str()), (200, Some("tiny")), "{name}");
    }
    let unknown = r#"{"model":"gpt-5","prompt":"x"}"#;
    check(&server, TEXT, unknown, 404, "model", "model_not_found", "The model `gpt-5` does not exist.").await;
    server.models.remove("tiny");
    check(&server, TEXT, r#"{"prompt":"x"}"#, 503, "null", "no_model", "no model is served").await;
}

#[tokio::test]
async fn a_full_queue_is_refused_before_work_is_spent() {
    let snapshot = EngineSnapshot { waiting: 8, ..EngineSnapshot::default() };
    let server = Server::with(Setup { snapshot, ..Setup::default() }, |_| Says::stop("x"));
    let answer = server.post(TEXT, r#"{"prompt":"x"}"#).await;
    assert_eq!((answer.status, answer.json()["error"]["code"].as_str()), (503, Some("queue_full")));
    assert_eq!(answer.headers["retry-after"], "1");
    assert!(server.submitted.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_request_that_does_not_fit_the_queue_whole_leaves_nothing_behind() {
    let server = Server::new(|_| Says::open("x"));
    let parked = {
        let router = server.router.clone();
        tokio::spawn(async move {
            let body = r#"{"prompt":"x","n":9,"stream":true}"#;
            let request = Request::post(TEXT).body(Body::from(body)).unwrap();
            router.oneshot(request).await.unwrap()
        })
    };
    let parked = parked.await.unwrap();
    let answer = server.post(TEXT, r#"{"prompt":"x","n":8}"#).await;
    assert_eq!((answer.status, answer.json()["error"]["code"].as_str()), (503, Some("queue_full")));
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(server.cancelled.count(), 7);
    drop(parked);
}
