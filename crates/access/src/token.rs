//! Tokens: secrets that show who one is.

use std::fmt;

use aws_lc_rs::rand::fill;
use serde::{Deserialize, Serialize};

use crate::fingerprint::Fingerprint;

/// What tokens begin with, so that people and scanners for secrets know them.
const PREFIX: &str = "smsvmm_";
/// Random bytes of a token: as many as its hash has.
const BYTES: usize = 32;
/// The longest text that is looked at.
const MAX_LENGTH: usize = 256;

/// A secret of 256 random bits, as text; shown once, to who is to have it.
pub struct Token(String);

impl Token {
    /// A new one; none if the system has no random numbers.
    pub fn generate() -> Option<Self> {
        let mut bytes = [0; BYTES];
        fill(&mut bytes).ok()?;
        let digits = bytes.iter().map(|byte| format!("{byte:02x}"));
        Some(Self(PREFIX.to_owned() + &digits.collect::<String>()))
    }

    /// The secret.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// What is kept of it.
    pub fn hash(&self) -> TokenHash {
        TokenHash::of(&self.0)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Token(..)")
    }
}

/// The SHA-256 sum of a token. Tokens are random, so nothing slower is needed to keep them from being guessed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TokenHash(Fingerprint);

impl TokenHash {
    /// That of a text that may be a token.
    pub fn of(text: &str) -> Self {
        // What is longer than any token is none; it is hashed no further than that.
        let text = text.as_bytes();
        Self(Fingerprint::of(text.get(..MAX_LENGTH).unwrap_or(text)))
    }

    /// Whether both are of the same token; takes as long if they are not.
    pub fn is(&self, other: &Self) -> bool {
        self.0.is(&other.0)
    }
}

/// In hexadecimal digits, as files have it.
impl fmt::Display for TokenHash {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_differ_and_are_known_by_their_hash_only() {
        let (one, other) = (Token::generate().unwrap(), Token::generate().unwrap());
        assert_eq!(one.reveal().len(), PREFIX.len() + 2 * BYTES);
        assert!(one.hash().is(&TokenHash::of(one.reveal())));
        assert!(!one.hash().is(&other.hash()));
        assert!(!format!("{one:?}").contains(&one.reveal()[PREFIX.len()..]));
    }
}
