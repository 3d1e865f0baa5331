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
async fn bodies_may_begin_with_a_mark_and_are_not_compressed() {
    let server = Server::new(|_| Says::stop("x"));
    assert_eq!(server.post("/v1/completions", "\u{feff}{\"prompt\":\"x\"}").await.status, 200);
    let send = async |encoding: &str| {
        let request = Request::post("/v1/completions").header("content-encoding", encoding);
        Answer::read(server.send(request.body(Body::from(r#"{"prompt":"x"}"#)).unwrap()).await).await
    };
    assert_eq!(send("identity").await.status, 200);
    let refused = send("gzip").await;
    let message = refused.json()["error"]["message"].as_str().map(str::to_owned);
    let expected = "the body must not be compressed; its content encoding is \"gzip\"";
    assert_eq!((refused.status, message.as_deref()), (415, Some(expected)));
}

#[tokio::test]
async fn slashes_around_an_address_do_not_matter() {
    let setup = Setup { api_keys: vec!["secret".into()], ..Setup::default() };
    let server = Server::with(setup, |_| Says::stop("x"));
    for path in ["/v1/models/", "//v1/models", "/v1/models/tiny/", "/v1/models/?x=1"] {
        let request = Request::get(path).header("authorization", "Bearer secret").body(Body::empty()).unwrap();
        assert_eq!(server.send(request).await.status(), 200, "{path}");
        assert_eq!(server.get(path).await.status, 401, "{path}");
    }
    assert_eq!(server.get("/health/").await.status, 200);
    assert_eq!(server.get("/").await.status, 401);
}

/// What a page of `origin` is told by a server that lets `origins` in: to what it asks beforehand, and on an answer.
async fn origins(origins: &str, origin: &str) -> [(u16, Option<String>); 2] {
    let setup = Setup { api_keys: vec!["secret".into()], origins: origins.parse().unwrap(), ..Setup::default() };
    let server = Server::with(setup, |_| Says::stop("x"));
    let ask = async |request: axum::http::request::Builder| {
        let request = request.uri("/v1/models").header("origin", origin).body(Body::empty()).unwrap();
        let answer = Answer::read(server.send(request).await).await;
        let allowed = answer.headers.get("access-control-allow-origin");
        (answer.status, allowed.map(|origin| origin.to_str().unwrap().to_owned()))
    };
    let asked = ask(Request::options("/").header("access-control-request-method", "POST")).await;
    [asked, ask(Request::get("/").header("authorization", "Bearer secret")).await]
}

#[tokio::test]
async fn pages_read_answers_where_their_origin_is_let_in() {
    let page = "http://localhost:3000";
    // Without a key: browsers send none with what they ask beforehand.
    assert_eq!(origins("", page).await, [(401, None), (200, None)]);
    assert_eq!(origins("https://other.example", page).await, [(401, None), (200, None)]);
    assert_eq!(origins("*", page).await, [(204, Some("*".into())), (200, Some("*".into()))]);
    assert_eq!(origins(page, page).await, [(204, Some(page.into())), (200, Some(page.into()))]);
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
