//! The arguments of `smsvmm disk` as clap sees them.

use std::path::PathBuf;

use api::ByteSize;
use api::file::Target;
use api::virtual_disk::{DiskOperation, ImageFormat};
use clap::{Args, Subcommand, ValueEnum};

use super::arguments::Which;
use super::file_arguments::{TargetArguments, path};

#[derive(Debug, Args)]
pub(crate) struct VirtualDiskArguments {
    #[command(flatten)]
    pub(crate) which: Which,

    #[command(subcommand)]
    pub(crate) command: DiskCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum DiskCommand {
    /// Make a disk that reads as zeroes. It gets space as it is written, unless it is thick.
    Create {
        /// Its path, which ends with .dsk.
        #[arg(value_parser = path)]
        path: String,
        /// Its size, for example 10G.
        #[arg(long)]
        size: ByteSize,
        /// Allocate space for all of it now.
        #[arg(long)]
        thick: bool,
        /// Its data have checksums, which reads verify.
        #[arg(long)]
        checksums: bool,
        #[command(flatten)]
        target: TargetArguments,
    },
    /// Show all disks. Only reads.
    List {
        /// Of this directory and those below it.
        #[arg(default_value = "/", value_parser = path)]
        path: String,
    },
    /// Show all that is known of a disk, and its snapshots. Only reads.
    Status {
        /// The disk.
        #[arg(value_parser = path)]
        path: String,
    },
    /// Delete a disk with all its snapshots, or, with /vm/root.dsk@NAME, one snapshot.
    ///
    /// Disks that were cloned from it, and other snapshots, keep what they need.
    Delete {
        /// The disk or the snapshot.
        #[arg(value_parser = path)]
        path: String,
    },
    /// Change the size of a disk; what is new reads as zeroes.
    Resize {
        /// The disk.
        #[arg(value_parser = path)]
        path: String,
        /// The new size, for example 20G.
        size: ByteSize,
        /// Let it become smaller, and lose what lies behind the new end.
        #[arg(long)]
        force: bool,
    },
    /// Keep the present state of disks, all at one moment. Nothing is copied.
    Snapshot {
        /// The disks.
        #[arg(required = true, value_parser = path)]
        paths: Vec<String>,
        /// What the snapshot is called.
        #[arg(long)]
        name: String,
        /// What people want to know of it.
        #[arg(long, default_value = "", value_name = "TEXT")]
        description: String,
    },
    /// Give a snapshot another name or description.
    Describe {
        /// The snapshot: /vm/root.dsk@NAME.
        #[arg(value_parser = path)]
        snapshot: String,
        /// Its new name.
        #[arg(long, required_unless_present = "description")]
        name: Option<String>,
        /// Its new description.
        #[arg(long, value_name = "TEXT")]
        description: Option<String>,
    },
    /// Make a disk what it was when a snapshot was made. What was written since goes, unless another snapshot has it.
    Revert {
        /// The snapshot: /vm/root.dsk@NAME.
        #[arg(value_parser = path)]
        snapshot: String,
    },
    /// Make a disk with the content of a disk or of a snapshot. Nothing is copied: both keep what they have in common.
    Clone {
        /// The disk, or the snapshot: /vm/root.dsk@NAME.
        #[arg(value_parser = path)]
        path: String,
        /// The new disk.
        #[arg(value_parser = path)]
        to: String,
    },
    /// Copy a disk or a snapshot with all its data.
    Copy {
        /// The disk, or the snapshot: /vm/root.dsk@NAME.
        #[arg(value_parser = path)]
        path: String,
        /// The new disk.
        #[arg(value_parser = path)]
        to: String,
        /// Allocate space for all of it now.
        #[arg(long)]
        thick: bool,
        /// Read both again afterwards, and compare.
        #[arg(long)]
        verify: bool,
    },
    /// What was written to the redo layer of a disk (modes undoable and append) stays for good.
    Commit {
        /// The disk.
        #[arg(value_parser = path)]
        path: String,
    },
    /// What was written to the redo layer of a disk (modes undoable and append) goes.
    Discard {
        /// The disk.
        #[arg(value_parser = path)]
        path: String,
    },
    /// Make the chain of a disk as short as its snapshots allow; goes on with what was broken off.
    Merge {
        /// The disk.
        #[arg(value_parser = path)]
        path: String,
    },
    /// Move the data of a disk, those of its snapshots too, to another volume while it is used. A job: who has the pool open goes on with it.
    Move {
        /// The disk.
        #[arg(value_parser = path)]
        path: String,
        #[command(flatten)]
        to: Destination,
        /// Do not wait for the job.
        #[arg(long)]
        no_wait: bool,
    },
    /// Show which blocks of a disk were written or discarded since a snapshot was made. Only reads.
    Changed {
        /// The disk.
        #[arg(value_parser = path)]
        path: String,
        /// The snapshot's name.
        #[arg(long, value_name = "SNAPSHOT")]
        since: String,
        /// Until this snapshot was made [default: until now].
        #[arg(long, value_name = "SNAPSHOT")]
        until: Option<String>,
    },
    /// Show where a range of a snapshot lies on devices. Only reads.
    Places {
        /// The snapshot: /vm/root.dsk@NAME.
        #[arg(value_parser = path)]
        snapshot: String,
        /// First byte.
        #[arg(long, default_value = "0")]
        offset: ByteSize,
        /// Bytes.
        #[arg(long, default_value = "256M")]
        length: ByteSize,
    },
    /// Make a disk from an image: raw, or qcow2. Zeroes take no space.
    Import {
        /// A file or a block device of the host.
        #[arg(value_name = "FILE")]
        image: PathBuf,
        /// The new disk.
        #[arg(value_parser = path)]
        path: String,
        /// What the image is [default: qcow2 if it begins like one, else raw].
        #[arg(long)]
        format: Option<Format>,
        /// Read the images on which a qcow2 image is built, too. Only for images that you trust: they name files of this host.
        #[arg(long)]
        backing: bool,
        /// Make the disk larger than the image.
        #[arg(long)]
        size: Option<ByteSize>,
        /// Allocate space for all of it.
        #[arg(long)]
        thick: bool,
        /// Read both again afterwards, and compare.
        #[arg(long)]
        verify: bool,
    },
    /// Make an image from a disk or a snapshot: raw, sparse, or qcow2. Only reads the pool.
    Export {
        /// The disk, or the snapshot: /vm/root.dsk@NAME.
        #[arg(value_parser = path)]
        path: String,
        /// The image.
        #[arg(value_name = "FILE")]
        image: PathBuf,
        /// What it shall be [default: qcow2 if its name ends so, else raw].
        #[arg(long)]
        format: Option<Format>,
        /// Replace a file of that name.
        #[arg(long)]
        force: bool,
        /// Read both again afterwards, and compare.
        #[arg(long)]
        verify: bool,
    },
}

/// Where a disk is moved.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct Destination {
    /// To this volume and no other.
    #[arg(long, value_name = "NAME")]
    volume: Option<String>,
    /// To volumes of this storage class.
    #[arg(long, value_name = "NAME")]
    class: Option<String>,
    /// To any volume.
    #[arg(long)]
    anywhere: bool,
}

impl Destination {
    fn target(self) -> Target {
        let named = self.volume.map(Target::Volume).or(self.class.map(Target::Class));
        // One of the three is given.
        named.unwrap_or_default()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// The bytes of the disk, one after the other.
    Raw,
    /// QEMU's format.
    Qcow2,
}

impl From<Format> for ImageFormat {
    fn from(format: Format) -> Self {
        match format {
            Format::Raw => Self::Raw,
            Format::Qcow2 => Self::Qcow2,
        }
    }
}

impl DiskCommand {
    /// The operation that it asks for; none for those that move data.
    pub(crate) fn operation(self) -> Option<DiskOperation> {
        Some(match self {
            Self::Create {
                path,
                size,
                thick,
                checksums,
                target,
            } => DiskOperation::Create {
                path,
                size: size.bytes(),
                thick,
                target: target.target(),
                checksums: checksums.then_some(true),
            },
            Self::List { path } => DiskOperation::List {
                path,
                limit: None,
                after: None,
            },
            Self::Status { path } => DiskOperation::Status { path },
            Self::Delete { path } if path.contains(".dsk@") => DiskOperation::DeleteSnapshot { path },
            Self::Delete { path } => DiskOperation::Delete { path },
            Self::Resize { path, size, force } => DiskOperation::Resize {
                path,
                size: size.bytes(),
                force,
            },
            Self::Snapshot {
                paths,
                name,
                description,
            } => DiskOperation::Snapshot {
                paths,
                name,
                description,
            },
            Self::Describe {
                snapshot,
                name,
                description,
            } => DiskOperation::DescribeSnapshot {
                path: snapshot,
                name,
                description,
            },
            Self::Revert { snapshot } => DiskOperation::Revert { path: snapshot },
            Self::Clone { path, to } => DiskOperation::Clone { path, to },
            Self::Commit { path } => DiskOperation::Commit { path },
            Self::Discard { path } => DiskOperation::Discard { path },
            Self::Merge { path } => DiskOperation::Merge { path },
            Self::Move { path, to, .. } => DiskOperation::Move {
                path,
                to: to.target(),
            },
            Self::Changed { path, since, until } => DiskOperation::Changed { path, since, until },
            Self::Places {
                snapshot,
                offset,
                length,
            } => DiskOperation::Places {
                path: snapshot,
                offset: offset.bytes(),
                length: length.bytes(),
                unless: None,
            },
            Self::Import { .. } | Self::Export { .. } | Self::Copy { .. } => return None,
        })
    }
}
