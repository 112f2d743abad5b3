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
        host.administer(&format!("pool create tank {}", devices.join(" ")))?;
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
        let devices = self.devices.join(",");
        self.host
            .administer(&format!("{command} --devices {devices} {rest}"))
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
            // With a helper, so that the sandbox around both threads is tried.
            .toml(&format!(
                "[pool]\ndevices = [{}]\nio-helpers = 1\n",
                devices.join(", ")
            ))
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

/// A device of the mapper for a story that changes the host, `/dev/dm-0`: a file of 768 MiB until told otherwise.
pub struct MappedDevice<'a>(&'a Host);

impl<'a> MappedDevice<'a> {
    /// Its path.
    pub const PATH: &'static str = "/dev/dm-0";

    /// Makes it.
    ///
    /// # Errors
    /// The host cannot.
    pub fn create(host: &'a Host) -> Result<Self> {
        host.sh("modprobe -a loop dm-mod\n\
             truncate -s 768M backing && busybox losetup /dev/loop0 backing\n\
             echo 0 1572864 linear /dev/loop0 0 | dmsetup create --noudevsync first")?;
        Ok(Self(host))
    }

    /// All its requests fail from now on.
    ///
    /// # Errors
    /// The host cannot.
    pub fn fail(&self) -> Result<()> {
        self.becomes("error")
    }

    /// It is the file again, with what that had.
    ///
    /// # Errors
    /// The host cannot.
    pub fn mend(&self) -> Result<()> {
        self.becomes("linear /dev/loop0 0")
    }

    fn becomes(&self, target: &str) -> Result<()> {
        let table = format!("echo 0 1572864 {target} | dmsetup load first");
        self.0.sh(&format!(
            "dmsetup suspend first; {table}; dmsetup resume --noudevsync first"
        ))?;
        Ok(())
    }
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

impl Host {
    /// `smsvmm ARGUMENTS`, which must succeed; what it says.
    ///
    /// # Errors
    /// When it fails.
    pub fn administer(&self, arguments: &str) -> Result<String> {
        let words: Vec<&str> = arguments.split_whitespace().collect();
        succeeded(arguments, &self.run_smsvmm(&words)?)
    }
}

impl Vm {
    /// `smsvmm ARGUMENTS --config vm.toml`, as an administrator on the same host, while it runs; what it says.
    ///
    /// # Errors
    /// When it fails.
    pub fn administer(&self, arguments: &str) -> Result<String> {
        let mut words: Vec<&str> = arguments.split_whitespace().collect();
        words.extend(["--config", "vm.toml"]);
        succeeded(arguments, &self.smsvmm(&words)?)
    }
}
