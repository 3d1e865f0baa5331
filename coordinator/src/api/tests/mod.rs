//! The routes against an engine whose answers are written beforehand.

mod admission;
mod beam;
mod chat;
mod completions;
mod embeddings;
mod errors;
mod openapi;
mod responses;
mod structured;
mod surroundings;
mod tools;
mod traces;

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{HeaderMap, Request, Response};
use phalanx_formats::{EmbeddingSettings, GenerationDefaults, ModelFiles};
use phalanx_proto::{SamplingParams, StatusSnapshot, TokenId, TokenLogprobs};
use tower::ServiceExt;

use super::{Admission, AllowedOrigins, ApiState, ServedModel, ServedModels, router};
use crate::constraint::GrammarCompiler;
use crate::engine::scripted::{self, Cancelled, Submitted};
use crate::engine::{EngineError, EngineLimits, EngineSnapshot, FinishReason, TokenEvent, Usage};
use crate::security::keys::KeyRing;
use crate::text::TextModel;

/// The end token of the tiny tokenizer.
const END: TokenId = TokenId(511);

fn tiny_text(template: Option<&str>) -> Arc<TextModel> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/tiny-llama");
    let files = ModelFiles::open(&folder).expect("the tiny model is part of the repository");
    let mut text = TextModel::load(&files).unwrap();
    if let Some(template) = template {
        text.set_chat_template(template.to_owned()).unwrap();
    }
    Arc::new(text)
}

fn limits() -> EngineLimits {
    EngineLimits::for_tests()
}

/// How an answer ends.
enum Ending {
    Finished(FinishReason),
    Failed(crate::engine::EngineError),
    /// It never does.
    Open,
}

/// The events of one output that says `text`.
struct Says {
    text: &'static str,
    ending: Ending,
    /// The log-probability of each of its tokens.
    logprob: f32,
}

impl Says {
    fn stop(text: &'static str) -> Self {
        Self { text, ending: Ending::Finished(FinishReason::Stop(END)), logprob: -0.5 }
    }

    fn length(text: &'static str) -> Self {
        Self { text, ending: Ending::Finished(FinishReason::Length), logprob: -0.5 }
    }

    fn open(text: &'static str) -> Self {
        Self { text, ending: Ending::Open, logprob: -0.5 }
    }

    async fn send(self, text: Arc<TextModel>, to: Submitted) {
        let mut tokens = text.encode(self.text, false).unwrap();
        if let Ending::Finished(FinishReason::Stop(token)) = self.ending {
            tokens.push(token);
        }
        let described = |token: TokenId, count: u32| {
            let logprob = self.logprob;
            let others = [(token, logprob), (TokenId(40), -1.25), (TokenId(41), -2.5)];
            TokenLogprobs { token, logprob, rank: 1, top: others[..count.min(3) as usize].to_vec() }
        };
        if let Some(count) = to.sampling.prompt_logprobs {
            let entries = to.prompt[1..].iter().map(|token| described(*token, count)).collect();
            to.events.send(TokenEvent::PromptLogprobs(entries)).await.unwrap();
        }
        let usage =
            Usage { prompt_tokens: to.prompt.len() as u32, completion_tokens: tokens.len() as u32, cached_tokens: 0 };
        if to.sampling.pooling.is_some() {
            let values = to.prompt.iter().map(|token| token.0 as f32).chain([0.0; 4]).take(4).collect();
            to.events.send(TokenEvent::Pooled(values)).await.unwrap();
            tokens.clear();
        }
        for (index, token) in (0..).zip(tokens) {
            let logprobs = to.sampling.logprobs.map(|count| described(token, count));
            if to.events.send(TokenEvent::Token { index, token, logprobs }).await.is_err() {
                return;
            }
            // Outputs of one request take turns, so that streams are interleaved in one way only.
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        match self.ending {
            Ending::Finished(reason) => drop(to.events.send(TokenEvent::Finished { reason, usage }).await),
            Ending::Failed(error) => drop(to.events.send(TokenEvent::Failed(error)).await),
            Ending::Open => to.events.closed().await,
        }
    }
}

/// A router with one model, `tiny`.
struct Server {
    router: Router,
    models: ServedModels,
    cancelled: Cancelled,
    /// How the engine was asked to sample, in order.
    submitted: Arc<Mutex<Vec<SamplingParams>>>,
}

/// What a test may change of the model.
struct Setup {
    has_text: bool,
    limits: EngineLimits,
    snapshot: EngineSnapshot,
    defaults: GenerationDefaults,
    embedding: EmbeddingSettings,
    api_keys: Vec<String>,
    /// In place of the model's own.
    template: Option<&'static str>,
    queue_timeout: Option<Duration>,
    keys: Option<KeyRing>,
    origins: AllowedOrigins,
    status: StatusSnapshot,
    traces: Option<crate::traces::TraceSink>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            has_text: true,
            limits: limits(),
            snapshot: EngineSnapshot { num_blocks: 64, num_blocks_free: 48, running: 2, ..EngineSnapshot::default() },
            defaults: GenerationDefaults::default(),
            embedding: EmbeddingSettings::default(),
            api_keys: Vec::new(),
            template: None,
            queue_timeout: None,
            keys: None,
            origins: AllowedOrigins::default(),
            status: StatusSnapshot::default(),
            traces: None,
        }
    }
}

impl Server {
    fn new(says: impl FnMut(usize) -> Says + Send + 'static) -> Self {
        Self::with(Setup::default(), says)
    }

    fn with(setup: Setup, mut says: impl FnMut(usize) -> Says + Send + 'static) -> Self {
        let text = tiny_text(setup.template);
        let submitted = Arc::new(Mutex::new(Vec::new()));
        let (seen, speaker) = (Arc::clone(&submitted), Arc::clone(&text));
        let script = move |to: Submitted| {
            seen.lock().unwrap().push(to.sampling.clone());
            tokio::spawn(says(to.number).send(Arc::clone(&speaker), to));
        };
        let max_model_len = setup.limits.max_model_len;
        let (engine, cancelled) = scripted::spawn(setup.limits, setup.snapshot, script);
        let models = ServedModels::default();
        models.insert(ServedModel {
            name: "tiny".into(),
            model_path: "/models/tiny-llama/".into(),
            aliases: vec!["alias".into()],
            grammars: setup.has_text.then(|| GrammarCompiler::new(Arc::clone(&text), 515, vec![END])),
            text: setup.has_text.then_some(text),
            engine: engine.into(),
            max_model_len,
            created: 7,
            defaults: setup.defaults,
            embedding: setup.embedding,
            end_token_ids: vec![END],
            queue_timeout: setup.queue_timeout,
            admission: Admission::default(),
            log_stats: false,
        });
        let status = setup.status;
        let mut state = ApiState::new(models.clone(), Arc::new(move || status.clone()));
        state.keys = Arc::new(setup.keys.unwrap_or_else(|| KeyRing::new(&setup.api_keys, None).unwrap()));
        state.origins = setup.origins;
        state.traces = setup.traces;
        Self { router: router(state), models, cancelled, submitted }
    }

    async fn send(&self, request: Request<Body>) -> Response<Body> {
        self.router.clone().oneshot(request).await.unwrap()
    }

    async fn post(&self, path: &str, body: &str) -> Answer {
        let request = Request::post(path)
            .header("content-type", "application/json")
            .header("x-request-id", "t")
            .body(Body::from(body.to_owned()))
            .unwrap();
        Answer::read(self.send(request).await).await
    }

    async fn get(&self, path: &str) -> Answer {
        Answer::read(self.send(Request::get(path).body(Body::empty()).unwrap()).await).await
    }

    fn sampling(&self) -> SamplingParams {
        self.submitted.lock().unwrap().last().unwrap().clone()
    }
}

/// An answer, read to its end.
struct Answer {
    status: u16,
    headers: HeaderMap,
    body: String,
}

impl Answer {
    async fn read(response: Response<Body>) -> Self {
        let (parts, body) = response.into_parts();
        let bytes = to_bytes(body, usize::MAX).await.unwrap();
        let body = without_times(std::str::from_utf8(&bytes).unwrap()).replace(super::SYSTEM_FINGERPRINT, "phalanx");
        Self { status: parts.status.as_u16(), headers: parts.headers, body }
    }

    fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap()
    }

    /// The data of the frames of a stream.
    fn frames(&self) -> Vec<&str> {
        self.body.split_terminator("\n\n").map(|frame| frame.strip_prefix("data: ").unwrap()).collect()
    }
}

/// `"created":N` with N as 0.
fn without_times(body: &str) -> String {
    let mut parts = body.split("\"created\":");
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        out.push_str("\"created\":0");
        out.push_str(part.trim_start_matches(|c: char| c.is_ascii_digit()));
    }
    out
}

/// Waits for what another task does.
async fn settled(done: impl Fn() -> bool) {
    for _ in 0..200 {
        if done() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("it did not come about within a second");
}
