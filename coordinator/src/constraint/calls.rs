//! Grammars of tool calls: the model's own way of writing them, with arguments that meet the schemas.
//!
//! **Invariant:** what such a grammar allows, the parser of the same format reads as calls of these tools.

use std::fmt::Write;

use serde_json::{Map, Value, json};

use super::grammar::{Grammar, lark_string};
use crate::text::TextModel;
use crate::text::tools::{Body, Tool, ToolFormat};

/// Most calls in one answer that has to consist of calls.
const NUM_CALLS_MAX: usize = 8;
/// Control tokens that formats use as marks.
const MARKS: [&str; 7] = [
    "<|action_start|>",
    "<|plugin|>",
    "<|action_end|>",
    "[TOOL_CALLS]",
    "<tool_call>",
    "</tool_call>",
    "<|python_tag|>",
];
/// Any character.
const ANY_TEXT: &str = r"(.|\n)";
/// Text of a string that stands bare between tags.
const BARE_TEXT: &str = "[^<]";

/// The grammar of an answer that is one call of some of these tools, or several where `is_parallel`.
pub fn call_grammar(text: &TextModel, tools: &[&Tool], is_parallel: bool) -> Grammar {
    let format = text.tool_format();
    let mut rules = Rules { text, format, lark: String::new() };
    let more = if is_parallel { NUM_CALLS_MAX - 1 } else { 0 };
    let (open, close, between) = (rules.mark(format.open), rules.mark(format.close), rules.mark(format.between));
    let start = match (format.each, more) {
        (true, 0) => format!("start: one\none: {open} call {close}\n"),
        (true, _) => format!("start: one ({between} one){{0,{more}}}\none: {open} call {close}\n"),
        (false, 0) => format!("start: {open} call {close}\n"),
        (false, _) => format!("start: {open} call ({between} call){{0,{more}}} {close}\n"),
    };
    let calls: Vec<String> = (0..tools.len()).map(|number| format!("call_{number}")).collect();
    rules.lark = format!("{start}call: {}\n", calls.join(" | "));
    for (number, tool) in tools.iter().enumerate() {
        rules.call(number, tool);
    }
    Grammar::Lark(rules.lark)
}

/// The grammar of an answer in which calls are up to the model, but for how they are written: free text, and calls whose
/// arguments meet their schema where the tool is strict. None where no tool is.
pub fn free_grammar(text: &TextModel, tools: &[Tool], is_parallel: bool) -> Option<Grammar> {
    if !tools.iter().any(|tool| tool.strict) {
        return None;
    }
    let format = text.tool_format();
    let mut rules = Rules { text, format, lark: String::new() };
    let num_calls = if is_parallel { NUM_CALLS_MAX } else { 1 };
    let mark = format.starts.first().copied().filter(|mark| format.open.starts_with(*mark));
    let open = rules.mark(format.open.strip_prefix(mark.unwrap_or_default()).unwrap_or(format.open));
    let (close, between) = (rules.mark(format.close), rules.mark(format.between));
    let more =
        if format.each || num_calls == 1 { String::new() } else { format!("({between} call){{0,{}}}", num_calls - 1) };
    let num_regions = if format.each { num_calls } else { 1 };
    let region = format!("region: {open} call {more} {close}\n");
    let start = match (mark, format.leading) {
        (Some(mark), _) => {
            let control = MARKS.iter().find(|known| mark.starts_with(**known) && text.control_token(known).is_some());
            let opened = if control.is_some() {
                format!("text? {}", rules.mark(mark))
            } else {
                rules.rule("opening[lazy]", &format!("/{ANY_TEXT}*/ {}", lark_string(mark)));
                "opening".to_owned()
            };
            format!("start: ({opened} region){{0,{num_regions}}} text?\n")
        }
        (None, Some(leading)) => {
            rules.rule("OTHER", &format!("/[^{}]{ANY_TEXT}*/", regex_escaped(leading)));
            "start: region | OTHER\n".to_owned()
        }
        (None, None) => return None,
    };
    let head = std::mem::take(&mut rules.lark);
    let calls: Vec<String> = (0..tools.len()).map(|number| format!("call_{number}")).collect();
    rules.lark = format!("{start}{head}text: /{ANY_TEXT}+/\n{region}call: {}\n", calls.join(" | "));
    for (number, tool) in tools.iter().enumerate() {
        if tool.strict {
            rules.call(number, tool);
        } else {
            let parameters = json!({"type": "object"});
            rules.call(number, &Tool { parameters, ..tool.clone() });
        }
    }
    Some(Grammar::Lark(rules.lark))
}

fn regex_escaped(c: char) -> String {
    format!("\\{c}")
}

struct Rules<'a> {
    text: &'a TextModel,
    format: &'static ToolFormat,
    lark: String,
}

impl Rules<'_> {
    /// Text in which control tokens stand for themselves.
    fn mark(&self, text: &str) -> String {
        let mut parts = Vec::new();
        let (mut plain, mut rest) = (String::new(), text);
        while let Some(c) = rest.chars().next() {
            let token = MARKS.iter().find(|mark| rest.starts_with(**mark));
            if let Some((mark, id)) = token.and_then(|mark| Some((mark, self.text.control_token(mark)?))) {
                if !plain.is_empty() {
                    parts.push(lark_string(&std::mem::take(&mut plain)));
                }
                parts.push(format!("<[{id}]>"));
                rest = &rest[mark.len()..];
            } else {
                plain.push(c);
                rest = &rest[c.len_utf8()..];
            }
        }
        if !plain.is_empty() || parts.is_empty() {
            parts.push(lark_string(&plain));
        }
        parts.join(" ")
    }

    fn rule(&mut self, name: &str, body: &str) {
        let _infallible = writeln!(self.lark, "{name}: {body}");
    }

    fn call(&mut self, number: usize, tool: &Tool) {
        let name = format!("call_{number}");
        match self.format.body {
            Body::Json => {
                let key = self.format.arguments_key;
                let head = format!("{{\"name\": {}, \"{key}\": ", Value::from(tool.name.as_str()));
                self.rule(&name, &format!("{} arguments_{number} \"}}\"", lark_string(&head)));
                self.rule(&format!("arguments_{number}"), &Grammar::lark_json(&as_object(&tool.parameters)));
            }
            Body::Xml => {
                let parameters = self.parameters(number, tool, |rules, key, value, schema| {
                    let value = rules.bare_value(&value, schema);
                    let (open, close) = (format!("<parameter={key}>\n"), "\n</parameter>\n");
                    format!("{} {value} {}", lark_string(&open), lark_string(close))
                });
                let optional =
                    |(rule, required): &(String, bool)| format!("{rule}{}", if *required { "" } else { "?" });
                let inside: Vec<String> = parameters.iter().map(optional).collect();
                let head = lark_string(&format!("<function={}>\n", tool.name));
                self.rule(&name, &format!("{head} {} \"</function>\"", inside.join(" ")));
            }
            Body::Python => {
                let parameters = self.parameters(number, tool, |rules, key, value, schema| {
                    rules.rule(&value, &Grammar::lark_json(schema));
                    format!("{} {value}", lark_string(&format!("{key}=")))
                });
                let head = lark_string(&format!("{}(", tool.name));
                self.rule(&name, &format!("{head} {} \")\"", separated(&parameters)));
            }
        }
    }

    /// A rule for each argument, required ones first; gives their names and whether they are required.
    fn parameters(
        &mut self,
        number: usize,
        tool: &Tool,
        body: impl Fn(&mut Self, &str, String, &Value) -> String,
    ) -> Vec<(String, bool)> {
        let none = Map::new();
        let properties = tool.parameters.get("properties").and_then(Value::as_object).unwrap_or(&none);
        let listed = tool.parameters.get("required").and_then(Value::as_array);
        let is_required = |key: &str| listed.is_some_and(|listed| listed.iter().any(|other| other == key));
        let mut rules = Vec::new();
        for (at, (key, schema)) in properties.iter().enumerate() {
            let rule = format!("parameter_{number}_{at}");
            let schema = with_definitions(schema, &tool.parameters);
            let text = body(self, key, format!("value_{number}_{at}"), &schema);
            self.rule(&rule, &text);
            rules.push((rule, is_required(key)));
        }
        rules.sort_by_key(|(_, required)| !required);
        rules
    }

    /// A value between tags: strings stand bare, the rest is JSON.
    fn bare_value(&mut self, name: &str, schema: &Value) -> String {
        if let Some(choices) = schema["enum"].as_array() {
            let bare = |choice: &Value| lark_string(&choice.as_str().map_or_else(|| choice.to_string(), str::to_owned));
            let choices: Vec<String> = choices.iter().map(bare).collect();
            self.rule(name, &choices.join(" | "));
        } else if schema["type"] == "string" {
            let min = schema["minLength"].as_u64().unwrap_or(0);
            let max = schema["maxLength"].as_u64().map_or_else(String::new, |max| max.to_string());
            let token = name.to_uppercase();
            self.rule(&token, &format!("/{BARE_TEXT}{{{min},{max}}}/"));
            return token;
        } else {
            self.rule(name, &Grammar::lark_json(schema));
        }
        name.to_owned()
    }
}

/// Arguments with commas between them: the required ones, then any of the others in order.
fn separated(parameters: &[(String, bool)]) -> String {
    let Some(((first, required), others)) = parameters.split_first() else { return String::new() };
    let mut text = first.clone();
    for (rule, required) in others {
        let _infallible = write!(text, " (\", \" {rule}){}", if *required { "" } else { "?" });
    }
    if *required { text } else { format!("({text})?") }
}

/// Arguments are an object, whatever the schema leaves unsaid.
fn as_object(schema: &Value) -> Value {
    match schema {
        Value::Object(members) if members.contains_key("type") || members.contains_key("$ref") => schema.clone(),
        Value::Object(members) => {
            let mut members = members.clone();
            members.insert("type".into(), "object".into());
            Value::Object(members)
        }
        _ => json!({"type": "object"}),
    }
}

/// A part of a schema with the definitions that it may refer to.
fn with_definitions(schema: &Value, root: &Value) -> Value {
    let Value::Object(members) = schema else { return schema.clone() };
    let mut members = members.clone();
    for key in ["$defs", "definitions"] {
        if let Some(definitions) = root.get(key) {
            members.entry(key).or_insert_with(|| definitions.clone());
        }
    }
    Value::Object(members)
}

#[cfg(test)]
mod tests {
    use super::super::compiler::tests::{bounded_schema, check_bounded, compiler, text, walk};
    use super::*;
    use crate::text::tools::{ToolEvent, ToolParser};

    fn tools() -> Vec<Tool> {
        let tool = |name: &str, parameters| Tool { name: name.into(), description: None, parameters, strict: true };
        let empty = json!({"type": "object", "properties": {}, "additionalProperties": false});
        vec![tool("forecast", bounded_schema()), tool("now", empty)]
    }

    /// Draws answers at random within the grammar; what is complete must read as calls whose arguments meet the schema.
    async fn check(format: &str, is_parallel: bool) {
        let (mut text, compiler, tools) = (text(), compiler(), tools());
        text.set_tool_format(ToolFormat::named(format).unwrap());
        let listed: Vec<&Tool> = tools.iter().collect();
        let grammar = call_grammar(&text, &listed, is_parallel);
        let constraint = compiler.compile(grammar.clone(), None).await.unwrap_or_else(|e| panic!("{e} {grammar:?}"));
        let (mut num_complete, mut num_calls_max) = (0, 0);
        for seed in 0..60 {
            let (said, complete) = walk(&text, &constraint, seed, 1500);
            let mut parser = ToolParser::new(text.tool_format(), tools.clone().into(), usize::MAX);
            let mut events = parser.push(&said);
            events.extend(parser.finish());
            let mut calls: Vec<(String, String)> = Vec::new();
            for event in events {
                match event {
                    ToolEvent::Text(text) => assert!(!complete, "{format}: {text:?} in {said:?}"),
                    ToolEvent::Call { name, .. } => calls.push((name, String::new())),
                    ToolEvent::Arguments { index, text } => calls[index].1.push_str(&text),
                }
            }
            if !complete {
                continue;
            }
            num_complete += 1;
            num_calls_max = num_calls_max.max(calls.len());
            assert!(!calls.is_empty() && (is_parallel || calls.len() == 1), "{format}: {said:?}");
            for (name, arguments) in calls {
                let arguments: Value =
                    serde_json::from_str(&arguments).unwrap_or_else(|e| panic!("{format}: {e} {arguments:?} {said:?}"));
                match name.as_str() {
                    "forecast" => check_bounded(&arguments),
                    "now" => assert_eq!(arguments, json!({})),
                    other => panic!("{other}"),
                }
            }
        }
        assert!(num_complete > 30, "{format}: {num_complete} of 60");
        assert_eq!(is_parallel, num_calls_max > 1, "{format}");
    }

    /// Lets the model say something freely, then walks on at random: what looks like a call must be one.
    async fn check_free(format: &str, said: &str) {
        let (mut text, compiler, tools) = (text(), compiler(), tools());
        text.set_tool_format(ToolFormat::named(format).unwrap());
        let grammar = free_grammar(&text, &tools, true).unwrap();
        let mut constraint =
            compiler.compile(grammar.clone(), None).await.unwrap_or_else(|e| panic!("{e} {grammar:?}"));
        for (num_tokens, token) in text.encode(said, false).unwrap().into_iter().enumerate() {
            constraint =
                constraint.commit(token).unwrap_or_else(|error| panic!("{format}: {error} after {num_tokens}"));
        }
        for seed in 0..10 {
            let (rest, _) = walk(&text, &constraint, seed, 400);
            let mut parser = ToolParser::new(text.tool_format(), tools.clone().into(), 1);
            let mut events = parser.push(&format!("{said}{rest}"));
            events.extend(parser.finish());
            let name = events.iter().find_map(|event| match event {
                ToolEvent::Call { name, .. } => Some(name.clone()),
                _ => None,
            });
            let arguments: String = events
                .into_iter()
                .filter_map(|event| match event {
                    ToolEvent::Arguments { text, .. } => Some(text),
                    _ => None,
                })
                .collect();
            let arguments = serde_json::from_str(&arguments);
            match (name.as_deref(), arguments) {
                (Some("forecast"), Ok(arguments)) => check_bounded(&arguments),
                (Some("now"), Ok(arguments)) => assert_eq!(arguments, json!({})),
                (name, arguments) => panic!("{format}: {name:?} {arguments:?} in {rest:?}"),
            }
        }
    }

    #[tokio::test]
    async fn strict_tools_hold_calls_that_the_model_chooses_to_make() {
        check_free("hermes", "Hi {x} <tool ok\n<tool_call>").await;
        check_free("hermes", "<tool_call>\n{\"name\": \"").await;
        check_free("mistral", "Sure. [TOOL_CALLS]").await;
        check_free("internlm", "Sure. <|action_start|><|plugin|>").await;
        check_free("llama3_json", "{\"name\"").await;
        check_free("pythonic", "[").await;
        assert_eq!(free_grammar(&text(), &[], true), None);
    }

    #[tokio::test]
    async fn strict_tools_leave_text_free() {
        let (mut text, compiler) = (text(), compiler());
        for format in ToolFormat::names() {
            text.set_tool_format(ToolFormat::named(format).unwrap());
            let grammar = free_grammar(&text, &tools(), true).unwrap();
            let mut constraint = compiler.compile(grammar, None).await.unwrap();
            for token in text.encode("Just text, 1 < 2, with {braces} and [lists].\n\nOk", false).unwrap() {
                constraint = constraint.commit(token).unwrap_or_else(|error| panic!("{format}: {error}"));
            }
        }
    }

    #[tokio::test]
    async fn what_the_grammar_of_calls_allows_is_read_as_calls() {
        for format in ToolFormat::names() {
            check(format, false).await;
            check(format, true).await;
        }
    }
}
