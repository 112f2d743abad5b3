//! Patterns of names: what a backup leaves out.

/// A pattern: `*` and `?` stand for anything but `/`, `**` for anything, `[a-z]` and `[!a-z]` for a byte of some. One without `/` is for
/// the last part of a path, one with `/` for the whole path.
#[derive(Debug, Clone)]
pub(crate) struct Glob {
    pattern: Vec<u8>,
    whole: bool,
}

impl Glob {
    /// Any text is a pattern.
    pub(crate) fn new(text: &str) -> Self {
        let whole = text.contains('/');
        // Folders are left out with all that is in them: `/a/b/` is `/a/b`.
        let pattern = text.strip_prefix('/').unwrap_or(text).trim_end_matches('/');
        Self {
            pattern: pattern.as_bytes().to_vec(),
            whole,
        }
    }

    /// Whether it is for this path, which has no `/` at its beginning.
    pub(crate) fn matches(&self, path: &[u8]) -> bool {
        let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or(path);
        matches(&self.pattern, if self.whole { path } else { name })
    }
}

/// Tries what `**` may stand for: anything, and before a `/` also nothing together with it.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    match pattern {
        [b'*', b'*', b'/', rest @ ..] => (0..=text.len())
            .filter(|from| *from == 0 || text[from - 1] == b'/')
            .any(|from| fits(rest, &text[from..])),
        [b'*', b'*', rest @ ..] => (0..=text.len()).any(|from| fits(rest, &text[from..])),
        _ => fits(pattern, text),
    }
}

/// The rest is one loop: when what was tried does not fit, the last star takes one byte more. (What an earlier one took is as short as
/// it can be, which leaves most to the others.)
fn fits<'a>(mut pattern: &'a [u8], mut text: &'a [u8]) -> bool {
    let mut again: Option<(&[u8], &[u8])> = None;
    loop {
        let step = match pattern {
            [b'*', b'*', ..] => return matches(pattern, text),
            [b'*', rest @ ..] => {
                again = Some((rest, text));
                pattern = rest;
                continue;
            }
            [] if text.is_empty() => return true,
            [] => None,
            [b'[', rest @ ..] => class(rest, text),
            [b'?', rest @ ..] => text
                .split_first()
                .filter(|(byte, _)| **byte != b'/')
                .map(|(_, left)| (rest, left)),
            [wanted, rest @ ..] => text
                .split_first()
                .filter(|(byte, _)| *byte == wanted)
                .map(|(_, left)| (rest, left)),
        };
        if let Some(next) = step {
            (pattern, text) = next;
            continue;
        }
        match again {
            Some((rest, [byte, left @ ..])) if *byte != b'/' => {
                again = Some((rest, left));
                (pattern, text) = (rest, left);
            }
            _ => return false,
        }
    }
}

/// The part of a pattern behind `[`, and the text: what is left of both if the first byte is of the class. A class without an end is
/// the bracket itself.
fn class<'a>(pattern: &'a [u8], text: &'a [u8]) -> Option<(&'a [u8], &'a [u8])> {
    let (byte, left) = text.split_first()?;
    let (not, members) = match pattern {
        [b'!' | b'^', rest @ ..] => (true, rest),
        _ => (false, pattern),
    };
    // A bracket that comes first is a member.
    let Some(end) = members.iter().skip(1).position(|byte| *byte == b']') else {
        return (*byte == b'[').then_some((pattern, left));
    };
    let (mut members, rest) = (&members[..=end], &members[end + 2..]);
    let mut found = false;
    while let Some((first, after)) = members.split_first() {
        members = after;
        match after {
            [b'-', last, after @ ..] => {
                found |= (first..=last).contains(&byte);
                members = after;
            }
            _ => found |= first == byte,
        }
    }
    (found != not && *byte != b'/').then_some((rest, left))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_patterns() {
        for (pattern, path, expected) in [
            ("*.tmp", "srv/a.tmp", true),
            ("*.tmp", "srv/a.tmp/b", false),
            ("a?c", "abc", true),
            ("a?c", "x/abc", true),
            ("a?c", "a/c", false),
            ("/srv/cache", "srv/cache", true),
            ("/srv/cache/", "srv/cache", true),
            ("/srv/cache", "srv/cache2", false),
            ("/srv/*/cache", "srv/a/cache", true),
            ("/srv/*/cache", "srv/a/b/cache", false),
            ("/srv/**/cache", "srv/a/b/cache", true),
            ("/srv/**/cache", "srv/cache", true),
            ("/srv/**/cache", "srv/xcache", false),
            ("/*v/**/c*e", "srv/a/cache", true),
            ("/**/x", "srv/x", true),
            ("/srv/**", "srv/a/b", true),
            ("[a-c]x", "bx", true),
            ("[!a-c]x", "bx", false),
            ("[!a-c]x", "dx", true),
            ("[]]x", "]x", true),
            ("[ab", "[ab", true),
            ("[ab", "a", false),
            ("*", "anything", true),
            ("", "a", false),
            ("*a*b*c", "xxaxxbxxc", true),
            ("*a*b*c", "xxaxxbxx", false),
            ("caf\u{e9}", "caf\u{e9}", true),
        ] {
            assert_eq!(
                Glob::new(pattern).matches(path.as_bytes()),
                expected,
                "{pattern} {path}"
            );
        }
        assert!(Glob::new("a?").matches(b"a\xff"));
    }

    #[test]
    fn a_bad_pattern_takes_no_long_time() {
        let pattern = "*a".repeat(40);
        assert!(!Glob::new(&pattern).matches("a".repeat(39).as_bytes()));
        assert!(!Glob::new(&format!("{pattern}b")).matches("a".repeat(4000).as_bytes()));
    }
}
