//! `/v1/completions`.

use super::*;

const PATH: &str = "/v1/completions";

#[tokio::test]
async fn a_whole_answer_is_openais_object() {
    let server = Server::new(|_| Says::length("Hello there"));
    let answer = server.post(PATH, r#"{"model":"tiny","prompt":"Hi","max_tokens":3}"#).await;
    assert_eq!(answer.status, 200);
    insta::assert_snapshot!(answer.body);
}

#[tokio::test]
async fn a_stream_has_text_then_finish_then_usage() {
    let server = Server::new(|_| Says::stop("Hi"));
    let body = r#"{"prompt":[1,2],"stream":true,"stream_options":{"include_usage":true,"continuous_usage_stats":true},"return_token_ids":true}"#;
    insta::assert_snapshot!(server.post(PATH, body).await.body);
}

#[tokio::test]
async fn prompts_come_back_with_echo_and_log_probabilities() {
    let server = Server::new(|_| Says::length("x"));
    let body = r#"{"prompt":"Hi","echo":true,"logprobs":1,"max_tokens":1}"#;
    insta::assert_snapshot!("echo", server.post(PATH, body).await.body);
    let body = r#"{"prompt":"Hi","echo":true,"logprobs":1,"max_tokens":1,"stream":true}"#;
    insta::assert_snapshot!("echo_stream", server.post(PATH, body).await.body);
    let body = r#"{"prompt":"Hi","echo":true,"logprobs":1,"max_tokens":0,"return_token_ids":true}"#;
    insta::assert_snapshot!("echo_only", server.post(PATH, body).await.body);
}

#[tokio::test]
async fn prompt_log_probabilities_are_named_by_token_id() {
    let server = Server::new(|_| Says::length("x"));
    let body = r#"{"prompt":[50,51,52],"prompt_logprobs":2,"max_tokens":1,"return_token_ids":true}"#;
    insta::assert_snapshot!(server.post(PATH, body).await.body);
}

#[tokio::test]
async fn many_prompts_give_their_choices_in_order() {
    let server = Server::new(|number| Says::length(["a", "b", "c", "d"][number]));
    let answer =
        server.post(PATH, r#"{"prompt":["x","yz"],"n":2,"temperature":1,"return_token_ids":true}"#).await.json();
    let choices = answer["choices"].as_array().unwrap();
    let told: Vec<_> = choices.iter().map(|choice| (choice["index"].as_u64(), choice["text"].as_str())).collect();
    assert_eq!(told, [(Some(0), Some("a")), (Some(1), Some("b")), (Some(2), Some("c")), (Some(3), Some("d"))]);
    let text = tiny_text(None);
    let own = serde_json::to_value(text.encode("yz", true).unwrap()).unwrap();
    assert_eq!(choices[3]["prompt_token_ids"], own);
    let prompt_tokens = text.encode("x", true).unwrap().len() + text.encode("yz", true).unwrap().len();
    assert_eq!(answer["usage"]["prompt_tokens"], prompt_tokens);
}

#[tokio::test]
async fn the_best_of_several_is_kept() {
    let server = Server::new(|number| Says::length(["a", "b", "c"][number]));
    let answer = server.post(PATH, r#"{"prompt":"x","n":1,"best_of":3}"#).await.json();
    assert_eq!(answer["choices"].as_array().unwrap().len(), 1);
    assert_eq!(answer["usage"]["completion_tokens"], 3);
    assert_eq!(server.sampling().logprobs, Some(0));
}

/// The sum counts, not the mean: a short output with unlikely tokens may be likelier than a long one with likely ones.
#[tokio::test]
async fn the_best_is_the_likeliest_as_a_whole() {
    let server = Server::new(|number| {
        let (text, logprob) = [("a", -1.0), ("abababababababab cd cd", -0.25), ("b", -2.0)][number];
        Says { logprob, ..Says::length(text) }
    });
    let answer = server.post(PATH, r#"{"prompt":"x","n":2,"best_of":3}"#).await.json();
    let texts: Vec<_> = answer["choices"].as_array().unwrap().iter().map(|choice| choice["text"].clone()).collect();
    assert_eq!(texts, ["a", "b"]);
}

#[tokio::test]
async fn a_model_without_a_tokenizer_takes_ids() {
    let server = Server::with(Setup { has_text: false, ..Setup::default() }, |_| Says::stop("Hi"));
    let answer = server.post(PATH, r#"{"prompt":[1,2],"return_token_ids":true,"logprobs":1}"#).await;
    insta::assert_snapshot!(answer.body);
    for (path, body, param) in [
        (PATH, r#"{"prompt":"Hi"}"#, "prompt"),
        (PATH, r#"{"prompt":[1],"stop":"x"}"#, "stop"),
        ("/v1/chat/completions", r#"{"messages":[{"role":"user","content":"Hi"}]}"#, "messages"),
        ("/tokenize", r#"{"prompt":"Hi"}"#, "prompt"),
    ] {
        let answer = server.post(path, body).await;
        assert_eq!((answer.status, answer.json()["error"]["param"].as_str()), (400, Some(param)), "{body}");
    }
}

#[tokio::test]
async fn end_tokens_are_silent_unless_they_are_wanted() {
    let server = Server::new(|_| Says::stop("Hi"));
    let check = async |rest: &str, text: &str, stop_reason: serde_json::Value| {
        let choice = server.post(PATH, &format!(r#"{{"prompt":"x"{rest}}}"#)).await.json()["choices"][0].clone();
        assert_eq!((choice["text"].as_str(), &choice["stop_reason"]), (Some(text), &stop_reason), "{rest}");
    };
    check("", "Hi", serde_json::Value::Null).await;
    check(r#","stop_token_ids":[511]"#, "Hi", 511.into()).await;
    check(r#","include_stop_str_in_output":true"#, "Hi", serde_json::Value::Null).await;
    check(r#","include_stop_str_in_output":true,"skip_special_tokens":false"#, "Hi<|im_end|>", serde_json::Value::Null)
        .await;
}

#[tokio::test]
async fn long_prompts_are_tokenized_elsewhere() {
    let server = Server::new(|_| Says::stop("Hi"));
    let prompt = "many words ".repeat(2000);
    let answer = server.post(PATH, &format!(r#"{{"prompt":"{prompt}"}}"#)).await;
    assert_eq!(answer.status, 400);
    assert_eq!(answer.json()["error"]["code"], "context_length_exceeded");
}
