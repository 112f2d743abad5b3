//! Bytes that are text most of the time: names of files, targets of symbolic links, values of extended attributes.
//!
//! In JSON they are a string. `\` is written `\\`, and each byte that is not part of valid UTF-8, and NUL, as `\x` and two hexadecimal
//! digits (`\xff`); JSON then doubles each `\` once more, as it does in every string.

use std::ffi::OsStr;
use std::fmt::{self, Write as _};
use std::os::unix::ffi::OsStrExt;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Bytes of a name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct RawText(pub Vec<u8>);

impl RawText {
    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// As the system takes it.
    pub fn as_os_str(&self) -> &OsStr {
        OsStr::from_bytes(&self.0)
    }

    /// Reads what [`fmt::Display`] wrote.
    ///
    /// # Errors
    /// A `\` that begins nothing that is known.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        const WRONG: &str = "a \\ is followed by \\ or by x and two hexadecimal digits";
        let mut bytes = Vec::with_capacity(text.len());
        let mut rest = text.bytes();
        while let Some(byte) = rest.next() {
            if byte != b'\\' {
                bytes.push(byte);
                continue;
            }
            match rest.next() {
                Some(b'\\') => bytes.push(b'\\'),
                Some(b'x') => {
                    let mut digit = || rest.next().and_then(|digit| char::from(digit).to_digit(16));
                    let (high, low) = (digit().ok_or(WRONG)?, digit().ok_or(WRONG)?);
                    bytes.push(u8::try_from(high << 4 | low).map_err(|_| WRONG)?);
                }
                _ => return Err(WRONG),
            }
        }
        Ok(Self(bytes))
    }
}

impl From<&str> for RawText {
    fn from(text: &str) -> Self {
        Self(text.as_bytes().to_vec())
    }
}

impl From<&OsStr> for RawText {
    fn from(text: &OsStr) -> Self {
        Self(text.as_bytes().to_vec())
    }
}

impl From<Vec<u8>> for RawText {
    fn from(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }
}

impl fmt::Display for RawText {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.0.utf8_chunks() {
            for character in chunk.valid().chars() {
                match character {
                    '\\' => formatter.write_str("\\\\")?,
                    '\0' => formatter.write_str("\\x00")?,
                    other => formatter.write_char(other)?,
                }
            }
            for byte in chunk.invalid() {
                write!(formatter, "\\x{byte:02x}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Debug for RawText {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.to_string(), formatter)
    }
}

impl Serialize for RawText {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'a> Deserialize<'a> for RawText {
    fn deserialize<D: Deserializer<'a>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_bytes_survive_json() {
        let all: Vec<u8> = (0..=255).chain(*b"\\x41\\\\").chain("über".bytes()).collect();
        for bytes in [all, Vec::new(), b"plain/name".to_vec(), vec![0xff, b'\\', 0xc3]] {
            let text = RawText(bytes);
            let json = serde_json::to_string(&text).unwrap();
            assert_eq!(serde_json::from_str::<RawText>(&json).unwrap(), text);
        }
        assert_eq!(RawText(b"a\\\xff".to_vec()).to_string(), "a\\\\\\xff");
        for wrong in ["\\", "\\x", "\\xf", "\\xfg", "\\n"] {
            assert!(RawText::parse(wrong).is_err(), "{wrong}");
        }
    }
}
