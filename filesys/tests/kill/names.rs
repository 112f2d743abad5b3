//! Changes of names, as the child tells of them and the parent remembers them.

use std::collections::BTreeSet;

use crate::blocks::mix;

/// The directory in which names change.
pub(crate) const DIRECTORY: &str = "/names";

/// A change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Change {
    Make(String),
    Rename(String, String),
    Delete(String),
}

impl Change {
    /// A change of these names; what is new is called `new`.
    pub(crate) fn draw(names: &BTreeSet<String>, number: u64, new: String) -> Self {
        let pick = |part: u64| {
            names
                .iter()
                .nth((number / part % names.len() as u64) as usize)
                .cloned()
        };
        match number % 4 {
            _ if names.len() < 3 => Self::Make(new),
            0 | 1 if names.len() < 12 => Self::Make(new),
            2 => pick(16).map_or_else(|| Self::Make(String::new()), |old| Self::Rename(old, new)),
            _ => pick(16).map_or_else(|| Self::Make(String::new()), Self::Delete),
        }
    }

    pub(crate) fn apply(&self, names: &mut BTreeSet<String>) {
        match self {
            Self::Make(name) => {
                names.insert(name.clone());
            }
            Self::Rename(old, new) => {
                names.remove(old);
                names.insert(new.clone());
            }
            Self::Delete(name) => {
                names.remove(name);
            }
        }
    }

    pub(crate) fn encode(&self) -> String {
        match self {
            Self::Make(name) => format!("make {name}"),
            Self::Rename(old, new) => format!("rename {old} {new}"),
            Self::Delete(name) => format!("delete {name}"),
        }
    }

    pub(crate) fn decode(words: &[&str]) -> Self {
        match words {
            ["make", name] => Self::Make((*name).to_owned()),
            ["rename", old, new] => Self::Rename((*old).to_owned(), (*new).to_owned()),
            ["delete", name] => Self::Delete((*name).to_owned()),
            other => panic!("no change: {other:?}"),
        }
    }
}

pub(crate) fn path(name: &str) -> String {
    format!("{DIRECTORY}/{name}")
}

/// The size that a file is made with, and whether it is thick. A name keeps the end of what it was first.
pub(crate) fn shape(name: &str) -> (u64, bool) {
    let end = name.rsplit('.').next().unwrap_or_default();
    let number = end.bytes().fold(7, |sum, byte| mix(sum, byte.into()));
    ((1 + number % 64) * 8192, number & 64 != 0)
}
