//! `cargo xtask setup`: everything that the tests and the demo need, from Debian packages, into the cache.
//!
//! Root is not needed, nothing is mounted or installed, and what is done is not done again. Interrupted, it goes on at the
//! image that was being made. Only [`peer_programs`], for tests and benchmarks, installs a few packages, if this is root.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail};
use lab::{Cache, Key, Toolbox};

use crate::apt::Apt;
use crate::recipe::Recipe;
use crate::{debian, host, images, kernels};

/// How long an image that is not current is kept: other work trees may share the cache.
const UNUSED: Duration = Duration::from_secs(14 * 86_400);

/// What to make.
pub(crate) struct Options {
    /// Ask for newer packages.
    pub(crate) refresh: bool,
    /// Make the full Debian guest too.
    pub(crate) debian: bool,
}

/// Makes what is missing.
pub(crate) fn run(options: &Options) -> Result<()> {
    let cache = Cache::locate();
    let stamp = cache.path(format!("complete-{}", inputs(options)?));
    if !options.refresh
        && fs::read_to_string(&stamp).is_ok_and(|text| current_images(&cache).is_ok_and(|now| now == text))
    {
        cache.keep_current();
        return Ok(());
    }
    require_programs()?;
    let recipe = Recipe::load()?;
    host::step(&format!("images in {}", cache.path("").display()));
    for (name, programs) in [("toolbox", &recipe.toolbox), ("emulator", &recipe.emulator)] {
        let apt = Apt::open(&cache, &recipe, &programs.suite, options.refresh)?;
        images::programs(&cache, name, &programs.packages, &apt)?;
    }
    let toolbox = Toolbox::open(&cache)?;
    let mut made = Vec::new();
    for kernel in &recipe.kernel {
        let result = Apt::open(&cache, &recipe, &kernel.suite, options.refresh)
            .and_then(|apt| kernels::make(&cache, &recipe, &apt, &toolbox, kernel));
        match result {
            Ok(image) => made.push((kernel.name.clone(), image)),
            Err(error) if kernel.required => return Err(error),
            Err(error) => host::step(&format!("without the kernel {}: {error:#}", kernel.name)),
        }
    }
    images::lab_host(&cache, &recipe, &toolbox)?;
    if options.debian {
        let apt = Apt::open(&cache, &recipe, &recipe.debian.suite, options.refresh)?;
        debian::make(&cache, &recipe, &toolbox, &apt)?;
    }
    images::lab_images(&cache, &toolbox, &made)?;
    let apt = Apt::open(&cache, &recipe, &recipe.guest_tools.suite, options.refresh)?;
    images::guest_tools(&cache, &recipe, &apt, &toolbox, &made)?;
    prune(&cache)?;
    fs::write(&stamp, current_images(&cache)?)?;
    host::step("the images are ready");
    Ok(())
}

/// Removes what no recipe names any more.
fn prune(cache: &Cache) -> Result<()> {
    let pruned = cache.prune(UNUSED)?;
    if !pruned.removed.is_empty() {
        host::step(&format!(
            "removed what nobody has used for two weeks: {}",
            pruned.removed.join(", ")
        ));
    }
    Ok(())
}

/// A key of all that decides what set-up makes, but the packages' versions: those change only when asked to.
fn inputs(options: &Options) -> Result<Key> {
    let mut key = Key::new().with([u8::from(options.debian)]);
    let mut files: Vec<_> = fs::read_dir(lab::repository().join("images"))?
        .filter_map(Result::ok)
        .collect();
    files.sort_by_key(fs::DirEntry::file_name);
    for file in files {
        key = key.with(fs::read(file.path())?);
    }
    for source in [
        include_str!("apt.rs"),
        include_str!("debian.rs"),
        include_str!("images.rs"),
        include_str!("kernels.rs"),
    ] {
        key = key.with(source);
    }
    Ok(key)
}

/// Which images are current, one per line; an error when one of them is not there.
fn current_images(cache: &Cache) -> Result<String> {
    let mut lines = Vec::new();
    for entry in fs::read_dir(cache.path("current"))? {
        let path = entry?.path();
        lines.push(fs::canonicalize(path)?.display().to_string());
    }
    lines.sort();
    Ok(lines.join("\n"))
}

/// Programs of this machine that tests use as peers. What is missing is installed, if this is root; else it is said how, and tests that need
/// them say that they are skipped.
pub(crate) fn peer_programs() {
    let used = [
        ("qemu-img", "qemu-utils"),
        ("nbdkit", "nbdkit"),
        ("nbdcopy", "libnbd-bin"),
        ("nbdsh", "python3-libnbd"),
        ("openssl", "openssl"),
        ("curl", "curl"),
        ("setpriv", "util-linux"),
        ("iscsi-ls", "libiscsi-bin"),
    ];
    let missing = || -> Vec<&str> {
        let missing = used.iter().filter(|(program, _)| !host::has(program));
        missing.map(|(_, package)| *package).collect()
    };
    let wanted = missing();
    if wanted.is_empty() {
        return;
    }
    let packages = wanted.join(" ");
    if rustix::process::geteuid().is_root() {
        host::step(&format!("installing {packages}"));
        let apt = |arguments: &[&str]| {
            let mut apt = Command::new("apt-get");
            apt.args(arguments).env("DEBIAN_FRONTEND", "noninteractive");
            apt.status().is_ok_and(|status| status.success())
        };
        let install = [
            ["install", "--yes", "--no-install-recommends"].as_slice(),
            &wanted,
        ]
        .concat();
        let done = apt(&install) || (apt(&["update"]) && apt(&install));
        iscsi_in_qemu(&apt);
        if done && missing().is_empty() {
            return;
        }
    }
    host::step(&format!(
        "some tests will be skipped; to run them: sudo apt-get install {}",
        missing().join(" ")
    ));
}

/// QEMU's iSCSI driver. It has to be of qemu-img's own version: where that came from somewhere else, it is left as it is, and a
/// test is skipped.
fn iscsi_in_qemu(apt: &impl Fn(&[&str]) -> bool) {
    apt(&[
        "install",
        "--yes",
        "--no-install-recommends",
        "--no-remove",
        "qemu-block-extra",
    ]);
}

/// The few programs that must be here before anything can be unpacked; every Debian system has them.
fn require_programs() -> Result<()> {
    let needed = [
        ("apt-get", "apt"),
        ("dpkg-deb", "dpkg"),
        ("tar", "tar"),
        ("perl", "perl"),
    ];
    let missing: Vec<&str> = needed
        .iter()
        .filter(|(program, _)| !host::has(program))
        .map(|(_, package)| *package)
        .collect();
    if !missing.is_empty() {
        bail!(
            "programs are missing; install them with: sudo apt-get install {}",
            missing.join(" ")
        );
    }
    Ok(())
}
