//! The audit log: a file of lines of JSON that only grows.
//!
//! ```text
//! {"time":"2026-11-29 13:31:02Z","request":7,"principal":"anna","from":"192.0.2.7:50310","method":"POST","path":"/v1/vms/web1/storage","body":{...},"before":{...}}
//! {"time":"2026-11-29 13:31:02Z","request":7,"after":{...},"status":200}
//! ```
//!
//! The first line of a request is durable before it is passed on. Bodies of requests hold no secrets. Who rotates the log sends the file away: it is
//! opened anew when it is gone.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use api::Utc;
use serde::Serialize;
use serde_json::Value;

/// The log cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the audit log {}", path.display())]
pub struct AuditError {
    /// The file.
    path: PathBuf,
    /// The answer.
    source: io::Error,
}

/// A line: what is not known is left out.
#[derive(Debug, Default, Serialize)]
pub(super) struct Line<'a> {
    pub(super) time: String,
    /// Number of the request in this process.
    pub(super) request: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) principal: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) from: Option<SocketAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) method: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) path: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) body: Option<Value>,
    /// How what it changes was, and how it is afterwards: see [`subject`](super::subject).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) before: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) after: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) status: Option<u16>,
    /// Why a console was closed, when it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) closed: Option<&'a str>,
    /// Why it was refused here, or why there is no answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) reason: Option<&'a str>,
}

/// The file, open.
#[derive(Debug)]
pub(super) struct Audit {
    path: PathBuf,
    file: File,
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)
}

impl Audit {
    pub(super) fn open(path: &Path) -> Result<Self, AuditError> {
        let file = open(path).map_err(|source| AuditError {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            path: path.to_owned(),
            file,
        })
    }

    /// Appends a line; `durable`: and waits until it is on the medium.
    pub(super) fn write(&mut self, mut line: Line<'_>, durable: bool) -> Result<(), AuditError> {
        line.time = Utc::now().to_string();
        self.append(&line, durable).map_err(|source| AuditError {
            path: self.path.clone(),
            source,
        })
    }

    fn append(&mut self, line: &Line<'_>, durable: bool) -> io::Result<()> {
        let open_one = self.file.metadata()?;
        let same = |there: std::fs::Metadata| (there.dev(), there.ino()) == (open_one.dev(), open_one.ino());
        if !std::fs::metadata(&self.path).is_ok_and(same) {
            self.file = open(&self.path)?;
        }
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        // One call: lines of two processes do not mix.
        self.file.write_all(&text)?;
        match durable {
            true => self.file.sync_data(),
            false => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_json_and_the_file_may_be_moved_away() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.log");
        let mut audit = Audit::open(&path).unwrap();
        let line = |request, principal| Line {
            request,
            principal,
            ..Line::default()
        };
        audit.write(line(1, Some("a \"quoted\"\nname")), true).unwrap();
        std::fs::rename(&path, folder.path().join("audit.log.1")).unwrap();
        audit.write(line(2, None), false).unwrap();
        let read = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap();
        let first: Value = serde_json::from_str(&read("audit.log.1")).unwrap();
        assert_eq!(first["principal"], "a \"quoted\"\nname");
        assert_eq!(read("audit.log.1").matches('\n').count(), 1);
        let second: Value = serde_json::from_str(&read("audit.log")).unwrap();
        assert_eq!((&second["request"], second.get("principal")), (&2.into(), None));
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert!(Audit::open(folder.path()).is_err());
    }
}
