//! Parsers of tool calls: a byte that names the format, one for the cuts, and the text. The fold of the stream is the whole.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use phalanx_coordinator::text::tools::{Tool, ToolEvent, ToolFormat, ToolParser, Tools};
use phalanx_coordinator::text::ThoughtParser;
use serde_json::json;

static TOOLS: LazyLock<Tools> = LazyLock::new(|| {
    let tool = |name: &str, parameters| Tool { name: name.into(), description: None, parameters, strict: false };
    let weather = json!({"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}});
    [tool("weather", weather), tool("now", json!({"type": "object", "properties": {}}))].into()
});

type Whole = (String, Vec<(String, String)>);

fn take(whole: &mut Whole, events: Vec<ToolEvent>) {
    for event in events {
        match event {
            ToolEvent::Text(text) => whole.0.push_str(&text),
            ToolEvent::Call { index, name } => {
                assert_eq!(index, whole.1.len());
                whole.1.push((name, String::new()));
            }
            ToolEvent::Arguments { index, text } => {
                assert_eq!(index + 1, whole.1.len());
                whole.1[index].1.push_str(&text);
            }
        }
    }
}

fn fold<'a>(format: &'static ToolFormat, pieces: impl Iterator<Item = &'a str>) -> Whole {
    let mut parser = ToolParser::new(format, TOOLS.clone(), 8);
    let mut whole = Whole::default();
    for piece in pieces {
        take(&mut whole, parser.push(piece));
    }
    take(&mut whole, parser.finish());
    whole
}

fuzz_target!(|data: &[u8]| {
    let [format, width, text @ ..] = data else { return };
    let names = ToolFormat::names();
    let format = ToolFormat::named(names[*format as usize % names.len()]).expect("a format");
    let text = String::from_utf8_lossy(text);
    let whole = fold(format, [&*text].into_iter());
    let chars = text.char_indices().map(|(at, c)| &text[at..at + c.len_utf8()]);
    assert_eq!(fold(format, chars), whole, "by characters");
    let width = usize::from(*width) + 1;
    let mut rest = &*text;
    let pieces = std::iter::from_fn(|| {
        let cut = rest.ceil_char_boundary(width.min(rest.len()));
        let (piece, behind) = rest.split_at(cut);
        rest = behind;
        (!piece.is_empty()).then_some(piece)
    });
    assert_eq!(fold(format, pieces), whole, "by {width} bytes");
    let _ = ThoughtParser::is_opened_by(&text);
});
