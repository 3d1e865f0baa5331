//! The page on the dashboard port: what `status` prints, refreshed each second.
//!
//! Reads the status board and nothing else. One embedded page, no build step, no external resource.
//!
//! **Invariant:** nothing here changes the cluster.

use axum::http::header;
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Json, Router};

use crate::cluster::StatusBoard;

const PAGE: &str = include_str!("page.html");

/// The page and its data.
pub fn router(board: StatusBoard) -> Router {
    let status = move || async move { ([(header::CACHE_CONTROL, "no-store")], Json(board.snapshot())) };
    Router::new().route("/", get(page)).route("/status.json", get(status))
}

async fn page() -> impl IntoResponse {
    const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'";
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_FRAME_OPTIONS, "DENY"),
    ];
    (headers, PAGE)
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use axum::http::{Request, StatusCode};
    use http_body_util::BodyExt;
    use tower::ServiceExt;

    use super::*;

    async fn fetch(path: &str) -> (StatusCode, String) {
        let board = StatusBoard::new(std::time::Instant::now());
        let request = Request::get(path).body(Body::empty()).expect("a request");
        let answer = router(board).oneshot(request).await.expect("answers");
        let status = answer.status();
        let body = answer.into_body().collect().await.expect("a body").to_bytes();
        (status, String::from_utf8(body.to_vec()).expect("text"))
    }

    #[tokio::test]
    async fn the_page_needs_nothing_from_elsewhere() {
        let (status, page) = fetch("/").await;
        assert_eq!(status, StatusCode::OK);
        assert!(page.contains("status.json") && !page.contains("http://") && !page.contains("https://"));
    }

    #[tokio::test]
    async fn the_data_is_the_status_snapshot() {
        let (status, json) = fetch("/status.json").await;
        assert_eq!(status, StatusCode::OK);
        serde_json::from_str::<phalanx_proto::StatusSnapshot>(&json).expect("a snapshot");
    }
}
