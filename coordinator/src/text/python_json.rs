//! Values as Python prints them: chat templates were written against Jinja in Python.

use std::fmt::{self, Write};
use std::io;

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Error, ErrorKind};
use serde_json::ser::Formatter;

/// Widest indentation that a template may ask for.
const INDENT_MAX: usize = 64;

/// Longest text that a template may make of one value: lists can be longer than memory without holding anything.
const TEXT_BYTES_MAX: usize = 32 << 20;

/// Most members of lists and objects that one value may have in all, and its deepest nesting.
const MEMBERS_MAX: usize = 4 << 20;
const NESTING_MAX: usize = 128;

/// `str(value)`: `None`, `True` and `False` where Rust has `none`, `true` and `false`.
///
/// # Errors
/// The text is longer than [`TEXT_BYTES_MAX`].
pub(super) fn to_text(value: &Value) -> Result<String, Error> {
    Ok(match value.kind() {
        ValueKind::None => "None".into(),
        ValueKind::Bool if value.is_true() => "True".into(),
        ValueKind::Bool => "False".into(),
        _ => {
            check_size(value)?;
            let mut out = Bounded::default();
            write!(out, "{value}").map_err(|_| too_long())?;
            out.text()?
        }
    })
}

/// Refuses what would take for ever to write: printing a list goes on to its end, whatever its writer says.
fn check_size(value: &Value) -> Result<(), Error> {
    let mut left = MEMBERS_MAX;
    if fits(value, &mut left, NESTING_MAX) { Ok(()) } else { Err(too_long()) }
}

fn fits(value: &Value, left: &mut usize, levels: usize) -> bool {
    if !matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable | ValueKind::Map) {
        return true;
    }
    // What does not know its length is not walked when it is written either.
    let Some(rest) = value.len().map_or(Some(*left), |len| left.checked_sub(len)) else { return false };
    *left = rest;
    if levels == 0 {
        return false;
    }
    let is_map = value.kind() == ValueKind::Map;
    let Ok(mut members) = value.try_iter() else { return true };
    members.all(|member| {
        let member = if is_map { value.get_item(&member).unwrap_or(Value::UNDEFINED) } else { member };
        fits(&member, left, levels - 1)
    })
}

fn too_long() -> Error {
    Error::new(ErrorKind::InvalidOperation, "a value's text is too long")
}

/// Text up to its limit.
#[derive(Default)]
struct Bounded(Vec<u8>);

impl Bounded {
    fn text(self) -> Result<String, Error> {
        String::from_utf8(self.0).map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))
    }
}

impl fmt::Write for Bounded {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        io::Write::write_all(self, text.as_bytes()).map_err(|_| fmt::Error)
    }
}

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > TEXT_BYTES_MAX {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
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
    check_size(value)?;
    let failed = |source| Error::new(ErrorKind::BadSerialization, "tojson failed").with_source(source);
    let mut out = Bounded::default();
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
    Ok(Value::from_safe_string(out.text()?))
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
