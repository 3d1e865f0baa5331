//! Which web pages may read answers (CORS).
//!
//! Browsers let a page of another origin read an answer only where the server says so. Nothing is said unless an operator names
//! origins: a page that somebody happens to visit must not talk to a server on loopback.
//!
//! **Invariant:** what a page asks beforehand (`OPTIONS`) is answered here, before keys are looked at: browsers send none with it.

use std::fmt;
use std::str::FromStr;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::reply;

/// How long a browser may keep an answer to what it asks beforehand, seconds.
const MAX_AGE: HeaderValue = HeaderValue::from_static("600");
const METHODS: HeaderValue = HeaderValue::from_static("GET, POST, OPTIONS");
/// Headers of answers that pages may read, beside those that they always may.
const EXPOSED: [HeaderName; 3] = [reply::REQUEST_ID, reply::IGNORED, header::RETRY_AFTER];

/// The origins of pages that may read answers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum AllowedOrigins {
    /// None beside the server's own.
    #[default]
    Own,
    /// All.
    Any,
    /// These, as browsers write them.
    These(Vec<String>),
}

impl FromStr for AllowedOrigins {
    type Err = String;

    /// Reads `*`, origins with commas between them, or a JSON list of either.
    fn from_str(text: &str) -> Result<Self, String> {
        let origins: Vec<String> = if text.trim_start().starts_with('[') {
            serde_json::from_str(text).map_err(|error| format!("not a JSON list of origins: {error}"))?
        } else {
            text.split(',').map(|origin| origin.trim().to_owned()).filter(|origin| !origin.is_empty()).collect()
        };
        if origins.iter().any(|origin| origin == "*") {
            return Ok(Self::Any);
        }
        match origins.iter().find(|origin| !is_origin(origin)) {
            Some(wrong) => {
                Err(format!("{wrong:?} is not an origin; write * or, for example, https://chat.example.com:3000"))
            }
            None if origins.is_empty() => Ok(Self::Own),
            None => Ok(Self::These(origins.into_iter().map(|origin| origin.to_ascii_lowercase()).collect())),
        }
    }
}

impl fmt::Display for AllowedOrigins {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Own => Ok(()),
            Self::Any => f.write_str("*"),
            Self::These(origins) => f.write_str(&origins.join(",")),
        }
    }
}

/// Scheme, host and perhaps a port; no path, not even a slash.
fn is_origin(text: &str) -> bool {
    let Ok(uri) = text.parse::<Uri>() else { return false };
    uri.scheme().is_some()
        && uri.authority().is_some()
        && !text.ends_with('/')
        && uri.path() == "/"
        && uri.query().is_none()
}

impl AllowedOrigins {
    /// What to tell a page of this origin; nothing where it may not read.
    fn allow(&self, origin: &HeaderValue) -> Option<HeaderValue> {
        match self {
            Self::Own => None,
            Self::Any => Some(HeaderValue::from_static("*")),
            Self::These(origins) => {
                let given = origin.to_str().ok()?;
                origins.iter().any(|known| known.eq_ignore_ascii_case(given)).then(|| origin.clone())
            }
        }
    }
}

/// Answers what a browser asks beforehand, and says on all other answers who may read them.
pub async fn pass(State(origins): State<AllowedOrigins>, request: Request, next: Next) -> Response {
    let allowed = request.headers().get(header::ORIGIN).and_then(|origin| origins.allow(origin));
    let asks_beforehand =
        request.method() == Method::OPTIONS && request.headers().contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    let mut response = match (&allowed, asks_beforehand) {
        (Some(_), true) => {
            let wanted = request.headers().get(header::ACCESS_CONTROL_REQUEST_HEADERS).cloned();
            let mut response = StatusCode::NO_CONTENT.into_response();
            let headers = response.headers_mut();
            headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, METHODS);
            headers.insert(header::ACCESS_CONTROL_MAX_AGE, MAX_AGE);
            headers.extend(wanted.map(|wanted| (header::ACCESS_CONTROL_ALLOW_HEADERS, wanted)));
            response
        }
        _ => next.run(request).await,
    };
    say(&origins, allowed, response.headers_mut());
    response
}

fn say(origins: &AllowedOrigins, allowed: Option<HeaderValue>, headers: &mut HeaderMap) {
    if matches!(origins, AllowedOrigins::These(_)) {
        headers.append(header::VARY, HeaderValue::from(header::ORIGIN));
    }
    let Some(allowed) = allowed else { return };
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, allowed);
    for name in EXPOSED {
        headers.append(header::ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from(name));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: Option<&str>) {
        let read = text.parse::<AllowedOrigins>().ok().map(|origins| origins.to_string());
        assert_eq!(read.as_deref(), expected, "{text}");
    }

    #[test]
    fn origins_are_read_as_people_write_them() {
        check("", Some(""));
        check("*", Some("*"));
        check(r#"["*"]"#, Some("*"));
        check("http://localhost:3000", Some("http://localhost:3000"));
        check("https://A.example, http://b:1", Some("https://a.example,http://b:1"));
        check(r#"["https://a.example"]"#, Some("https://a.example"));
        check("https://a.example/", None);
        check("https://a.example/path", None);
        check("a.example", None);
        check("[1]", None);
    }
}
