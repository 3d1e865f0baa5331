//! Grammars over the tiny model's vocabulary, walked at random.

use std::path::Path;
use std::time::Duration;

use phalanx_formats::ModelFiles;
use phalanx_proto::TokenMask;
use serde_json::{Value, json};

use super::*;
use crate::engine::NextTokens;

/// Rows of the tiny model's logits.
const VOCAB_SIZE: u32 = 515;
/// Its end token.
const END: TokenId = TokenId(511);

pub(in crate::constraint) fn text() -> TextModel {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/tiny-llama");
    TextModel::load(&ModelFiles::open(&folder).unwrap()).unwrap()
}

pub(in crate::constraint) fn compiler() -> GrammarCompiler {
    GrammarCompiler::new(Arc::new(text()), VOCAB_SIZE, vec![END])
}

/// A small generator of random numbers; each seed gives another walk.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % limit
    }
}

fn allowed(next: &NextTokens) -> Vec<u32> {
    let NextTokens::Only(words) = next else { panic!("{next:?}") };
    (0..VOCAB_SIZE + 64).filter(|token| TokenMask::allows(words, *token)).collect()
}

/// Draws tokens at random among those that are allowed. Gives the text, and whether it is complete.
pub(in crate::constraint) fn walk(
    text: &TextModel,
    constraint: &Constraint,
    seed: u64,
    num_tokens_max: usize,
) -> (String, bool) {
    let mut dice = Dice(seed);
    let mut constraint = constraint.clone();
    let mut tokens = Vec::new();
    while tokens.len() < num_tokens_max {
        if *constraint.next() == NextTokens::Done {
            return (text.decode(&tokens, true), true);
        }
        let choices = allowed(constraint.next());
        assert!(choices.iter().all(|token| *token < VOCAB_SIZE));
        let token = TokenId(choices[dice.below(choices.len())]);
        if token == END {
            return (text.decode(&tokens, true), true);
        }
        tokens.push(token);
        constraint = constraint.commit(token).unwrap();
    }
    (text.decode(&tokens, true), false)
}

pub(in crate::constraint) fn bounded_schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 12},
            "days": {"type": "integer", "minimum": 1, "maximum": 14},
            "unit": {"enum": ["celsius", "fahrenheit"]},
            "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        },
        "required": ["city", "days"],
        "additionalProperties": false,
    })
}

pub(in crate::constraint) fn check_bounded(value: &Value) {
    let object = value.as_object().unwrap();
    assert!(object["city"].as_str().unwrap().chars().count() <= 12, "{value}");
    assert!((1..=14).contains(&object["days"].as_i64().unwrap()), "{value}");
    assert!(object.get("unit").is_none_or(|unit| unit == "celsius" || unit == "fahrenheit"), "{value}");
    assert!(object.get("tags").is_none_or(|tags| tags.as_array().unwrap().len() <= 3), "{value}");
    assert!(object.keys().all(|key| ["city", "days", "unit", "tags"].contains(&key.as_str())), "{value}");
}

#[tokio::test]
async fn random_tokens_within_a_schema_make_json_of_the_schema() {
    let (text, compiler) = (text(), compiler());
    let constraint = compiler.compile(Grammar::JsonSchema(bounded_schema()), None).await.unwrap();
    let mut num_complete = 0;
    for seed in 0..200 {
        let (json, complete) = walk(&text, &constraint, seed, 400);
        if complete {
            num_complete += 1;
            check_bounded(&serde_json::from_str(&json).unwrap_or_else(|error| panic!("{error}: {json:?}")));
        }
    }
    assert!(num_complete > 150, "{num_complete} of 200 came to an end");
}

#[tokio::test]
async fn local_references_are_followed() {
    let schema = json!({
        "$defs": {"Step": {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
            "required": ["n"], "additionalProperties": false}},
        "type": "object", "properties": {"steps": {"type": "array", "items": {"$ref": "#/$defs/Step"}, "maxItems": 2}},
        "required": ["steps"], "additionalProperties": false,
    });
    let (text, constraint) = (text(), compiler().compile(Grammar::JsonSchema(schema), None).await.unwrap());
    for seed in 0..20 {
        let (json, complete) = walk(&text, &constraint, seed, 400);
        assert!(complete, "{json}");
        let value: Value = serde_json::from_str(&json).unwrap();
        assert!(value["steps"].as_array().unwrap().iter().all(|step| step["n"].as_u64().unwrap() < 10));
    }
}

#[tokio::test]
async fn every_kind_of_grammar_holds_the_text() {
    let (text, compiler) = (text(), compiler());
    let lark = r#"start: greeting " " NAME
greeting: "hello" | "bye"
NAME: /[a-z]{1,5}/"#;
    let cases = [
        (Grammar::Regex(r"[0-9]{3}-[0-9]{2}".into()), r"^\d\d\d-\d\d$"),
        (Grammar::Choice(vec!["yes".into(), "no\"\\\n".into()]), ""),
        (Grammar::Lark(lark.into()), ""),
    ];
    for (grammar, _) in cases {
        let constraint = compiler.compile(grammar.clone(), None).await.unwrap();
        for seed in 0..20 {
            let (said, complete) = walk(&text, &constraint, seed, 60);
            assert!(complete, "{said:?}");
            let fits = match &grammar {
                Grammar::Regex(_) => {
                    said.len() == 6
                        && said.bytes().enumerate().all(|(at, b)| b.is_ascii_digit() || at == 3 && b == b'-')
                }
                Grammar::Choice(choices) => choices.contains(&said),
                _ => said.starts_with("hello ") || said.starts_with("bye "),
            };
            assert!(fits, "{grammar:?} {said:?}");
        }
    }
}

#[tokio::test]
async fn any_object_is_an_object() {
    let (text, constraint) = (text(), compiler().compile(Grammar::JsonObject, None).await.unwrap());
    for seed in 0..20 {
        let (json, complete) = walk(&text, &constraint, seed, 600);
        assert!(json.starts_with('{') || json.starts_with(|c: char| c.is_whitespace()), "{json:?}");
        let read = serde_json::from_str::<Value>(&json);
        // JSON's numbers have no bounds, and the reader's have.
        let fits = read.map_or_else(|error| error.to_string().contains("out of range"), |value| value.is_object());
        assert!(!complete || fits, "{json:?}");
    }
}

#[tokio::test]
async fn what_cannot_be_compiled_is_refused_with_a_reason() {
    let compiler = compiler();
    let bad = [
        Grammar::Lark("start: nothing".into()),
        Grammar::Lark("start: \"a".into()),
        Grammar::Lark("start: start".into()),
        Grammar::Regex("(".into()),
        Grammar::Regex("[z-a]".into()),
        Grammar::Regex(r"(?=x)y".into()),
        Grammar::JsonSchema(json!({"type": "nothing"})),
        Grammar::JsonSchema(json!({"type": "integer", "minimum": 5, "maximum": 4})),
        Grammar::JsonSchema(json!({"$ref": "http://example.com/x"})),
        Grammar::JsonSchema(json!({"$ref": "#/$defs/missing"})),
        Grammar::JsonSchema(json!(false)),
        Grammar::JsonSchema(json!(7)),
    ];
    for grammar in bad {
        let refused = compiler.compile(grammar.clone(), None).await;
        assert!(matches!(refused, Err(GrammarError::Invalid { .. })), "{grammar:?}: {refused:?}");
    }
    assert!(compiler.compile(Grammar::Choice(vec!["a".into()]), None).await.is_ok(), "the next one is not hurt");
}

/// Processor time of this thread so far: unlike the clock it does not run faster on a busy machine.
fn processor_time() -> Duration {
    const TICK: Duration = Duration::from_millis(10);
    let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
    // Behind the name, which may hold anything: time in user mode and in the kernel are the 12th and 13th field.
    let fields = stat.rsplit_once(") ").unwrap().1.split(' ').skip(11).take(2);
    fields.map(|ticks| TICK * ticks.parse::<u32>().unwrap()).sum()
}

#[test]
fn costly_grammars_end_in_time() {
    let compiler = compiler();
    let rules: String = (0..1500).map(|at| format!("r{at}: \"a\" r{}\n", at + 1)).collect();
    let costly = [
        Grammar::Regex("((a{1,1000}){1,1000}){1,1000}".into()),
        Grammar::Regex("(x+x+)+y".into()),
        Grammar::Regex("(.*a){25}".into()),
        Grammar::Regex("(a|b|ab)*c(a|b|ab)*d.{0,500}".into()),
        Grammar::Lark(format!("start: r0\n{rules}r1500: \"b\"")),
        Grammar::Lark(format!("start: {}", "\"a\" ".repeat(8000))),
        Grammar::Lark(format!("start: {}", "\"a\"? ".repeat(5000))),
    ];
    for grammar in costly {
        let shared = Arc::clone(&compiler.shared);
        let work = move || {
            let started = processor_time();
            let compiled = grammar.check().and_then(|()| shared.constraint(&grammar, None));
            (processor_time() - started, compiled.err())
        };
        let thread = std::thread::Builder::new().stack_size(COMPILE_STACK_BYTES).spawn(work).unwrap();
        let (used, error) = thread.join().unwrap();
        assert!(used < COMPILE_DEADLINE, "{used:?} {error:?}");
    }
}

#[tokio::test]
async fn a_grammar_may_begin_behind_the_thoughts() {
    let thoughts_end = TokenId(300);
    let constraint = compiler()
        .compile(Grammar::Choice(vec!["yes".into()]), Some(Thoughts { start: None, end: thoughts_end }))
        .await
        .unwrap();
    assert_eq!(*constraint.next(), NextTokens::Any);
    let thinking = constraint.commit(TokenId(5)).unwrap();
    assert_eq!(*thinking.next(), NextTokens::Any);
    let answering = thinking.commit(thoughts_end).unwrap();
    let choices = allowed(answering.next());
    assert!(!choices.is_empty() && choices.iter().all(|token| "yes".starts_with(&text().token_text(TokenId(*token)))));
}

#[tokio::test]
async fn the_first_token_may_say_whether_there_are_thoughts() {
    let (start, end) = (TokenId(299), TokenId(300));
    let thoughts = Some(Thoughts { start: Some(start), end });
    let constraint = compiler().compile(Grammar::Choice(vec!["yes".into()]), thoughts).await.unwrap();
    let choices = allowed(constraint.next());
    assert!(choices.contains(&start.0) && choices.len() < 10, "{choices:?}");
    assert_eq!(*constraint.clone().commit(start).unwrap().next(), NextTokens::Any);
    let token = text().encode("yes", false).unwrap()[0];
    assert!(!allowed(constraint.commit(token).unwrap().next()).contains(&start.0));
}

#[tokio::test]
async fn rolled_back_tokens_leave_no_trace() {
    let compiler = compiler();
    let thoughts_end = TokenId(300);
    for end in [None, Some(thoughts_end)] {
        let shared = &compiler.shared;
        let grammar = Grammar::Choice(vec!["yesterday".into()]);
        compiler.compile(grammar.clone(), None).await.unwrap();
        let library = shared.library.get().unwrap().as_ref().unwrap();
        let matcher = Matcher::new(library.factory.create_parser(grammar.to_library()));
        let mut rules: Box<dyn TokenConstraint> =
            Box::new(GrammarConstraint::new(matcher, Arc::clone(&library.vocabulary)));
        if let Some(end) = end {
            rules = Box::new(AfterThoughts::new(Thoughts { start: None, end }, rules));
            rules.commit(TokenId(7)).unwrap();
            rules.commit(end).unwrap();
        }
        let before = rules.mask().unwrap();
        for token in text().encode("yes", false).unwrap() {
            rules.commit(token).unwrap();
        }
        assert_ne!(rules.mask().unwrap(), before);
        rules.rollback(text().encode("yes", false).unwrap().len()).unwrap();
        assert_eq!(rules.mask().unwrap(), before);
        if end.is_some() {
            rules.rollback(1).unwrap();
            assert_eq!(rules.mask().unwrap(), NextTokens::Any);
            assert!(rules.rollback(2).is_err());
        }
    }
}

#[tokio::test]
async fn equal_grammars_are_compiled_once() {
    let compiler = compiler();
    for _ in 0..3 {
        compiler.compile(Grammar::JsonSchema(bounded_schema()), None).await.unwrap();
    }
    assert_eq!(compiler.shared.compiled.lock().unwrap().len(), 1);
}
