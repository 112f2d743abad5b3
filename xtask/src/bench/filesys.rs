//! `cargo xtask bench filesys`: the file system beside its bare volume and beside qcow2, on memory and on this disk.
//!
//! Memory is XFS on a zram device if this may be made (by root, where the kernel has both), else tmpfs. What qcow2 needs comes from
//! Debian's packages, unpacked in the cache, if this machine does not have it.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail};
use lab::{Cache, finish};

use crate::apt::{self, Apt};
use crate::host;
use crate::recipe::Recipe;

/// Runs the bench; `arguments` are passed on.
pub(crate) fn run(arguments: &[String]) -> Result<ExitCode> {
    let zram = Zram::make();
    let memory = in_memory(&zram);
    let disk = std::env::current_dir()?.join("target/bench");
    fs::create_dir_all(&disk)?;
    cargo_bench("filesys", "filesys", &[&memory, &disk], arguments)
}

/// A folder in memory: that of the device, or one of tmpfs, which has no O_DIRECT on older kernels.
pub(super) fn in_memory(zram: &Result<Zram>) -> PathBuf {
    zram.as_ref().map_or_else(
        |error| {
            host::step(&format!("tmpfs instead of XFS on zram: {error:#}"));
            PathBuf::from("/dev/shm")
        },
        |zram| zram.folder.path().to_path_buf(),
    )
}

/// Runs a bench of a package in these folders, where QEMU's programs are found.
pub(super) fn cargo_bench(
    package: &str,
    bench: &str,
    folders: &[&PathBuf],
    arguments: &[String],
) -> Result<ExitCode> {
    let programs = programs()?;
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command
        .args(["bench", "--package", package, "--bench", bench, "--"])
        .args(folders)
        .args(arguments);
    if let Some(tree) = programs {
        let mut path = OsString::from(tree.join("usr/bin"));
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap_or_default());
        command
            .env("PATH", path)
            .env("LD_LIBRARY_PATH", tree.join("usr/lib/x86_64-linux-gnu"));
    }
    let status = command.status().context("cannot start cargo")?;
    Ok(if status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// A folder with qemu-img and qemu-storage-daemon, if this machine has them not.
pub(super) fn programs() -> Result<Option<PathBuf>> {
    if ["qemu-img", "qemu-storage-daemon"].into_iter().all(host::has) {
        return Ok(None);
    }
    let cache = Cache::locate();
    let tree = cache.path("bench-programs");
    if tree.join("complete").exists() {
        return Ok(Some(tree));
    }
    let recipe = Recipe::load()?;
    let apt = Apt::open(&cache, &recipe, &recipe.emulator.suite, false)?;
    let wanted = ["qemu-utils".to_owned()];
    host::step("fetching qemu-storage-daemon");
    let closure = apt.closure(&wanted)?;
    for folder in ["usr/bin", "usr/sbin", "usr/lib", "usr/lib64"] {
        fs::create_dir_all(tree.join(folder))?;
        if let Some(name) = folder.strip_prefix("usr/") {
            // Packages of today's Debian lie below /usr.
            let link = tree.join(name);
            if !link.exists() {
                std::os::unix::fs::symlink(folder, link)?;
            }
        }
    }
    for package in apt.fetch_closure(&wanted, &closure)? {
        apt::unpack(&package, &tree)?;
    }
    fs::write(tree.join("complete"), "")?;
    Ok(Some(tree))
}

/// XFS on a compressed block device in memory.
pub(super) struct Zram {
    number: String,
    pub(super) folder: tempfile::TempDir,
}

impl Zram {
    pub(super) fn make() -> Result<Self> {
        let number = fs::read_to_string("/sys/class/zram-control/hot_add").context("no zram")?;
        let zram = Self {
            number: number.trim().to_owned(),
            folder: tempfile::tempdir()?,
        };
        fs::write(zram.control("disksize"), "24G")?;
        let device = format!("/dev/zram{}", zram.number);
        finish(Command::new("mkfs.xfs").args(["-q", "-f", "-K", &device]))?;
        finish(Command::new("mount").arg(&device).arg(zram.folder.path()))?;
        Ok(zram)
    }

    /// Pages that are kept as one word, and all that are there.
    pub(super) fn same_pages(&self) -> Result<(u64, u64)> {
        let text = fs::read_to_string(self.control("mm_stat")).context("no statistics")?;
        let numbers: Vec<u64> = text
            .split_whitespace()
            .map_while(|word| word.parse().ok())
            .collect();
        match numbers[..] {
            [original, _, _, _, _, same, ..] => Ok((same, original / 4096)),
            _ => bail!("unknown statistics: {text}"),
        }
    }

    fn control(&self, file: &str) -> PathBuf {
        Path::new("/sys/block").join(format!("zram{}/{file}", self.number))
    }
}

impl Drop for Zram {
    fn drop(&mut self) {
        // What was not done needs no undoing: all of these may fail.
        let _ = finish(Command::new("umount").arg(self.folder.path()));
        let _ = fs::write(self.control("reset"), "1");
        let _ = fs::write("/sys/class/zram-control/hot_remove", &self.number);
    }
}
