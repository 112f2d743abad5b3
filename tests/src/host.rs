//! The host of a story: the machine on which its virtual machines run.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use lab::Output;

use crate::VmBuilder;

/// The guest kernels (images/recipe.toml).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// Debian 12's kernel for virtual machines, 6.1: always there.
    Debian12Cloud,
    /// Debian 12's general kernel, 6.1.
    Debian12,
    /// Debian 12's backported kernel for virtual machines.
    Debian12Backports,
    /// Debian 11's kernel for virtual machines, 5.10.
    Debian11Cloud,
    /// Debian 13's kernel for virtual machines, 6.12.
    Debian13Cloud,
}

impl Kernel {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Debian12Cloud,
        Self::Debian12,
        Self::Debian12Backports,
        Self::Debian11Cloud,
        Self::Debian13Cloud,
    ];

    /// The name of its image.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Debian12Cloud => "debian-12-cloud",
            Self::Debian12 => "debian-12",
            Self::Debian12Backports => "debian-12-backports",
            Self::Debian11Cloud => "debian-11-cloud",
            Self::Debian13Cloud => "debian-13-cloud",
        }
    }
}

/// Where a story finds what it needs.
pub(crate) struct Place {
    pub(crate) images: PathBuf,
    pub(crate) program: PathBuf,
    pub(crate) static_program: PathBuf,
    pub(crate) guest_program: PathBuf,
    pub(crate) agent: PathBuf,
    /// A disk image, or a block device.
    pub(crate) guest_tools: PathBuf,
}

/// The machine on which a story's virtual machines run, with a folder for the story's files.
pub struct Host {
    place: Place,
    folder: tempfile::TempDir,
}

impl Host {
    pub(crate) fn new(place: Place) -> Result<Self> {
        Ok(Self {
            place,
            folder: tempfile::Builder::new().prefix("story.").tempdir()?,
        })
    }

    pub(crate) fn place(&self) -> &Place {
        &self.place
    }

    /// A folder for the story's files; it goes when the story ends.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The program under test.
    #[must_use]
    pub fn smsvmm(&self) -> &Path {
        &self.place.program
    }

    /// The program under test as one file that needs no libraries; the story asks for it by [`crate::Story::static_program`].
    #[must_use]
    pub fn static_smsvmm(&self) -> &Path {
        &self.place.static_program
    }

    /// A file of a kernel's image: `bzImage`, `vmlinux`, `initrd`, `initrd-tools`.
    #[must_use]
    pub fn kernel_file(&self, kernel: Kernel, file: &str) -> PathBuf {
        self.place.images.join(kernel.name()).join(file)
    }

    /// Whether this kernel could be had when the images were made.
    #[must_use]
    pub fn has(&self, kernel: Kernel) -> bool {
        self.kernel_file(kernel, "bzImage").exists()
    }

    /// Describes a virtual machine.
    #[must_use]
    pub fn vm(&self, name: &str) -> VmBuilder<'_> {
        VmBuilder::new(self, name)
    }

    /// Makes a raw image of a size in MiB, all holes.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn image(&self, name: &str, mib: u64) -> Result<PathBuf> {
        let path = self.folder().join(name);
        File::create(&path)
            .and_then(|file| file.set_len(mib << 20))
            .with_context(|| format!("cannot make {}", path.display()))?;
        Ok(path)
    }

    /// Runs a shell script on the host, in the story's folder.
    ///
    /// # Errors
    /// When there is no shell. A script that fails is not an error.
    pub fn run(&self, script: &str) -> Result<Output> {
        let output = Command::new("sh")
            .arg("-c")
            .arg(format!("exec 2>&1\n{script}"))
            .current_dir(self.folder())
            .output()?;
        Ok(Output {
            status: output.status.code().unwrap_or(-1),
            bytes: output.stdout,
        })
    }

    /// Runs a shell script that must succeed, and returns its output without the last line's end.
    ///
    /// # Errors
    /// When it fails.
    pub fn sh(&self, script: &str) -> Result<String> {
        let output = self.run(&format!("set -e\n{script}"))?;
        let text = output.text();
        ensure!(
            output.status == 0,
            "on the host, {script:?} ended with {}: {text}",
            output.status
        );
        Ok(text.trim_end().to_owned())
    }

    /// Runs the program under test with some arguments, in the story's folder.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn run_smsvmm(&self, arguments: &[&str]) -> Result<Output> {
        ensure!(
            self.place.program.exists(),
            "there is no {}; `cargo build -p smsvmm` makes it",
            self.place.program.display()
        );
        let output = Command::new(&self.place.program)
            .args(arguments)
            .current_dir(self.folder())
            .output()?;
        let bytes = [output.stdout, output.stderr].concat();
        Ok(Output {
            status: output.status.code().unwrap_or(-1),
            bytes,
        })
    }
}
