//! Prompts from a file or a pipe: lines of text, or JSON objects with the fields of a request.
//!
//! **Invariant:** a request that leaves here has a prompt or messages, and the flags' fields where the line has none of its own.

use std::io::Read;
use std::path::Path;

use clap::ValueEnum;
use serde_json::{Map, Value, json};

use crate::cli::CliError;

/// How prompts are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum InputFormat {
    /// JSONL where the first line is an object, else text
    #[default]
    Auto,
    /// One prompt a line
    Text,
    /// One object a line, with `prompt` or `messages` and any field of a request
    Jsonl,
}

/// One request of the input.
#[derive(Debug, Clone, PartialEq)]
pub struct Item {
    /// Where it goes.
    pub path: &'static str,
    /// Its fields, the model's name excepted.
    pub fields: Map<String, Value>,
    /// What is repeated in the output: `prompt` or `messages`, and the line's own `id`.
    pub echo: Map<String, Value>,
}

/// What flags say of every request.
#[derive(Debug, Clone, Default)]
pub struct Defaults {
    /// Fields where a line has none.
    pub fields: Map<String, Value>,
    /// Lines of text are messages.
    pub as_chat: bool,
    /// The system message of such conversations.
    pub system: Option<String>,
}

/// Reads the whole input; `-` is stdin.
///
/// # Errors
/// It cannot be read, or a line is no request; the line is named.
pub fn read(path: &Path, format: InputFormat, defaults: &Defaults) -> Result<Vec<Item>, CliError> {
    let named = |error: std::io::Error| CliError::usage(format!("{}: {error}", path.display()));
    let text = if path == Path::new("-") {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).map_err(named)?;
        text
    } else {
        std::fs::read_to_string(path).map_err(named)?
    };
    parse(&text, format, defaults)
        .map_err(|(line, reason)| CliError::usage(format!("{} line {line}: {reason}", path.display())))
}

fn parse(text: &str, format: InputFormat, defaults: &Defaults) -> Result<Vec<Item>, (usize, String)> {
    let lines = || (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty());
    let first_is_object = || lines().next().is_some_and(|(_, line)| line.trim_start().starts_with('{'));
    let as_json = match format {
        InputFormat::Auto => first_is_object(),
        InputFormat::Text => false,
        InputFormat::Jsonl => true,
    };
    let item = |(number, line): (usize, &str)| match as_json {
        false => Ok(defaults.item_of_text(line)),
        true => defaults.item_of_json(line).map_err(|reason| (number, reason)),
    };
    lines().map(item).collect()
}

impl Defaults {
    fn item_of_text(&self, line: &str) -> Item {
        let mut own = Map::new();
        if self.as_chat {
            let system = self.system.iter().map(|text| json!({"role": "system", "content": text}));
            let messages: Vec<Value> = system.chain([json!({"role": "user", "content": line})]).collect();
            own.insert("messages".into(), messages.into());
        } else {
            own.insert("prompt".into(), line.into());
        }
        self.item(own)
    }

    fn item_of_json(&self, line: &str) -> Result<Item, String> {
        let Value::Object(own) = serde_json::from_str(line).map_err(|error| error.to_string())? else {
            return Err("it is no JSON object".into());
        };
        match (own.contains_key("prompt"), own.contains_key("messages")) {
            (true, true) => Err("it has both prompt and messages".into()),
            (false, false) => Err("it has neither prompt nor messages".into()),
            _ if own.get("stream").is_some_and(|stream| stream == true) => Err("stream cannot be true here".into()),
            _ => Ok(self.item(own)),
        }
    }

    fn item(&self, mut own: Map<String, Value>) -> Item {
        let mut echo = Map::new();
        if let Some(id) = own.shift_remove("id") {
            echo.insert("id".into(), id);
        }
        let key = if own.contains_key("messages") { "messages" } else { "prompt" };
        echo.insert(key.into(), own.get(key).cloned().unwrap_or_default());
        let path = if key == "messages" { "/v1/chat/completions" } else { "/v1/completions" };
        let mut fields = self.fields.clone();
        fields.append(&mut own);
        Item { path, fields, echo }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, as_chat: bool, expected: &[&str]) {
        let mut fields = Map::new();
        fields.insert("max_tokens".into(), 5.into());
        let defaults = Defaults { fields, as_chat, system: as_chat.then(|| "s".into()) };
        let told = match parse(text, InputFormat::Auto, &defaults) {
            Ok(items) => items
                .into_iter()
                .map(|item| format!("{} {} {}", item.path, Value::from(item.fields), Value::from(item.echo)))
                .collect(),
            Err((line, reason)) => vec![format!("{line}: {reason}")],
        };
        assert_eq!(told, expected, "{text}");
    }

    #[test]
    fn lines_become_requests() {
        check(
            "a b\n\nc\n",
            false,
            &[
                r#"/v1/completions {"max_tokens":5,"prompt":"a b"} {"prompt":"a b"}"#,
                r#"/v1/completions {"max_tokens":5,"prompt":"c"} {"prompt":"c"}"#,
            ],
        );
        check(
            "a",
            true,
            &[
                r#"/v1/chat/completions {"max_tokens":5,"messages":[{"role":"system","content":"s"},{"role":"user","content":"a"}]} {"messages":[{"role":"system","content":"s"},{"role":"user","content":"a"}]}"#,
            ],
        );
        check(
            r#"{"id":7,"prompt":[1,2],"max_tokens":9}"#,
            false,
            &[r#"/v1/completions {"max_tokens":9,"prompt":[1,2]} {"id":7,"prompt":[1,2]}"#],
        );
        check(r#"{"messages":[]}"#, false, &[r#"/v1/chat/completions {"max_tokens":5,"messages":[]} {"messages":[]}"#]);
        check("", false, &[]);
    }

    #[test]
    fn lines_that_are_no_request_are_named() {
        check("{\"prompt\":\"a\"}\n[]", false, &["2: it is no JSON object"]);
        check("{}", false, &["1: it has neither prompt nor messages"]);
        check(r#"{"prompt":"a","messages":[]}"#, false, &["1: it has both prompt and messages"]);
        check(r#"{"prompt":"a","stream":true}"#, false, &["1: stream cannot be true here"]);
        check("{", false, &["1: EOF while parsing an object at line 1 column 1"]);
    }
}
