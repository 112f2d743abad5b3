//! `cargo xtask bench filesys`: the file system beside its bare volume and beside qcow2, on memory and on this disk.
//!
//! Memory is XFS on a zram device if this may be made (by root, where the kernel has both), else tmpfs; and once more with the pools on zram devices
//! themselves, as on disks of their own (qcow2 images stay on XFS). What qcow2 needs comes from
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
    let made = InMemory::make();
    let memory = in_memory(&made);
    let disk = std::env::current_dir()?.join("target/bench");
    fs::create_dir_all(&disk)?;
    let mut folders = vec![&memory];
    let blocks = block_devices(&memory);
    match &blocks {
        Ok((folder, _)) => folders.push(folder),
        Err(error) => host::step(&format!("without block devices in memory: {error:#}")),
    }
    folders.push(&disk);
    cargo_bench("filesys", "filesys", &folders, arguments)
}

/// A folder in which the bench finds block devices in memory where it would make files for its pools.
fn block_devices(memory: &Path) -> Result<(PathBuf, Vec<Zram>)> {
    let folder = memory.join("block-devices");
    fs::create_dir_all(&folder)?;
    let mut devices = Vec::new();
    for name in ["d0", "p0", "p1", "p2"] {
        let device = Zram::make(8 << 30)?;
        std::os::unix::fs::symlink(device.path(), folder.join(name))?;
        devices.push(device);
    }
    Ok((folder, devices))
}

/// A folder in memory: that of the device, or one of tmpfs, which has no O_DIRECT on older kernels.
pub(super) fn in_memory(made: &Result<InMemory>) -> PathBuf {
    made.as_ref().map_or_else(
        |error| {
            host::step(&format!("tmpfs instead of XFS on zram: {error:#}"));
            PathBuf::from("/dev/shm")
        },
        |made| made.folder.path().to_path_buf(),
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

/// A compressed block device in memory.
pub(super) struct Zram {
    number: String,
}

impl Zram {
    /// One of `size` bytes at most; it takes what is written.
    pub(super) fn make(size: u64) -> Result<Self> {
        let number = fs::read_to_string("/sys/class/zram-control/hot_add").context("no zram")?;
        let zram = Self {
            number: number.trim().to_owned(),
        };
        fs::write(zram.control("disksize"), size.to_string())?;
        Ok(zram)
    }

    pub(super) fn path(&self) -> PathBuf {
        PathBuf::from(format!("/dev/zram{}", self.number))
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
        let _ = fs::write(self.control("reset"), "1");
        let _ = fs::write("/sys/class/zram-control/hot_remove", &self.number);
    }
}

/// XFS on such a device.
pub(super) struct InMemory {
    pub(super) folder: tempfile::TempDir,
    pub(super) zram: Zram,
}

impl InMemory {
    pub(super) fn make() -> Result<Self> {
        let made = Self {
            zram: Zram::make(24 << 30)?,
            folder: tempfile::tempdir()?,
        };
        let device = made.zram.path();
        finish(Command::new("mkfs.xfs").args(["-q", "-f", "-K"]).arg(&device))?;
        finish(Command::new("mount").arg(&device).arg(made.folder.path()))?;
        Ok(made)
    }
}

impl Drop for InMemory {
    fn drop(&mut self) {
        // It may not be mounted.
        let _ = finish(Command::new("umount").arg(self.folder.path()));
    }
}
