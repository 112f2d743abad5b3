//! Files in TOML that a person names: what is wrong is told with the line.

use std::path::Path;

use anyhow::Context;
use serde::de::DeserializeOwned;

use crate::exit::UsageError;

/// Largest file that is read, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// Reads a file.
///
/// # Errors
/// It cannot be read, is too large, or is no `T`: wrong usage, all of it.
pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> anyhow::Result<T> {
    let shown = path.display();
    let length = std::fs::metadata(path).map(|metadata| metadata.len());
    if length.is_ok_and(|length| length > MAX_FILE) {
        return Err(UsageError::new(format!("{shown} is too large for a configuration")).into());
    }
    let text = std::fs::read_to_string(path).map_err(UsageError::new);
    parse(path, &text.with_context(|| format!("cannot read {shown}"))?)
}

/// What the text of a file says.
///
/// # Errors
/// It is no `T`.
pub(crate) fn parse<T: DeserializeOwned>(path: &Path, text: &str) -> anyhow::Result<T> {
    toml::from_str(text).map_err(|error| {
        let start = error.span().map_or(0, |span| span.start);
        let line = text
            .get(..start)
            .map_or(1, |before| before.matches('\n').count() + 1);
        let message = error.message().replace('\n', ", ");
        UsageError::new(format!("{}:{line}: {message}", path.display())).into()
    })
}
