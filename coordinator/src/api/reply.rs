//! What every answer carries, whatever its body.

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::response::Response;

/// Names the fields of a request that nobody looked at.
pub const IGNORED: HeaderName = HeaderName::from_static("x-phalanx-ignored");
/// The client's own name for a request.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Longest list of ignored fields that is told.
const IGNORED_BYTES_MAX: usize = 1024;
/// Longest name of a request that is taken over.
pub const REQUEST_ID_CHARS_MAX: usize = 128;

/// The client's own name for a request, where it is fit to be written into logs.
pub fn request_id(headers: &HeaderMap) -> Option<String> {
    let id = headers.get(REQUEST_ID)?.to_str().ok()?;
    (!id.is_empty() && id.len() <= REQUEST_ID_CHARS_MAX).then(|| id.to_owned())
}

/// A name for a request that has none.
pub fn new_id() -> String {
    uuid::Uuid::new_v4().simple().to_string()
}

/// Adds the names of ignored fields, where there are any.
pub fn with_ignored(mut response: Response, ignored: &[String]) -> Response {
    let mut list = String::new();
    for name in ignored {
        if list.len() + name.len() > IGNORED_BYTES_MAX {
            list.push_str(if list.is_empty() { "..." } else { ", ..." });
            break;
        }
        if !list.is_empty() {
            list.push_str(", ");
        }
        list.extend(name.chars().map(|c| if c.is_ascii_graphic() { c } else { '?' }));
    }
    if let (false, Ok(value)) = (list.is_empty(), HeaderValue::from_str(&list)) {
        response.headers_mut().insert(IGNORED, value);
    }
    response
}
