//! What a guest can ask for.

use api::file::Target;
use api::storage::{LayoutKind, Shape};
use serde::{Deserialize, Serialize};

/// A request. Disks are named by their path in the pool (`/web1/root.dsk`), snapshots with their name behind it
/// (`/web1/root.dsk@monday`). Sizes are numbers of bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    rename_all = "kebab-case",
    rename_all_fields = "kebab-case",
    tag = "command",
    deny_unknown_fields
)]
pub enum Request {
    /// Who asks, and what it may do.
    Describe {},
    /// The disks that the guest has or may have.
    ListDisks {},
    /// The volumes on which its disks are, and those that it may name.
    ListVolumes {},
    /// What is known of a disk, its snapshots too.
    DiskStatus {
        /// The disk.
        disk: String,
    },
    /// Make a disk that reads as zeroes.
    CreateDisk {
        /// Its path.
        disk: String,
        /// Its size.
        size: u64,
        /// Allocate space for all of it.
        #[serde(default)]
        thick: bool,
        /// Where its data shall be.
        #[serde(default)]
        target: Option<Target>,
        /// Its data have checksums.
        #[serde(default)]
        checksums: Option<bool>,
        /// Give it to this guest at once.
        #[serde(default)]
        attach: bool,
    },
    /// Make a disk with the content of a disk or snapshot. Nothing is copied.
    CloneDisk {
        /// The disk or snapshot.
        source: String,
        /// The new disk.
        disk: String,
        /// Give it to this guest at once.
        #[serde(default)]
        attach: bool,
    },
    /// Give a disk or snapshot to this guest; a snapshot can only be read.
    AttachDisk {
        /// Which.
        disk: String,
        /// The guest cannot write it.
        #[serde(default)]
        read_only: bool,
    },
    /// Take a disk from this guest.
    DetachDisk {
        /// Which.
        disk: String,
    },
    /// Delete a disk with its snapshots.
    DeleteDisk {
        /// Which.
        disk: String,
    },
    /// Make a disk larger.
    ResizeDisk {
        /// Which.
        disk: String,
        /// The new size.
        size: u64,
    },
    /// Keep the present state of disks, all at one moment.
    Snapshot {
        /// The disks; all of the pool that the guest can write if none is named.
        #[serde(default)]
        disks: Vec<String>,
        /// What it is called.
        name: String,
        /// What people want to know of it.
        #[serde(default)]
        description: String,
    },
    /// Delete a snapshot.
    DeleteSnapshot {
        /// Which.
        snapshot: String,
    },
    /// Make a disk what it was. Not while a guest uses it.
    Revert {
        /// The snapshot.
        snapshot: String,
    },
    /// What was written to the redo layer stays.
    Commit {
        /// The disk.
        disk: String,
    },
    /// What was written to the redo layer goes.
    Discard {
        /// The disk.
        disk: String,
    },
    /// Change what is decided for a disk's data.
    SetAttributes {
        /// The disk.
        disk: String,
        /// What changes.
        attributes: DiskAttributes,
    },
    /// Move the data of a disk to where they shall be from now on. Begins a job.
    MoveDisk {
        /// The disk.
        disk: String,
        /// Where.
        to: Target,
        /// Answer with the job, and not when it has ended. Since version 1.1.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        background: bool,
    },
    /// Move the data of the volume behind a disk to other devices. Begins a job.
    MoveVolume {
        /// The volume.
        volume: String,
        /// Away from this device.
        #[serde(default)]
        from: Option<String>,
        /// Only to this one.
        #[serde(default)]
        to: Option<String>,
        /// At most so many bytes per second; 0 for no limit.
        #[serde(default)]
        throttle: u64,
    },
    /// Change the layout (RAID level) of the volume behind a disk. Begins a job.
    SetLayout {
        /// The volume.
        volume: String,
        /// The new layout.
        layout: LayoutKind,
        /// Columns, parity included; 0 for as many as is good.
        #[serde(default)]
        columns: u32,
        /// Copies of each byte; 0 for two where there are copies.
        #[serde(default)]
        copies: u32,
        /// Bytes per column and row; 0 for the usual.
        #[serde(default)]
        stripe_unit: u64,
        /// Only these devices.
        #[serde(default)]
        devices: Vec<String>,
        /// At most so many bytes per second; 0 for no limit.
        #[serde(default)]
        throttle: u64,
    },
    /// The jobs that the guest has begun.
    ListJobs {},
    /// How it is with a job that the guest has begun.
    JobStatus {
        /// Its number.
        job: u32,
    },
    /// End a job that the guest has begun where it is.
    CancelJob {
        /// Its number.
        job: u32,
    },
    /// Freeze an image of disks: a snapshot of all at one moment, with what is needed to read it elsewhere.
    FreezeImage {
        /// The disks; all of the pool that the guest can write if none is named.
        #[serde(default)]
        disks: Vec<String>,
        /// What it is called.
        name: String,
    },
    /// Give up a frozen image.
    ReleaseImage {
        /// The disks.
        disks: Vec<String>,
        /// What it is called.
        name: String,
    },
    /// Where the data of a disk are, on which volume.
    Extents {
        /// The disk.
        disk: String,
    },
    /// A number that differs when the data of a disk may lie elsewhere than before.
    ConfigurationId {
        /// The disk.
        disk: String,
    },
    /// Which ranges of a disk differ from what they were.
    Changed {
        /// The disk.
        disk: String,
        /// Since this snapshot was made.
        since: String,
        /// Until this one was made; until now if none.
        #[serde(default)]
        until: Option<String>,
    },
    /// How replication is.
    ReplicationStatus {},
    /// How the migration to cheaper storage is.
    HsmStatus {},
}

/// What can be decided for a disk's data; what is none stays.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct DiskAttributes {
    /// Data that are written from now on have checksums.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checksums: Option<bool>,
    /// Never migrated to cheaper storage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exempt_from_migration: Option<bool>,
}

impl Request {
    /// The command's name, as in its JSON.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Describe {} => "describe",
            Self::ListDisks {} => "list-disks",
            Self::ListVolumes {} => "list-volumes",
            Self::DiskStatus { .. } => "disk-status",
            Self::CreateDisk { .. } => "create-disk",
            Self::CloneDisk { .. } => "clone-disk",
            Self::AttachDisk { .. } => "attach-disk",
            Self::DetachDisk { .. } => "detach-disk",
            Self::DeleteDisk { .. } => "delete-disk",
            Self::ResizeDisk { .. } => "resize-disk",
            Self::Snapshot { .. } => "snapshot",
            Self::DeleteSnapshot { .. } => "delete-snapshot",
            Self::Revert { .. } => "revert",
            Self::Commit { .. } => "commit",
            Self::Discard { .. } => "discard",
            Self::SetAttributes { .. } => "set-attributes",
            Self::MoveDisk { .. } => "move-disk",
            Self::MoveVolume { .. } => "move-volume",
            Self::SetLayout { .. } => "set-layout",
            Self::ListJobs {} => "list-jobs",
            Self::JobStatus { .. } => "job-status",
            Self::CancelJob { .. } => "cancel-job",
            Self::FreezeImage { .. } => "freeze-image",
            Self::ReleaseImage { .. } => "release-image",
            Self::Extents { .. } => "extents",
            Self::ConfigurationId { .. } => "configuration-id",
            Self::Changed { .. } => "changed",
            Self::ReplicationStatus {} => "replication-status",
            Self::HsmStatus {} => "hsm-status",
        }
    }

    /// What it is about, for the log: a disk, a volume, a job; empty if that is nothing of all this.
    pub fn object(&self) -> String {
        match self {
            Self::DiskStatus { disk }
            | Self::CreateDisk { disk, .. }
            | Self::CloneDisk { disk, .. }
            | Self::AttachDisk { disk, .. }
            | Self::DetachDisk { disk }
            | Self::DeleteDisk { disk }
            | Self::ResizeDisk { disk, .. }
            | Self::Commit { disk }
            | Self::Discard { disk }
            | Self::SetAttributes { disk, .. }
            | Self::MoveDisk { disk, .. }
            | Self::Extents { disk }
            | Self::ConfigurationId { disk }
            | Self::Changed { disk, .. } => disk.clone(),
            Self::Snapshot { disks, name, .. }
            | Self::FreezeImage { disks, name }
            | Self::ReleaseImage { disks, name } => format!("{}@{name}", disks.join(" ")),
            Self::DeleteSnapshot { snapshot } | Self::Revert { snapshot } => snapshot.clone(),
            Self::MoveVolume { volume, .. } | Self::SetLayout { volume, .. } => volume.clone(),
            Self::JobStatus { job } | Self::CancelJob { job } => format!("job {job}"),
            Self::Describe {}
            | Self::ListDisks {}
            | Self::ListVolumes {}
            | Self::ListJobs {}
            | Self::ReplicationStatus {}
            | Self::HsmStatus {} => String::new(),
        }
    }

    /// Whether it changes nothing.
    pub const fn only_reads(&self) -> bool {
        matches!(
            self,
            Self::Describe {}
                | Self::ListDisks {}
                | Self::ListVolumes {}
                | Self::DiskStatus { .. }
                | Self::ListJobs {}
                | Self::JobStatus { .. }
                | Self::Extents { .. }
                | Self::ConfigurationId { .. }
                | Self::Changed { .. }
                | Self::ReplicationStatus {}
                | Self::HsmStatus {}
        )
    }

    /// The layout that [`Self::SetLayout`] wants.
    pub fn shape(&self) -> Option<Shape> {
        let Self::SetLayout {
            layout,
            columns,
            copies,
            stripe_unit,
            devices,
            ..
        } = self
        else {
            return None;
        };
        Some(Shape {
            layout: *layout,
            columns: *columns,
            copies: *copies,
            stripe_unit: *stripe_unit,
            class: String::new(),
            devices: devices.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_an_object_with_its_command_and_nothing_unknown() {
        let text = r#"{"command": "create-disk", "disk": "/a.dsk", "size": 4096, "attach": true}"#;
        let request: Request = serde_json::from_str(text).unwrap();
        assert!(matches!(
            request,
            Request::CreateDisk {
                attach: true,
                thick: false,
                ..
            }
        ));
        assert_eq!(
            (request.name(), request.object().as_str()),
            ("create-disk", "/a.dsk")
        );
        for text in [
            r#"{"command": "describe", "x": 1}"#,
            r#"{"command": "create-disk", "disk": "/a.dsk", "size": -1}"#,
            r#"{"command": "create-disk", "disk": "/a.dsk"}"#,
            r#"{"command": "format-everything"}"#,
            r#"{"command": "set-attributes", "disk": "/a.dsk", "attributes": {"frozen": true}}"#,
            "[]",
            "",
        ] {
            assert!(serde_json::from_str::<Request>(text).is_err(), "{text}");
        }
        // A decoder that follows depth without end has no stack left.
        let deep = format!(r#"{{"command": {}"#, "[".repeat(1 << 20));
        assert!(serde_json::from_str::<Request>(&deep).is_err());
    }

    #[test]
    fn the_name_is_that_of_the_json() {
        for request in [
            Request::ListDisks {},
            Request::SetLayout {
                volume: "v".into(),
                layout: LayoutKind::Raid5,
                columns: 0,
                copies: 0,
                stripe_unit: 0,
                devices: Vec::new(),
                throttle: 0,
            },
            Request::ConfigurationId {
                disk: "/a.dsk".into(),
            },
        ] {
            let json = serde_json::to_value(&request).unwrap();
            assert_eq!(json["command"], request.name());
            assert_eq!(serde_json::from_value::<Request>(json).unwrap(), request);
        }
    }
}
