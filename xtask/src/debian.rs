//! The full Debian guest: `bzImage`, `initrd` and `root.ext4`, a raw ext4 image.
//!
//! `mmdebstrap` installs the packages into a folder of its own, as root in a chroot or as an ordinary user in a user
//! namespace, and gives a tar archive; mke2fs makes the image from the unpacked archive, for an ordinary user under
//! fakeroot. Nothing is mounted outside of mmdebstrap's own mount namespace.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use lab::{Archive, Cache, Key, Toolbox};

use crate::apt::Apt;
use crate::host;
use crate::kernels::Modules;
use crate::recipe::{self, Recipe};

/// Makes the image `debian`.
pub(crate) fn make(cache: &Cache, recipe: &Recipe, toolbox: &Toolbox, apt: &Apt) -> Result<()> {
    let debian = &recipe.debian;
    let kernel = cache.image(&format!("kernel-{}", debian.kernel))?;
    let closure = apt.closure(&debian.packages)?;
    let names: Vec<&str> = closure.iter().map(|package| package.file.as_str()).collect();
    let (init, customize) = (
        recipe::file("debian-initrd-init")?,
        recipe::file("debian-customize")?,
    );
    let key = Key::new()
        .with("2")
        .with(kernel.to_string_lossy().as_bytes())
        .with(format!("{debian:?}"))
        .with(names.join("\n"))
        .with(&init)
        .with(&customize);
    cache.make("debian", key, |folder| {
        host::step(&format!(
            "Debian guest: installing {} packages (a minute or two)",
            closure.len()
        ));
        fs::hard_link(kernel.join("bzImage"), folder.join("bzImage"))?;
        fs::write(folder.join("initrd"), initrd(toolbox, recipe, &kernel, init)?)?;
        let archive = folder.join("root.tar");
        bootstrap(recipe, toolbox, apt, &kernel, &archive)?;
        host::step("Debian guest: making its disk image");
        image(toolbox, folder, &archive, &debian.size)?;
        fs::remove_file(&archive)?;
        Ok(())
    })?;
    Ok(())
}

/// A small initrd of our own: load the drivers, mount the root, hand over.
fn initrd(toolbox: &Toolbox, recipe: &Recipe, kernel: &Path, init: String) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    archive.copy(&toolbox.tree().join("usr/bin/busybox"), "bin/busybox", 0o755)?;
    archive.link("bin/sh", "busybox");
    archive.file("init", 0o755, init);
    for name in ["dev", "proc", "sys", "root"] {
        archive.folder(name);
    }
    Modules::of_image(kernel, toolbox)?.add_in_order(&mut archive, &recipe.debian.initrd_modules)?;
    archive.bytes()
}

fn bootstrap(recipe: &Recipe, toolbox: &Toolbox, apt: &Apt, kernel: &Path, archive: &Path) -> Result<()> {
    let script = toolbox
        .program("mmdebstrap")
        .context("the toolbox has no mmdebstrap")?;
    let customize = lab::repository().join("images/debian-customize");
    let release = fs::read_to_string(kernel.join("release"))?;
    let mode = if rustix::process::geteuid().is_root() {
        "root"
    } else {
        "unshare"
    };
    if mode == "unshare" && !host::has("newuidmap") {
        bail!(
            "an ordinary user needs newuidmap to make the Debian guest; install it with: sudo apt-get install uidmap"
        );
    }
    let mut command = Command::new("perl");
    command.arg(script).args([
        "--variant=apt",
        "--format=tar",
        &format!("--mode={mode}"),
        "--skip=output/dev",
    ]);
    command.arg(format!("--include={}", recipe.debian.packages.join(",")));
    command.arg("--aptopt=Acquire::Languages \"none\"");
    command.arg("--customize-hook=mkdir -p \"$1/usr/lib/modules\"");
    command.arg(format!(
        "--customize-hook=copy-in {} /usr/lib/modules",
        lab::quote(&kernel.join("modules").join(release))
    ));
    command.arg(format!(
        "--customize-hook=upload {} /customize",
        lab::quote(&customize)
    ));
    command.arg("--customize-hook=chroot \"$1\" sh /customize");
    command.arg(&recipe.debian.suite).arg(archive);
    // The lists' own sources, so that both come from the same mirror.
    command.arg(apt.sources());
    command
        .env("SOURCE_DATE_EPOCH", "1700000000")
        .env("LC_ALL", "C.UTF-8")
        .stdin(Stdio::null());
    let log = archive.with_extension("log");
    let writer = fs::File::create(&log)?;
    let status = command
        .stdout(writer.try_clone()?)
        .stderr(writer)
        .status()
        .context("cannot start perl")?;
    if !status.success() {
        let text = fs::read_to_string(&log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let end = lines
            .get(lines.len().saturating_sub(25)..)
            .unwrap_or_default()
            .join("\n");
        bail!("mmdebstrap failed ({status}):\n{end}");
    }
    Ok(())
}

/// Unpacks the archive and makes the image, with the owners that the archive tells.
fn image(toolbox: &Toolbox, folder: &Path, archive: &Path, size: &str) -> Result<()> {
    let root = folder.join("root");
    fs::create_dir_all(&root)?;
    let mke2fs = toolbox.program("mke2fs").context("the toolbox has no mke2fs")?;
    let script = format!(
        "tar -C {root} --numeric-owner -xpf {archive} && \
         mke2fs=$(LD_LIBRARY_PATH={libraries} {mke2fs} -q -F -t ext4 -b 4096 -m 0 -L root \
         -U 736d7376-6d6d-4000-8000-000000000003 \
         -E hash_seed=736d7376-6d6d-4000-8000-000000000004,lazy_itable_init=1,nodiscard \
         -d {root} {image} {size} 2>&1) || {{ echo \"$mke2fs\" >&2; exit 1; }}",
        root = lab::quote(&root),
        archive = lab::quote(archive),
        libraries = lab::quote(&toolbox.libraries()),
        mke2fs = lab::quote(&mke2fs),
        image = lab::quote(&folder.join("root.ext4")),
    );
    let mut command = if rustix::process::geteuid().is_root() {
        Command::new("sh")
    } else {
        let library = toolbox
            .tree()
            .join("usr/lib/x86_64-linux-gnu/libfakeroot/libfakeroot-sysv.so");
        let mut command = Command::new("sh");
        command.arg(
            toolbox
                .program("fakeroot-sysv")
                .context("the toolbox has no fakeroot")?,
        );
        command.arg("--lib").arg(library);
        command.arg("--faked").arg(
            toolbox
                .program("faked-sysv")
                .context("the toolbox has no faked")?,
        );
        command.args(["--", "sh"]);
        command
    };
    command
        .env("E2FSPROGS_FAKE_TIME", "1700000000")
        .arg("-ec")
        .arg(&script);
    ensure!(
        command.status()?.success(),
        "the Debian guest's disk image could not be made"
    );
    fs::remove_dir_all(&root).with_context(|| format!("cannot remove {}", root.display()))?;
    Ok(())
}
