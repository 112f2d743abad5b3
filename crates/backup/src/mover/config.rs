//! What a mover is told: the file of `smsvmm mover serve`.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use access::TokenHash;
use api::ByteSize;
use serde::{Deserialize, Serialize};

use crate::plan::MAX_ENTRIES;

/// `mover.toml`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct MoverConfig {
    /// Where it listens.
    pub listen: SocketAddr,
    /// The folder for archives; each principal has one of its own in it.
    pub store: PathBuf,
    /// Certificate and key. Without them only addresses of this host are allowed.
    #[serde(default)]
    pub tls: Option<TlsConfig>,
    /// Limits.
    #[serde(default)]
    pub limits: Limits,
    /// Who may back up what.
    #[serde(rename = "principal", default)]
    pub principals: Vec<Principal>,
}

/// Files in PEM format.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct TlsConfig {
    /// The mover's certificate, followed by those that lead to its authority.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// How much is possible.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Limits {
    /// Connections at once.
    pub connections: usize,
    /// Entries of a backup.
    pub entries: u64,
    /// Bytes of a backup that are read or sent, together; no limit if none.
    pub bytes: Option<ByteSize>,
    /// Bytes per second of a connection; no limit if none.
    pub rate: Option<ByteSize>,
    /// Seconds in which a request, or the next one, must have come whole.
    pub patience: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 8,
            entries: MAX_ENTRIES,
            bytes: None,
            rate: None,
            patience: 120,
        }
    }
}

/// Who may back up what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Principal {
    /// What the folder of its archives is called.
    pub name: String,
    /// SHA-256 of its token in hexadecimal digits, as `smsvmm mover token` tells.
    pub token_sha256: TokenHash,
    /// The management socket of its machine.
    #[serde(default)]
    pub socket: Option<PathBuf>,
    /// The devices of its pool, if they are to be read directly.
    #[serde(default)]
    pub devices: Vec<PathBuf>,
    /// Disks beside those that its machine has attached for writing: paths, or beginnings of paths with `*` at the end.
    #[serde(default)]
    pub disks: Vec<String>,
    /// Instead of a socket: the images of frozen disks, by their names (`/web1/data.dsk@monday`).
    #[serde(default)]
    pub images: BTreeMap<String, PathBuf>,
}

impl MoverConfig {
    /// Checks what the types alone cannot.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&self) -> Result<(), String> {
        if self.tls.is_none() && !self.listen.ip().is_loopback() {
            return Err(format!(
                "listen: {} can be reached from elsewhere, and tokens would go there in clear: give [tls] a certificate and a key",
                self.listen
            ));
        }
        if self.limits.connections == 0 || self.limits.patience == 0 {
            return Err("limits: connections and patience are at least 1".into());
        }
        if self.principals.is_empty() {
            return Err("there is no [[principal]]: nobody could use it".into());
        }
        for (number, principal) in self.principals.iter().enumerate() {
            let name = &principal.name;
            crate::check::name(name).map_err(|error| format!("principal: {error}"))?;
            let others = self.principals.get(..number).unwrap_or_default();
            if others.iter().any(|other| other.name == *name) {
                return Err(format!("principal {name} is there twice"));
            }
            let twice = |other: &Principal| other.token_sha256.is(&principal.token_sha256);
            if others.iter().any(twice) {
                return Err(format!("principal {name} has the token of another one"));
            }
            match (&principal.socket, principal.images.is_empty()) {
                (Some(_), true) | (None, false) => {}
                _ => return Err(format!("principal {name} needs either a socket or images")),
            }
        }
        Ok(())
    }

    /// Whose token this is.
    pub fn principal(&self, token: &str) -> Option<&Principal> {
        let given = TokenHash::of(token);
        let mut found = None;
        // All are compared, whichever it is.
        for principal in &self.principals {
            if given.is(&principal.token_sha256) {
                found = Some(principal);
            }
        }
        found
    }
}

impl Principal {
    /// Whether `disks` has this path.
    pub(super) fn has(&self, disk: &str) -> bool {
        self.disks.iter().any(|pattern| match pattern.strip_suffix('*') {
            Some(beginning) => disk.starts_with(beginning),
            None => disk == pattern,
        })
    }
}

/// Fills `bytes` with randomness.
pub(super) fn random(bytes: &mut [u8]) -> std::io::Result<()> {
    aws_lc_rs::rand::fill(bytes).map_err(|_| std::io::Error::other("the system gives no random numbers"))
}

#[cfg(test)]
mod tests {
    use access::Token;

    use super::*;

    fn principal(name: &str, token: &Token) -> Principal {
        Principal {
            name: name.into(),
            token_sha256: token.hash(),
            socket: Some("/run/x.sock".into()),
            devices: Vec::new(),
            disks: vec!["/a/*".into(), "/b.dsk".into()],
            images: BTreeMap::new(),
        }
    }

    fn config(principals: Vec<Principal>) -> MoverConfig {
        MoverConfig {
            listen: "127.0.0.1:0".parse().unwrap(),
            store: "/tmp".into(),
            tls: None,
            limits: Limits::default(),
            principals,
        }
    }

    #[test]
    fn a_token_leads_to_its_principal_and_to_no_other() {
        let (first, second) = (Token::generate().unwrap(), Token::generate().unwrap());
        let config = config(vec![principal("a", &first), principal("b", &second)]);
        config.check().unwrap();
        let first = first.reveal();
        assert_eq!(config.principal(first).unwrap().name, "a");
        assert_eq!(config.principal(second.reveal()).unwrap().name, "b");
        for wrong in ["", &first[..first.len() - 1], "smsvmm_"] {
            assert!(config.principal(wrong).is_none(), "{wrong}");
        }
        assert!(config.principals[0].has("/a/x.dsk") && config.principals[0].has("/b.dsk"));
        assert!(!config.principals[0].has("/ab.dsk") && !config.principals[0].has("/b.dsk2"));
    }

    #[test]
    fn a_configuration_that_gives_too_much_away_is_refused() {
        let token = Token::generate().unwrap();
        let good = config(vec![principal("a", &token)]);
        good.check().unwrap();
        let open = MoverConfig {
            listen: "0.0.0.0:1".parse().unwrap(),
            ..good.clone()
        };
        let both = Principal {
            images: [("/x.dsk@y".to_owned(), PathBuf::from("/z"))].into(),
            ..principal("a", &token)
        };
        let neither = Principal {
            socket: None,
            ..principal("a", &token)
        };
        for wrong in [
            open,
            config(Vec::new()),
            config(vec![principal("../a", &token)]),
            config(vec![
                principal("a", &token),
                principal("a", &Token::generate().unwrap()),
            ]),
            config(vec![principal("a", &token), principal("b", &token)]),
            config(vec![both]),
            config(vec![neither]),
        ] {
            assert!(wrong.check().is_err(), "{wrong:?}");
        }
    }
}
