//! Values as Python prints them: chat templates were written against Jinja in Python.

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Error, ErrorKind};
use serde_json::ser::Formatter;

/// Widest indentation that a template may ask for.
const INDENT_MAX: usize = 64;

/// `str(value)`: `None`, `True` and `False` where Rust has `none`, `true` and `false`.
pub(super) fn to_text(value: &Value) -> String {
    match value.kind() {
        ValueKind::None => "None".into(),
        ValueKind::Bool if value.is_true() => "True".into(),
        ValueKind::Bool => "False".into(),
        _ => value.to_string(),
    }
}

/// Jinja's `tojson` as transformers sets it: `json.dumps(value, ensure_ascii=False, indent=indent)`, no HTML escapes.
pub(super) fn tojson(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let _ensure_ascii: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    if indent.is_some_and(|width| width > INDENT_MAX) {
        return Err(Error::new(ErrorKind::InvalidOperation, format!("tojson indents by at most {INDENT_MAX}")));
    }
    let failed = |source| Error::new(ErrorKind::BadSerialization, "tojson failed").with_source(source);
    let mut out = Vec::new();
    match indent {
        Some(width) => {
            let spaces = " ".repeat(width);
            let formatter = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            let mut serializer = serde_json::Serializer::with_formatter(&mut out, formatter);
            serde::Serialize::serialize(value, &mut serializer).map_err(failed)?;
        }
        None => {
            let mut serializer = serde_json::Serializer::with_formatter(&mut out, PythonSeparators);
            serde::Serialize::serialize(value, &mut serializer).map_err(failed)?;
        }
    }
    let text = String::from_utf8(out).map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    Ok(Value::from_safe_string(text))
}

/// `", "` and `": "`, as `json.dumps` writes them.
struct PythonSeparators;

impl Formatter for PythonSeparators {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}
