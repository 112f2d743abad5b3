//! The arguments of `smsvmm file` as clap sees them.

use api::ByteSize;
use api::file::{AttributeChanges, FileOperation, Target};
use clap::{ArgGroup, Args, Subcommand, ValueEnum};

use super::arguments::Which;

#[derive(Debug, Args)]
pub(crate) struct FileArguments {
    #[command(flatten)]
    pub(crate) which: Which,

    #[command(subcommand)]
    pub(crate) command: FileCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum FileCommand {
    /// Make the pool's file system: a volume for metadata (fs-meta), and all other volumes for data.
    ///
    /// Volumes that are made later join by themselves. What volumes carry that is known (a file system, a partition table) is not
    /// destroyed without --force.
    Format {
        /// Size of the metadata volume [default: 1/2048 of the pool and up to 64M, at least 16M].
        #[arg(long, value_name = "SIZE")]
        meta_size: Option<ByteSize>,
        /// Copies of the metadata on different devices [default: as many as there are devices, at most 3].
        #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=8))]
        meta_copies: Option<u32>,
        /// Destroy what the volumes carry, and the file system that there is.
        #[arg(long)]
        force: bool,
    },
    /// Show what is in a directory. Only reads.
    List {
        /// The directory, or a file.
        #[arg(default_value = "/", value_parser = path)]
        path: String,
        /// With sizes, times and states.
        #[arg(short, long)]
        long: bool,
        /// With all that is in its directories.
        #[arg(short, long)]
        recursive: bool,
    },
    /// Make a directory.
    Mkdir {
        /// Its path.
        #[arg(value_parser = path)]
        path: String,
        /// Make those above it, too, and do not mind if it is there.
        #[arg(short, long)]
        parents: bool,
        #[command(flatten)]
        attributes: AttributeArguments,
    },
    /// Give a file or directory another name, or put it into another directory.
    Move {
        /// The present path.
        #[arg(value_parser = path)]
        from: String,
        /// The new one, or a directory.
        #[arg(value_parser = path)]
        to: String,
    },
    /// Delete a file or an empty directory. What layers still need of a file stays until they need it no more.
    Delete {
        /// Its path.
        #[arg(value_parser = path)]
        path: String,
        /// With all that is in it.
        #[arg(short, long)]
        recursive: bool,
    },
    /// Show all that is known of a file or directory. Only reads.
    Stat {
        /// Its path.
        #[arg(value_parser = path)]
        path: String,
    },
    /// Change where a file's data shall lie, and how; of a directory, what is made in it later gets that.
    SetAttributes {
        /// Its path.
        #[arg(value_parser = path)]
        path: String,
        #[command(flatten)]
        attributes: AttributeArguments,
        /// The file takes no writes.
        #[arg(long, value_name = "yes|no")]
        frozen: Option<Decision>,
    },
    /// Show where the data of a file are. Only reads.
    Extents {
        /// The file.
        #[arg(value_parser = path)]
        path: String,
    },
    /// Put the data of files in order on their volumes.
    Defragment {
        /// A file, or a directory with all that is in it.
        #[arg(default_value = "/", value_parser = path)]
        path: String,
    },
    /// Move the data of files to where their attributes want them.
    Relocate {
        /// A file, or a directory with all that is in it.
        #[arg(value_parser = path)]
        path: String,
        #[command(flatten)]
        target: TargetArguments,
    },
    /// Empty a volume: it gets nothing new, and what files have on it moves to others. Then it can be deleted.
    Drain {
        /// Its name.
        volume: String,
        /// Not any more: use it like the others.
        #[arg(long)]
        end: bool,
    },
    /// Read all metadata of the file system and see that they agree.
    Check {
        /// Repair what can be repaired without loss.
        #[arg(long)]
        repair: bool,
    },
    /// Read everything that has a checksum, metadata and data, and repair what is wrong from other copies. What could not be repaired is
    /// shown, and the exit status is 1.
    Scrub,
    /// Write standard input to a file: `smsvmm file write /a.dsk < a.raw`. It is made if it is not there.
    ///
    /// Without --offset the file becomes what is written. Whole 64K of zeroes take no space. Files have whole sectors of 512 bytes: a
    /// last one that is not full is filled up with zeroes.
    Write {
        /// The file.
        #[arg(value_parser = path)]
        path: String,
        /// Begin here, and leave the rest of the file as it is; a multiple of 512.
        #[arg(long, value_name = "SIZE")]
        offset: Option<ByteSize>,
        /// Size of the file afterwards [default: by what is written].
        #[arg(long)]
        size: Option<ByteSize>,
        /// Allocate space for all of a new file.
        #[arg(long)]
        thick: bool,
    },
    /// Write a file to standard output: `smsvmm file read /a.dsk > a.raw`. Only reads.
    Read {
        /// The file.
        #[arg(value_parser = path)]
        path: String,
        /// Begin here.
        #[arg(long, default_value = "0", value_name = "SIZE")]
        offset: ByteSize,
        /// So much [default: all the rest].
        #[arg(long, value_name = "SIZE")]
        length: Option<ByteSize>,
    },
    /// Freeze a file as it is, and make a layer on it that is written instead. Nothing is copied.
    Snapshot {
        /// The file.
        #[arg(value_parser = path)]
        path: String,
        /// The layer.
        #[arg(value_parser = path)]
        layer: String,
    },
    /// Have a layer take over what its parent has; the parent goes.
    Merge {
        /// The layer.
        #[arg(value_parser = path)]
        layer: String,
        /// The layer gets its parent's name.
        #[arg(long)]
        into_parent_name: bool,
    },
    /// Make a file with the content of a frozen one. Nothing is copied.
    Clone {
        /// The frozen file.
        #[arg(value_parser = path)]
        frozen: String,
        /// The new file.
        #[arg(value_parser = path)]
        path: String,
    },
    /// Change the size of a file; what is new reads as zeroes.
    Resize {
        /// The file.
        #[arg(value_parser = path)]
        path: String,
        /// The new size, for example 20G.
        size: ByteSize,
        /// Let it become smaller, and lose what lies behind the new end.
        #[arg(long)]
        shrink: bool,
    },
}

/// Where data shall lie.
#[derive(Debug, Default, Args)]
#[command(group = ArgGroup::new("where").multiple(false))]
pub(crate) struct TargetArguments {
    /// On this volume and no other.
    #[arg(long, group = "where", value_name = "NAME")]
    volume: Option<String>,
    /// On volumes of this storage class.
    #[arg(long, group = "where", value_name = "NAME")]
    class: Option<String>,
    /// On any volume.
    #[arg(long, group = "where")]
    anywhere: bool,
}

impl TargetArguments {
    pub(crate) fn target(self) -> Option<Target> {
        match (self.volume, self.class, self.anywhere) {
            (Some(volume), ..) => Some(Target::Volume(volume)),
            (_, Some(class), _) => Some(Target::Class(class)),
            (.., true) => Some(Target::Any),
            _ => None,
        }
    }
}

/// What may be decided for files.
#[derive(Debug, Default, Args)]
pub(crate) struct AttributeArguments {
    #[command(flatten)]
    target: TargetArguments,
    /// Space is allocated for all of a file when it is made.
    #[arg(long, value_name = "yes|no")]
    thick: Option<Decision>,
    /// Data have checksums, which reads verify.
    #[arg(long, value_name = "yes|no")]
    checksums: Option<Decision>,
    /// Data are never migrated to cheaper storage.
    #[arg(long, value_name = "yes|no")]
    exempt_from_migration: Option<Decision>,
}

impl AttributeArguments {
    pub(crate) fn changes(self, frozen: Option<Decision>) -> AttributeChanges {
        let yes = |decision: Option<Decision>| decision.map(|decision| decision == Decision::Yes);
        AttributeChanges {
            target: self.target.target(),
            thick: yes(self.thick),
            checksums: yes(self.checksums),
            exempt_from_migration: yes(self.exempt_from_migration),
            frozen: yes(frozen),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Decision {
    Yes,
    No,
}

/// What is not a path is wrong usage, not a failure.
pub(super) fn path(text: &str) -> Result<String, String> {
    match text.starts_with('/') {
        true => Ok(text.to_owned()),
        false => Err(format!("paths in the pool's file system begin with /: /{text}")),
    }
}

impl FileCommand {
    /// The operation that it asks for; none for those that move data through standard streams.
    pub(crate) fn operation(self) -> Option<FileOperation> {
        Some(match self {
            Self::Format {
                meta_size,
                meta_copies,
                force,
            } => FileOperation::Format {
                meta_size: meta_size.map(ByteSize::bytes),
                meta_copies,
                force,
            },
            Self::List { path, recursive, .. } => FileOperation::List {
                path,
                recursive,
                limit: None,
                after: None,
            },
            Self::Mkdir {
                path,
                parents,
                attributes,
            } => FileOperation::MakeDirectory {
                path,
                parents,
                attributes: attributes.changes(None),
            },
            Self::Move { from, to } => FileOperation::Move { from, to },
            Self::Delete { path, recursive } => FileOperation::Delete { path, recursive },
            Self::Stat { path } => FileOperation::Stat { path },
            Self::SetAttributes {
                path,
                attributes,
                frozen,
            } => FileOperation::SetAttributes {
                path,
                attributes: attributes.changes(frozen),
            },
            Self::Extents { path } => FileOperation::Extents { path },
            Self::Defragment { path } => FileOperation::Defragment { path },
            Self::Relocate { path, target } => FileOperation::Relocate {
                path,
                to: target.target(),
            },
            Self::Drain { volume, end } => FileOperation::Drain { volume, end },
            Self::Check { repair } => FileOperation::Check { repair },
            Self::Scrub => FileOperation::Scrub,
            Self::Snapshot { path, layer } => FileOperation::Snapshot { path, layer },
            Self::Merge {
                layer,
                into_parent_name,
            } => FileOperation::Merge {
                layer,
                into_parent_name,
            },
            Self::Clone { frozen, path } => FileOperation::Clone { frozen, path },
            Self::Resize { path, size, shrink } => FileOperation::Resize {
                path,
                size: size.bytes(),
                shrink,
            },
            Self::Write { .. } | Self::Read { .. } => return None,
        })
    }
}
