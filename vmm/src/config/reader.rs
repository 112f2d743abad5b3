//! Serde over a [`Node`] tree, with errors that say where and what would be accepted.
//!
//! Each deserializer knows its node and its key; the innermost one that sees an error adds both. Serde's own messages speak
//! of Rust types; those of [`ReadError`] speak of what to write.

use std::fmt::{self, Display};
use std::marker::PhantomData;
use std::rc::Rc;

use serde::de::value::StrDeserializer;
use serde::de::{
    DeserializeSeed, Deserializer, EnumAccess, Expected, MapAccess, SeqAccess, Unexpected, Visitor,
};
use serde::forward_to_deserialize_any;

use super::document::{Entry, Node, Value};
use super::error::{ConfigError, Place};
use super::suggest::did_you_mean;

/// Reads a `T` from the whole tree.
pub(super) fn read<T: serde::de::DeserializeOwned>(root: &Node) -> Result<T, ConfigError> {
    let key = Key {
        parent: None,
        part: "",
    };
    read_node(root, key, PhantomData).map_err(|error| {
        let (place, key) = error
            .at
            .unwrap_or_else(|| (Rc::clone(&root.place), String::new()));
        ConfigError::Value {
            place: (*place).clone(),
            key,
            message: error.message,
        }
    })
}

/// Reads one value; errors that do not name a deeper place get this one.
fn read_node<'de, S: DeserializeSeed<'de>>(
    node: &Node,
    key: Key<'_>,
    seed: S,
) -> Result<S::Value, ReadError> {
    seed.deserialize(NodeReader { node, key }).map_err(|error| {
        let place = match error.missing {
            Some(_) => &node.place,
            None => blamed(node),
        };
        error.or_at(place, &key)
    })
}

/// Where to look for what is wrong with a value as a whole: a table that an override has changed was changed there.
fn blamed(node: &Node) -> &Rc<Place> {
    let Value::Table(table) = &node.value else {
        return &node.place;
    };
    let mut places = table.values().map(|entry| &entry.node.place);
    places
        .find(|place| matches!(***place, Place::Override(_)))
        .unwrap_or(&node.place)
}

#[derive(Debug)]
pub(super) struct ReadError {
    message: String,
    /// The key that is missing in the table where the error is found.
    missing: Option<&'static str>,
    at: Option<(Rc<Place>, String)>,
}

impl ReadError {
    fn new(message: String) -> Self {
        Self {
            message,
            missing: None,
            at: None,
        }
    }

    fn or_at(mut self, place: &Rc<Place>, key: &Key<'_>) -> Self {
        if self.at.is_none() {
            let key = match self.missing {
                Some(part) => Key {
                    parent: Some(key),
                    part,
                }
                .to_string(),
                None => key.to_string(),
            };
            self.at = Some((Rc::clone(place), key));
        }
        self
    }
}

impl Display for ReadError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.message)
    }
}

impl std::error::Error for ReadError {}

impl serde::de::Error for ReadError {
    fn custom<T: Display>(message: T) -> Self {
        Self::new(message.to_string())
    }

    fn invalid_type(unexpected: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::new(format!(
            "expected {}, found {}",
            in_words(&expected.to_string()),
            found(unexpected)
        ))
    }

    fn invalid_value(unexpected: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::invalid_type(unexpected, expected)
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        Self::new(format!(
            "`{variant}` is not known here; {}",
            choices(variant, expected, "use ")
        ))
    }

    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        Self::new(format!(
            "unknown key; {}",
            choices(field, expected, "known here: ")
        ))
    }

    fn missing_field(field: &'static str) -> Self {
        Self {
            missing: Some(field),
            ..Self::new("is missing".to_owned())
        }
    }

    fn duplicate_field(field: &'static str) -> Self {
        Self::new(format!("`{field}` is given twice"))
    }
}

/// The nearest choice if there is a near one, and all choices.
fn choices(written: &str, expected: &[&str], lead: &str) -> String {
    let all = expected
        .iter()
        .map(|choice| format!("`{choice}`"))
        .collect::<Vec<_>>()
        .join(", ");
    match did_you_mean(written, expected) {
        Some(near) => format!("did you mean `{near}`? ({lead}{all})"),
        None => format!("{lead}{all}"),
    }
}

/// What serde calls by Rust's names, in the words of a configuration.
fn in_words(expected: &str) -> String {
    match expected {
        "a boolean" => "true or false",
        "a string" | "path string" | "string or map" => "a text in quotes",
        "u8" => "a whole number from 0 to 255",
        "u16" => "a whole number from 0 to 65535",
        "u32" => "a whole number from 0 to 4294967295",
        "u64" => "a whole number, not negative",
        "a sequence" => "a list in [ ]",
        other if other.starts_with("struct ") => "a table",
        other => other,
    }
    .to_owned()
}

fn found(unexpected: Unexpected<'_>) -> String {
    match unexpected {
        Unexpected::Str(text) => format!("the text \"{text}\""),
        Unexpected::Unsigned(number) => format!("the number {number}"),
        Unexpected::Signed(number) => format!("the number {number}"),
        Unexpected::Float(number) => format!("the number {number:?}"),
        Unexpected::Bool(value) => format!("{value}"),
        Unexpected::Seq => "a list".to_owned(),
        Unexpected::Map => "a table".to_owned(),
        other => other.to_string(),
    }
}

/// A key with dots, as a list of parts that live on the stack.
#[derive(Clone, Copy)]
struct Key<'a> {
    parent: Option<&'a Key<'a>>,
    part: &'a str,
}

impl Display for Key<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(parent) = self.parent {
            parent.fmt(formatter)?;
            if parent.parent.is_some() {
                formatter.write_str(".")?;
            }
        }
        formatter.write_str(self.part)
    }
}

struct NodeReader<'a> {
    node: &'a Node,
    key: Key<'a>,
}

impl NodeReader<'_> {
    fn visit<'de, V: Visitor<'de>>(&self, visitor: V) -> Result<V::Value, ReadError> {
        match &self.node.value {
            Value::Text(text) => visitor.visit_str(text),
            Value::Integer(number) => match (u64::try_from(*number), i64::try_from(*number)) {
                (Ok(number), _) => visitor.visit_u64(number),
                (_, Ok(number)) => visitor.visit_i64(number),
                _ => Err(ReadError::new(format!(
                    "the number {number} is beyond every limit"
                ))),
            },
            Value::Float(number) => visitor.visit_f64(*number),
            Value::Bool(value) => visitor.visit_bool(*value),
            Value::Date(date) => Err(ReadError::new(format!(
                "{date} is a date; put it into quotes if it is a text"
            ))),
            Value::Array(items) => visitor.visit_seq(Items {
                items: items.iter(),
                index: 0,
                key: &self.key,
            }),
            Value::Table(table) => visitor.visit_map(Entries {
                entries: table.iter(),
                current: None,
                key: &self.key,
            }),
        }
    }
}

impl<'de> Deserializer<'de> for NodeReader<'_> {
    type Error = ReadError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        self.visit(visitor)
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        match &self.node.raw {
            Some(raw) => visitor.visit_str(raw),
            None => self.deserialize_any(visitor),
        }
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        self.deserialize_str(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, ReadError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ReadError> {
        let text = match (&self.node.raw, &self.node.value) {
            (Some(raw), _) => raw,
            (None, Value::Text(text)) => text,
            (None, other) => {
                let choices = choices("", variants, "use ");
                let message = format!(
                    "expected a text in quotes, found {}; {choices}",
                    other.type_name()
                );
                return Err(ReadError::new(message));
            }
        };
        visitor.visit_enum(Choice(text))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char bytes byte_buf unit unit_struct seq tuple
        tuple_struct map struct identifier ignored_any
    }
}

/// An enum without contents, from its name.
struct Choice<'a>(&'a str);

impl<'de> EnumAccess<'de> for Choice<'_> {
    type Error = ReadError;
    type Variant = NoContents;

    fn variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<(S::Value, NoContents), ReadError> {
        seed.deserialize(StrDeserializer::new(self.0))
            .map(|value| (value, NoContents))
    }
}

struct NoContents;

impl<'de> serde::de::VariantAccess<'de> for NoContents {
    type Error = ReadError;

    fn unit_variant(self) -> Result<(), ReadError> {
        Ok(())
    }

    fn newtype_variant_seed<S: DeserializeSeed<'de>>(self, _seed: S) -> Result<S::Value, ReadError> {
        Err(ReadError::new("needs contents".to_owned()))
    }

    fn tuple_variant<V: Visitor<'de>>(self, _length: usize, _visitor: V) -> Result<V::Value, ReadError> {
        Err(ReadError::new("needs contents".to_owned()))
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        _fields: &'static [&'static str],
        _visitor: V,
    ) -> Result<V::Value, ReadError> {
        Err(ReadError::new("needs contents".to_owned()))
    }
}

struct Items<'a> {
    items: std::slice::Iter<'a, Node>,
    index: usize,
    key: &'a Key<'a>,
}

impl<'de> SeqAccess<'de> for Items<'_> {
    type Error = ReadError;

    fn next_element_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, ReadError> {
        let Some(node) = self.items.next() else {
            return Ok(None);
        };
        let part = self.index.to_string();
        self.index += 1;
        let key = Key {
            parent: Some(self.key),
            part: &part,
        };
        read_node(node, key, seed).map(Some)
    }
}

struct Entries<'a> {
    entries: std::collections::btree_map::Iter<'a, String, Entry>,
    current: Option<(&'a str, &'a Entry)>,
    key: &'a Key<'a>,
}

impl<'de> MapAccess<'de> for Entries<'_> {
    type Error = ReadError;

    fn next_key_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, ReadError> {
        let Some((name, entry)) = self.entries.next() else {
            return Ok(None);
        };
        self.current = Some((name, entry));
        let key = Key {
            parent: Some(self.key),
            part: name,
        };
        seed.deserialize(StrDeserializer::new(name))
            .map(Some)
            .map_err(|error: ReadError| error.or_at(&entry.key_place, &key))
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, ReadError> {
        let Some((name, entry)) = self.current.take() else {
            return Err(ReadError::new("a value was asked for before its key".to_owned()));
        };
        let key = Key {
            parent: Some(self.key),
            part: name,
        };
        read_node(&entry.node, key, seed)
    }
}
