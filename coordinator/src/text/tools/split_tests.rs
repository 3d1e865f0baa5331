//! Answers made to order in every format: however they are cut, by characters, by bytes or by the tokens of a vocabulary, what
//! comes out is what was called, to the last brace.

use std::path::Path;
use std::sync::LazyLock;

use proptest::prelude::*;
use serde_json::{Map, json};

use super::tests::{Whole, fold};
use super::*;
use crate::text::{Detokenizer, Tokenizer};

/// Vocabularies whose pieces cut the answers: byte-level, byte-level of the tiny models, and with byte fallback.
static VOCABULARIES: LazyLock<Vec<Arc<Tokenizer>>> = LazyLock::new(|| {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens");
    let read = |name: &str| {
        let bytes = std::fs::read(goldens.join(name).join("tokenizer.json")).expect("part of the repository");
        Arc::new(Tokenizer::from_json(&bytes, None).expect("a tokenizer"))
    };
    ["tokenizers/tiny-bpe", "tiny-llama", "tokenizers/tiny-spm"].into_iter().map(read).collect()
});

/// Any JSON, with what formats stumble over in its texts.
fn value() -> impl Strategy<Value = Value> {
    let text = proptest::sample::select(
        &[
            "",
            "a",
            "San Francisco",
            "你好",
            "é😀",
            "\"",
            "\\",
            "\\\"}",
            "\n",
            "{",
            "}]",
            "</tool_call>",
            "<b>",
            "'",
            "a, b=",
            "]</",
            "[TOOL_CALLS]",
            "\u{7f}\u{1}",
            "True",
            "3",
            "a < b > c",
            "<|eom",
            "(x)",
        ][..],
    );
    let texts = proptest::collection::vec(text, 0..3).prop_map(|parts| Value::from(parts.concat()));
    let leaf = prop_oneof![
        texts,
        any::<i32>().prop_map(Value::from),
        any::<bool>().prop_map(Value::from),
        Just(Value::Null),
        (-1000..1000).prop_map(|n| json!(f64::from(n) / 8.0)),
    ];
    leaf.prop_recursive(3, 12, 3, |inner| {
        let members = proptest::collection::vec(("[a-c\"}]{1,3}", inner.clone()), 0..3);
        prop_oneof![
            proptest::collection::vec(inner, 0..3).prop_map(Value::from),
            members.prop_map(|members| Value::Object(members.into_iter().collect())),
        ]
    })
}

/// The arguments of a call: the names are those of variables, as XML and Python need them.
fn arguments() -> impl Strategy<Value = Map<String, Value>> {
    proptest::collection::btree_map("[a-z_]{1,6}", value(), 0..4).prop_map(|members| members.into_iter().collect())
}

type Call = (String, Map<String, Value>);

fn calls() -> impl Strategy<Value = Vec<Call>> {
    let name = proptest::sample::select(&["weather", "now"][..]).prop_map(str::to_owned);
    proptest::collection::vec((name, arguments()), 1..4)
}

/// A value as Python writes it.
fn python(value: &Value) -> String {
    match value {
        Value::Null => "None".into(),
        Value::Bool(true) => "True".into(),
        Value::Bool(false) => "False".into(),
        Value::Number(number) => number.to_string(),
        // JSON's escapes are Python's too.
        Value::String(string) => Value::from(string.as_str()).to_string(),
        Value::Array(items) => format!("[{}]", items.iter().map(python).collect::<Vec<_>>().join(", ")),
        Value::Object(members) => {
            let members: Vec<String> = members
                .iter()
                .map(|(key, value)| format!("{}: {}", Value::from(key.as_str()), python(value)))
                .collect();
            format!("{{{}}}", members.join(", "))
        }
    }
}

/// A value as it stands between tags.
fn bare(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// Calls as a model of the format writes them.
fn written(format: &ToolFormat, calls: &[Call]) -> String {
    let one = |(name, arguments): &Call| match format.body {
        Body::Json => json!({"name": name, format.arguments_key: arguments}).to_string(),
        Body::Xml => {
            let parameters =
                arguments.iter().map(|(key, value)| format!("<parameter={key}>\n{}\n</parameter>\n", bare(value)));
            format!("<function={name}>\n{}</function>", parameters.collect::<String>())
        }
        Body::Python => {
            let arguments: Vec<String> =
                arguments.iter().map(|(key, value)| format!("{key}={}", python(value))).collect();
            format!("{name}({})", arguments.join(", "))
        }
    };
    let all: Vec<String> = calls.iter().map(one).collect();
    if format.each {
        let all: Vec<String> = all.iter().map(|one| format!("{}{one}{}", format.open, format.close)).collect();
        all.join(format.between)
    } else {
        format!("{}{}{}", format.open, all.join(format.between), format.close)
    }
}

/// What a tag cannot hold: its own end, and white space at the edges of a bare text.
fn fits_tags(value: &Value) -> bool {
    let text = bare(value);
    !text.contains("</") && text.trim() == text && value.as_str().is_none_or(|_| !text.is_empty())
}

/// The pieces in which a vocabulary streams a text.
fn pieces(tokenizer: &Arc<Tokenizer>, text: &str) -> Vec<String> {
    let tokens = tokenizer.encode(text, false).expect("tokens");
    let mut detokenizer = Detokenizer::new(Arc::clone(tokenizer), false);
    let mut pieces: Vec<String> = tokens.into_iter().map(|token| detokenizer.push(token)).collect();
    pieces.push(detokenizer.finish());
    pieces
}

fn views(pieces: &[String]) -> Vec<&str> {
    pieces.iter().map(String::as_str).collect()
}

/// The whole answer, after checking that no cut of it changes anything.
fn checked(format: &'static ToolFormat, answer: &str, cuts: &[prop::sample::Index]) -> Whole {
    let whole = fold(format, &[answer]);
    let chars: Vec<String> = answer.chars().map(String::from).collect();
    assert_eq!(fold(format, &views(&chars)), whole, "{answer:?} by characters");
    for (at, _) in answer.char_indices() {
        assert_eq!(fold(format, &[&answer[..at], &answer[at..]]), whole, "{answer:?} cut at {at}");
    }
    let mut places: Vec<usize> =
        cuts.iter().map(|cut| answer.floor_char_boundary(cut.index(answer.len() + 1))).collect();
    places.extend([0, answer.len()]);
    places.sort_unstable();
    let parts: Vec<&str> = places.windows(2).map(|cut| &answer[cut[0]..cut[1]]).collect();
    assert_eq!(fold(format, &parts), whole, "{answer:?} cut at {places:?}");
    for tokenizer in VOCABULARIES.iter() {
        let pieces = pieces(tokenizer, answer);
        // A vocabulary may normalise: its own text is the answer then.
        let whole = fold(format, &[&pieces.concat()]);
        assert_eq!(fold(format, &views(&pieces)), whole, "{answer:?} by tokens {pieces:?}");
        for at in 0..=pieces.len() {
            let halves = [pieces[..at].concat(), pieces[at..].concat()];
            assert_eq!(fold(format, &views(&halves)), whole, "{pieces:?} cut at token {at}");
        }
    }
    whole
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn calls_come_out_as_they_were_made_however_the_stream_is_cut(
        format in 0..FORMATS.len(),
        calls in calls(),
        before in proptest::sample::select(&["", "I look. ", "你好\n"][..]),
        cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..8),
    ) {
        let format = FORMATS[format];
        if format.body == Body::Xml {
            prop_assume!(calls.iter().all(|(_, arguments)| arguments.values().all(fits_tags)));
        }
        // Without an opening text a call stands alone.
        let before = if format.open.starts_with(format.starts[0]) { before } else { "" };
        let whole = checked(format, &format!("{before}{}", written(format, &calls)), &cuts);
        let made: Vec<Call> = whole.calls.iter().map(|(name, arguments)| {
            let arguments = serde_json::from_str(arguments).expect("arguments are an object");
            (name.clone(), arguments)
        }).collect();
        if format.body == Body::Xml {
            // Bare values say no type: what is text and what is not is the schema's to tell.
            let texts = |calls: &[Call]| -> Vec<Vec<String>> {
                calls.iter().map(|(_, arguments)| arguments.values().map(bare).collect()).collect()
            };
            prop_assert_eq!(texts(&made), texts(&calls));
        } else {
            prop_assert_eq!(&made, &calls);
        }
        prop_assert_eq!(whole.text.trim_end(), before.trim_end());
    }

    #[test]
    fn a_call_that_is_cut_off_streams_as_it_ends(
        format in 0..FORMATS.len(),
        calls in calls(),
        end in any::<prop::sample::Index>(),
        cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..4),
    ) {
        let format = FORMATS[format];
        let answer = written(format, &calls);
        let answer = &answer[..answer.floor_char_boundary(end.index(answer.len() + 1))];
        checked(format, answer, &cuts);
    }
}
