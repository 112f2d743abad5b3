//! `[remote]` in the file that --config names: a machine behind a gateway.
//!
//! ```toml
//! [remote]
//! address = "host1.example:7443"
//! machine = "web1"
//! ca = "ca.pem"
//! token-file = "anna.token"         # or certificate = "anna.pem" and key = "anna.key"
//! ```

use std::path::{Path, PathBuf};

use access::ClientTls;
use anyhow::Context;
use management::{Remote, Scope, Target};
use serde::Deserialize;

use crate::exit::UsageError;
use crate::toml_file;

/// The table; relative paths are relative to its file.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct RemoteConfig {
    address: String,
    /// Without one, the host behind the gateway is meant.
    machine: Option<String>,
    ca: PathBuf,
    token_file: Option<PathBuf>,
    certificate: Option<PathBuf>,
    key: Option<PathBuf>,
}

impl RemoteConfig {
    /// Where that is, and `scope` of it unless the table names a machine; `file` is the file that has the table.
    ///
    /// # Errors
    /// The token cannot be read, or something is missing.
    pub(crate) fn target(self, file: &Path, scope: Scope) -> anyhow::Result<Target> {
        let folder = file.parent().unwrap_or(Path::new(""));
        let wrong = |what: &str| UsageError::new(format!("{}: remote: {what}", file.display()));
        let certificate = match (self.certificate, self.key) {
            (Some(certificate), Some(key)) => Some((folder.join(certificate), folder.join(key))),
            (None, None) => None,
            _ => return Err(wrong("certificate and key belong together").into()),
        };
        if certificate.is_none() && self.token_file.is_none() {
            return Err(wrong("it needs token-file, or certificate and key").into());
        }
        let token = self.token_file.map(|path| {
            let path = folder.join(path);
            let text = std::fs::read_to_string(&path).map_err(UsageError::new);
            text.with_context(|| format!("cannot read {}", path.display()))
        });
        let token = token.transpose()?.map(|text| text.trim().to_owned());
        if token
            .as_ref()
            .is_some_and(|token| token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()))
        {
            return Err(wrong("the file of token-file has no token").into());
        }
        Ok(Target::Remote(Box::new(Remote {
            address: self.address,
            scope: self.machine.map_or(scope, Scope::Machine),
            tls: ClientTls {
                authorities: folder.join(self.ca),
                certificate,
            },
            token,
        })))
    }
}

/// What a file leads to over the network; none if it is another kind of file.
///
/// # Errors
/// There is a `[remote]`, and it is wrong.
pub(crate) fn target(path: &Path, scope: Scope) -> anyhow::Result<Option<Target>> {
    #[derive(Deserialize)]
    struct File {
        remote: Option<RemoteConfig>,
    }
    let Ok(text) = std::fs::read_to_string(path) else {
        // Whoever reads it as what it is says why.
        return Ok(None);
    };
    if !text.contains("[remote]") {
        return Ok(None);
    }
    let file: File = toml_file::parse(path, &text)?;
    file.remote.map(|remote| remote.target(path, scope)).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_leads_to_a_machine_or_says_what_is_missing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("remote.toml");
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            target(&path, Scope::Pool("safe".to_owned()))
        };
        assert!(read("name = \"a\"").unwrap().is_none());
        let base = "[remote]\naddress = \"h:1\"\nmachine = \"web1\"\nca = \"ca.pem\"\n";
        let missing = format!("{:#}", read(base).unwrap_err());
        assert!(missing.contains("token-file"), "{missing}");
        let half = format!("{base}certificate = \"a.pem\"\n");
        assert!(format!("{:#}", read(&half).unwrap_err()).contains("belong together"));
        let told = format!("{base}token-file = \"t\"\n");
        assert!(format!("{:#}", read(&told).unwrap_err()).contains("cannot read"));
        std::fs::write(folder.path().join("t"), "smsvmm_1\n").unwrap();
        let Some(Target::Remote(remote)) = read(&told).unwrap() else {
            panic!("no remote");
        };
        assert_eq!(
            (&remote.scope, remote.token.as_deref()),
            (&Scope::Machine("web1".to_owned()), Some("smsvmm_1"))
        );
        assert_eq!(remote.tls.authorities, folder.path().join("ca.pem"));
        std::fs::write(folder.path().join("t"), "two words\n").unwrap();
        assert!(read(&told).is_err());
        let unknown = format!("{base}colour = \"red\"\n");
        assert!(
            format!("{:#}", read(&unknown).unwrap_err()).contains("remote.toml:5"),
            "line"
        );
    }
}
