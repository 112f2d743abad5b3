//! `cargo xtask deb --try`: the packages on a clean Debian.
//!
//! ```text
//!   this machine ── QEMU (an AMD host, emulated) ── Debian with systemd ── dpkg -i smsvmm.deb
//!                                                     smsvmm.service ── smsvmm serve ── smsvmm run ── a guest
//! ```
//!
//! The Debian is the image of the demo; what is done on it is `packaging/trial.sh`, which its systemd runs instead of a login.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context as _, Result, bail, ensure};
use lab::{Cache, Toolbox};

use crate::host;
use crate::setup;

/// The emulated processor, as in the lab.
const PROCESSOR: &str = "EPYC-Rome,+svm,+npt";
/// What the script says at its end.
const DONE: &str = "trial: all is well";
/// Where the packages and the script are on that machine.
const PAYLOAD: &str = "/run/payload";

/// Installs the packages in `packages` and uses them.
pub(super) fn run(packages: &Path) -> Result<()> {
    setup::run(&setup::Options {
        refresh: false,
        debian: true,
    })?;
    let cache = Cache::locate();
    let (debian, guest) = (cache.image("debian")?, cache.image("kernel-debian-12-cloud")?);
    let folder = tempfile::tempdir_in(cache.path(""))?;
    let payload = folder.path().join("payload");
    fs::create_dir(&payload)?;
    for entry in fs::read_dir(packages)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            fs::copy(&path, payload.join(path.file_name().context("a name")?))?;
        }
    }
    fs::copy(guest.join("bzImage"), payload.join("guest-kernel"))?;
    fs::copy(guest.join("initrd"), payload.join("guest-initrd"))?;
    fs::copy(
        lab::repository().join("packaging/trial.sh"),
        payload.join("trial.sh"),
    )?;
    let toolbox = Toolbox::open(&cache)?;
    let image = folder.path().join("payload.ext4");
    let mut command = toolbox.command("mke2fs");
    command
        .args(["-q", "-F", "-t", "ext4", "-d"])
        .arg(&payload)
        .arg(&image)
        .arg("256M");
    lab::finish(&mut command)?;
    let mut disks = vec![image];
    for number in 0..3 {
        let device = folder.path().join(format!("d{number}.img"));
        fs::File::create(&device)?.set_len(512 << 20)?;
        disks.push(device);
    }
    boot(&cache, &debian, &disks)
}

/// Boots Debian with the disks, shows what it says, and sees that the script ends well.
fn boot(cache: &Cache, debian: &Path, disks: &[std::path::PathBuf]) -> Result<()> {
    host::step("booting a clean Debian (emulated: it takes a minute or two)");
    let emulator = Toolbox::emulator(cache)?;
    let script = format!("mkdir -p {PAYLOAD}; mount /dev/vdb {PAYLOAD}; exec sh {PAYLOAD}/trial.sh");
    let line = format!(
        "console=ttyS0 root=/dev/vda rw quiet mitigations=off tsc=reliable no_timer_check panic=-1 \
         systemd.run=\"/bin/sh -c '{script}'\" systemd.run_success_action=poweroff systemd.run_failure_action=poweroff"
    );
    let mut command = emulator.command("qemu-system-x86_64");
    for firmware in ["usr/share/qemu", "usr/share/seabios"] {
        command.arg("-L").arg(emulator.tree().join(firmware));
    }
    command
        .args([
            "-M",
            "q35",
            "-cpu",
            PROCESSOR,
            "-accel",
            "tcg,thread=multi,tb-size=512",
        ])
        .args([
            "-smp",
            "1",
            "-m",
            "3072",
            "-display",
            "none",
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
        ])
        .args(["-serial", "stdio", "-snapshot"])
        .arg("-kernel")
        .arg(debian.join("bzImage"))
        .arg("-initrd")
        .arg(debian.join("initrd"))
        .args(["-append", &line]);
    for disk in [&debian.join("root.ext4")].into_iter().chain(disks) {
        command
            .arg("-drive")
            .arg(format!("file={},format=raw,if=virtio", disk.display()));
    }
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start QEMU")?;
    let output = BufReader::new(child.stdout.take().context("no output")?);
    let mut done = false;
    for line in output.split(b'\n') {
        let line = String::from_utf8_lossy(&line?).trim_end().to_owned();
        println!("{line}");
        done |= line.contains(DONE);
    }
    let status = child.wait()?;
    ensure!(status.success(), "QEMU ended with {status}");
    if !done {
        bail!("the trial did not end well: see above");
    }
    Ok(())
}
