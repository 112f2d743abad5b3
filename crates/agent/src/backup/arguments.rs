//! The command line of backups.

use std::path::PathBuf;

use clap::{Args, Subcommand};

#[derive(Debug, Subcommand)]
pub(crate) enum BackupCommand {
    /// Freeze an image, and have a mover back up files or whole disks from it.
    Create(Box<CreateArguments>),
    /// The backups of this machine, or what is in one.
    List {
        #[command(flatten)]
        from: From,
        /// What is in this one.
        #[arg(long)]
        name: Option<String>,
        /// Only these paths and what is below them.
        paths: Vec<PathBuf>,
    },
    /// Have the mover read a backup, and see that all checksums are right.
    Verify {
        #[command(flatten)]
        from: From,
        /// Which.
        #[arg(long)]
        name: String,
    },
    /// Write files of a backup into a folder.
    Restore(Box<RestoreArguments>),
}

/// The mover that has backups.
#[derive(Debug, Args)]
pub(crate) struct From {
    /// The mover that has it.
    #[arg(long = "from", value_name = "HOST:PORT")]
    pub(crate) address: String,
    #[command(flatten)]
    pub(crate) access: AccessArguments,
}

/// How mover and machine know each other.
#[derive(Debug, Args)]
pub(crate) struct AccessArguments {
    /// The file with the token of this machine, as `smsvmm mover token` made it.
    #[arg(long, value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,
    /// The certificate of the mover, or of the authority that signed it (PEM).
    #[arg(long, value_name = "FILE")]
    pub(crate) ca: Option<PathBuf>,
    /// The name in the mover's certificate, if it is not the host in its address.
    #[arg(long, value_name = "NAME")]
    pub(crate) tls_name: Option<String>,
    /// Speak in the clear. Whoever is on the way has the token and the files: only through a tunnel.
    #[arg(long, conflicts_with = "ca")]
    pub(crate) no_tls: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CreateArguments {
    /// The mover that makes the backup.
    #[arg(long, value_name = "HOST:PORT", required_unless_present = "dry_run")]
    pub(crate) to: Option<String>,
    #[command(flatten)]
    pub(crate) access: AccessArguments,
    /// Freeze an image, show what would be in the backup, and release the image again. No mover is asked.
    #[arg(long, conflicts_with_all = ["to", "parent", "incremental", "keep_image", "resume"])]
    pub(crate) dry_run: bool,
    /// What to back up: files, folders with all that is in them on their file system, or whole disks (/dev/sdb).
    #[arg(long = "source", value_name = "PATH", num_args = 1.., required = true)]
    pub(crate) sources: Vec<PathBuf>,
    /// What the backup is called; the time of its beginning if not said. The image is called backup-NAME.
    #[arg(long, required_if_eq("resume", "true"))]
    pub(crate) name: Option<String>,
    /// What people want to know of it.
    #[arg(long, default_value = "")]
    pub(crate) description: String,
    /// The file systems are thawed after so many seconds, whatever the host does.
    #[arg(long, default_value_t = 10, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=60))]
    pub(crate) limit: u64,
    /// Only what was written since this backup, whose image was kept by --keep-image.
    #[arg(long, value_name = "NAME", conflicts_with = "incremental")]
    pub(crate) parent: Option<String>,
    /// Only what was written since the latest backup whose image was kept.
    #[arg(long)]
    pub(crate) incremental: bool,
    /// Keep the image, so that the next backup can be an incremental one to this. The image of the parent is released then.
    #[arg(long)]
    pub(crate) keep_image: bool,
    /// Leave out what is called so: *.tmp, /srv/cache, /srv/**/cache.
    #[arg(long, value_name = "GLOB")]
    pub(crate) exclude: Vec<String>,
    /// If the backup is broken off, keep the image, so that --resume can go on with it.
    #[arg(long)]
    pub(crate) resumable: bool,
    /// Go on with a backup that was broken off: the same --name, sources and options as then.
    #[arg(long)]
    pub(crate) resume: bool,
}

#[derive(Debug, Args)]
pub(crate) struct RestoreArguments {
    #[command(flatten)]
    pub(crate) from: From,
    /// The backup.
    #[arg(long)]
    pub(crate) name: String,
    /// Only these paths and what is below them.
    pub(crate) paths: Vec<PathBuf>,
    /// The folder, which must be there. A whole disk becomes a file in it.
    #[arg(long = "to", value_name = "DIR")]
    pub(crate) to: PathBuf,
    /// Replace files that are there already.
    #[arg(long)]
    pub(crate) overwrite: bool,
}
