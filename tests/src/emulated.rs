//! Machines of QEMU on this machine, emulated in software: front-ends of vhost-user servers that are not ours.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use lab::{Archive, Cache, Toolbox};

use crate::Vm;
use crate::agent::AGENT;
use crate::place::{self, static_file};
use crate::vm::TOOLS_ON;

/// A machine of two processors and 256 MiB that can be shared, with a stock Debian kernel whose guest runs `script`, and the devices that
/// `arguments` say; its files go to `folder`.
///
/// # Errors
/// When the images cannot be read, or `folder` cannot be written.
pub fn emulated(folder: &Path, script: &str, arguments: &[&str]) -> Result<Command> {
    machine(folder, script, &[], arguments)
}

/// The same with more programs.
fn machine(folder: &Path, script: &str, programs: &[&Path], arguments: &[&str]) -> Result<Command> {
    let cache = Cache::locate();
    let kernel = cache.image("kernel-debian-12-cloud")?;
    let emulator = Toolbox::emulator(&cache)?;
    let mut command = emulator.command("qemu-system-x86_64");
    for firmware in ["usr/share/qemu", "usr/share/seabios"] {
        command.arg("-L").arg(emulator.tree().join(firmware));
    }
    let mut files = Archive::default();
    files.file("story", 0o755, script);
    files.file("tools-on", 0o755, TOOLS_ON);
    for program in programs {
        let name = program.file_name().context("a program without a name")?;
        let content = std::fs::read(program).with_context(|| format!("cannot read {}", program.display()))?;
        files.file(&format!("bin/{}", name.to_string_lossy()), 0o755, content);
    }
    let mut initrd = std::fs::read(kernel.join("initrd"))?;
    initrd.extend_from_slice(&files.bytes()?);
    std::fs::create_dir_all(folder)?;
    let own = folder.join("initrd");
    std::fs::write(&own, initrd)?;
    command.args("-M q35 -accel tcg -smp 2 -m 256M -display none -nodefaults -no-user-config".split(' '));
    command.args(
        "-object memory-backend-memfd,id=memory,size=256M,share=on -machine memory-backend=memory".split(' '),
    );
    command.args([
        "-no-reboot",
        "-serial",
        "stdio",
        "-append",
        "console=ttyS0 quiet panic=-1",
    ]);
    command.arg("-kernel").arg(kernel.join("bzImage"));
    command.arg("-initrd").arg(&own);
    command.args(arguments);
    Ok(command)
}

/// Such a machine with the disk of programs for guests, which takes commands ([`Vm::guest`]) once it is up.
///
/// # Errors
/// When it cannot be started.
pub fn emulated_with_tools(folder: &Path, arguments: &[&str], limit: Duration) -> Result<Vm> {
    with_tools(folder, &[], arguments, limit)
}

/// The same with `sms-agent`.
///
/// # Errors
/// When it cannot be started, or `cargo xtask static` has not made the agent.
pub fn emulated_with_agent(folder: &Path, arguments: &[&str], limit: Duration) -> Result<Vm> {
    let agent = static_file(place::AGENT, true)?;
    with_tools(folder, &[&agent], arguments, limit)
}

fn with_tools(folder: &Path, programs: &[&Path], arguments: &[&str], limit: Duration) -> Result<Vm> {
    let tools = Cache::locate().image("guest-tools")?.join("tools.ext4");
    let tools = format!("if=none,id=tools,format=raw,readonly=on,file={}", tools.display());
    let disk = [
        "-drive",
        &tools,
        "-device",
        "virtio-blk-pci,drive=tools,serial=tools",
    ];
    let arguments = [&disk, arguments].concat();
    Vm::launch(machine(folder, AGENT, programs, &arguments)?, folder, limit)
}
