//! What must be so for a change to be made: of two who change the same object, the second one shall notice.

use crate::{InvalidValue, Problem, ProblemKind};

/// Tags as a header lists them.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Tags {
    /// `*`: of anything that is there.
    Any,
    /// Each with whether it is weak.
    These(Vec<(bool, String)>),
}

/// `If-Match` and `If-None-Match` of a request (RFC 9110, section 13). By default there is no condition.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Condition {
    matches: Option<Tags>,
    matches_not: Option<Tags>,
}

impl Condition {
    /// There is no such object yet.
    pub fn is_new() -> Self {
        Self {
            matches: None,
            matches_not: Some(Tags::Any),
        }
    }

    /// From the values of both headers, as far as they are there.
    ///
    /// # Errors
    /// One of them is neither `*` nor a list of tags in quotation marks.
    pub fn parse(matches: Option<&str>, matches_not: Option<&str>) -> Result<Self, InvalidValue> {
        Ok(Self {
            matches: matches.map(tags).transpose()?,
            matches_not: matches_not.map(tags).transpose()?,
        })
    }

    /// Whether it holds for an object with the tag `current`, without quotation marks; none: that is not there.
    ///
    /// # Errors
    /// [`ProblemKind::Precondition`] if not.
    pub fn check(&self, current: Option<&str>) -> Result<(), Problem> {
        let there = |tags: &Tags, weakly: bool| match (tags, current) {
            (_, None) => false,
            (Tags::Any, Some(_)) => true,
            (Tags::These(tags), Some(current)) => {
                tags.iter().any(|(weak, tag)| tag == current && (weakly || !weak))
            }
        };
        let refused =
            |detail, remedy: &str| Err(Problem::new(ProblemKind::Precondition, detail).remedy(remedy));
        if self.matches.as_ref().is_some_and(|tags| !there(tags, false)) {
            return match current {
                Some(_) => refused(
                    "somebody has changed it meanwhile",
                    "get it again, and decide anew",
                ),
                None => refused("it is not there any more", "without If-Match it is made"),
            };
        }
        if self.matches_not.as_ref().is_some_and(|tags| there(tags, true)) {
            return refused(
                "it is there already",
                "choose another name, or say that it is to be replaced",
            );
        }
        Ok(())
    }
}

/// `*`, or `"a", W/"b"`.
fn tags(text: &str) -> Result<Tags, InvalidValue> {
    if text.trim() == "*" {
        return Ok(Tags::Any);
    }
    let wrong = || InvalidValue::new(format!("`{text}` is neither * nor a list of tags like \"1f00\""));
    let mut tags = Vec::new();
    let mut rest = text.trim();
    while !rest.is_empty() {
        let (weak, opened) = match rest.strip_prefix("W/") {
            Some(opened) => (true, opened),
            None => (false, rest),
        };
        let (tag, after) = opened
            .strip_prefix('"')
            .and_then(|opened| opened.split_once('"'))
            .ok_or_else(wrong)?;
        tags.push((weak, tag.to_owned()));
        rest = after.trim_start();
        if !rest.is_empty() {
            rest = rest.strip_prefix(',').ok_or_else(wrong)?.trim_start();
        }
    }
    if tags.is_empty() {
        return Err(wrong());
    }
    Ok(Tags::These(tags))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_holds_for_what_it_says() {
        let holds = |matches, matches_not, current| {
            let checked = Condition::parse(matches, matches_not).unwrap().check(current);
            checked.map_err(|problem| problem.status).is_ok()
        };
        for current in [None, Some("a")] {
            assert!(holds(None, None, current));
        }
        for (header, absent, a, b) in [
            ("*", false, true, true),
            ("\"a\"", false, true, false),
            ("\"b\", \"a\"", false, true, true),
            ("W/\"a\"", false, false, false),
            ("\"\"", false, false, false),
        ] {
            let found = [None, Some("a"), Some("b")].map(|current| holds(Some(header), None, current));
            assert_eq!(found, [absent, a, b], "{header}");
        }
        for (header, a) in [
            ("*", false),
            ("\"a\"", false),
            ("W/\"a\" ,\"c\"", false),
            ("\"b\"", true),
        ] {
            assert!(holds(None, Some(header), None), "{header}");
            assert_eq!(holds(None, Some(header), Some("a")), a, "{header}");
        }
        assert_eq!(Condition::parse(None, Some(" * ")).unwrap(), Condition::is_new());
        let problem = Condition::is_new().check(Some("a")).unwrap_err();
        assert_eq!((problem.kind, problem.status), (ProblemKind::Precondition, 412));
        for wrong in ["", "a", "\"a", "\"a\" \"b\"", "w/\"a\"", "*, \"a\"", "\"a\",,"] {
            assert!(Condition::parse(Some(wrong), None).is_err(), "{wrong}");
        }
    }
}
