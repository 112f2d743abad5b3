//! Pools of a story: made on the host, used by its machines, administered while they run.

use anyhow::{Context as _, Result, ensure};
use lab::Output;

use crate::{Host, Vm, VmBuilder};

/// A pool with a mirrored volume `safe` and a striped one `fast`, and the directory `/vm`.
pub struct Pool<'a> {
    host: &'a Host,
    devices: Vec<String>,
}

impl<'a> Pool<'a> {
    /// Makes it, on devices that exist; names are those of files in the story's folder, or paths.
    ///
    /// # Errors
    /// When smsvmm cannot.
    pub fn create(host: &'a Host, devices: &[&str]) -> Result<Self> {
        let pool = Self {
            host,
            devices: devices.iter().map(ToString::to_string).collect(),
        };
        smsvmm(host, &format!("pool create tank {}", devices.join(" ")))?;
        pool.run("file format --meta-size 64M")?;
        pool.run("volume create safe --size 512M --layout mirror")?;
        pool.run("volume create fast --size 512M --layout stripe")?;
        pool.run("file mkdir /vm")?;
        Ok(pool)
    }

    /// `smsvmm COMMAND --devices ... ARGUMENTS`, which must succeed; what it says. The pool is not in use meanwhile.
    ///
    /// # Errors
    /// When it fails.
    pub fn run(&self, arguments: &str) -> Result<String> {
        let (command, rest) = arguments.split_once(' ').context("a command")?;
        smsvmm(
            self.host,
            &format!("{command} --devices {} {rest}", self.devices.join(",")),
        )
    }

    /// Describes a virtual machine that has this pool.
    #[must_use]
    pub fn vm(&self, name: &str) -> VmBuilder<'a> {
        let folder = self.host.folder();
        let devices: Vec<String> = self
            .devices
            .iter()
            .map(|device| format!("{:?}", folder.join(device)))
            .collect();
        self.host
            .vm(name)
            .toml(&format!("[pool]\ndevices = [{}]\n", devices.join(", ")))
    }

    /// Checks its file system.
    ///
    /// # Errors
    /// When it has problems.
    pub fn check(&self) -> Result<()> {
        let said = self.run("file check")?;
        ensure!(!said.contains("problem"), "{said}");
        Ok(())
    }
}

/// Runs smsvmm on the host, which must succeed; what it says.
fn smsvmm(host: &Host, arguments: &str) -> Result<String> {
    let words: Vec<&str> = arguments.split_whitespace().collect();
    succeeded(arguments, &host.run_smsvmm(&words)?)
}

fn succeeded(arguments: &str, output: &Output) -> Result<String> {
    let text = output.text();
    ensure!(
        output.success(),
        "smsvmm {arguments} ended with {}: {text}",
        output.status
    );
    Ok(text)
}

impl Vm {
    /// `smsvmm COMMAND --config vm.toml ARGUMENTS`, as an administrator on the same host, while it runs; what it says.
    ///
    /// # Errors
    /// When it fails.
    pub fn administer(&self, arguments: &str) -> Result<String> {
        let (command, rest) = arguments.split_once(' ').context("a command")?;
        let mut words = vec![command, "--config", "vm.toml"];
        words.extend(rest.split_whitespace());
        succeeded(arguments, &self.smsvmm(&words)?)
    }
}
