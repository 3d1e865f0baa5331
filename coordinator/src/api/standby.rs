//! What the HTTP port of a head answers that stands by: that it lives, and who leads.
//!
//! **Invariant:** no request is taken: whoever sent it may send it again, here or to the head that leads.

use std::sync::Arc;

use axum::Router;
use axum::http::{HeaderName, HeaderValue, Uri};
use axum::response::Response;

use super::error::ApiError;
use super::{health, refused};

/// Names the head that leads, by its HTTP address.
const LEADER: HeaderName = HeaderName::from_static("x-phalanx-leader");

/// The routes; `leader` gives the HTTP address of the head that leads, where one does.
pub fn router(leader: Arc<dyn Fn() -> Option<String> + Send + Sync>) -> Router {
    let refuse = move |uri: Uri| {
        let leader = leader();
        async move { standing_by(&uri, leader) }
    };
    Router::new().merge(health::routes_of_any_head()).fallback(refuse)
}

fn standing_by(uri: &Uri, leader: Option<String>) -> Response {
    let header = leader.as_deref().and_then(|leader| HeaderValue::from_str(leader).ok());
    let mut response = refused(uri, ApiError::Standby { leader });
    if let Some(header) = header {
        response.headers_mut().insert(LEADER, header);
    }
    response
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use axum::http::Request;
    use http_body_util::BodyExt;
    use tower::ServiceExt;

    use super::*;

    async fn check(path: &str, leader: Option<&str>, status: u16, words: &str) {
        let leader = leader.map(str::to_owned);
        let router = router(Arc::new(move || leader.clone()));
        let answer = router.oneshot(Request::get(path).body(Body::empty()).expect("a request")).await.expect("answers");
        assert_eq!(answer.status().as_u16(), status);
        assert_eq!(answer.headers().contains_key("retry-after"), status == 503);
        let body = answer.into_body().collect().await.expect("a body").to_bytes();
        assert!(String::from_utf8_lossy(&body).contains(words), "{body:?}");
    }

    #[tokio::test]
    async fn a_head_that_stands_by_says_who_leads() {
        check("/v1/chat/completions", Some("http://b:8000"), 503, "http://b:8000 leads").await;
        check("/health", None, 503, "\"standby\"").await;
        check("/v1/messages", None, 503, "overloaded_error").await;
        check("/health/live", None, 200, "ok").await;
    }
}
