//! Quantities as people write them: sizes in binary units ("512M"), times with a unit ("90s").

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::{InvalidValue, string_type};

const UNITS: [(char, u32); 5] = [('K', 10), ('M', 20), ('G', 30), ('T', 40), ('P', 50)];

/// A number of bytes. Written "512M", "1G", "64K" (binary units, K = 1024 bytes; "MiB" is accepted too) or as a plain
/// number of bytes; shown in the largest unit that is exact.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ByteSize(u64);

impl ByteSize {
    /// `bytes` bytes.
    pub const fn from_bytes(bytes: u64) -> Self {
        Self(bytes)
    }

    /// `mebibytes` times 1,048,576 bytes.
    pub const fn from_mib(mebibytes: u32) -> Self {
        Self((mebibytes as u64) << 20)
    }

    /// The number of bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }
}

impl FromStr for ByteSize {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        let invalid = || {
            InvalidValue::new(format!(
                "`{text}` is not a size; write a whole number with a binary unit, for example \"512M\" or \"4G\" (units: K, M, G, T, P)"
            ))
        };
        let unit_at = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(unit_at);
        let mut unit_chars = unit.chars();
        let shift = match unit_chars.next() {
            None => 0,
            Some('B') if unit.len() == 1 => 0,
            Some(letter) => {
                let rest = unit_chars.as_str();
                if !(rest.is_empty() || rest == "iB") {
                    return Err(invalid());
                }
                let letter = letter.to_ascii_uppercase();
                UNITS
                    .iter()
                    .find(|(known, _)| *known == letter)
                    .ok_or_else(invalid)?
                    .1
            }
        };
        let number: u64 = number.parse().map_err(|_| invalid())?;
        number
            .checked_mul(1 << shift)
            .map(Self)
            .ok_or_else(|| InvalidValue::new(format!("`{text}` is beyond the largest size, 16383P")))
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (letter, shift) in UNITS.iter().rev() {
            if self.0 != 0 && self.0.trailing_zeros() >= *shift {
                return write!(formatter, "{}{letter}", self.0 >> shift);
            }
        }
        write!(formatter, "{}", self.0)
    }
}

/// A time-out. Written "90s", "500ms", "2m" or "1h".
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Seconds(Duration);

impl Seconds {
    /// `seconds` seconds.
    pub const fn new(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }

    /// As the standard library's type.
    pub const fn duration(self) -> Duration {
        self.0
    }
}

impl FromStr for Seconds {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        let invalid = || {
            InvalidValue::new(format!(
                "`{text}` is not a time; write a whole number with a unit, for example \"90s\" (units: ms, s, m, h)"
            ))
        };
        let unit_at = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(invalid)?;
        let (number, unit) = text.split_at(unit_at);
        let number: u64 = number.parse().map_err(|_| invalid())?;
        let milliseconds: u64 = match unit {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            _ => return Err(invalid()),
        };
        let total = number.checked_mul(milliseconds).ok_or_else(invalid)?;
        Ok(Self(Duration::from_millis(total)))
    }
}

impl fmt::Display for Seconds {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let milliseconds = self.0.as_millis();
        if milliseconds.is_multiple_of(1_000) {
            write!(formatter, "{}s", milliseconds / 1_000)
        } else {
            write!(formatter, "{milliseconds}ms")
        }
    }
}

string_type!(
    ByteSize,
    "a size such as \"512M\"",
    r"^[0-9]{1,20}([KMGTPkmgtp](iB)?|B)?$"
);
string_type!(Seconds, "a time such as \"90s\"", r"^[0-9]{1,20}(ms|s|m|h)$");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_binary_and_shown_in_the_largest_exact_unit() {
        for (text, bytes, shown) in [
            ("512M", 512 << 20, "512M"),
            ("1G", 1 << 30, "1G"),
            ("64k", 64 << 10, "64K"),
            ("1536MiB", 1536 << 20, "1536M"),
            ("4096", 4096, "4K"),
            ("513B", 513, "513"),
            ("0", 0, "0"),
            ("16383P", 16383 << 50, "16383P"),
        ] {
            let size: ByteSize = text.parse().unwrap();
            assert_eq!(size.bytes(), bytes, "{text}");
            assert_eq!(size.to_string(), shown);
        }
    }

    #[test]
    fn what_is_not_a_size_is_refused() {
        for text in [
            "",
            "G",
            "-1G",
            "1.5G",
            "1 G",
            "1GB",
            "1X",
            "1GiBs",
            "99999999999999999999",
            "16384P",
        ] {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
    }

    #[test]
    fn times_need_a_unit() {
        assert_eq!("90s".parse(), Ok(Seconds::new(90)));
        assert_eq!("2m".parse(), Ok(Seconds::new(120)));
        assert_eq!("1500ms".parse::<Seconds>().unwrap().to_string(), "1500ms");
        for text in ["90", "", "s", "1d", "-1s", "1.5s"] {
            assert!(text.parse::<Seconds>().is_err(), "{text}");
        }
    }
}
