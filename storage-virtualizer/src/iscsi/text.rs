//! Text: `key=value` pairs, each ended by a zero byte (RFC 7143 §6.1).

/// Longest name of a key.
const LONGEST_KEY: usize = 63;
/// Most keys in one negotiation.
const MOST_KEYS: usize = 128;
/// Longest value of a binary key: a CHAP challenge of 1024 bytes in hexadecimal digits.
const LONGEST_BINARY: usize = 1024;

/// The text is not such.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Malformed(pub(super) &'static str);

/// The pairs of `data`, in their order.
pub(super) fn parse(data: &[u8]) -> Result<Vec<(&str, &str)>, Malformed> {
    let mut pairs = Vec::new();
    for item in data.split(|byte| *byte == 0).filter(|item| !item.is_empty()) {
        let text = std::str::from_utf8(item).map_err(|_| Malformed("text that is not UTF-8"))?;
        let (key, value) = text.split_once('=').ok_or(Malformed("a key without a value"))?;
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b".-+@_/#".contains(&byte);
        if key.is_empty() || key.len() > LONGEST_KEY || !key.bytes().all(allowed) {
            return Err(Malformed("a key with an impossible name"));
        }
        if pairs.len() == MOST_KEYS {
            return Err(Malformed("too many keys"));
        }
        pairs.push((key, value));
    }
    Ok(pairs)
}

/// Text to be sent.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Text(pub(super) Vec<u8>);

impl Text {
    pub(super) fn put(&mut self, key: &str, value: &str) {
        self.0.extend(key.as_bytes());
        self.0.push(b'=');
        self.0.extend(value.as_bytes());
        self.0.push(0);
    }
}

/// A number: decimal, or hexadecimal with `0x` (§6.1).
pub(super) fn number(value: &str) -> Option<u32> {
    match value.strip_prefix("0x").or_else(|| value.strip_prefix("0X")) {
        Some(digits) if !digits.starts_with('+') => u32::from_str_radix(digits, 16).ok(),
        Some(_) => None,
        None if value.starts_with('+') => None,
        None => value.parse().ok(),
    }
}

/// Binary data: hexadecimal with `0x`, or base64 with `0b` (§6.1); at most 1024 bytes.
pub(super) fn binary(value: &str) -> Option<Vec<u8>> {
    let (kind, digits) = value.split_at_checked(2)?;
    if digits.is_empty() || digits.len() > 2 * LONGEST_BINARY {
        return None;
    }
    match kind {
        "0x" | "0X" => {
            // An odd number of digits begins with half a byte.
            let padded = format!("{}{digits}", "0".repeat(digits.len() % 2));
            let pairs = padded.as_bytes().chunks(2);
            pairs
                .map(|pair| Some(digit(pair[0])? << 4 | digit(*pair.get(1)?)?))
                .collect()
        }
        "0b" | "0B" => base64(digits),
        _ => None,
    }
}

fn digit(byte: u8) -> Option<u8> {
    char::from(byte)
        .to_digit(16)
        .and_then(|digit| u8::try_from(digit).ok())
}

fn base64(digits: &str) -> Option<Vec<u8>> {
    const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digits = digits.trim_end_matches('=');
    let (mut result, mut bits, mut held) = (Vec::new(), 0_u32, 0);
    for byte in digits.bytes() {
        let value = ALPHABET.iter().position(|digit| *digit == byte)?;
        bits = bits << 6 | u32::try_from(value).ok()?;
        held += 6;
        if held >= 8 {
            held -= 8;
            result.push(u8::try_from(bits >> held & 0xff).ok()?);
        }
    }
    Some(result)
}

/// Binary data as text.
pub(super) fn hexadecimal(bytes: &[u8]) -> String {
    let mut text = String::from("0x");
    for byte in bytes {
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_pairs_with_names_that_are_possible() {
        let parsed = parse(b"InitiatorName=iqn.a\0\0X-b=c=d\0Empty=\0").unwrap();
        assert_eq!(
            parsed,
            [("InitiatorName", "iqn.a"), ("X-b", "c=d"), ("Empty", "")]
        );
        for bad in [&b"novalue\0"[..], b"=x\0", b"a b=c\0", b"a=\xff\0"] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
        assert!(parse(format!("{}=1", "k".repeat(64)).as_bytes()).is_err());
        assert!(parse("k=1\0".repeat(129).as_bytes()).is_err());
    }

    #[test]
    fn numbers_and_binary_data_have_their_notations() {
        for (text, expected) in [
            ("0", Some(0)),
            ("0x1F", Some(31)),
            ("4294967295", Some(u32::MAX)),
            ("4294967296", None),
            ("+1", None),
            ("0x", None),
            ("-1", None),
            ("", None),
        ] {
            assert_eq!(number(text), expected, "{text}");
        }
        for (text, expected) in [
            ("0x0aFF", Some(vec![10, 255])),
            ("0xaff", Some(vec![10, 255])),
            ("0bAP8=", Some(vec![0, 255])),
            ("0bAP8", Some(vec![0, 255])),
            ("0x", None),
            ("0xg0", None),
            ("0b*", None),
            ("12", None),
            ("é", None),
        ] {
            assert_eq!(binary(text), expected, "{text}");
        }
        assert!(binary(&format!("0x{}", "0".repeat(2050))).is_none());
        assert_eq!(hexadecimal(&[1, 0xfe]), "0x01fe");
    }
}
