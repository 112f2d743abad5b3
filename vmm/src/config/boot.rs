//! `[boot]`: what the guest starts with.

use std::path::PathBuf;

use api::InvalidValue;
use serde::{Deserialize, Serialize};

/// Kernel, initial RAM disk and command line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct BootConfig {
    /// A bzImage (/boot/vmlinuz-...) or an ELF kernel with a PVH entry.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    #[serde(default = "default_cmdline")]
    pub cmdline: String,
}

impl BootConfig {
    /// Longest command line in bytes: COMMAND_LINE_SIZE of x86 Linux, less the final zero.
    pub const MAX_CMDLINE: usize = 2047;

    pub(super) fn check(&self) -> Result<(), (&'static str, InvalidValue)> {
        if self.kernel.as_os_str().is_empty() {
            return Err((
                "kernel",
                InvalidValue::new("is empty; name a bzImage or an ELF kernel"),
            ));
        }
        if self
            .initrd
            .as_ref()
            .is_some_and(|initrd| initrd.as_os_str().is_empty())
        {
            return Err((
                "initrd",
                InvalidValue::new("is empty; leave it out to boot without"),
            ));
        }
        if self.cmdline.len() > Self::MAX_CMDLINE {
            return Err((
                "cmdline",
                InvalidValue::new(format!(
                    "has {} bytes; Linux takes at most {}",
                    self.cmdline.len(),
                    Self::MAX_CMDLINE
                )),
            ));
        }
        if self.cmdline.bytes().any(|byte| byte == 0 || byte == b'\n') {
            return Err((
                "cmdline",
                InvalidValue::new("has a line break or a zero byte; Linux takes one line of text"),
            ));
        }
        Ok(())
    }
}

fn default_cmdline() -> String {
    "console=ttyS0".to_owned()
}
