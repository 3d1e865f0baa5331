//! Every format, whole and cut in every place.

use proptest::prelude::*;
use serde_json::json;

use super::*;

fn tools() -> Tools {
    let tool = |name: &str, parameters| Tool { name: name.into(), description: None, parameters, strict: false };
    let city = json!({"type": "object", "properties": {
        "city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"type": "string"}, "deep": {"type": "object"}}});
    [tool("weather", city), tool("now", json!({"type": "object", "properties": {}}))].into()
}

/// An answer as it looks in the end.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Whole {
    pub(super) text: String,
    pub(super) calls: Vec<(String, String)>,
}

pub(super) fn fold(format: &'static ToolFormat, pieces: &[&str]) -> Whole {
    let mut parser = ToolParser::new(format, tools(), usize::MAX);
    let mut whole = Whole::default();
    let mut take = |events: Vec<ToolEvent>| {
        for event in events {
            match event {
                ToolEvent::Text(text) => whole.text.push_str(&text),
                ToolEvent::Call { index, name } => {
                    assert_eq!(index, whole.calls.len());
                    whole.calls.push((name, String::new()));
                }
                ToolEvent::Arguments { index, text } => {
                    assert_eq!(index + 1, whole.calls.len());
                    whole.calls[index].1.push_str(&text);
                }
            }
        }
    };
    for piece in pieces {
        take(parser.push(piece));
    }
    take(parser.finish());
    whole
}

#[track_caller]
fn check(format: &'static ToolFormat, answer: &str, text: &str, calls: &[(&str, &str)]) {
    let expected =
        Whole { text: text.into(), calls: calls.iter().map(|(name, args)| ((*name).into(), (*args).into())).collect() };
    assert_eq!(fold(format, &[answer]), expected, "{answer:?} whole");
    let chars: Vec<String> = answer.chars().map(String::from).collect();
    let chars: Vec<&str> = chars.iter().map(String::as_str).collect();
    assert_eq!(fold(format, &chars), expected, "{answer:?} by characters");
    for (at, _) in answer.char_indices() {
        assert_eq!(fold(format, &[&answer[..at], &answer[at..]]), expected, "{answer:?} cut at {at}");
    }
}

const WEATHER: &str = r#"{"city": "San {Fran}\"cisco\" 你好", "deep": {"a": [1, {"b": "}"}]}}"#;

#[test]
fn hermes_calls() {
    let format = &hermes::FORMAT;
    check(format, "Hello there \n", "Hello there \n", &[]);
    check(format, "a < b <tool", "a < b <tool", &[]);
    let one = format!("<tool_call>\n{{\"name\": \"weather\", \"arguments\": {WEATHER}}}\n</tool_call>");
    check(format, &one, "", &[("weather", WEATHER)]);
    check(format, &format!("I look.\n{one}\n{one}\n"), "I look.", &[("weather", WEATHER), ("weather", WEATHER)]);
    check(format, &format!("{one} done"), " done", &[("weather", WEATHER)]);
    check(format, one.trim_end_matches("\n</tool_call>"), "", &[("weather", WEATHER)]);
    check(format, &one.replace("\n</tool_call>", "</tool_ca"), "", &[("weather", WEATHER)]);
    check(format, r#"<tool_call>{"name": "now"}</tool_call>"#, "", &[("now", "{}")]);
    check(format, r#"<tool_call>{"name": "now", "arguments": null}</tool_call>"#, "", &[("now", "{}")]);
    check(format, r#"<tool_call>{"arguments": {"a": 1}, "name": "now"}</tool_call>"#, "", &[("now", r#"{"a": 1}"#)]);
    check(
        format,
        r#"<tool_call>{"name": "now", "arguments": "{\"a\": 1}"}</tool_call>"#,
        "",
        &[("now", r#"{"a": 1}"#)],
    );
    check(format, r#"<tool_call>{"id": 7, "type": ["x"], "name": "n\u00fc"}</tool_call>"#, "", &[("nü", "{}")]);
    check(format, r#"<tool_call>[{"name": "now"}, {"name": "now"}]</tool_call>"#, "", &[("now", "{}"), ("now", "{}")]);
}

#[test]
fn what_only_looks_like_a_call_is_text() {
    let format = &hermes::FORMAT;
    for text in [
        "<tool_call>no json</tool_call>",
        "<tool_call>\n{\"nam",
        "<tool_call>{}</tool_call> x",
        "<tool_call></tool_call>",
        "<tool_call>{\"name\": 7}</tool_call>",
        "</tool_call>",
        "<<tool_call>x",
    ] {
        check(format, text, text, &[]);
    }
    check(&llama3_json::FORMAT, r#"{"answer": 42}"#, r#"{"answer": 42}"#, &[]);
    check(&llama3_json::FORMAT, r#"{"name": "Bob", "age": 3}"#, r#"{"name": "Bob", "age": 3}"#, &[]);
    check(&pythonic::FORMAT, "[1, 2, 3]", "[1, 2, 3]", &[]);
    check(&pythonic::FORMAT, "[note(x=1)]", "[note(x=1)]", &[]);
    check(&qwen3_coder::FORMAT, "a <function> b", "a <function> b", &[]);
    check(&qwen3_coder::FORMAT, "<tool_call>oops", "<tool_call>oops", &[]);
}

#[test]
fn a_call_that_breaks_keeps_what_was_said() {
    let format = &hermes::FORMAT;
    check(
        format,
        r#"<tool_call>{"name": "now", "arguments": {"a": 1}} }</tool_call>x"#,
        " }</tool_call>x",
        &[("now", r#"{"a": 1}"#)],
    );
    check(format, r#"<tool_call>{"name": "now" oops}</tool_call> x"#, " x", &[("now", "oops}")]);
    check(format, r#"<tool_call>{"name": "now", "arguments": {"a": [1"#, "", &[("now", r#"{"a": [1"#)]);
}

#[test]
fn llama_calls() {
    let format = &llama3_json::FORMAT;
    let call = r#"{"name": "weather", "parameters": {"city": "Rom", "n": 2}}"#;
    check(format, call, "", &[("weather", r#"{"city": "Rom", "n": 2}"#)]);
    check(
        format,
        &format!("\n{call}; {call}"),
        "",
        &[("weather", r#"{"city": "Rom", "n": 2}"#), ("weather", r#"{"city": "Rom", "n": 2}"#)],
    );
    check(format, &format!("<|python_tag|>{call}<|eom_id|>"), "", &[("weather", r#"{"city": "Rom", "n": 2}"#)]);
    check(format, r#"{"type": "function", "name": "now", "parameters": {}}"#, "", &[("now", "{}")]);
    check(format, "Sure: {\"name\"", "Sure: {\"name\"", &[]);
}

#[test]
fn internlm_calls() {
    let format = &internlm::FORMAT;
    let call = r#"<|action_start|><|plugin|>
{"name": "weather", "parameters": {"city": "Rom"}}<|action_end|>"#;
    check(format, call, "", &[("weather", r#"{"city": "Rom"}"#)]);
    check(format, &format!("我来查。{call}\n"), "我来查。", &[("weather", r#"{"city": "Rom"}"#)]);
}

#[test]
fn mistral_calls() {
    let format = &mistral::FORMAT;
    let calls = [("weather", r#"{"city": "Rom"}"#), ("now", "{}")];
    check(
        format,
        r#"[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rom"}}, {"name": "now", "arguments": {}}]"#,
        "",
        &calls,
    );
    check(format, r#"[TOOL_CALLS]weather[ARGS]{"city": "Rom"}[TOOL_CALLS]now[CALL_ID]123[ARGS]{}"#, "", &calls);
    check(format, r#"Let me. [TOOL_CALLS]now{}"#, "Let me.", &[("now", "{}")]);
    check(format, "see [TOOL] and [1]", "see [TOOL] and [1]", &[]);
}

#[test]
fn qwen3_coder_calls() {
    let format = &qwen3_coder::FORMAT;
    let call = "<tool_call>\n<function=weather>\n<parameter=city>\nNew \"York\"\n</parameter>\n\
                <parameter=days>\n3\n</parameter>\n<parameter=unit>\n5\n</parameter>\n\
                <parameter=deep>\n{\"a\": [1]}\n</parameter>\n</function>\n</tool_call>";
    let arguments = r#"{"city": "New \"York\"", "days": 3, "unit": "5", "deep": {"a": [1]}}"#;
    check(format, call, "", &[("weather", arguments)]);
    check(format, &format!("First.\n\n{call}\n{call}"), "First.", &[("weather", arguments), ("weather", arguments)]);
    check(format, "<function=now>\n</function>", "", &[("now", "{}")]);
    check(format, "<function=weather><parameter=city>a < b</function>", "", &[("weather", r#"{"city": "a < b"}"#)]);
}

#[test]
fn pythonic_calls() {
    let format = &pythonic::FORMAT;
    check(
        format,
        r#"[weather(city='San "F", (x)', days=3, deep={'a': [True, None]}), now()]"#,
        "",
        &[("weather", r#"{"city": "San \"F\", (x)", "days": 3, "deep": {"a":[true,null]}}"#), ("now", "{}")],
    );
    check(format, "<|python_start|>[now()]<|python_end|>", "", &[("now", "{}")]);
    check(format, "[weather('Rom', 2)]", "", &[("weather", r#"{"city": "Rom", "days": 2}"#)]);
}

#[test]
fn only_so_many_calls_come_out() {
    let call = r#"<tool_call>{"name": "now", "arguments": {"a": 1}}</tool_call>"#;
    let mut parser = ToolParser::new(&hermes::FORMAT, tools(), 1);
    let events = parser.push(&format!("{call}\n{call}"));
    let expected = [
        ToolEvent::Call { index: 0, name: "now".into() },
        ToolEvent::Arguments { index: 0, text: r#"{"a": 1}"#.into() },
    ];
    assert_eq!(events, expected);
    assert!(parser.finish().is_empty());
    assert_eq!(parser.num_calls(), 1);
}

#[test]
fn formats_are_found_from_templates() {
    let of = |template: &str, token: &str| ToolFormat::of_model(Some(template), |asked| asked == token).name;
    assert_eq!(of("{% if tools %}<tool_call>{% endif %}", ""), "hermes");
    assert_eq!(of("<tool_call>\n<function=x>", ""), "qwen3_coder");
    assert_eq!(of("[TOOL_CALLS]", ""), "mistral");
    assert_eq!(of("Environment: ipython", ""), "llama3_json");
    assert_eq!(of("plain", "<|action_start|>"), "internlm");
    assert_eq!(of("plain", ""), "hermes");
    assert_eq!(ToolFormat::named("qwen3_xml").map(|format| format.name), Some("qwen3_coder"));
    assert_eq!(ToolFormat::named("nothing"), None);
    assert!(knows_tools("{%- if tools %}") && knows_tools("{{ tools | tojson }}"));
    assert!(!knows_tools("You have tools. {{ messages }}") && !knows_tools("{% set my_tools = 1 %}"));
}

/// Text that is full of what the formats look for.
fn answer() -> impl Strategy<Value = String> {
    let parts = [
        "<tool_call>",
        "</tool_call>",
        "\n",
        " ",
        "{",
        "}",
        "[",
        "]",
        "\"name\": \"now\"",
        "\"name\": \"weather\"",
        ", ",
        "\"arguments\": ",
        "\"parameters\": {\"a\": 1}",
        WEATHER,
        "<function=now>",
        "</function>",
        "<parameter=city>",
        "</parameter>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "<|action_start|><|plugin|>",
        "<|action_end|>",
        "<|python_tag|>",
        "now(",
        "city='x'",
        ")",
        "你",
        "é",
        "text",
        "\\\"",
        "<",
        "; ",
        r#"{"name": "now", "arguments": {}}"#,
        r#"{"name": "weather", "parameters": {"city": "}"}}"#,
    ];
    proptest::collection::vec(proptest::sample::select(parts.to_vec()), 0..16).prop_map(|parts| parts.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn any_cut_of_any_text_gives_the_same_answer(
        format in 0..FORMATS.len(),
        answer in answer(),
        cuts in proptest::collection::vec(any::<proptest::sample::Index>(), 0..8),
    ) {
        let format = FORMATS[format];
        let mut places: Vec<usize> = cuts.iter().map(|cut| answer.floor_char_boundary(cut.index(answer.len() + 1))).collect();
        places.extend([0, answer.len()]);
        places.sort_unstable();
        let pieces: Vec<&str> = places.windows(2).map(|cut| &answer[cut[0]..cut[1]]).collect();
        prop_assert_eq!(fold(format, &pieces), fold(format, &[&answer]));
    }

    #[test]
    fn text_without_marks_is_never_touched(format in 0..FORMATS.len(), text in "[a-zA-Z0-9 .,\n<>/=\"']{0,60}") {
        let format = FORMATS[format];
        prop_assume!(format.starts.iter().all(|start| !text.contains(start)));
        prop_assert_eq!(fold(format, &[&text]), Whole { text: text.clone(), calls: vec![] });
    }
}
