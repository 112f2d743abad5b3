//! Folders on their way into the lab and back: an ext4 image made without mounting, and tar archives.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use crate::Cache;
use crate::toolbox::{Toolbox, finish};

/// The size of every share image. The saved host knows its disks, so this never varies; the file is sparse.
const SIZE: &str = "6G";

/// An ext4 image with a copy of a folder. The file goes when this is dropped; who has opened it keeps it.
pub struct Share {
    image: tempfile::TempPath,
}

impl Share {
    /// Copies a folder, or nothing, into a new image.
    ///
    /// # Errors
    /// When the folder cannot be read or does not fit.
    pub fn new(cache: &Cache, folder: Option<&Path>) -> Result<Self> {
        let temporary = cache.path("tmp");
        std::fs::create_dir_all(&temporary)?;
        let image = tempfile::Builder::new()
            .prefix("share.")
            .tempfile_in(&temporary)?
            .into_temp_path();
        let mut command = Toolbox::open(cache)?.command("mke2fs");
        command.args([
            "-q",
            "-F",
            "-t",
            "ext4",
            "-b",
            "4096",
            "-m",
            "0",
            "-O",
            "^has_journal",
        ]);
        command.args(["-E", "lazy_itable_init=1,nodiscard,root_owner=0:0"]);
        if let Some(folder) = folder {
            ensure!(
                folder.is_dir(),
                "the lab cannot share {}: it is no folder",
                folder.display()
            );
            command.arg("-d").arg(folder);
        }
        finish(command.arg(&image).arg(SIZE))?;
        Ok(Self { image })
    }

    /// The image file.
    #[must_use]
    pub fn image(&self) -> &Path {
        &self.image
    }
}

/// A tar archive of a file or folder.
pub(crate) fn pack(path: &Path) -> Result<Vec<u8>> {
    let path: PathBuf = std::path::absolute(path)?;
    let folder = path.parent().unwrap_or(Path::new("/"));
    let name = path
        .file_name()
        .with_context(|| format!("{} names no file", path.display()))?;
    finish(
        Command::new("tar")
            .arg("-C")
            .arg(folder)
            .args(["--owner=0", "--group=0", "-cf", "-"])
            .arg(name),
    )
}

/// Unpacks a tar archive into a folder, which is made when missing.
pub(crate) fn unpack(archive: &[u8], to: &Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    let mut tar = Command::new("tar")
        .arg("-C")
        .arg(to)
        .args(["-xf", "-"])
        .stdin(Stdio::piped())
        .spawn()?;
    tar.stdin.take().context("tar has no input")?.write_all(archive)?;
    ensure!(
        tar.wait()?.success(),
        "tar could not unpack into {}",
        to.display()
    );
    Ok(())
}
