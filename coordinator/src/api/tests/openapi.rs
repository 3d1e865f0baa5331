//! The document and what it describes are the same.

use serde_json::{Map, Value, json};

use super::*;

fn schema_of<'a>(document: &'a Value, path: &str) -> &'a Value {
    let content = &document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"];
    let name = content["$ref"].as_str().expect("a reference").rsplit('/').next().unwrap();
    &document["components"]["schemas"][name]
}

/// A value that a field of this schema cannot have.
fn wrong_for(schema: &Value) -> Value {
    let kinds = schema["type"].as_array().cloned().unwrap_or_else(|| vec![schema["type"].clone()]);
    if kinds.contains(&json!("object")) || schema.get("anyOf").is_some() { json!(7) } else { json!({"x": 1}) }
}

#[tokio::test]
async fn every_documented_field_is_read() {
    let server = Server::new(|_| Says::stop("x"));
    let document = super::super::openapi::document_for_tests();
    assert_eq!(server.get("/openapi.json").await.status, 200);
    let messages = json!([{"role": "user", "content": "Hi"}]);
    for (path, body) in [
        ("/v1/chat/completions", json!({"messages": messages})),
        ("/v1/completions", json!({"prompt": "x"})),
        ("/v1/responses", json!({"input": "x"})),
        ("/v1/embeddings", json!({"input": "x"})),
        ("/v1/messages", json!({"messages": messages, "max_tokens": 4})),
        ("/v1/messages/count_tokens", json!({"messages": messages})),
        ("/detokenize", json!({"tokens": [40]})),
    ] {
        let properties = schema_of(&document, path)["properties"].as_object().expect("fields");
        assert!(properties.len() > 1, "{path}");
        for (name, schema) in properties {
            let mut bad: Map<String, Value> = body.as_object().unwrap().clone();
            bad.insert(name.clone(), wrong_for(schema));
            let answer = server.post(path, &Value::from(bad).to_string()).await;
            assert_eq!(answer.status, 400, "{path} does not read {name}: {}", answer.body);
        }
    }
}

#[tokio::test]
async fn every_documented_route_exists_and_refers_to_what_is_there() {
    let server = Server::new(|_| Says::stop("x"));
    let document = super::super::openapi::document_for_tests();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for method in methods.as_object().unwrap().keys() {
            let path = path.replace("{id}", "tiny");
            let request = Request::builder().method(method.to_uppercase().as_str()).uri(&path);
            let answer = server.send(request.body(Body::from("{}")).unwrap()).await;
            assert!(![404, 405].contains(&answer.status().as_u16()), "{method} {path}");
        }
    }
    let text = document.to_string();
    for reference in text.split("\"$ref\":\"#/components/schemas/").skip(1) {
        let name = reference.split('"').next().unwrap();
        assert!(document["components"]["schemas"].get(name).is_some(), "{name}");
    }
    let page = server.get("/docs").await;
    assert!(page.status == 200 && page.body.contains("openapi.json"));
}
