//! Who may log in, what it has to prove, and what it sees then.

use std::collections::BTreeSet;
use std::fmt;

use crate::scsi::Visible;

/// Shortest secret (RFC 7143 §9.2.1: 96 bits where IPsec does not protect it).
const SHORTEST_SECRET: usize = 12;
/// Longest secret.
const LONGEST_SECRET: usize = 256;
/// Longest iSCSI name (RFC 7143 §4.2.7.1).
const LONGEST_NAME: usize = 223;

/// A name is not one of iSCSI's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name:?} is not an iSCSI name: {what}; write something like iqn.2026-11.org.example:disk")]
pub struct NameError {
    /// The name.
    name: String,
    /// What is wrong.
    what: &'static str,
}

/// Checks an iSCSI name: `iqn.YYYY-MM.REVERSED.DOMAIN[:ANYTHING]`, `eui.` and 16 digits, or `naa.` and 16 or 32 digits
/// (RFC 7143 §4.2.7.4 to 4.2.7.6).
///
/// # Errors
/// What is wrong with it.
pub fn check_name(name: &str) -> Result<(), NameError> {
    let refuse = |what| {
        let name = name.to_owned();
        Err(NameError { name, what })
    };
    if name.len() > LONGEST_NAME {
        return refuse("it is longer than 223 bytes");
    }
    // Names are compared after they were made lower case (RFC 3722); so only such are taken.
    let allowed = |letter: char| letter.is_alphanumeric() && !letter.is_uppercase() || ".-:".contains(letter);
    if let Some(rest) = name.strip_prefix("iqn.") {
        let date = rest.as_bytes();
        let digit = |at: usize| date.get(at).is_some_and(u8::is_ascii_digit);
        let dated = (0..4).all(digit)
            && date.get(4) == Some(&b'-')
            && digit(5)
            && digit(6)
            && date.get(7) == Some(&b'.');
        if !dated || date.len() < 9 {
            return refuse("after iqn. comes a date like 2026-11. and a reversed domain");
        }
        if !name.chars().all(allowed) {
            return refuse("only lower-case letters, digits, dots, dashes and colons are allowed");
        }
        return Ok(());
    }
    let digits = |rest: &str, lengths: &[usize]| {
        lengths.contains(&rest.len()) && rest.bytes().all(|byte| byte.is_ascii_hexdigit())
    };
    if name.strip_prefix("eui.").is_some_and(|rest| digits(rest, &[16]))
        || name
            .strip_prefix("naa.")
            .is_some_and(|rest| digits(rest, &[16, 32]))
    {
        return Ok(());
    }
    refuse("it begins with iqn., eui. or naa.")
}

/// A secret of CHAP. It is not shown, whoever prints it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Vec<u8>);

/// A secret cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SecretError {
    /// It can be guessed.
    #[error("a CHAP secret of {0} bytes is too short: it needs {SHORTEST_SECRET} at least, best random ones")]
    Short(usize),
    /// It is too long.
    #[error("a CHAP secret has at most {LONGEST_SECRET} bytes, not {0}")]
    Long(usize),
}

impl Secret {
    /// Takes a secret.
    ///
    /// # Errors
    /// It is too short or too long.
    pub fn new(bytes: Vec<u8>) -> Result<Self, SecretError> {
        match bytes.len() {
            length if length < SHORTEST_SECRET => Err(SecretError::Short(length)),
            length if length > LONGEST_SECRET => Err(SecretError::Long(length)),
            _ => Ok(Self(bytes)),
        }
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Secret")
    }
}

/// What an initiator proves by CHAP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chap {
    /// The initiator's CHAP name.
    pub user: String,
    /// Its secret.
    pub secret: Secret,
    /// The target's CHAP name and secret, if initiators may have the target prove who it is.
    pub mutual: Option<(String, Secret)>,
}

/// What an initiator may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Access {
    /// The initiator's name; none is any that is not named elsewhere.
    pub initiator: Option<String>,
    /// LUNs that it sees; none is all.
    pub luns: Option<BTreeSet<u16>>,
    /// What it has to prove; none: nothing, its name is believed.
    pub chap: Option<Chap>,
}

/// A list of [`Access`] is not possible.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AccessError {
    /// A name is none.
    #[error(transparent)]
    Name(#[from] NameError),
    /// An initiator is named twice.
    #[error("the initiator {0} is named twice")]
    Twice(String),
    /// A secret is used in both directions.
    #[error(
        "the CHAP secrets of {0} are the same in both directions: whoever has one side prove itself could pretend to be it; take two"
    )]
    SameSecret(String),
    /// A LUN does not exist.
    #[error("the initiator {initiator} is to see LUN {lun}, which does not exist")]
    NoSuchLun {
        /// Its name.
        initiator: String,
        /// The LUN.
        lun: u16,
    },
}

impl Access {
    /// Everybody sees everything.
    pub fn everybody() -> Self {
        Self {
            initiator: None,
            luns: None,
            chap: None,
        }
    }

    pub(super) fn visible(&self) -> Visible {
        self.luns.clone().map_or(Visible::All, Visible::Only)
    }
}

/// Checks a list: each initiator once, secrets that differ, LUNs that are among `luns`.
pub(super) fn check(list: &[Access], luns: &BTreeSet<u16>) -> Result<(), AccessError> {
    for (index, access) in list.iter().enumerate() {
        let name = access.initiator.as_deref().unwrap_or("*");
        if let Some(initiator) = &access.initiator {
            check_name(initiator)?;
        }
        if list[..index]
            .iter()
            .any(|other| other.initiator == access.initiator)
        {
            return Err(AccessError::Twice(name.to_owned()));
        }
        if let Some(chap) = &access.chap
            && chap
                .mutual
                .as_ref()
                .is_some_and(|(_, secret)| *secret == chap.secret)
        {
            return Err(AccessError::SameSecret(name.to_owned()));
        }
        if let Some(lun) = access.luns.iter().flatten().find(|lun| !luns.contains(lun)) {
            return Err(AccessError::NoSuchLun {
                initiator: name.to_owned(),
                lun: *lun,
            });
        }
    }
    Ok(())
}

/// What `initiator` may do; none: it may not log in.
pub(super) fn find<'a>(list: &'a [Access], initiator: &str) -> Option<&'a Access> {
    let named = list
        .iter()
        .find(|access| access.initiator.as_deref() == Some(initiator));
    named.or_else(|| list.iter().find(|access| access.initiator.is_none()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_such_as_the_standard_has() {
        for good in [
            "iqn.2026-11.org.example",
            "iqn.2001-04.com.example:storage:diskarrays-sn-a8675309",
            "iqn.1993-08.org.debian:01:abc",
            "eui.02004567a425678d",
            "naa.52004567ba64678d",
            "naa.62004567ba64678d0123456789abcdef",
        ] {
            assert_eq!(check_name(good), Ok(()), "{good}");
        }
        for bad in [
            "",
            "disk",
            "iqn.2026.org.example",
            "iqn.2026-11.",
            "iqn.2026-11.org.Example",
            "iqn.2026-11.org.example:a b",
            "iqn.2026-11.org.example:a\0",
            "eui.02004567a425678",
            "naa.x2004567ba64678d",
        ] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
        assert!(check_name(&format!("iqn.2026-11.org:{}", "a".repeat(220))).is_err());
    }

    #[test]
    fn a_list_names_each_initiator_once_and_secrets_differ() {
        let secret = |text: &str| Secret::new(text.as_bytes().to_vec()).unwrap();
        let named = |name: &str, luns: &[u16]| Access {
            initiator: Some(name.to_owned()),
            luns: Some(luns.iter().copied().collect()),
            chap: None,
        };
        let luns = BTreeSet::from([0, 1]);
        let (a, b) = (named("iqn.2026-11.a", &[0]), named("iqn.2026-11.b", &[1]));
        let list = [a.clone(), b.clone(), Access::everybody()];
        assert_eq!(check(&list, &luns), Ok(()));
        assert_eq!(find(&list, "iqn.2026-11.b"), Some(&b));
        assert_eq!(find(&list, "iqn.2026-11.c"), Some(&list[2]));
        assert_eq!(find(&list[..2], "iqn.2026-11.c"), None);
        assert!(matches!(
            check(&[a.clone(), a.clone()], &luns),
            Err(AccessError::Twice(_))
        ));
        let lost = named("iqn.2026-11.a", &[7]);
        assert!(matches!(
            check(&[lost], &luns),
            Err(AccessError::NoSuchLun { lun: 7, .. })
        ));
        let same = Access {
            chap: Some(Chap {
                user: "u".to_owned(),
                secret: secret("0123456789ab"),
                mutual: Some(("t".to_owned(), secret("0123456789ab"))),
            }),
            ..a
        };
        assert!(matches!(
            check(std::slice::from_ref(&same), &luns),
            Err(AccessError::SameSecret(_))
        ));
        assert!(!format!("{same:?}").contains("0123456789ab"));
        assert_eq!(Secret::new(vec![0; 11]), Err(SecretError::Short(11)));
        assert_eq!(Secret::new(vec![0; 257]), Err(SecretError::Long(257)));
    }
}
