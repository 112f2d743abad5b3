//! `--set key=value`: changes to a configuration from the command line.
//!
//! Keys are written with dots; a number selects an element of a list, `+` (or the number after the last) appends one. The
//! value is TOML, and text where it is not: `--set cpus=4 --set disk.0.read-only=true --set 'disk.+={image="x.raw"}'`.

use std::rc::Rc;

use toml::de::DeValue;

use super::document::{Entry, Node, Table, Value, convert};
use super::error::{ConfigError, Place};

/// Most elements of a list, so that an override cannot make it unreasonably long.
const MAX_LIST: usize = 1024;
/// Deepest key.
const MAX_DEPTH: usize = 8;

/// Applies one override to the whole configuration.
pub(super) fn apply(root: &mut Node, text: &str) -> Result<(), ConfigError> {
    let error = |message: String| ConfigError::Override {
        text: text.to_owned(),
        message,
    };
    let (key, value) = text.split_once('=').ok_or_else(|| {
        error("has no `=`; write key=value, for example cpus=4 or disk.0.read-only=true".to_owned())
    })?;
    let mut parts: Vec<&str> = key.trim().split('.').collect();
    let is_bare = |part: &&str| {
        !part.is_empty()
            && (*part == "+"
                || part
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte)))
    };
    if !parts.iter().all(is_bare) || parts.len() > MAX_DEPTH {
        return Err(error(format!(
            "`{key}` is not a key; write names with dots, for example disk.0.read-only"
        )));
    }
    let place = Rc::new(Place::Override(text.to_owned()));
    let node = parse_value(value.trim(), &place)?;
    // `cpus=4` changes the count and keeps the rest of a table, as `cpus.count=4` does.
    if let ([key], false) = (parts.as_slice(), matches!(node.value, Value::Table(_)))
        && let Some(long) = long_form(key)
    {
        parts.push(long);
    }
    insert(root, &parts, node, &place).map_err(error)
}

/// Makes `cpus = {count = 4}` of `cpus = 4`, and `memory = {size = "1G"}` of `memory = "1G"`.
pub(super) fn expand_shorthand(root: &mut Node) {
    let Value::Table(table) = &mut root.value else {
        return;
    };
    for (key, entry) in table {
        if let (Some(long), false) = (long_form(key), matches!(entry.node.value, Value::Table(_))) {
            let inner = Entry {
                key_place: Rc::clone(&entry.key_place),
                node: entry.node.clone(),
            };
            let table = Table::from([(long.to_owned(), inner)]);
            entry.node = Node::new(Rc::clone(&entry.key_place), Value::Table(table));
        }
    }
}

/// The key that is meant where a plain value stands for a table.
fn long_form(key: &str) -> Option<&'static str> {
    match key {
        "cpus" => Some("count"),
        "memory" => Some("size"),
        _ => None,
    }
}

/// A value as TOML, else as text.
fn parse_value(text: &str, place: &Rc<Place>) -> Result<Node, ConfigError> {
    let Ok(value) = DeValue::parse(text) else {
        return Ok(Node::new(Rc::clone(place), Value::Text(text.to_owned())));
    };
    let mut node = convert(value, &|_| Rc::clone(place))?;
    node.raw = match node.value {
        Value::Integer(_) | Value::Float(_) | Value::Bool(_) | Value::Date(_) => Some(text.to_owned()),
        _ => None,
    };
    Ok(node)
}

/// Puts `node` at `parts` below `target`, creating tables and elements on the way.
fn insert(target: &mut Node, parts: &[&str], node: Node, place: &Rc<Place>) -> Result<(), String> {
    let Some((first, rest)) = parts.split_first() else {
        *target = node;
        return Ok(());
    };
    let child = match &mut target.value {
        Value::Table(table) => {
            &mut table
                .entry((*first).to_owned())
                .or_insert_with(|| Entry {
                    key_place: Rc::clone(place),
                    node: empty(rest, place),
                })
                .node
        }
        Value::Array(items) => element(items, first, rest, place)?,
        other => {
            let name = other.type_name();
            return Err(format!("`{first}` cannot be set inside of {name}"));
        }
    };
    insert(child, rest, node, place)
}

/// The element of a list that `part` selects.
fn element<'a>(
    items: &'a mut Vec<Node>,
    part: &str,
    rest: &[&str],
    place: &Rc<Place>,
) -> Result<&'a mut Node, String> {
    let length = items.len();
    let index = match part {
        "+" => length,
        number => number.parse().map_err(|_| {
            format!("`{number}` does not select an element of a list; use a number from 0 or + to append")
        })?,
    };
    if index > length || index >= MAX_LIST {
        return Err(format!(
            "there is no element {index}, the list has {length}; use + to append one"
        ));
    }
    if index == length {
        items.push(empty(rest, place));
    }
    Ok(&mut items[index])
}

/// What a missing value on the way to `rest` is to become.
fn empty(rest: &[&str], place: &Rc<Place>) -> Node {
    let value = match rest.first() {
        Some(part) if *part == "+" || part.parse::<usize>().is_ok() => Value::Array(Vec::new()),
        _ => Value::Table(Table::new()),
    };
    Node::new(Rc::clone(place), value)
}
