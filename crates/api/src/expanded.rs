//! What a guest may do with storage management through its own disks: `[expanded-api]` of vm.toml.
//!
//! The principal is the virtual machine: whoever may send SCSI commands in a guest acts for all of it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{ByteSize, InvalidValue};

/// A group of commands that a guest may be allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Right {
    /// To look at its own disks, their volumes and snapshots, and at what it has started. Always there.
    Observe,
    /// To make and delete snapshots.
    Snapshot,
    /// To make a disk what it was; to commit or discard what an undoable disk has been written.
    Revert,
    /// To make disks, to clone them, to attach and detach them.
    Create,
    /// To delete disks.
    Delete,
    /// To make disks larger.
    Resize,
    /// To change what is decided for a disk's data.
    Attributes,
    /// To move a disk to other volumes, a volume to other devices.
    Move,
    /// To change the layout (RAID level) of a volume.
    Layout,
    /// To freeze images, and to ask where a disk's data are.
    Image,
}

impl Right {
    /// All of them, in the order of their bits in the page that tells a guest of its rights.
    pub const ALL: [Self; 10] = [
        Self::Observe,
        Self::Snapshot,
        Self::Revert,
        Self::Create,
        Self::Delete,
        Self::Resize,
        Self::Attributes,
        Self::Move,
        Self::Layout,
        Self::Image,
    ];

    /// As in vm.toml.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Observe => "observe",
            Self::Snapshot => "snapshot",
            Self::Revert => "revert",
            Self::Create => "create",
            Self::Delete => "delete",
            Self::Resize => "resize",
            Self::Attributes => "attributes",
            Self::Move => "move",
            Self::Layout => "layout",
            Self::Image => "image",
        }
    }
}

/// What the guest of a machine may do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct ExpandedPolicy {
    /// The machine's SCSI disks take the commands at all.
    pub enabled: bool,
    /// What it may do beside looking.
    pub allow: Vec<Right>,
    /// Disks that it may do it to, beside those that are attached to it for writing: paths, or beginnings of paths with `*` at the end.
    pub objects: Vec<String>,
    /// Volumes that it may name: where disks are made or moved to, and whose layout it may change. Names, or beginnings with `*`.
    pub volumes: Vec<String>,
    /// Devices that it may name, by their number in the pool (`d2`).
    pub devices: Vec<String>,
    /// Most snapshots of a disk.
    pub max_snapshots: u32,
    /// Most disks that there may be among `objects` when it makes one.
    pub max_disks: u32,
    /// Most bytes that disks among `objects` may have together, as guests see them, when it makes or resizes one; no limit if none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_bytes: Option<ByteSize>,
    /// Most jobs of its own that run at once.
    pub max_jobs: u32,
    /// Requests per second; twice as many may come at once.
    pub rate: u32,
}

impl Default for ExpandedPolicy {
    fn default() -> Self {
        Self {
            enabled: true,
            allow: Vec::new(),
            objects: Vec::new(),
            volumes: Vec::new(),
            devices: Vec::new(),
            max_snapshots: 64,
            max_disks: 16,
            max_bytes: None,
            max_jobs: 2,
            rate: 20,
        }
    }
}

impl ExpandedPolicy {
    /// Whether nothing is other than usual.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Whether it may do what `right` is for.
    pub fn allows(&self, right: Right) -> bool {
        right == Right::Observe || self.allow.contains(&right)
    }

    /// Its rights, in the order of [`Right::ALL`].
    pub fn rights(&self) -> Vec<Right> {
        Right::ALL
            .into_iter()
            .filter(|right| self.allows(*right))
            .collect()
    }

    /// Whether `objects` has the disk with this path.
    pub fn has_object(&self, path: &str) -> bool {
        self.objects.iter().any(|pattern| matches(pattern, path))
    }

    /// Whether it may name this volume.
    pub fn has_volume(&self, name: &str) -> bool {
        self.volumes.iter().any(|pattern| matches(pattern, name))
    }

    /// Checks what the types alone cannot.
    ///
    /// # Errors
    /// The key that is wrong, and what it may be.
    pub fn check(&self) -> Result<(), (&'static str, InvalidValue)> {
        let wrong = |key, text: String| Err((key, InvalidValue::new(text)));
        for pattern in &self.objects {
            let plain = pattern.strip_suffix('*').unwrap_or(pattern);
            let parts = plain.trim_start_matches('/').split('/');
            let strange = parts.clone().any(|part| matches!(part, "." | ".."))
                || plain.contains("//")
                || plain.contains('*');
            if !plain.starts_with('/') || strange {
                let text = format!(
                    "`{pattern}` is no path of the pool; give one like /web1/data.dsk, or /web1/* for all below"
                );
                return wrong("objects", text);
            }
            if pattern == plain && !plain.ends_with(".dsk") {
                let text = format!(
                    "`{pattern}` is no disk; its path ends with .dsk, or with * for all that begin so"
                );
                return wrong("objects", text);
            }
        }
        for pattern in &self.volumes {
            if pattern.is_empty() || pattern.strip_suffix('*').unwrap_or(pattern).contains('*') {
                return wrong(
                    "volumes",
                    format!("`{pattern}` is no name; `*` may only be the last character"),
                );
            }
        }
        if let Some(device) = self.devices.iter().find(|device| !is_device(device)) {
            let text = format!("`{device}` is no number of a device; `smsvmm device list` shows d0, d1, ...");
            return wrong("devices", text);
        }
        if self.rate == 0 || self.rate > 10_000 {
            return wrong("rate", format!("{} is not from 1 to 10000", self.rate));
        }
        Ok(())
    }
}

fn is_device(text: &str) -> bool {
    let number = text.strip_prefix('d').unwrap_or_default();
    !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
}

fn matches(pattern: &str, text: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(beginning) => text.starts_with(beginning),
        None => text == pattern,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_may_look_and_nothing_else_by_default() {
        let policy = ExpandedPolicy::default();
        assert_eq!(policy.rights(), [Right::Observe]);
        assert!(!policy.has_object("/vm/a.dsk") && !policy.has_volume("safe"));
        policy.check().unwrap();
    }

    #[test]
    fn patterns_have_one_star_at_their_end() {
        let policy = |text: &str| serde_json::from_str::<ExpandedPolicy>(text).unwrap();
        let good =
            policy(r#"{"objects": ["/vm1/*", "/x.dsk"], "volumes": ["safe", "web*"], "devices": ["d12"]}"#);
        good.check().unwrap();
        assert!(good.has_object("/vm1/a/b.dsk") && good.has_object("/x.dsk"));
        assert!(!good.has_object("/vm10/a.dsk") && !good.has_object("/x.dsk.dsk"));
        assert!(good.has_volume("web2") && !good.has_volume("safer"));
        for (text, key) in [
            (r#"{"objects": ["vm1/*"]}"#, "objects"),
            (r#"{"objects": ["/vm1/../*"]}"#, "objects"),
            (r#"{"objects": ["/*/a.dsk"]}"#, "objects"),
            (r#"{"objects": ["/vm1/"]}"#, "objects"),
            (r#"{"objects": ["/vm1//*"]}"#, "objects"),
            (r#"{"volumes": ["a*b"]}"#, "volumes"),
            (r#"{"devices": ["/dev/sda"]}"#, "devices"),
            (r#"{"rate": 0}"#, "rate"),
        ] {
            assert_eq!(policy(text).check().unwrap_err().0, key, "{text}");
        }
        assert!(serde_json::from_str::<ExpandedPolicy>(r#"{"alow": []}"#).is_err());
    }
}
