//! Objects that declare their members have no others, unless their schema says so.
//!
//! A schema that leaves `additionalProperties` out allows any member, and a model that likes to go on would never close the
//! object. What is generated here still meets the schema: it is one of the objects that the schema allows.
//!
//! **Invariant:** a schema that can be met can still be met.

use serde_json::{Map, Value};

/// Keywords under which one object is described in several places, so that no single one of them declares all members.
const COMBINING: [&str; 9] =
    ["allOf", "not", "if", "then", "else", "dependentSchemas", "dependencies", "unevaluatedProperties", "$dynamicRef"];
/// The same where they stand beside declared members.
const BESIDE: [&str; 7] =
    ["anyOf", "oneOf", "$ref", "additionalProperties", "patternProperties", "minProperties", "propertyNames"];

/// The schema with its objects closed; as it was where it describes one object in several places.
pub(super) fn closed(schema: &Value) -> Value {
    close(schema).unwrap_or_else(|| schema.clone())
}

/// None where the schema combines others.
fn close(schema: &Value) -> Option<Value> {
    let Value::Object(members) = schema else { return Some(schema.clone()) };
    if COMBINING.iter().any(|keyword| members.contains_key(*keyword)) {
        return None;
    }
    let mut closed = Map::with_capacity(members.len() + 1);
    for (keyword, value) in members {
        let value = match (keyword.as_str(), value) {
            ("properties" | "$defs" | "definitions", Value::Object(named)) => {
                let each = named.iter().map(|(name, schema)| Some((name.clone(), close(schema)?)));
                Value::Object(each.collect::<Option<_>>()?)
            }
            ("anyOf" | "oneOf" | "prefixItems" | "items", Value::Array(list)) => {
                Value::Array(list.iter().map(close).collect::<Option<_>>()?)
            }
            ("items" | "additionalProperties", schema) => close(schema)?,
            (_, other) => other.clone(),
        };
        closed.insert(keyword.clone(), value);
    }
    if declares_all(members) {
        closed.insert("additionalProperties".into(), false.into());
    }
    Some(Value::Object(closed))
}

/// True where the members of an object stand here and nowhere else, and nothing is said of others.
fn declares_all(members: &Map<String, Value>) -> bool {
    let Some(Value::Object(declared)) = members.get("properties") else { return false };
    let required = members.get("required").and_then(Value::as_array);
    let is_declared = |name: &Value| name.as_str().is_some_and(|name| declared.contains_key(name));
    BESIDE.iter().all(|keyword| !members.contains_key(*keyword))
        && required.is_none_or(|names| names.iter().all(is_declared))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(schema: Value, expected: Value) {
        assert_eq!(closed(&schema), expected, "{schema}");
    }

    fn check_kept(schema: Value) {
        check(schema.clone(), schema);
    }

    #[test]
    fn objects_that_declare_their_members_are_closed() {
        check(
            json!({"type": "object", "properties": {"a": {}}}),
            json!({"type": "object", "properties": {"a": {}}, "additionalProperties": false}),
        );
        let inner = json!({"properties": {"x": {"type": "string"}}, "required": ["x"]});
        let inner_closed =
            json!({"properties": {"x": {"type": "string"}}, "required": ["x"], "additionalProperties": false});
        check(
            json!({"$defs": {"I": inner}, "items": {"anyOf": [{"$ref": "#/$defs/I"}, inner]}}),
            json!({"$defs": {"I": inner_closed}, "items": {"anyOf": [{"$ref": "#/$defs/I"}, inner_closed]}}),
        );
        // A member may have the name of a keyword.
        check(
            json!({"properties": {"not": {"type": "null"}}}),
            json!({"properties": {"not": {"type": "null"}}, "additionalProperties": false}),
        );
    }

    #[test]
    fn what_says_more_is_left_as_it_is() {
        check_kept(json!({"type": "object"}));
        check_kept(json!({"properties": {"a": {}}, "additionalProperties": true}));
        check_kept(json!({"properties": {"a": {}}, "patternProperties": {"^x": {}}}));
        check_kept(json!({"properties": {"a": {}}, "required": ["b"]}));
        check_kept(json!({"properties": {"a": {}}, "minProperties": 2}));
        check_kept(json!({"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}));
        check_kept(json!({"properties": {"a": {}}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]}));
        check_kept(json!(true));
    }
}
