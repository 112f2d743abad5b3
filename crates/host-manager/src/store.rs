//! The definitions of machines on the host's own file system.
//!
//! ```text
//!   STATE/vms/NAME/vm.toml        complete: absolute paths, the manager's sockets
//!   STATE/vms/NAME/machine.toml   when it is started
//!   STATE/vms/NAME/log            what its process had to say; log.1 before that
//!   STATE/vms/NAME/user           as whom it was started last
//!   RUNTIME/vms/NAME/...          its sockets, the disks that it may use, and whether it is wanted to run
//!
//! All of it is the manager's, and nothing is the machine's but its sockets: what it could change, it could lead elsewhere.
//! ```
//!
//! A file is replaced as a whole, and durable when that returns; a definition is there when its vm.toml is.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use api::{Problem, ProblemKind, RestartPolicy, VmName};
use crc_fast::{CrcAlgorithm, Digest};
use serde::{Deserialize, Serialize};

/// A log that is larger when a machine is started is put aside, in bytes.
const MAX_LOG: u64 = 1 << 20;
/// Largest vm.toml that is read, in bytes.
const MAX_DEFINITION: u64 = 1 << 20;

/// When a machine is started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(crate) struct StartRules {
    pub(crate) autostart: bool,
    pub(crate) restart: RestartPolicy,
}

/// A name for a definition: the same for the same one, also in another process; as good as certainly another one for another.
pub(crate) fn revision(config: &str, rules: StartRules) -> String {
    let mut digest = Digest::new(CrcAlgorithm::Crc64Nvme);
    digest.update(config.as_bytes());
    digest.update(format!("{rules:?}").as_bytes());
    format!("{:016x}", digest.finalize())
}

/// The folders.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    state: PathBuf,
    runtime: PathBuf,
}

/// The files of one machine.
#[derive(Debug, Clone)]
pub(crate) struct Files {
    pub(crate) config: PathBuf,
    pub(crate) rules: PathBuf,
    pub(crate) log: PathBuf,
    pub(crate) management: PathBuf,
    pub(crate) serial: PathBuf,
    /// The socket at which it asks the manager.
    pub(crate) manager: PathBuf,
    /// The disks that it may use.
    pub(crate) disks: PathBuf,
    /// The number of its user.
    pub(crate) user: PathBuf,
    /// How the process ended, in its own words.
    pub(crate) report: PathBuf,
    /// It is there as long as somebody wants the machine to run.
    pub(crate) wanted: PathBuf,
}

fn failed(action: &str, path: &Path) -> impl FnOnce(io::Error) -> Problem + use<> {
    let text = format!("cannot {action} {}", path.display());
    move |error| Problem::new(ProblemKind::Host, format!("{text}: {error}"))
}

/// Makes a folder that is private to its owner, and those above it.
pub(crate) fn private_folder(path: &Path) -> Result<(), Problem> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(failed("make the folder", path))
}

/// Replaces a file as a whole; it is durable when this returns.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
}

impl Store {
    /// Makes the folders if they are not there.
    pub(crate) fn open(state: &Path, runtime: &Path) -> Result<Self, Problem> {
        private_folder(&state.join("vms"))?;
        private_folder(&runtime.join("vms"))?;
        Ok(Self {
            state: state.to_owned(),
            runtime: runtime.to_owned(),
        })
    }

    /// The files of a machine.
    ///
    /// # Errors
    /// The name would lead elsewhere.
    pub(crate) fn files(&self, name: &VmName) -> Result<Files, Problem> {
        if name.as_str().starts_with('.') {
            let problem = Problem::new(ProblemKind::Invalid, "the name of a machine begins with no dot");
            return Err(problem.about(name));
        }
        let state = self.state.join("vms").join(name.as_str());
        let runtime = self.runtime.join("vms").join(name.as_str());
        Ok(Files {
            config: state.join("vm.toml"),
            rules: state.join("machine.toml"),
            log: state.join("log"),
            report: state.join("end"),
            user: state.join("user"),
            manager: runtime.join("manager.sock"),
            disks: runtime.join("disks"),
            management: runtime.join("management.sock"),
            serial: runtime.join("serial.sock"),
            wanted: runtime.join("wanted"),
        })
    }

    /// The machines that are defined, in the order of their names.
    pub(crate) fn names(&self) -> Result<Vec<VmName>, Problem> {
        let folder = self.state.join("vms");
        let failed = || failed("read", &folder);
        let mut names = Vec::new();
        for entry in fs::read_dir(&folder).map_err(failed())? {
            let entry = entry.map_err(failed())?;
            let name = entry.file_name().to_str().and_then(|name| name.parse().ok());
            if let Some(name) = name
                && entry.path().join("vm.toml").exists()
            {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    /// The text of a machine's vm.toml, and when it is started.
    pub(crate) fn read(&self, name: &VmName) -> Result<(String, StartRules), Problem> {
        let files = self.files(name)?;
        let size = fs::metadata(&files.config).map_or(0, |metadata| metadata.len());
        if size > MAX_DEFINITION {
            let text = format!("{} is too large", files.config.display());
            return Err(Problem::new(ProblemKind::Host, text).about(name));
        }
        let config = fs::read_to_string(&files.config).map_err(failed("read", &files.config))?;
        let rules = match fs::read_to_string(&files.rules) {
            Ok(text) => toml::from_str(&text).map_err(|error| {
                let text = format!("{}: {}", files.rules.display(), error.message());
                Problem::new(ProblemKind::Host, text).about(name)
            })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => StartRules::default(),
            Err(error) => return Err(failed("read", &files.rules)(error)),
        };
        Ok((config, rules))
    }

    /// Stores a definition.
    pub(crate) fn write(&self, name: &VmName, config: &str, rules: StartRules) -> Result<(), Problem> {
        let files = self.files(name)?;
        private_folder(files.config.parent().unwrap_or(&self.state))?;
        let text = toml::to_string(&rules).unwrap_or_default();
        replace(&files.rules, &text).map_err(failed("write", &files.rules))?;
        replace(&files.config, config).map_err(failed("write", &files.config))
    }

    /// Removes a definition, its log, and its sockets.
    pub(crate) fn remove(&self, name: &VmName) -> Result<(), Problem> {
        let files = self.files(name)?;
        // First what makes it a definition.
        fs::remove_file(&files.config).map_err(failed("remove", &files.config))?;
        for path in [&files.config, &files.management] {
            if let Some(folder) = path.parent() {
                match fs::remove_dir_all(folder) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        return Err(failed("remove", folder)(error));
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }
}

impl Files {
    /// Notes for the next manager whether somebody wants the machine to run.
    pub(crate) fn want(&self, wanted: bool) {
        let noted = match wanted {
            true => File::create(&self.wanted).map(drop),
            false => fs::remove_file(&self.wanted),
        };
        match noted {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %self.wanted.display(), %error, "what is wanted cannot be noted");
            }
            _ => {}
        }
    }

    /// The number of the user as whom the machine was started last.
    pub(crate) fn user(&self) -> Option<u32> {
        fs::read_to_string(&self.user).ok()?.trim().parse().ok()
    }

    /// Keeps the number of its user, also over a crash: what it leaves must not become another machine's.
    pub(crate) fn set_user(&self, user: Option<u32>) -> Result<(), Problem> {
        let text = user.map(|user| format!("{user}\n")).unwrap_or_default();
        replace(&self.user, &text).map_err(failed("write", &self.user))
    }

    /// Removes sockets of a process that has ended: its own user could not.
    pub(crate) fn tidy(&self) {
        for socket in [&self.management, &self.serial] {
            match fs::remove_file(socket) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(path = %socket.display(), %error, "a socket cannot be removed");
                }
                _ => {}
            }
        }
    }

    /// Makes the folders of a machine.
    pub(crate) fn folders(&self) -> Result<(), Problem> {
        for path in [&self.log, &self.management] {
            private_folder(path.parent().unwrap_or(Path::new("/")))?;
        }
        Ok(())
    }

    /// Makes what a process needs that is started now; its log.
    pub(crate) fn prepare(&self) -> Result<File, Problem> {
        self.folders()?;
        if fs::metadata(&self.log).is_ok_and(|log| log.len() > MAX_LOG) {
            let old = self.log.with_extension("1");
            fs::rename(&self.log, &old).map_err(failed("put aside", &self.log))?;
        }
        // It tells of the last one.
        let _ = fs::remove_file(&self.report);
        OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&self.log)
            .map_err(failed("open", &self.log))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn definitions_are_kept_and_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("state"), &folder.path().join("run")).unwrap();
        let (web, db): (VmName, VmName) = ("web1".parse().unwrap(), "db1".parse().unwrap());
        let rules = StartRules {
            autostart: true,
            restart: RestartPolicy::Always,
        };
        store.write(&web, "name = \"web1\"", rules).unwrap();
        store.write(&db, "name = \"db1\"", StartRules::default()).unwrap();
        assert_eq!(store.names().unwrap(), [db.clone(), web.clone()]);
        assert_eq!(store.read(&web).unwrap(), ("name = \"web1\"".to_owned(), rules));
        let files = store.files(&db).unwrap();
        fs::remove_file(&files.rules).unwrap();
        assert_eq!(store.read(&db).unwrap().1, StartRules::default());
        files.prepare().unwrap().write_all(&[b'x'; 2 << 20]).unwrap();
        files.prepare().unwrap();
        assert_eq!(fs::metadata(&files.log).unwrap().len(), 0);
        store.remove(&db).unwrap();
        assert_eq!(store.names().unwrap(), [web]);
        assert!(!files.management.parent().unwrap().exists());
        assert!(store.files(&"..".parse().unwrap()).is_err());
    }
}
