//! The model's own chat template, rendered as transformers renders it.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, Value};
use minijinja::{Environment, Error, ErrorKind, UndefinedBehavior};
use serde_json::Map;
use time::OffsetDateTime;

use super::python_json;
use super::template_thread::TemplateThreads;
use super::{TextError, Tokenizer};

/// What a template may spend on one conversation: instructions, and 64 bytes of text for each, written or made in between.
const TEMPLATE_FUEL: u64 = 4_000_000;
/// Longest template; the longest in use have some ten thousand.
const TEMPLATE_BYTES_MAX: usize = 256 * 1024;

/// What a chat template is asked to render.
#[derive(Debug, Clone, Default)]
pub struct ChatPrompt {
    /// Messages as the client sent them.
    pub messages: Vec<serde_json::Value>,
    /// Tools as the client sent them.
    pub tools: Option<Vec<serde_json::Value>>,
    /// Ends with the opening of the assistant's turn.
    pub add_generation_prompt: bool,
    /// Leaves the last message open, to be continued.
    pub continue_final_message: bool,
    /// Further variables for the template.
    pub kwargs: Map<String, serde_json::Value>,
}

/// A parsed chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    threads: TemplateThreads,
    bos_token: Option<String>,
    eos_token: Option<String>,
}

impl ChatTemplate {
    /// Parses a template; special tokens come from the tokenizer.
    ///
    /// # Errors
    /// The template is too long, or does not parse.
    pub fn new(template: String, tokenizer: &Tokenizer) -> Result<Self, TextError> {
        let bytes = template.len();
        if bytes > TEMPLATE_BYTES_MAX {
            return Err(TextError::LongTemplate { bytes, limit: TEMPLATE_BYTES_MAX });
        }
        let threads = TemplateThreads::new(&template);
        // Its parser goes down as deep as the template is nested.
        let environment = threads.run(move || environment(&template)).map_err(not_rendered)??;
        Ok(Self {
            environment: Arc::new(environment),
            threads,
            bos_token: tokenizer.bos_token().map(str::to_owned),
            eos_token: tokenizer.eos_token().map(str::to_owned),
        })
    }

    /// Renders a conversation.
    ///
    /// # Errors
    /// The template raises, or the messages have not the shape that it expects.
    pub fn render(&self, prompt: &ChatPrompt) -> Result<String, TextError> {
        let mut variables = prompt.kwargs.clone();
        let tools = prompt.tools.clone().map_or(serde_json::Value::Null, serde_json::Value::Array);
        variables.insert("messages".into(), prompt.messages.clone().into());
        variables.insert("tools".into(), tools);
        variables.entry("documents").or_insert(serde_json::Value::Null);
        variables.insert("add_generation_prompt".into(), prompt.add_generation_prompt.into());
        for (name, token) in [("bos_token", &self.bos_token), ("eos_token", &self.eos_token)] {
            if let Some(token) = token {
                variables.entry(name).or_insert_with(|| token.as_str().into());
            }
        }
        let environment = Arc::clone(&self.environment);
        let render = move || {
            let template = environment.get_template("chat").map_err(TextError::Template)?;
            template.render(Value::from(Serde(variables))).map_err(|error| TextError::Render {
                reason: error.detail().map_or_else(|| error.to_string(), str::to_owned),
            })
        };
        let text = self.threads.render(render).map_err(not_rendered)??;
        if prompt.continue_final_message { cut_after_final_message(text, prompt) } else { Ok(text) }
    }
}

/// The engine, with the template in it.
fn environment(template: &str) -> Result<Environment<'static>, TextError> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.map_err(TextError::Template)?);
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_fuel(Some(TEMPLATE_FUEL));
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_formatter(|out, _, value| {
        if value.is_undefined() {
            return Ok(());
        }
        out.write_str(&python_json::to_text(value)?).map_err(Error::from)
    });
    environment.add_filter("tojson", |value: Value, options| python_json::tojson(&value, options));
    environment.add_filter("trim", |value: Value| python_json::to_text(&value).map(|text| text.trim().to_owned()));
    environment.add_filter("string", |value: Value| python_json::to_text(&value));
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", |format: String| strftime_utc(&format, SystemTime::now()));
    environment.add_template_owned("chat", without_generation_tags(template)).map_err(TextError::Template)?;
    Ok(environment)
}

/// Why a thread gave nothing.
fn not_rendered(error: impl std::fmt::Display) -> TextError {
    TextError::Render { reason: error.to_string() }
}

/// Leaves the last message open: whatever the template wrote behind its content goes.
fn cut_after_final_message(mut text: String, prompt: &ChatPrompt) -> Result<String, TextError> {
    let content = prompt.messages.last().and_then(|message| message["content"].as_str()).unwrap_or_default();
    let content = content.trim();
    match text.rfind(content) {
        Some(at) if !content.is_empty() => {
            text.truncate(at + content.len());
            Ok(text)
        }
        _ => Err(TextError::Render { reason: "the final message has no text to continue".into() }),
    }
}

/// `{% generation %}` marks the assistant's part for training; Jinja does not know it, and it writes nothing.
fn without_generation_tags(template: &str) -> String {
    let mut out = String::with_capacity(template.len());
    let mut rest = template;
    while let Some(start) = rest.find("{%") {
        let Some(len) = rest[start..].find("%}") else { break };
        let tag = &rest[start..start + len + 2];
        let name = tag
            .trim_start_matches("{%")
            .trim_end_matches("%}")
            .trim_matches(|c: char| c == '-' || c == '+' || c.is_whitespace());
        out.push_str(&rest[..start]);
        if name == "generation" || name == "endgeneration" {
            // An empty comment keeps the tag's white-space control.
            out.push_str(if tag.starts_with("{%-") { "{#-" } else { "{#" });
            out.push_str(if tag.ends_with("-%}") { " -#}" } else { " #}" });
        } else {
            out.push_str(tag);
        }
        rest = &rest[start + len + 2..];
    }
    out.push_str(rest);
    out
}

/// `strftime` in UTC, with the fields that chat templates use.
fn strftime_utc(format: &str, now: SystemTime) -> String {
    let seconds = now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let now = OffsetDateTime::from_unix_timestamp(seconds.cast_signed()).unwrap_or(OffsetDateTime::UNIX_EPOCH);
    let (month_name, day_name) = (now.month().to_string(), now.weekday().to_string());
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('Y') => out.push_str(&format!("{:04}", now.year())),
            Some('y') => out.push_str(&format!("{:02}", now.year() % 100)),
            Some('m') => out.push_str(&format!("{:02}", u8::from(now.month()))),
            Some('d') => out.push_str(&format!("{:02}", now.day())),
            Some('B') => out.push_str(&month_name),
            Some('b') => out.push_str(&month_name[..3]),
            Some('A') => out.push_str(&day_name),
            Some('a') => out.push_str(&day_name[..3]),
            Some('H') => out.push_str(&format!("{:02}", now.hour())),
            Some('M') => out.push_str(&format!("{:02}", now.minute())),
            Some('S') => out.push_str(&format!("{:02}", now.second())),
            Some(other) => out.push(other),
            None => out.push('%'),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        let at = |s| UNIX_EPOCH + Duration::from_secs(s);
        assert_eq!(strftime_utc("%d %b %Y", at(0)), "01 Jan 1970");
        assert_eq!(strftime_utc("%A %Y-%m-%d %H:%M:%S", at(1_709_210_096)), "Thursday 2024-02-29 12:34:56");
        assert_eq!(strftime_utc("%d %B %y %a", at(1_735_689_599)), "31 December 24 Tue");
    }

    /// Templates come with models, from wherever those come.
    #[test]
    fn hostile_templates_end_and_fill_no_memory() {
        let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/tiny-llama/tokenizer.json");
        let tokenizer = Tokenizer::from_json(&std::fs::read(file).unwrap(), None).unwrap();
        let parens = format!("{{{{ {}1{} }}}}", "(".repeat(20_000), ")".repeat(20_000));
        let ifs = format!("{}x{}", "{% if 1 %}".repeat(20_000), "{% endif %}".repeat(20_000));
        for hostile in [
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "{% set ns = namespace(x='ab') %}{% for a in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
            "{% set ns = namespace(x=['a' * 1000]) %}{% for a in range(16) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
            "{% for a in range(1000) %}{{ 'x' * 90000000 }}{% endfor %}",
            "{{ 'x' * 99999999999 }}",
            "{{ messages | tojson(indent=9999999999999) }}",
            "{{ '%999999999999d' | format(1) }}",
            "{{ 'x'.rjust(999999999999) }}",
            "{{ 'x' | indent(999999999999, true) }}",
            "{{ 'ab' | replace('', 'x' * 9000000) | replace('x', 'y' * 9000000) }}",
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "{% set ns = namespace(x=['a' * 1000]) %}{% for a in range(16) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x | tojson }}",
            "{% set ns = namespace(x=[1]) %}{% for a in range(30) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
            "{% set ns = namespace(x=[1]) %}{% for a in range(30) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
            "{% set ns = namespace(x=[1]) %}{% for a in range(50000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
            "{% set ns = namespace(x=[1]) %}{% for a in range(50000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x == [ns.x] }}",
            "{% set ns = namespace(x=[1]) %}{% for a in range(50000) %}{% set ns.x = {'a': ns.x} %}{% endfor %}{{ ns.x ~ 'a' }}",
            &parens,
            &ifs,
            &format!("{{{{ 1{} }}}}", " + 1".repeat(50_000)),
            &format!("{{{{ x{} }}}}", ".a".repeat(50_000)),
            &format!("{{{{ {}x }}}}", "not ".repeat(50_000)),
            &format!("{{{{ x{} }}}}", "|list".repeat(50_000)),
        ] {
            let prompt = ChatPrompt { messages: vec![serde_json::json!({"role": "user"})], ..ChatPrompt::default() };
            let rendered = ChatTemplate::new(hostile.to_owned(), &tokenizer).and_then(|it| it.render(&prompt));
            let shown = &hostile[..hostile.len().min(60)];
            assert!(
                rendered.as_ref().map_or(true, |text| text.len() < 1 << 20),
                "{shown}: {:?}",
                rendered.map(|t| t.len())
            );
        }
    }

    #[test]
    fn generation_tags_write_nothing() {
        assert_eq!(
            without_generation_tags("a{% generation %}b{%- endgeneration -%}c{% if x %}"),
            "a{# #}b{#- -#}c{% if x %}"
        );
    }
}
