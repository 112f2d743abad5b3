//! The command line.

use std::path::PathBuf;

use crate::backup::BackupCommand;
use api::ByteSize;
use api::file::Target;
use api::storage::LayoutKind;
use clap::{Args, Parser, Subcommand, ValueEnum};

/// Storage management for this virtual machine, through its own disks.
///
/// Disks are named by their path in the pool of the host (`/web1/data.dsk`), as `disk list` shows them, or by their device here
/// (`/dev/sdb`); snapshots by their disk's path and their name (`/web1/data.dsk@monday`).
#[derive(Debug, Parser)]
#[command(name = "sms-agent", version, max_term_width = 100)]
pub(crate) struct Arguments {
    /// Speak to the host through this disk; by default through the first that is one of smsvmm.
    #[arg(long, value_name = "/dev/sdX", global = true)]
    pub(crate) device: Option<PathBuf>,
    /// Answer in JSON.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Which machine this is, and what it may do.
    Status,
    /// Write manual pages, one for each command.
    Manual {
        /// The folder to which they are written.
        folder: PathBuf,
    },
    /// Disks and their snapshots.
    #[command(subcommand)]
    Disk(DiskCommand),
    /// Volumes behind the disks.
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Long operations that this machine has begun.
    #[command(subcommand)]
    Job(JobCommand),
    /// What happened to this machine.
    Events {
        /// Only what came after this number.
        #[arg(long, default_value_t = 0)]
        after: u32,
        /// Go on until interrupted.
        #[arg(long)]
        follow: bool,
    },
    /// Freeze file systems for a moment, and make one snapshot of all disks that they are on.
    FreezeImage {
        /// Files or directories; the file systems on which they are, are frozen.
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// What the image is called.
        #[arg(long)]
        name: String,
        /// The file systems are thawed after so many seconds, whatever the host does.
        #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=60))]
        limit: u64,
    },
    /// Give a frozen image up.
    ReleaseImage {
        /// What it is called.
        #[arg(long)]
        name: String,
        /// Its disks.
        #[arg(required = true)]
        disks: Vec<String>,
    },
    /// Backups of files and disks, from a frozen image, by a mover.
    #[command(subcommand)]
    Backup(BackupCommand),
    /// Send a request as it is written: an object with `command`, as docs/formats/expanded-api.md has it.
    Raw {
        /// The request, in JSON.
        request: String,
    },
    /// Send a command as bytes: to try what the host refuses.
    #[command(hide = true)]
    Forge {
        /// The command, in hexadecimal digits.
        cdb: String,
        /// So many zeroes are sent with it.
        #[arg(long, default_value_t = 0)]
        zeroes: usize,
    },
    /// How replication is.
    Replication,
    /// How the migration to cheaper storage is.
    Hsm,
}

#[derive(Debug, Subcommand)]
pub(crate) enum DiskCommand {
    /// The disks that this machine has or may have.
    List,
    /// What is known of a disk.
    Status {
        /// The disk.
        disk: String,
    },
    /// Make a disk, and have it here.
    Create {
        /// Its path.
        disk: String,
        /// Its size: 10G, 512M.
        #[arg(long)]
        size: ByteSize,
        /// Allocate space for all of it.
        #[arg(long)]
        thick: bool,
        #[command(flatten)]
        place: Place,
        /// Its data have checksums.
        #[arg(long)]
        checksums: bool,
        /// Only make it.
        #[arg(long)]
        no_attach: bool,
    },
    /// Make a disk with the content of a disk or snapshot.
    Clone {
        /// The disk or snapshot.
        source: String,
        /// The new disk.
        disk: String,
        /// Have it here at once.
        #[arg(long)]
        attach: bool,
    },
    /// Have a disk, or a snapshot to read, here.
    Attach {
        /// Which.
        disk: String,
        /// Only to read.
        #[arg(long)]
        read_only: bool,
    },
    /// Give a disk back to the host, which keeps it. Unmount it first.
    Detach {
        /// Which.
        disk: String,
    },
    /// Delete a disk with its snapshots. Detach it first.
    Delete {
        /// Which.
        disk: String,
    },
    /// Make a disk larger.
    Resize {
        /// Which.
        disk: String,
        /// The new size.
        size: ByteSize,
    },
    /// Keep the present state of disks, all at one moment.
    Snapshot {
        /// The disks; all that this machine can write if none is named.
        disks: Vec<String>,
        /// What it is called.
        #[arg(long)]
        name: String,
        /// What people want to know of it.
        #[arg(long, default_value = "")]
        description: String,
    },
    /// The snapshots of a disk.
    Snapshots {
        /// The disk.
        disk: String,
    },
    /// Delete a snapshot.
    DeleteSnapshot {
        /// Which: /web1/data.dsk@monday.
        snapshot: String,
    },
    /// Make a disk what it was. Detach it first.
    Revert {
        /// To which snapshot.
        snapshot: String,
    },
    /// Keep what was written to an undoable disk.
    Commit {
        /// The disk.
        disk: String,
    },
    /// Throw away what was written to an undoable disk.
    Discard {
        /// The disk.
        disk: String,
    },
    /// Change what is decided for a disk's data.
    SetAttributes {
        /// The disk.
        disk: String,
        /// Data that are written from now on have checksums, or not.
        #[arg(long)]
        checksums: Option<bool>,
        /// Never migrated to cheaper storage, or not.
        #[arg(long)]
        exempt_from_migration: Option<bool>,
    },
    /// Move a disk's data to another volume, while it is used. A job: it goes on when this command is ended.
    Move {
        /// The disk.
        disk: String,
        #[command(flatten)]
        place: Place,
        /// Do not wait until it is moved.
        #[arg(long)]
        background: bool,
    },
    /// Where a disk's data are.
    Extents {
        /// The disk.
        disk: String,
    },
    /// A text that changes when a disk's data may lie elsewhere.
    ConfigurationId {
        /// The disk.
        disk: String,
    },
    /// What differs since a snapshot.
    Changed {
        /// The disk.
        disk: String,
        /// The name of the snapshot.
        #[arg(long)]
        since: String,
        /// The name of a later one; until now if none.
        #[arg(long)]
        until: Option<String>,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum VolumeCommand {
    /// The volumes on which this machine's disks are, and those that it may name.
    List,
    /// Change the layout (RAID level) of a volume, while it is used.
    SetLayout {
        /// Which.
        volume: String,
        /// The new layout.
        #[arg(long, value_enum)]
        layout: Layout,
        /// Columns, parity included.
        #[arg(long, default_value_t = 0)]
        columns: u32,
        /// Copies of each byte.
        #[arg(long, default_value_t = 0)]
        copies: u32,
        /// Only these devices: d1,d2.
        #[arg(long, value_delimiter = ',')]
        devices: Vec<String>,
        #[command(flatten)]
        job: JobArguments,
    },
    /// Move a volume's data to other devices, while it is used.
    Move {
        /// Which.
        volume: String,
        /// Away from this device: d1.
        #[arg(long)]
        from: Option<String>,
        /// Only to this one.
        #[arg(long)]
        to: Option<String>,
        #[command(flatten)]
        job: JobArguments,
    },
}

#[derive(Debug, Args)]
pub(crate) struct JobArguments {
    /// Wait until it is done.
    #[arg(long)]
    pub(crate) wait: bool,
    /// At most so many bytes per second.
    #[arg(long, value_name = "BYTES")]
    pub(crate) throttle: Option<ByteSize>,
}

impl JobArguments {
    /// Bytes per second; 0 for no limit.
    pub(crate) fn bytes(&self) -> u64 {
        self.throttle.map_or(0, ByteSize::bytes)
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum JobCommand {
    /// All.
    List,
    /// One.
    #[command(visible_alias = "show")]
    Status {
        /// Its number.
        job: u32,
    },
    /// Wait until it has ended.
    Wait {
        /// Its number.
        job: u32,
    },
    /// End it where it is.
    Cancel {
        /// Its number.
        job: u32,
    },
}

#[derive(Debug, Args)]
#[group(multiple = false)]
pub(crate) struct Place {
    /// On this volume.
    #[arg(long)]
    volume: Option<String>,
    /// On volumes of this storage class.
    #[arg(long)]
    class: Option<String>,
}

impl Place {
    /// None if nothing is said.
    pub(crate) fn target(self) -> Option<Target> {
        self.volume.map(Target::Volume).or(self.class.map(Target::Class))
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Layout {
    Concat,
    Stripe,
    Mirror,
    StripeMirror,
    Raid5,
    Raid6,
}

impl From<Layout> for LayoutKind {
    fn from(layout: Layout) -> Self {
        match layout {
            Layout::Concat => Self::Concat,
            Layout::Stripe => Self::Stripe,
            Layout::Mirror => Self::Mirror,
            Layout::StripeMirror => Self::StripeMirror,
            Layout::Raid5 => Self::Raid5,
            Layout::Raid6 => Self::Raid6,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Arguments::command().debug_assert();
    }
}
