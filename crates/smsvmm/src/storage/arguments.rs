//! The arguments of `smsvmm pool`, `device`, `volume` and `job` as clap sees them.

use std::path::PathBuf;

use api::ByteSize;
use api::storage::{JobPriority, LayoutKind, NewDevice, ReadPolicy, Shape};
use clap::{Args, Subcommand, ValueEnum};

use crate::exit::UsageError;

/// Which pool.
#[derive(Debug, Args)]
pub(crate) struct Which {
    /// A file that names the pool's devices, or who has it: vm.toml, host.toml, or any with `[pool]` and devices = [...]
    /// [default: $SMSVMM_CONFIG, or /etc/smsvmm/host.toml].
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,

    /// The pool's devices, in any order; may be given several times.
    ///
    /// A device is a path, nbd://HOST:PORT/EXPORT, nbd+unix:///EXPORT?socket=PATH, or multipath:DEVICE,... with several ways
    /// to one device, which needs a --devices of its own.
    #[arg(long, global = true, value_name = "DEVICE,...")]
    pub(crate) devices: Vec<String>,

    /// Of the pools of a host's manager, the one of this name; without it there may be one only.
    #[arg(long, global = true, value_name = "NAME", conflicts_with = "devices")]
    pub(crate) pool: Option<String>,

    /// Print JSON.
    #[arg(long, global = true)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct PoolArguments {
    #[command(flatten)]
    pub(crate) which: Which,

    #[command(subcommand)]
    pub(crate) command: PoolCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PoolCommand {
    /// Make a pool on devices: block devices, or regular files (`truncate -s 10G d0.img`). Prints the lines for vm.toml.
    ///
    /// Exports of NBD servers (nbd://HOST/EXPORT, nbd+unix:///EXPORT?socket=PATH) and devices with several paths
    /// (multipath:DEVICE,DEVICE) are devices, too.
    ///
    /// A device that carries a pool's label, a partition table or a known file system is refused without --force.
    Create {
        /// Name of the pool.
        name: String,
        /// Its devices.
        #[arg(required = true, value_name = "DEVICE")]
        paths: Vec<String>,
        /// A device that is kept for others that fail; may be given several times.
        #[arg(long, value_name = "DEVICE")]
        spare: Vec<String>,
        /// Storage class of the devices, for example ssd.
        #[arg(long, default_value = "", hide_default_value = true)]
        class: String,
        /// Destroy what the devices carry.
        #[arg(long)]
        force: bool,
    },
    /// Show the pool, its devices, volumes and unfinished jobs. Only reads.
    Status,
    /// Read everything, compare copies and parity, repair what differs.
    Scrub {
        /// Only this volume.
        #[arg(long)]
        volume: Option<String>,
        #[command(flatten)]
        speed: Speed,
    },
    /// Open a pool from its devices, wherever they come from, bring all copies up to date, close it, print the lines for vm.toml.
    Import {
        /// Its devices, in any order; those of --devices or --config if none is given.
        #[arg(value_name = "DEVICE")]
        paths: Vec<String>,
        /// Go on although too few devices are there: what only the missing ones know is lost.
        #[arg(long)]
        force: bool,
        /// If the pool was changed on some of its devices without the others: keep what this device has, the rest is lost.
        #[arg(long, value_name = "DEVICE", conflicts_with = "force")]
        prefer: Option<String>,
    },
    /// Close a pool cleanly, so that its devices can be moved to another host: nobody has it open, nothing is left to be replayed.
    Export,
}

#[derive(Debug, Args)]
pub(crate) struct DeviceArguments {
    #[command(flatten)]
    pub(crate) which: Which,

    #[command(subcommand)]
    pub(crate) command: DeviceCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum DeviceCommand {
    /// Show the devices. Only reads.
    List,
    /// Add devices, whose content is lost; what carries something known is refused without --force.
    Add {
        /// The devices.
        #[arg(required = true, value_name = "DEVICE")]
        paths: Vec<String>,
        #[command(flatten)]
        new: NewArguments,
    },
    /// Take an empty device out of the pool; `device evacuate` empties it.
    Remove {
        /// Its path or address, or number, or identity.
        device: String,
    },
    /// Move everything off a device while the volumes stay in use.
    Evacuate {
        /// Its path or address, or number, or identity.
        device: String,
        /// Only to this device.
        #[arg(long, value_name = "DEVICE")]
        to: Option<String>,
        #[command(flatten)]
        speed: Speed,
    },
    /// Put a new device in the place of one that is in use, has failed or is missing, and take that one out.
    Replace {
        /// Path, address, number or identity of the one that leaves.
        device: String,
        /// The new one, whose content is lost.
        by: String,
        #[command(flatten)]
        new: NewArguments,
        #[command(flatten)]
        speed: Speed,
    },
}

/// What a device of a pool is.
#[derive(Debug, Args)]
pub(crate) struct NewArguments {
    /// Keep it for others that fail.
    #[arg(long)]
    pub(crate) spare: bool,
    /// Storage class, for example ssd.
    #[arg(long, default_value = "", hide_default_value = true)]
    pub(crate) class: String,
    /// Enclosure, rack or host: redundancy is spread over different ones.
    #[arg(long, default_value = "", hide_default_value = true)]
    pub(crate) enclosure: String,
    /// Destroy what it carries.
    #[arg(long)]
    pub(crate) force: bool,
}

impl NewArguments {
    pub(crate) fn device(&self, path: &str) -> NewDevice {
        NewDevice {
            path: path.to_owned(),
            spare: self.spare,
            class: self.class.clone(),
            enclosure: self.enclosure.clone(),
            force: self.force,
        }
    }
}

/// How fast a job may be.
#[derive(Debug, Args)]
pub(crate) struct Speed {
    /// At most so much per second, for example 100M [default: as fast as it goes].
    #[arg(long, value_name = "SIZE")]
    throttle: Option<ByteSize>,
}

impl Speed {
    pub(crate) fn bytes(&self) -> u64 {
        self.throttle.map_or(0, ByteSize::bytes)
    }
}

#[derive(Debug, Args)]
pub(crate) struct VolumeArguments {
    #[command(flatten)]
    pub(crate) which: Which,

    #[command(subcommand)]
    pub(crate) command: VolumeCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum VolumeCommand {
    /// Make a volume, which reads as zeroes.
    Create {
        /// Its name.
        name: String,
        /// Its size, for example 10G.
        #[arg(long)]
        size: ByteSize,
        #[command(flatten)]
        layout: LayoutArguments,
        /// Its logical block size.
        #[arg(long, default_value_t = 4096, value_name = "BYTES")]
        block: u32,
        /// Which copies answer reads.
        #[arg(long, default_value = "balanced")]
        read_policy: ReadPolicyName,
        /// The pool's file system does not use it.
        #[arg(long)]
        raw: bool,
    },
    /// Show the volumes. Only reads.
    List,
    /// Show a volume and what of it lies where. Only reads.
    Status {
        /// Its name.
        name: String,
    },
    /// Change its size; what is new reads as zeroes.
    Resize {
        /// Its name.
        name: String,
        /// The new size, for example 20G.
        #[arg(long)]
        size: ByteSize,
        /// Let it become smaller, and lose what lies behind the new end.
        #[arg(long)]
        shrink: bool,
    },
    /// Change its layout while it stays in use.
    SetLayout {
        /// Its name.
        name: String,
        #[command(flatten)]
        layout: LayoutArguments,
        #[command(flatten)]
        speed: Speed,
    },
    /// Change which of its copies answer reads.
    SetReadPolicy {
        /// Its name.
        name: String,
        /// Which copies answer reads.
        #[arg(long)]
        read_policy: ReadPolicyName,
    },
    /// Move its data from one device to others while it stays in use.
    Move {
        /// Its name.
        name: String,
        /// Away from this device [default: from all that its layout and class do not allow].
        #[arg(long, value_name = "DEVICE")]
        from: Option<String>,
        /// Only to this device.
        #[arg(long, value_name = "DEVICE")]
        to: Option<String>,
        #[command(flatten)]
        speed: Speed,
    },
    /// Delete it with all its data.
    Delete {
        /// Its name.
        name: String,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ReadPolicyName {
    /// The one whose device has the least to do.
    Balanced,
    /// Two are asked, and the first good answer counts: twice the load, fewer slow reads.
    FirstAnswer,
}

impl From<ReadPolicyName> for ReadPolicy {
    fn from(name: ReadPolicyName) -> Self {
        match name {
            ReadPolicyName::Balanced => Self::Balanced,
            ReadPolicyName::FirstAnswer => Self::FirstAnswer,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct LayoutArguments {
    /// How its data are laid out.
    #[arg(long)]
    layout: LayoutName,
    /// Over so many columns, parity included [default: as many as is good].
    #[arg(long, value_name = "NUMBER")]
    columns: Option<u32>,
    /// Copies of everything, 2 to 8 [default: 2].
    #[arg(long, value_name = "NUMBER")]
    copies: Option<u32>,
    /// So much per column before the next one's turn: a power of two of at least 4K [default: 64K].
    #[arg(long, value_name = "SIZE")]
    stripe_unit: Option<ByteSize>,
    /// Only on devices of this storage class.
    #[arg(long, default_value = "", hide_default_value = true)]
    class: String,
    /// Only on this device; may be given several times.
    #[arg(long, value_name = "DEVICE")]
    device: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LayoutName {
    /// One device after the other; no redundancy.
    Concat,
    /// Over several devices in turn; no redundancy.
    #[value(alias = "raid0")]
    Stripe,
    /// Whole copies on different devices.
    #[value(alias = "raid1")]
    Mirror,
    /// A stripe over mirrors.
    #[value(alias = "raid10")]
    StripeMirror,
    /// A stripe with parity: any one device may fail.
    Raid5,
    /// A stripe with double parity: any two devices may fail.
    Raid6,
}

impl LayoutArguments {
    pub(crate) fn shape(&self) -> Result<Shape, UsageError> {
        let layout = match self.layout {
            LayoutName::Concat => LayoutKind::Concat,
            LayoutName::Stripe => LayoutKind::Stripe,
            LayoutName::Mirror => LayoutKind::Mirror,
            LayoutName::StripeMirror => LayoutKind::StripeMirror,
            LayoutName::Raid5 => LayoutKind::Raid5,
            LayoutName::Raid6 => LayoutKind::Raid6,
        };
        let striped = !matches!(layout, LayoutKind::Concat | LayoutKind::Mirror);
        let copied = matches!(layout, LayoutKind::Mirror | LayoutKind::StripeMirror);
        let refuse = |option: &str, layouts: &str| {
            Err(UsageError::new(format!(
                "--{option} has no meaning for this layout; it belongs to {layouts}"
            )))
        };
        if self.columns.is_some() && !striped {
            return refuse("columns", "stripe, stripe-mirror, raid5 and raid6");
        }
        if self.stripe_unit.is_some() && !striped {
            return refuse("stripe-unit", "stripe, stripe-mirror, raid5 and raid6");
        }
        if self.copies.is_some() && !copied {
            return refuse("copies", "mirror and stripe-mirror");
        }
        if self.columns == Some(0)
            || self.copies == Some(0)
            || self.stripe_unit.is_some_and(|unit| unit.bytes() == 0)
        {
            return Err(UsageError::new(
                "--columns, --copies and --stripe-unit cannot be 0",
            ));
        }
        Ok(Shape {
            layout,
            columns: self.columns.unwrap_or(0),
            copies: self.copies.unwrap_or(0),
            stripe_unit: self.stripe_unit.map_or(0, ByteSize::bytes),
            class: self.class.clone(),
            devices: self.device.clone(),
        })
    }
}

#[derive(Debug, Args)]
pub(crate) struct JobArguments {
    #[command(flatten)]
    pub(crate) which: Which,

    #[command(subcommand)]
    pub(crate) command: JobCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum JobCommand {
    /// Show the jobs. Only reads.
    List {
        /// Those that have ended, too.
        #[arg(long)]
        all: bool,
    },
    /// Show a job. Only reads.
    Show {
        /// Its number.
        job: u32,
    },
    /// Have a job run to its end, or all jobs: copies are brought up to date, layouts changed, devices emptied.
    Wait {
        /// Its number.
        job: Option<u32>,
    },
    /// Have a job rest until it is resumed.
    Pause {
        /// Its number.
        job: u32,
    },
    /// Have a paused job go on, and wait for its end.
    Resume {
        /// Its number.
        job: u32,
    },
    /// End a job where it is. What it has done stays, and is whole.
    Cancel {
        /// Its number.
        job: u32,
    },
    /// Change how fast a job may be, while it runs and after a restart.
    Throttle {
        /// Its number.
        job: u32,
        /// At most so many bytes per second, for example 100M; 0 for no limit.
        rate: ByteSize,
    },
    /// Change how a job stands to the pool's others, while it runs and after a restart: who begins first, and who leaves time to whom.
    Priority {
        /// Its number.
        job: u32,
        /// After others, like most, or before others.
        #[arg(value_enum)]
        level: PriorityArgument,
    },
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum PriorityArgument {
    Low,
    Normal,
    High,
}

impl From<PriorityArgument> for JobPriority {
    fn from(level: PriorityArgument) -> Self {
        match level {
            PriorityArgument::Low => Self::Low,
            PriorityArgument::Normal => Self::Normal,
            PriorityArgument::High => Self::High,
        }
    }
}
