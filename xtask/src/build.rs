//! Building the programs that the other commands run.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use crate::host;

/// cargo for this work tree, the same that runs this program.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(lab::repository()).stdin(Stdio::null());
    command
}

/// Builds a package's program with optimization; returns its path.
pub(crate) fn release(package: &str) -> Result<PathBuf> {
    host::step(&format!("building {package} (release)"));
    let status = cargo()
        .args(["build", "--release", "--locked", "--package", package])
        .status();
    ensure!(
        status.context("cannot start cargo")?.success(),
        "{package} does not build"
    );
    Ok(target()?.join("release").join(package))
}

/// The target folder of the build that this program comes from.
pub(crate) fn target() -> Result<PathBuf> {
    let program = std::env::current_exe()?;
    // target/debug/xtask
    let folder = program
        .ancestors()
        .nth(2)
        .context("this program is in no target folder")?;
    Ok(folder.to_path_buf())
}

/// Whether stock kernels can run on this machine's KVM.
pub(crate) fn kvm_is_good(smsvmm: &Path) -> bool {
    Command::new(smsvmm)
        .args(["host", "check", "--json"])
        .output()
        .is_ok_and(|output| output.status.success())
}

/// Builds a program of a package for use in guests: with optimization, and linked statically. Returns its path.
pub(crate) fn static_program(package: &str, program: &str) -> Result<PathBuf> {
    host::step(&format!("building {program} (static)"));
    let mut command = cargo();
    command.args([
        "rustc",
        "--release",
        "--locked",
        "--package",
        package,
        "--bin",
        program,
    ]);
    // Without what debuggers need: guests have them in memory.
    command.args(["--", "-C", "target-feature=+crt-static", "-C", "strip=debuginfo"]);
    ensure!(
        command.status().context("cannot start cargo")?.success(),
        "{program} does not build"
    );
    Ok(target()?.join("release").join(program))
}

/// Builds what stories run inside guests, beside the static smsvmm in `target/static`.
pub(crate) fn guest_programs() -> Result<()> {
    let folder = target()?.join("static");
    std::fs::create_dir_all(&folder)?;
    let program = static_program("guest-tools", "fs-load")?;
    std::fs::copy(program, folder.join("fs-load"))?;
    let program = static_program("agent", "sms-agent")?;
    std::fs::copy(program, folder.join("sms-agent"))?;
    Ok(())
}

/// Builds smsvmm as one file that needs no libraries, in `target/static`. Only the program itself is built for that, and
/// linked with what the tests have built already; so it is not optimized.
pub(crate) fn static_smsvmm() -> Result<PathBuf> {
    host::step("building smsvmm (static)");
    let mut command = cargo();
    command.args(["rustc", "--locked", "--package", "smsvmm", "--bin", "smsvmm"]);
    // Not by RUSTFLAGS: those apply to procedural macros as well, which cannot be static.
    command.args(["--", "-C", "target-feature=+crt-static", "-C", "strip=debuginfo"]);
    ensure!(
        command.status().context("cannot start cargo")?.success(),
        "the static smsvmm does not build"
    );
    let target = target()?;
    let program = target.join("static/smsvmm");
    std::fs::create_dir_all(target.join("static"))?;
    // Not under the name by which tests find the usual program: the next `cargo build` links that anew.
    std::fs::rename(target.join("debug/smsvmm"), &program)?;
    Ok(program)
}
