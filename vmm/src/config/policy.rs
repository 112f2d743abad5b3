//! `[power]`, `[sandbox]`, `[management]`, `[resources]`: how the process around the machine behaves.

use std::path::PathBuf;

use api::{ByteSize, Seconds};
use serde::{Deserialize, Serialize};

/// What follows when the guest ends in one way or another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct PowerConfig {
    /// The guest asks for a reboot.
    pub on_reboot: OnReboot,
    /// The guest crashes.
    pub on_crash: OnCrash,
    /// How long the guest may take to shut down after the power button; then it is stopped hard.
    pub shutdown_timeout: Seconds,
}

impl Default for PowerConfig {
    fn default() -> Self {
        Self {
            on_reboot: OnReboot::Reboot,
            on_crash: OnCrash::Stop,
            shutdown_timeout: Seconds::new(90),
        }
    }
}

/// What follows a guest's wish to reboot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnReboot {
    /// It starts again in the same process with the same configuration.
    Reboot,
    /// The process ends.
    Stop,
}

/// What follows a guest's crash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnCrash {
    /// The process ends with its own exit status.
    Stop,
    /// It starts again.
    Reboot,
}

/// How the process confines itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct SandboxConfig {
    /// System calls that no thread of its kind needs.
    pub seccomp: Seccomp,
    /// Files that the configuration does not name.
    pub landlock: bool,
    /// Files and folders that may be opened later, for example for disks to be attached.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub paths: Vec<PathBuf>,
}

impl Default for SandboxConfig {
    fn default() -> Self {
        Self {
            seccomp: Seccomp::On,
            landlock: true,
            paths: Vec::new(),
        }
    }
}

/// What happens at a system call that is not allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Seccomp {
    /// The process is killed.
    On,
    /// It is allowed and logged by the kernel.
    Log,
    /// There is no filter.
    Off,
}

/// The management socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ManagementConfig {
    /// Path of the Unix socket, made with mode 0600.
    pub socket: PathBuf,
}

/// What a manager of the host lets the machine's process have, by a control group of its own. Without a manager nobody looks at it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct ResourcesConfig {
    /// Its part of the processors where they are not enough, from 1 to 10000; 100 is that of any other process group.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_weight: Option<u32>,
    /// Most time of processors, in percent of one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_max: Option<u32>,
    /// Most memory, with that of the guest; the kernel ends the process that needs more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_max: Option<ByteSize>,
    /// Most threads and processes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pids_max: Option<u32>,
}

impl ResourcesConfig {
    /// Whether nothing is other than usual.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Whether all can be so; else the key, and what is wrong.
    ///
    /// # Errors
    /// A value is impossible.
    pub fn check(&self) -> Result<(), (&'static str, &'static str)> {
        if self
            .cpu_weight
            .is_some_and(|weight| !(1..=10_000).contains(&weight))
        {
            return Err(("cpu-weight", "must be from 1 to 10000; 100 is usual"));
        }
        if self.cpu_max == Some(0) {
            return Err(("cpu-max", "must be at least 1, in percent of one processor"));
        }
        if self.pids_max.is_some_and(|most| most < 32) {
            return Err((
                "pids-max",
                "must be at least 32: a machine has a thread per processor, disk and queue",
            ));
        }
        Ok(())
    }
}
