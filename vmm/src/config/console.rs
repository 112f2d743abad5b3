//! `[console]`: where the guest's consoles lead.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use api::{InvalidValue, string_type};
use serde::{Deserialize, Serialize};

/// The guest's consoles.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct ConsoleConfig {
    /// Where the 16550 serial port (ttyS0) leads.
    pub serial: ConsoleSpec,
    /// Where the virtio console (hvc0) leads; without it the guest has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub virtio: Option<ConsoleSpec>,
    /// The key that leaves a console on "stdio".
    pub escape: EscapeKey,
}

impl Default for ConsoleConfig {
    fn default() -> Self {
        Self {
            serial: ConsoleSpec::Stdio,
            virtio: None,
            escape: EscapeKey::default(),
        }
    }
}

/// Where a console leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConsoleSpec {
    /// Standard input and output of smsvmm: "stdio".
    Stdio,
    /// A pseudo-terminal, and a symbolic link to it if named: "pty" or "pty:LINK".
    Pty(Option<PathBuf>),
    /// A file to which output is appended: "file:PATH".
    File(PathBuf),
    /// A Unix socket that takes one client at a time: "socket:PATH".
    Socket(PathBuf),
    /// Nowhere: "null".
    Null,
}

impl FromStr for ConsoleSpec {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        match text.split_once(':') {
            None if text == "stdio" => Ok(Self::Stdio),
            None if text == "pty" => Ok(Self::Pty(None)),
            None if text == "null" => Ok(Self::Null),
            Some(("pty", path)) if !path.is_empty() => Ok(Self::Pty(Some(path.into()))),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("socket", path)) if !path.is_empty() => Ok(Self::Socket(path.into())),
            _ => Err(InvalidValue::new(format!(
                "`{text}` is not a console; use \"stdio\", \"pty\", \"pty:LINK\", \"file:PATH\", \"socket:PATH\" or \"null\""
            ))),
        }
    }
}

impl fmt::Display for ConsoleSpec {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdio => formatter.write_str("stdio"),
            Self::Pty(None) => formatter.write_str("pty"),
            Self::Pty(Some(path)) => write!(formatter, "pty:{}", path.display()),
            Self::File(path) => write!(formatter, "file:{}", path.display()),
            Self::Socket(path) => write!(formatter, "socket:{}", path.display()),
            Self::Null => formatter.write_str("null"),
        }
    }
}

string_type!(ConsoleSpec, "a console such as \"stdio\" or \"socket:PATH\"");

/// The control character that leaves the console: "ctrl-]", "ctrl-a", ..., or "none".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EscapeKey(Option<u8>);

impl EscapeKey {
    /// The control character, 1 to 31, or none.
    pub const fn control_character(self) -> Option<u8> {
        self.0
    }
}

impl Default for EscapeKey {
    fn default() -> Self {
        Self(Some(b']' - 0x40))
    }
}

impl FromStr for EscapeKey {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        if text == "none" {
            return Ok(Self(None));
        }
        match text
            .strip_prefix("ctrl-")
            .map(|key| key.to_ascii_uppercase())
            .as_deref()
            .map(str::as_bytes)
        {
            Some([key @ b'A'..=b'_']) => Ok(Self(Some(key - 0x40))),
            _ => Err(InvalidValue::new(format!(
                "`{text}` is not an escape key; use \"ctrl-\" with a letter or one of [ \\ ] ^ _, for example \"ctrl-]\", or \"none\""
            ))),
        }
    }
}

impl fmt::Display for EscapeKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            None => formatter.write_str("none"),
            Some(control) => write!(
                formatter,
                "ctrl-{}",
                char::from(control + 0x40).to_ascii_lowercase()
            ),
        }
    }
}

string_type!(EscapeKey, "a key such as \"ctrl-]\"");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn consoles_are_written_as_they_are_read() {
        for text in ["stdio", "pty", "pty:/run/x", "file:/tmp/a:b", "socket:s", "null"] {
            assert_eq!(text.parse::<ConsoleSpec>().unwrap().to_string(), text);
        }
        for text in ["", "tty", "pty:", "file:", "file", "socket", "stdio:x", "null:"] {
            assert!(text.parse::<ConsoleSpec>().is_err(), "{text}");
        }
    }

    #[test]
    fn escape_keys_are_control_characters() {
        assert_eq!("ctrl-]".parse(), Ok(EscapeKey::default()));
        assert_eq!(EscapeKey::default().control_character(), Some(0x1d));
        assert_eq!(
            "ctrl-a".parse::<EscapeKey>().unwrap().control_character(),
            Some(1)
        );
        assert_eq!("none".parse::<EscapeKey>().unwrap().control_character(), None);
        for text in ["", "a", "ctrl-", "ctrl-1", "ctrl-aa", "ctrl-é"] {
            assert!(text.parse::<EscapeKey>().is_err(), "{text}");
        }
    }
}
