//! CHAP (RFC 7143 §12.1.3, RFC 1994): who knows the secret, without saying it.
//!
//! ```text
//!   initiator                                target
//!     CHAP_A=7,5                     ──►       chooses the first that it has: SHA-256, MD5
//!                                    ◄──       CHAP_A, CHAP_I, CHAP_C: an identifier and a challenge
//!     CHAP_N, CHAP_R, and perhaps    ──►       response = H(identifier, secret, challenge), compared in constant time
//!     CHAP_I, CHAP_C of its own      ◄──       CHAP_N, CHAP_R: with the secret of the other direction
//! ```

use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::digest::{Context, SHA256};
use aws_lc_rs::rand;

use super::access::{Chap, Secret};
use super::md5::md5;
use super::text::{self, Text};

/// Longest challenge that is taken (RFC 7143 §12.1.3).
const LONGEST_CHALLENGE: usize = 1024;
/// Bytes of our challenges.
const CHALLENGE: usize = 32;

/// How responses are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Algorithm {
    Md5 = 5,
    Sha256 = 7,
}

impl Algorithm {
    /// The first of a list of numbers that is known here.
    pub(super) fn choose(list: &str) -> Option<Self> {
        list.split(',').find_map(|number| match number.trim() {
            "5" => Some(Self::Md5),
            "7" => Some(Self::Sha256),
            _ => None,
        })
    }

    pub(super) fn respond(self, identifier: u8, secret: &Secret, challenge: &[u8]) -> Vec<u8> {
        let parts: [&[u8]; 3] = [&[identifier], secret.as_bytes(), challenge];
        match self {
            Self::Md5 => md5(&parts.concat()).to_vec(),
            Self::Sha256 => {
                let mut context = Context::new(&SHA256);
                parts.iter().for_each(|part| context.update(part));
                context.finish().as_ref().to_vec()
            }
        }
    }
}

/// What the target has asked.
#[derive(Debug)]
pub(super) struct Question {
    algorithm: Algorithm,
    identifier: u8,
    challenge: [u8; CHALLENGE],
}

/// Keys of the initiator's answer.
#[derive(Debug, Default)]
pub(super) struct Reply<'a> {
    pub(super) name: Option<&'a str>,
    pub(super) response: Option<&'a str>,
    pub(super) identifier: Option<&'a str>,
    pub(super) challenge: Option<&'a str>,
}

impl Question {
    /// A fresh one. None if the host has no random numbers.
    pub(super) fn new(algorithm: Algorithm) -> Option<Self> {
        let (mut identifier, mut challenge) = ([0], [0; CHALLENGE]);
        rand::fill(&mut identifier).ok()?;
        rand::fill(&mut challenge).ok()?;
        Some(Self {
            algorithm,
            identifier: identifier[0],
            challenge,
        })
    }

    pub(super) fn put(&self, text: &mut Text) {
        text.put("CHAP_A", &(self.algorithm as u8).to_string());
        text.put("CHAP_I", &self.identifier.to_string());
        text.put("CHAP_C", &text::hexadecimal(&self.challenge));
    }

    /// Checks the answer against `known`, and answers the initiator's own question, if it has one.
    ///
    /// # Errors
    /// Why the initiator is not let in.
    pub(super) fn check(&self, reply: &Reply<'_>, known: &Chap) -> Result<Text, &'static str> {
        let (Some(name), Some(response)) = (reply.name, reply.response) else {
            return Err("the initiator's answer to CHAP is incomplete");
        };
        let response = text::binary(response).ok_or("a CHAP response is malformed")?;
        let expected = self
            .algorithm
            .respond(self.identifier, &known.secret, &self.challenge);
        let right = verify_slices_are_equal(&expected, &response).is_ok();
        let named = verify_slices_are_equal(known.user.as_bytes(), name.as_bytes()).is_ok();
        if !right || !named {
            return Err("wrong CHAP name or secret");
        }
        let mut text = Text::default();
        match (reply.identifier, reply.challenge) {
            (None, None) => {}
            (Some(identifier), Some(challenge)) => {
                let identifier = text::number(identifier).and_then(|number| u8::try_from(number).ok());
                let identifier = identifier.ok_or("a CHAP identifier is malformed")?;
                let challenge = text::binary(challenge)
                    .filter(|challenge| challenge.len() <= LONGEST_CHALLENGE)
                    .ok_or("a CHAP challenge is malformed")?;
                // Who sends our own challenge back wants us to compute the answer to it.
                if challenge == self.challenge {
                    return Err("the CHAP challenge is our own");
                }
                let (user, secret) = known
                    .mutual
                    .as_ref()
                    .ok_or("the initiator wants mutual CHAP, for which there is no secret")?;
                text.put("CHAP_N", user);
                let response = self.algorithm.respond(identifier, secret, &challenge);
                text.put("CHAP_R", &text::hexadecimal(&response));
            }
            _ => return Err("the initiator's question of CHAP is incomplete"),
        }
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(text: &str) -> Secret {
        Secret::new(text.as_bytes().to_vec()).unwrap()
    }

    #[test]
    fn responses_are_digests_of_identifier_secret_and_challenge() {
        let secret = secret("0123456789ab");
        let all = [&[9][..], b"0123456789ab", b"challenge"].concat();
        assert_eq!(Algorithm::Md5.respond(9, &secret, b"challenge"), md5(&all));
        // Of `printf '\t0123456789abchallenge' | sha256sum`.
        assert_eq!(Algorithm::Sha256.respond(9, &secret, b"challenge").len(), 32);
        assert_eq!(Algorithm::choose("6,7,5"), Some(Algorithm::Sha256));
        assert_eq!(Algorithm::choose("5"), Some(Algorithm::Md5));
        assert_eq!(Algorithm::choose("8,x"), None);
    }

    #[test]
    fn only_who_knows_name_and_secret_is_let_in_and_reflections_are_seen() {
        let mut known = Chap {
            user: "host".to_owned(),
            secret: secret("0123456789ab"),
            mutual: None,
        };
        let question = Question::new(Algorithm::Sha256).unwrap();
        let answer = |secret: &Secret| {
            let bytes = Algorithm::Sha256.respond(question.identifier, secret, &question.challenge);
            text::hexadecimal(&bytes)
        };
        let right = answer(&known.secret);
        let wrong = answer(&secret("ba9876543210"));
        let reply = |name, response| Reply {
            name: Some(name),
            response: Some(response),
            ..Reply::default()
        };
        assert_eq!(
            question.check(&reply("host", &right), &known),
            Ok(Text::default())
        );
        assert!(question.check(&reply("host", &wrong), &known).is_err());
        assert!(question.check(&reply("other", &right), &known).is_err());
        assert!(question.check(&Reply::default(), &known).is_err());
        let own = text::hexadecimal(&question.challenge);
        let mutual = |challenge| Reply {
            identifier: Some("3"),
            challenge: Some(challenge),
            ..reply("host", &right)
        };
        assert!(question.check(&mutual("0x0102"), &known).is_err());
        known.mutual = Some(("target".to_owned(), secret("another secret")));
        let text = question.check(&mutual("0x0102"), &known).unwrap();
        let response = Algorithm::Sha256.respond(3, &secret("another secret"), &[1, 2]);
        let mut expected = Text::default();
        expected.put("CHAP_N", "target");
        expected.put("CHAP_R", &text::hexadecimal(&response));
        assert_eq!(text, expected);
        for bad in [own.as_str(), "0x", "zz"] {
            assert!(question.check(&mutual(bad), &known).is_err(), "{bad}");
        }
    }
}
