//! Everything around generation: models, health, metrics, keys, tokens, unknown routes.

use super::*;

#[tokio::test]
async fn models_are_listed_under_each_name() {
    let server = Server::new(|_| Says::stop("x"));
    insta::assert_snapshot!("models", server.get("/v1/models").await.body);
    let one = server.get("/v1/models/tiny").await;
    assert_eq!((one.status, one.json()["id"].as_str()), (200, Some("tiny")));
    for path in ["/v1/models//models/tiny-llama/", "/v1/models/models/tiny-llama"] {
        assert_eq!(server.get(path).await.json()["id"], "tiny", "{path}");
    }
    let none = server.get("/v1/models/other").await;
    assert_eq!((none.status, none.json()["error"]["code"].as_str()), (404, Some("model_not_found")));
}

#[tokio::test]
async fn routes_and_methods_that_do_not_exist_are_error_objects() {
    let server = Server::new(|_| Says::stop("x"));
    let none = server.get("/v2/nothing").await;
    assert_eq!((none.status, none.json()["error"]["message"].as_str()), (404, Some("there is no /v2/nothing here")));
    let wrong = server.get("/v1/completions").await;
    let message = wrong.json()["error"]["message"].as_str().map(str::to_owned);
    assert_eq!((wrong.status, message.as_deref()), (405, Some("GET is not allowed on /v1/completions")));
}

#[tokio::test]
async fn bodies_have_a_type_and_a_size() {
    let server = Server::new(|_| Says::stop("x"));
    let send = async |content_type: &str, body: Body| {
        let request = Request::post("/v1/completions").header("content-type", content_type).body(body).unwrap();
        Answer::read(server.send(request).await).await
    };
    let ok = r#"{"prompt":"x"}"#;
    assert_eq!(send("application/json; charset=utf-8", Body::from(ok)).await.status, 200);
    assert_eq!(send("text/plain", Body::from(ok)).await.status, 415);
    let large = send("application/json", Body::from(vec![b' '; (32 << 20) + 1])).await;
    assert_eq!((large.status, large.json()["error"]["type"].as_str()), (413, Some("invalid_request_error")));
}

#[tokio::test]
async fn health_follows_the_models() {
    let server = Server::new(|_| Says::stop("x"));
    assert_eq!(server.get("/health").await.status, 200);
    assert_eq!(server.get("/health/live").await.status, 200);
    assert_eq!(server.get("/version").await.json()["version"], phalanx_proto::VERSION);
    server.models.remove("tiny");
    let ill = server.get("/health").await;
    let message = ill.json()["error"]["message"].as_str().map(str::to_owned);
    assert_eq!((ill.status, message.as_deref()), (503, Some("not healthy: no model is served")));
    assert_eq!(server.get("/health/live").await.status, 200);
}

#[tokio::test]
async fn keys_guard_everything_but_health() {
    let setup = Setup { api_keys: vec!["secret".into(), "other".into()], ..Setup::default() };
    let server = Server::with(setup, |_| Says::stop("x"));
    let get = async |path: &str, key: Option<&str>| {
        let mut request = Request::get(path);
        if let Some(key) = key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        Answer::read(server.send(request.body(Body::empty()).unwrap()).await).await
    };
    assert_eq!(get("/v1/models", None).await.status, 401);
    let wrong = get("/v1/models", Some("secreT")).await;
    assert_eq!((wrong.status, wrong.json()["error"]["code"].as_str()), (401, Some("invalid_api_key")));
    assert_eq!(get("/v1/models", Some("secret")).await.status, 200);
    assert_eq!(get("/metrics", None).await.status, 401);
    assert_eq!(get("/health", None).await.status, 200);
}

#[tokio::test]
async fn metrics_count_requests_and_show_blocks() {
    let server = Server::new(|_| Says::stop("Hello there"));
    server.post("/v1/completions", r#"{"prompt":"x"}"#).await;
    let text = server.get("/metrics").await.body;
    for line in [
        r#"phalanx_kv_blocks{model_name="tiny"} 64"#,
        r#"phalanx_kv_blocks_free{model_name="tiny"} 48"#,
        r#"phalanx_requests_running{model_name="tiny"} 2"#,
        r#"vllm:num_requests_running{model_name="tiny"} 2"#,
        r#"vllm:kv_cache_usage_perc{model_name="tiny"} 0.25"#,
        "# TYPE phalanx_time_to_first_token_seconds histogram",
        r#"phalanx_http_requests_total{endpoint="/v1/completions",status="200"}"#,
        r#"phalanx_inter_token_latency_seconds_bucket{model_name="tiny",le="0.00025"}"#,
        r#"phalanx_requests_finished_total{model_name="tiny",finished_reason="stop"}"#,
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
}

#[tokio::test]
async fn text_and_tokens_go_both_ways() {
    let server = Server::new(|_| Says::stop("x"));
    let tokens = server.post("/tokenize", r#"{"prompt":"Hello there","return_token_strs":true}"#).await.json();
    assert_eq!(tokens["count"], tokens["tokens"].as_array().unwrap().len());
    assert_eq!(tokens["max_model_len"], 256);
    let body = serde_json::json!({"tokens": tokens["tokens"]}).to_string();
    assert_eq!(server.post("/detokenize", &body).await.json()["prompt"], "Hello there");
    let refused = server.post("/detokenize", r#"{"tokens":[515]}"#).await.json();
    assert_eq!(refused["error"]["message"], "token id 515 is outside the vocabulary of 515");
    let chat = server.post("/tokenize", r#"{"messages":[{"role":"user","content":"Hi"}]}"#).await.json();
    assert!(chat["count"].as_u64() > Some(5));
}

#[tokio::test]
async fn requests_keep_the_name_that_the_client_gave() {
    let server = Server::new(|_| Says::stop("x"));
    let answer = server.post("/v1/completions", r#"{"prompt":"x"}"#).await;
    assert_eq!(answer.headers["x-request-id"], "t");
    assert_eq!(answer.json()["id"], "cmpl-t");
    assert!(!server.get("/health").await.headers["x-request-id"].is_empty());
}
