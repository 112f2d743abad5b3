//! `cargo xtask deb`: packages for Debian and Ubuntu.

mod trial;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use crate::build;
use crate::host;

/// What makes the packages; pinned, as its answers to the metadata in Cargo.toml may change.
const CARGO_DEB: &str = "3.8.0";

/// Makes the packages, and tries them on a clean Debian if that is wanted.
///
/// `made`: where packages are that were made before.
pub(crate) fn run(try_them: bool, made: Option<PathBuf>) -> Result<()> {
    let packages = made.map_or_else(make, Ok)?;
    match try_them {
        true => trial::run(&packages),
        false => Ok(()),
    }
}

/// Makes the packages; where they are.
fn make() -> Result<PathBuf> {
    let target = build::target()?;
    let program = build::release("smsvmm")?;
    let agent = build::static_program("agent", "sms-agent")?;
    let folder = target.join("deb");
    host::step("manual pages and completions");
    std::fs::create_dir_all(folder.join("man"))?;
    std::fs::create_dir_all(folder.join("agent"))?;
    output(&program, &["manual", &folder.join("man").display().to_string()])?;
    output(&agent, &["manual", &folder.join("agent").display().to_string()])?;
    for (shell, file) in [
        ("bash", "smsvmm.bash"),
        ("zsh", "_smsvmm"),
        ("fish", "smsvmm.fish"),
    ] {
        std::fs::write(folder.join(file), output(&program, &["completions", shell])?)?;
    }
    let cargo_deb = tool(&target)?;
    let packages = target.join("debian");
    for package in ["smsvmm", "agent"] {
        host::step(&format!("the package of {package}"));
        let status = Command::new(&cargo_deb)
            .args(["--no-build", "--quiet", "--package", package, "--output"])
            .arg(&packages)
            .current_dir(lab::repository())
            .status();
        ensure!(
            status.context("cannot start cargo-deb")?.success(),
            "there is no package of {package}"
        );
    }
    host::step(&format!("the packages are in {}", packages.display()));
    Ok(packages)
}

/// What a program prints.
fn output(program: &Path, arguments: &[&str]) -> Result<Vec<u8>> {
    let output = Command::new(program)
        .args(arguments)
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot start {}", program.display()))?;
    ensure!(
        output.status.success(),
        "{} {arguments:?} failed",
        program.display()
    );
    Ok(output.stdout)
}

/// cargo-deb, built if it is not there.
fn tool(target: &Path) -> Result<PathBuf> {
    let root = target.join("tools");
    let program = root.join("bin/cargo-deb");
    if !program.exists() {
        host::step(&format!("building cargo-deb {CARGO_DEB} (once)"));
        let status = build::cargo()
            .args(["install", "--quiet", "--locked", "--version", CARGO_DEB, "--root"])
            .arg(&root)
            .arg("cargo-deb")
            .env("CARGO_TARGET_DIR", root.join("build"))
            .status();
        ensure!(
            status.context("cannot start cargo")?.success(),
            "cargo-deb cannot be built"
        );
    }
    Ok(program)
}
