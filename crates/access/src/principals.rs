//! Who is known, by what, and what they may do: a file.
//!
//! ```toml
//! [[principal]]
//! name = "anna"
//! role = "administrator"
//! certificate-sha256 = "ba78..."        # of the client's certificate
//!
//! [[principal]]
//! name = "monitoring"
//! role = "viewer"
//! token-sha256 = "2cf2..."              # of the token
//! expires = 1798675200                  # seconds since 1970; left out: never
//! machines = ["web1", "db1"]            # left out: all
//! ```
//!
//! The file is private to its owner (mode 0600): who can write it has all rights. A change takes effect with the next request.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::fingerprint::Fingerprint;
use crate::token::TokenHash;

/// The largest file that is read, in bytes.
const MAX_FILE: u64 = 1 << 20;
/// The longest name of a principal, in bytes.
const MAX_NAME: usize = 64;

/// What somebody may do; each may also what those before it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Look at machines, disks, volumes and devices, and at events.
    Viewer,
    /// Run machines, and use their storage: power, limits, snapshots, clones, sizes of disks, jobs.
    Operator,
    /// Everything: physical storage, what is deleted, files of the host that are given to guests.
    Administrator,
}

impl fmt::Display for Role {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Viewer => "viewer",
            Self::Operator => "operator",
            Self::Administrator => "administrator",
        })
    }
}

/// Somebody who is known.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Principal {
    /// What the audit log calls it.
    pub name: String,
    /// What it may do.
    pub role: Role,
    /// The machines to which that is restricted, by name; all if none is named.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub machines: Vec<String>,
    /// When this ends, in seconds since 1970; never if none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<u64>,
    /// It has the token with this SHA-256 sum.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_sha256: Option<TokenHash>,
    /// It has the certificate with this SHA-256 sum (of its DER).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate_sha256: Option<Fingerprint>,
}

impl Principal {
    /// Whether it may have to do with a machine.
    pub fn knows(&self, machine: &str) -> bool {
        self.machines.is_empty() || self.machines.iter().any(|known| known == machine)
    }

    /// Whether it may have to do with all of a host.
    pub fn knows_all(&self) -> bool {
        self.machines.is_empty()
    }

    /// Whether its time is over.
    pub fn has_expired(&self) -> bool {
        self.expires.is_some_and(|end| end <= now())
    }

    fn check(&self) -> Result<(), String> {
        let name = &self.name;
        if name.is_empty() || name.len() > MAX_NAME || name.chars().any(char::is_control) {
            return Err(format!(
                "the name {name:?} is empty, too long, or has control characters"
            ));
        }
        if self.token_sha256.is_none() && self.certificate_sha256.is_none() {
            return Err(format!(
                "{name} has neither token-sha256 nor certificate-sha256, so nobody could be it"
            ));
        }
        Ok(())
    }
}

/// How somebody shows who it is.
#[derive(Debug, Clone, Default)]
pub struct Credentials {
    /// The sum of the certificate with which TLS has been begun.
    pub certificate: Option<Fingerprint>,
    /// The sum of the token that came with the request.
    pub token: Option<TokenHash>,
}

/// Somebody is not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unknown {
    /// It shows nothing.
    #[error("neither a known client certificate nor a token was presented")]
    Nothing,
    /// What it shows is nobody's, or not any more.
    #[error("the certificate or token is not known, or has expired")]
    Wrong,
}

/// The file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PrincipalsError {
    /// It cannot be read or written.
    #[error("cannot {action} {}", path.display())]
    System {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The answer.
        source: io::Error,
    },
    /// Others can read or change it.
    #[error("{} can be read or changed by others than its owner; `chmod 600` it", .0.display())]
    Open(PathBuf),
    /// It is too large.
    #[error("{} has more than {MAX_FILE} bytes", .0.display())]
    TooLarge(PathBuf),
    /// Its content is wrong.
    #[error("{}: {detail}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong, with the line if it is known.
        detail: String,
    },
    /// A name is there already.
    #[error("there is a principal {name} in {} already; revoke it first", path.display())]
    Exists {
        /// The name.
        name: String,
        /// The file.
        path: PathBuf,
    },
    /// A name is not there.
    #[error("there is no principal {name} in {}", path.display())]
    Missing {
        /// The name.
        name: String,
        /// The file.
        path: PathBuf,
    },
}

/// All who are known.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Principals {
    /// In the order of the file.
    #[serde(default, rename = "principal", skip_serializing_if = "Vec::is_empty")]
    pub all: Vec<Principal>,
}

fn system(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PrincipalsError + use<> {
    let path = path.to_owned();
    move |source| PrincipalsError::System { action, path, source }
}

/// Seconds since 1970.
fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

impl Principals {
    /// Reads the file.
    ///
    /// # Errors
    /// It cannot be read, is open to others, or says something impossible.
    pub fn load(path: &Path) -> Result<Self, PrincipalsError> {
        let file = File::open(path).map_err(system("read", path))?;
        let metadata = file.metadata().map_err(system("read", path))?;
        if metadata.mode() & 0o077 != 0 {
            return Err(PrincipalsError::Open(path.to_owned()));
        }
        let mut text = String::new();
        let read = file.take(MAX_FILE + 1).read_to_string(&mut text);
        read.map_err(system("read", path))?;
        if text.len() as u64 > MAX_FILE {
            return Err(PrincipalsError::TooLarge(path.to_owned()));
        }
        Self::parse(&text).map_err(|detail| PrincipalsError::Content {
            path: path.to_owned(),
            detail,
        })
    }

    fn parse(text: &str) -> Result<Self, String> {
        let principals: Self = toml::from_str(text).map_err(|error| {
            let start = error.span().map_or(0, |span| span.start);
            let before = text.get(..start).unwrap_or_default();
            let line = before.matches('\n').count() + 1;
            format!("line {line}: {}", error.message().replace('\n', ", "))
        })?;
        for (number, principal) in principals.all.iter().enumerate() {
            principal.check()?;
            let earlier = principals.all.get(..number).unwrap_or_default();
            if earlier.iter().any(|other| other.name == principal.name) {
                return Err(format!("the name {} is there twice", principal.name));
            }
        }
        Ok(principals)
    }

    /// Writes the file, as a whole or not at all, readable by its owner only.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn save(&self, path: &Path) -> Result<(), PrincipalsError> {
        let text = toml::to_string(self).map_err(|error| PrincipalsError::Content {
            path: path.to_owned(),
            detail: error.to_string(),
        })?;
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(".new");
        let new = path.with_file_name(name);
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600);
        let written = options.open(&new).and_then(|mut file| {
            rustix::fs::fchmod(&file, rustix::fs::Mode::from_raw_mode(0o600))?;
            file.write_all(text.as_bytes())?;
            file.sync_all()
        });
        written.map_err(system("write", &new))?;
        std::fs::rename(&new, path).map_err(system("replace", path))?;
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        let folder = File::open(folder.unwrap_or(Path::new(".")));
        folder
            .and_then(|folder| folder.sync_all())
            .map_err(system("replace", path))
    }

    /// Adds somebody.
    ///
    /// # Errors
    /// Its name is there already, or it says something impossible.
    pub fn add(&mut self, principal: Principal, path: &Path) -> Result<(), PrincipalsError> {
        principal.check().map_err(|detail| PrincipalsError::Content {
            path: path.to_owned(),
            detail,
        })?;
        if self.all.iter().any(|other| other.name == principal.name) {
            return Err(PrincipalsError::Exists {
                name: principal.name,
                path: path.to_owned(),
            });
        }
        self.all.push(principal);
        Ok(())
    }

    /// Takes somebody out.
    ///
    /// # Errors
    /// There is nobody of that name.
    pub fn remove(&mut self, name: &str, path: &Path) -> Result<(), PrincipalsError> {
        let before = self.all.len();
        self.all.retain(|principal| principal.name != name);
        if self.all.len() == before {
            return Err(PrincipalsError::Missing {
                name: name.to_owned(),
                path: path.to_owned(),
            });
        }
        Ok(())
    }

    /// Who that is. A certificate goes before a token. Takes as long whoever it is.
    ///
    /// # Errors
    /// Nobody who is known now.
    pub fn find(&self, credentials: &Credentials) -> Result<&Principal, Unknown> {
        let mut found = None;
        for principal in &self.all {
            let by_certificate = credentials
                .certificate
                .as_ref()
                .zip(principal.certificate_sha256.as_ref());
            let by_token = credentials.token.as_ref().zip(principal.token_sha256.as_ref());
            let certified = by_certificate.is_some_and(|(shown, known)| shown.is(known));
            let told = by_token.is_some_and(|(shown, known)| shown.is(known));
            if !principal.has_expired() && (certified || (told && found.is_none())) {
                found = Some(principal);
                if certified {
                    break;
                }
            }
        }
        match (found, credentials) {
            (Some(principal), _) => Ok(principal),
            (
                None,
                Credentials {
                    certificate: None,
                    token: None,
                },
            ) => Err(Unknown::Nothing),
            _ => Err(Unknown::Wrong),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::token::Token;

    fn principal(name: &str, token: &Token) -> Principal {
        Principal {
            name: name.to_owned(),
            role: Role::Operator,
            machines: Vec::new(),
            expires: None,
            token_sha256: Some(token.hash()),
            certificate_sha256: None,
        }
    }

    fn with(token: &str) -> Credentials {
        Credentials {
            certificate: None,
            token: Some(TokenHash::of(token)),
        }
    }

    #[test]
    fn who_is_known_is_found_until_it_expires_or_is_revoked() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("access.toml");
        let (anna, ben) = (Token::generate().unwrap(), Token::generate().unwrap());
        let mut all = Principals::default();
        all.add(principal("anna", &anna), &path).unwrap();
        let ended = Principal {
            expires: Some(1),
            ..principal("ben", &ben)
        };
        all.add(ended, &path).unwrap();
        let twice = all.add(principal("anna", &ben), &path);
        assert!(matches!(twice, Err(PrincipalsError::Exists { .. })));
        all.save(&path).unwrap();
        let mut read = Principals::load(&path).unwrap();
        assert_eq!(read, all);
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(!text.contains(anna.reveal()), "a secret is on the disk");
        assert_eq!(read.find(&with(anna.reveal())).unwrap().name, "anna");
        assert_eq!(read.find(&with(ben.reveal())), Err(Unknown::Wrong));
        assert_eq!(read.find(&with("")), Err(Unknown::Wrong));
        assert_eq!(read.find(&Credentials::default()), Err(Unknown::Nothing));
        read.remove("anna", &path).unwrap();
        assert_eq!(read.find(&with(anna.reveal())), Err(Unknown::Wrong));
        assert!(read.remove("anna", &path).is_err());
    }

    #[test]
    fn a_certificate_goes_before_a_token() {
        let token = Token::generate().unwrap();
        let certificate = Fingerprint::of(b"a certificate");
        let mut all = Principals::default();
        let path = Path::new("access.toml");
        all.add(principal("told", &token), path).unwrap();
        let certified = Principal {
            token_sha256: None,
            certificate_sha256: Some(certificate.clone()),
            machines: vec!["web1".into()],
            ..principal("certified", &token)
        };
        all.add(certified, path).unwrap();
        let both = Credentials {
            certificate: Some(certificate),
            ..with(token.reveal())
        };
        let found = all.find(&both).unwrap();
        assert_eq!(found.name, "certified");
        assert!(found.knows("web1") && !found.knows("db1"));
        assert!(all.find(&with(token.reveal())).unwrap().knows("db1"));
    }

    #[test]
    fn files_that_are_open_or_wrong_are_refused_with_the_reason() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("access.toml");
        assert!(matches!(
            Principals::load(&path),
            Err(PrincipalsError::System { .. })
        ));
        let sum = Fingerprint::of(b"x");
        for (text, reason) in [
            ("[[principal]]\nname = \"a\"\nrole = \"king\"\n", "line 3"),
            (
                "[[principal]]\nname = \"a\"\nrole = \"viewer\"\n",
                "nobody could be it",
            ),
            ("[[principal]]\nname = \"\"\nrole = \"viewer\"\n", "empty"),
            ("[[principal]]\nrole = \"viewer\"\n", "name"),
            (
                "[[principal]]\nname = \"a\"\nrole = \"viewer\"\ntoken-sha256 = \"12\"\n",
                "64",
            ),
            ("x = 1\n", "unknown field"),
        ] {
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
            let error = Principals::load(&path).unwrap_err().to_string();
            assert!(error.contains(reason), "{text}: {error}");
        }
        let entry = format!("[[principal]]\nname = \"a\"\nrole = \"viewer\"\ntoken-sha256 = \"{sum}\"\n");
        std::fs::write(&path, entry.repeat(2)).unwrap();
        assert!(Principals::load(&path).unwrap_err().to_string().contains("twice"));
        std::fs::write(&path, entry).unwrap();
        assert!(Principals::load(&path).is_ok());
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(Principals::load(&path), Err(PrincipalsError::Open(_))));
    }
}
