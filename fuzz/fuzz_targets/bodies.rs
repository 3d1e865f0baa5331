//! Bodies of requests: the first byte names the endpoint, the rest is the body. Whatever comes, the answer is no 5xx.
#![no_main]

#[path = "../../coordinator/benches/front/dummy.rs"]
mod dummy;

use std::path::Path;
use std::sync::{Arc, LazyLock};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::Request;
use libfuzzer_sys::fuzz_target;
use phalanx_coordinator::api::{ApiState, ServedModels, router};
use phalanx_proto::StatusSnapshot;
use tokio::runtime::Runtime;
use tower::ServiceExt;

const ENDPOINTS: [&str; 7] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/tokenize",
    "/detokenize",
];

struct Server {
    runtime: Runtime,
    router: Router,
}

/// Grammars and masks are compiled by a library on threads that survive its panics; anything else that panics is a finding.
fn forgive_contained_panics() {
    let abort = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if !matches!(std::thread::current().name(), Some("grammar" | "masks")) {
            abort(info);
        }
    }));
}

static SERVER: LazyLock<Server> = LazyLock::new(|| {
    forgive_contained_panics();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let router = runtime.block_on(async {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/tiny-llama");
        let limits = phalanx_coordinator::engine::EngineLimits { max_model_len: 256, ..dummy::limits(16, 64) };
        let models = ServedModels::default();
        models.insert(dummy::served(&folder, limits).await.expect("the tiny model"));
        router(ApiState::new(models, Arc::new(StatusSnapshot::default)))
    });
    Server { runtime, router }
});

fuzz_target!(|data: &[u8]| {
    let Some((first, body)) = data.split_first() else { return };
    let path = ENDPOINTS[*first as usize % ENDPOINTS.len()];
    let request = Request::post(path).header("content-type", "application/json").body(Body::from(body.to_vec()));
    let request = request.expect("a request");
    let server = &*SERVER;
    server.runtime.block_on(async {
        let Ok(response) = server.router.clone().oneshot(request).await;
        let status = response.status().as_u16();
        let body = to_bytes(response.into_body(), usize::MAX).await.expect("a body");
        assert!(status < 500, "{path} answers {status}: {}", String::from_utf8_lossy(&body));
    });
});
