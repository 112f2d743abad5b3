//! A parsed configuration that remembers where each value was written: a line of the file or an override.
//!
//! The `toml` crate gives values with byte ranges; here they become [`Node`]s with a [`Place`], so that values from the file
//! and from `--set` live in one tree and errors can name their origin.

use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::error::{ConfigError, Place};

/// A table: per key where the key stands, and its value.
pub(super) type Table = BTreeMap<String, Entry>;

#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) key_place: Rc<Place>,
    pub(super) node: Node,
}

#[derive(Debug, Clone)]
pub(super) struct Node {
    pub(super) place: Rc<Place>,
    pub(super) value: Value,
    /// The text of a scalar on the command line, where quotes are not to be asked for: `--set name=7` is a text if a text
    /// is wanted.
    pub(super) raw: Option<String>,
}

#[derive(Debug, Clone)]
pub(super) enum Value {
    Text(String),
    Integer(i128),
    Float(f64),
    Bool(bool),
    Date(String),
    Array(Vec<Node>),
    Table(Table),
}

impl Value {
    pub(super) fn type_name(&self) -> &'static str {
        match self {
            Self::Text(_) => "text",
            Self::Integer(_) => "a whole number",
            Self::Float(_) => "a number",
            Self::Bool(_) => "a truth value",
            Self::Date(_) => "a date",
            Self::Array(_) => "a list",
            Self::Table(_) => "a table",
        }
    }
}

impl Node {
    pub(super) fn new(place: Rc<Place>, value: Value) -> Self {
        Self {
            place,
            value,
            raw: None,
        }
    }

    /// The node at `key` (with dots), or as near to it as the tree goes.
    pub(super) fn locate(&self, key: &str) -> &Self {
        let mut node = self;
        for part in key.split('.') {
            let next = match &node.value {
                Value::Table(table) => table.get(part).map(|entry| &entry.node),
                Value::Array(items) => part.parse().ok().and_then(|index: usize| items.get(index)),
                _ => None,
            };
            match next {
                Some(next) => node = next,
                None => break,
            }
        }
        node
    }
}

/// Parses the text of the file at `path`, which is only named in errors.
pub(super) fn parse(path: &Path, text: &str) -> Result<Node, ConfigError> {
    let lines = Lines::new(path, text);
    let table = DeTable::parse(text).map_err(|error| {
        let (line, column) = lines.position(error.span().map_or(0, |span| span.start));
        ConfigError::Syntax {
            path: path.to_owned(),
            line,
            column,
            message: error.message().replace('\n', ", "),
        }
    })?;
    let top = Rc::new(Place::line(path, 1));
    Ok(Node::new(
        top,
        convert_table(table.into_inner(), &|offset| lines.place(offset))?,
    ))
}

/// Turns a value of the `toml` crate into ours; `place` maps byte offsets.
pub(super) fn convert(
    value: Spanned<DeValue<'_>>,
    place: &dyn Fn(usize) -> Rc<Place>,
) -> Result<Node, ConfigError> {
    let here = place(value.span().start);
    let value = match value.into_inner() {
        DeValue::String(text) => Value::Text(text.into_owned()),
        DeValue::Integer(number) => match i128::from_str_radix(number.as_str(), number.radix()) {
            Ok(number) => Value::Integer(number),
            Err(_) => return Err(unreadable(&here, number.as_str())),
        },
        DeValue::Float(number) => match number.as_str().parse() {
            Ok(number) => Value::Float(number),
            Err(_) => return Err(unreadable(&here, number.as_str())),
        },
        DeValue::Boolean(value) => Value::Bool(value),
        DeValue::Datetime(date) => Value::Date(date.to_string()),
        DeValue::Array(items) => Value::Array(
            items
                .into_iter()
                .map(|item| convert(item, place))
                .collect::<Result<_, _>>()?,
        ),
        DeValue::Table(table) => convert_table(table, place)?,
    };
    Ok(Node::new(here, value))
}

fn convert_table(table: DeTable<'_>, place: &dyn Fn(usize) -> Rc<Place>) -> Result<Value, ConfigError> {
    let mut converted = Table::new();
    for (key, value) in table {
        let key_place = place(key.span().start);
        let mut node = convert(value, place)?;
        // A value that spans lines, and a `[table]`, are better found by their key.
        node.place = Rc::clone(&key_place);
        converted.insert(key.into_inner().into_owned(), Entry { key_place, node });
    }
    Ok(Value::Table(converted))
}

fn unreadable(place: &Place, text: &str) -> ConfigError {
    ConfigError::Value {
        place: place.clone(),
        key: text.to_owned(),
        message: "is not a number that can be represented".to_owned(),
    }
}

/// Maps byte offsets of a text to lines.
struct Lines<'a> {
    text: &'a str,
    starts: Vec<usize>,
    path: &'a Path,
}

impl<'a> Lines<'a> {
    fn new(path: &'a Path, text: &'a str) -> Self {
        let starts = std::iter::once(0)
            .chain(text.match_indices('\n').map(|(at, _)| at + 1))
            .collect();
        Self { text, starts, path }
    }

    /// Line and column (in characters) of `offset`, both from 1.
    fn position(&self, offset: usize) -> (usize, usize) {
        let line = self.starts.partition_point(|start| *start <= offset).max(1);
        let start = self.starts[line - 1];
        let column = self
            .text
            .get(start..offset)
            .map_or(0, |before| before.chars().count());
        (line, column + 1)
    }

    fn place(&self, offset: usize) -> Rc<Place> {
        Rc::new(Place::line(self.path, self.position(offset).0))
    }
}
