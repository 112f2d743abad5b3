//! The programs of the toolbox: unpacked Debian packages, run on this machine without being installed.
//!
//! The same tree is the lab host's root. Here its programs use this machine's C library and dynamic loader (an older or
//! newer one than the tree's would not fit the tree's loader) and all other libraries of the tree.

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use crate::Cache;

/// Gives commands for the toolbox's programs.
#[derive(Clone, Debug)]
pub struct Toolbox {
    folder: PathBuf,
}

impl Toolbox {
    /// The toolbox of the cache.
    ///
    /// # Errors
    /// When `cargo xtask setup` has not made it.
    pub fn open(cache: &Cache) -> Result<Self> {
        Ok(Self {
            folder: cache.image("toolbox")?,
        })
    }

    /// The tree with the QEMU that emulates the lab host: another, newer one than the toolbox's.
    ///
    /// # Errors
    /// When `cargo xtask setup` has not made it.
    pub fn emulator(cache: &Cache) -> Result<Self> {
        Ok(Self {
            folder: cache.image("emulator")?,
        })
    }

    /// Packages that set-up has unpacked in a folder, as `tree` and `libraries`.
    #[must_use]
    pub fn at(folder: &Path) -> Self {
        Self {
            folder: folder.to_path_buf(),
        }
    }

    /// The root of the unpacked tree.
    #[must_use]
    pub fn tree(&self) -> PathBuf {
        self.folder.join("tree")
    }

    /// Symlinks to the tree's libraries, without those of the C library.
    #[must_use]
    pub fn libraries(&self) -> PathBuf {
        self.folder.join("libraries")
    }

    /// The file of a program of the tree.
    #[must_use]
    pub fn program(&self, name: &str) -> Option<PathBuf> {
        ["usr/bin", "usr/sbin"]
            .iter()
            .find_map(|folder| self.resolve(Path::new(folder).join(name)))
    }

    /// Follows a path's symlinks as seen from inside the tree.
    fn resolve(&self, path: PathBuf) -> Option<PathBuf> {
        let mut path = self.tree().join(path);
        for _ in 0..8 {
            let Ok(target) = std::fs::read_link(&path) else {
                break;
            };
            path = match target.strip_prefix("/") {
                Ok(inside) => self.tree().join(inside),
                Err(_) => path.parent()?.join(target),
            };
        }
        path.exists().then_some(path)
    }

    /// A search path with this machine's programs first and the tree's behind them. Good for programs that need nothing but
    /// the C library, such as iasl and passt.
    #[must_use]
    pub fn search_path(&self) -> std::ffi::OsString {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let tree = ["usr/bin", "usr/sbin"].map(|folder| self.tree().join(folder));
        std::env::join_paths(std::env::split_paths(&path).chain(tree)).unwrap_or(path)
    }

    /// A command that runs a program of the tree on this machine (or this machine's, when the tree does not have it).
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.program(program).unwrap_or_else(|| PathBuf::from(program)));
        command
            .arg0(program)
            .env("LD_LIBRARY_PATH", self.libraries())
            .env(
                "QEMU_MODULE_DIR",
                self.tree().join("usr/lib/x86_64-linux-gnu/qemu"),
            )
            .stdin(Stdio::null());
        command
    }
}

/// Runs a command to its end and returns its standard output.
///
/// # Errors
/// When it cannot be started or fails; the error has its arguments and error output.
pub fn finish(command: &mut Command) -> Result<Vec<u8>> {
    let output = command
        .output()
        .with_context(|| format!("cannot start {}", name(command).display()))?;
    if !output.status.success() {
        bail!(
            "{command:?} failed ({}): {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(output.stdout)
}

fn name(command: &Command) -> &Path {
    Path::new(command.get_program())
}
