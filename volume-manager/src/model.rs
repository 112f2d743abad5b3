//! The configuration of a pool: which devices belong to it, which volumes lie where on them, what is under way.
//!
//! Plain data. It is stored whole on every device (`format`), changed by making a new one with the next epoch, and never
//! edited in place. All sizes and offsets are bytes and multiples of [`BLOCK`], unless said otherwise.

use std::fmt;

/// Unit of allocation and of all metadata on media.
pub const BLOCK: u64 = 4096;

/// Most devices in a pool.
pub const MAX_DEVICES: usize = 1024;
/// Most volumes in a pool.
pub const MAX_VOLUMES: usize = 16384;
/// Most members of a column: eight legs, and one that is being filled to replace one of them.
pub const MAX_MEMBERS: usize = 9;
/// Most columns of a section, parity included.
pub const MAX_COLUMNS: usize = 64;
/// Longest name of a pool, device or volume in bytes.
pub const MAX_NAME: usize = 255;

/// A random identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Uuid(pub u128);

impl fmt::Display for Uuid {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hex = format!("{:032x}", self.0);
        let [a, b, c, d, e] = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]];
        write!(formatter, "{a}-{b}-{c}-{d}-{e}")
    }
}

/// Number of a device within its pool; never used again for another device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceId(pub u32);

/// Number of a volume within its pool; never used again for another volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VolumeId(pub u32);

/// Number of a member within its volume; never used again for another member.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MemberId(pub u32);

/// Number of a job within its pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobId(pub u32);

impl fmt::Display for DeviceId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "d{}", self.0)
    }
}

/// A time from one open of the pool to the next. Who opens a pool begins one, with an identity of its own, so that two
/// configurations with the same epoch but of different histories can be told apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Incarnation {
    /// Drawn at random when it began.
    pub id: Uuid,
    /// Its first epoch; it lasts until the epoch before the next one's first.
    pub first_epoch: u64,
    /// It was begun without a majority, by order of a person.
    pub forced: bool,
}

/// Everything about a pool that must survive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Configuration {
    /// Identity of the pool.
    pub pool: Uuid,
    /// Its name.
    pub name: String,
    /// Grows by one with every change. Never a time.
    pub epoch: u64,
    /// The history, oldest first, the present one last; old ones are cut off after [`MAX_INCARNATIONS`].
    pub incarnations: Vec<Incarnation>,
    /// In order of their ids.
    pub devices: Vec<Device>,
    /// In order of their ids.
    pub volumes: Vec<Volume>,
    /// In order of their ids.
    pub jobs: Vec<Job>,
    /// For the next device.
    pub next_device: u32,
    /// For the next volume.
    pub next_volume: u32,
    /// For the next job.
    pub next_job: u32,
}

/// Incarnations kept in a configuration.
pub const MAX_INCARNATIONS: usize = 1024;

/// What a device is good for at present.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceState {
    /// Used, holds the configuration, may get new extents.
    Active,
    /// As `Active`, but takes over from others that fail: gets no extents otherwise.
    Spare,
    /// As `Active`, but is being emptied and gets no new extents.
    Evacuating,
    /// It failed, or was missing when the pool was opened. Redundant columns do without it; it holds no valid configuration.
    Faulty {
        /// The first epoch without it.
        since: u64,
    },
}

/// A physical device, or a file in its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Its number.
    pub id: DeviceId,
    /// The identity in its label.
    pub uuid: Uuid,
    /// For people: the path or address under which it was last opened.
    pub name: String,
    /// Size in bytes as a whole.
    pub size: u64,
    /// First byte that may be part of an extent; what is before is the private region.
    pub data_start: u64,
    /// Logical block size in bytes.
    pub block: u32,
    /// Its use.
    pub state: DeviceState,
    /// Storage class, say `ssd`; empty for none.
    pub class: String,
    /// Enclosure, rack or host: redundancy is spread over different ones; empty for unknown, which counts as one of its own.
    pub enclosure: String,
}

/// How a volume's data are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// Extents one after the other.
    Concat,
    /// Over several columns, round robin in units.
    Stripe {
        /// At least 2.
        columns: u32,
    },
    /// Whole copies, each a concat.
    Mirror {
        /// 2 to 8.
        legs: u32,
    },
    /// A stripe whose every column is a mirror.
    StripeMirror {
        /// At least 2.
        columns: u32,
        /// 2 to 8.
        legs: u32,
    },
    /// A stripe with one parity unit per row, rotating (left-symmetric as Linux md).
    Raid5 {
        /// With parity; at least 3.
        columns: u32,
    },
    /// A stripe with two parity units per row, rotating.
    Raid6 {
        /// With parity; at least 4.
        columns: u32,
    },
}

impl Layout {
    /// Columns of a section, parity included.
    pub fn columns(self) -> u32 {
        match self {
            Self::Concat | Self::Mirror { .. } => 1,
            Self::Stripe { columns }
            | Self::StripeMirror { columns, .. }
            | Self::Raid5 { columns }
            | Self::Raid6 { columns } => columns,
        }
    }

    /// Members of a column.
    pub fn legs(self) -> u32 {
        match self {
            Self::Mirror { legs } | Self::StripeMirror { legs, .. } => legs,
            _ => 1,
        }
    }

    /// Parity units per row.
    pub fn parity(self) -> u32 {
        match self {
            Self::Raid5 { .. } => 1,
            Self::Raid6 { .. } => 2,
            _ => 0,
        }
    }

    /// So many devices may fail at once, whichever they are.
    pub fn tolerates(self) -> u32 {
        self.parity().max(self.legs().saturating_sub(1))
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Concat => write!(formatter, "concat"),
            Self::Stripe { columns } => write!(formatter, "stripe of {columns}"),
            Self::Mirror { legs } => write!(formatter, "mirror of {legs}"),
            Self::StripeMirror { columns, legs } => {
                write!(formatter, "stripe of {columns} mirrors of {legs}")
            }
            Self::Raid5 { columns } => write!(formatter, "raid5 {}+1", columns.saturating_sub(1)),
            Self::Raid6 { columns } => write!(formatter, "raid6 {}+2", columns.saturating_sub(2)),
        }
    }
}

/// What was asked for: new extents of the volume follow it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attributes {
    /// Redundancy and striping.
    pub layout: Layout,
    /// Bytes per column and row, a power of two of at least [`BLOCK`]; of no meaning for concat and mirror.
    pub stripe_unit: u64,
    /// Only devices of this class; empty for any.
    pub class: String,
    /// Only these devices; empty for any.
    pub devices: Vec<DeviceId>,
}

/// Which legs answer a read, where there are several.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ReadPolicy {
    /// The one with the least to do.
    #[default]
    Balanced,
    /// Two are asked, and the first good answer counts: for devices whose latency has outliers, at twice the load.
    FirstAnswer,
}

/// An address space with attributes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// Its number.
    pub id: VolumeId,
    /// Its identity.
    pub uuid: Uuid,
    /// Its name, unique in the pool.
    pub name: String,
    /// Size in bytes: the sum of its sections' lengths.
    pub size: u64,
    /// Logical block size in bytes; never smaller than those of its devices.
    pub block: u32,
    /// What was asked for.
    pub attributes: Attributes,
    /// Bytes per region of the dirty-region log, a power of two; fixed for the volume's life.
    pub region: u64,
    /// The devices whose activity log covers the volume: at least one of them is there whenever the volume can be used at all.
    /// Empty if nothing needs a log (no redundancy).
    pub log_devices: Vec<DeviceId>,
    /// Which regions changed since members were detached, one copy per log device; none if there is no redundancy.
    pub bitmap: Vec<Extent>,
    /// Sectors of the bitmap of other generations count as zero. The epoch in which the first member that is now detached was
    /// detached; 0 if none is.
    pub bitmap_generation: u64,
    /// Its address space, in order.
    pub sections: Vec<Section>,
    /// For the next member.
    pub next_member: u32,
    /// For the next section.
    pub next_section: u32,
    /// Which legs answer reads.
    pub read_policy: ReadPolicy,
}

/// A piece of a volume's address space with one layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// Its number within the volume; never used again for another section, so it names the parity log's records.
    pub id: u32,
    /// Bytes of the volume that it holds: whole rows, but for the last one.
    pub length: u64,
    /// Bytes per column and row. With one column: the length of the column.
    pub unit: u64,
    /// Parity units per row: 0, 1 or 2.
    pub parity: u32,
    /// Row number, for the rotation of parity, of its first row: sections that were split keep their rows' rotation.
    pub rotation: u64,
    /// Data and parity columns. All are equally long.
    pub columns: Vec<Column>,
    /// Copies of the parity log; empty without parity.
    pub log: Vec<Extent>,
}

/// Members that hold the same bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Column {
    /// At least one.
    pub members: Vec<Member>,
}

/// What of a member's content is good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemberState {
    /// All of it, but for regions that were dirty at a crash.
    InSync,
    /// All that lies below `cursor` bytes: it is being filled from other members or from parity.
    Filling {
        /// Byte of the member's address space.
        cursor: u64,
    },
    /// It was detached, and all is good but for what the volume's bitmap and the activity log say, above `cursor`.
    Stale {
        /// Byte of the member's address space.
        cursor: u64,
    },
}

/// One copy of a column.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its number.
    pub id: MemberId,
    /// What of it is good.
    pub state: MemberState,
    /// One after the other. All members of a section are equally long.
    pub extents: Vec<Extent>,
}

/// A contiguous run on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Where.
    pub device: DeviceId,
    /// First byte on the device, private region included.
    pub start: u64,
    /// Length in bytes.
    pub length: u64,
}

/// A long operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    /// Its number.
    pub id: JobId,
    /// What it does.
    pub kind: JobKind,
    /// Whether it goes on.
    pub state: JobState,
    /// Work done, in bytes, as last recorded; what is done since is not lost but not counted either after a crash.
    pub done: u64,
    /// All work, in bytes, as estimated when it began.
    pub total: u64,
    /// At most so many bytes per second; 0 for no limit.
    pub throttle: u64,
    /// How it stands to other jobs; of one that has ended, [`Priority::Normal`].
    pub priority: Priority,
}

/// How a job stands to others of its pool: the order in which those that wait begin, and what those that run leave to each other. The
/// requests of guests are not concerned.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// After all others.
    Low,
    /// What a job has that nobody has said anything of.
    #[default]
    Normal,
    /// Before all others.
    High,
}

/// What a job does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobKind {
    /// Brings all members of a volume that are not in sync up to date.
    Resync {
        /// Which.
        volume: VolumeId,
    },
    /// Gives a volume another layout or other attributes.
    Relayout {
        /// Which.
        volume: VolumeId,
        /// To what.
        target: Attributes,
    },
    /// Moves every extent of a volume that lies on `from` (or, if none, on any device that its attributes do not allow) elsewhere.
    Move {
        /// Which.
        volume: VolumeId,
        /// Away from.
        from: Option<DeviceId>,
        /// Only to this device, if given.
        to: Option<DeviceId>,
    },
    /// Moves everything off a device.
    Evacuate {
        /// Which.
        device: DeviceId,
        /// Only to this device, if given (replacement of a device).
        to: Option<DeviceId>,
        /// The device leaves the pool when it is empty.
        remove: bool,
    },
    /// Reads everything, compares copies and parity, repairs.
    Scrub {
        /// Which volume; all if none.
        volume: Option<VolumeId>,
    },
    /// Moves what makes the load off devices that have more of it than others, by jobs of kind `Move`, until no move would help.
    AutoTune {
        /// So many milliseconds are looked at before each decision.
        window: u32,
    },
}

/// Whether a job goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobState {
    /// It runs whenever the pool is open.
    Running,
    /// Stopped by a person until resumed.
    Paused,
    /// Ended well.
    Done,
    /// Ended by a person.
    Cancelled,
    /// Ended by an error; the text says what to do.
    Failed(String),
}

impl Configuration {
    /// The device with this number.
    pub fn device(&self, id: DeviceId) -> Option<&Device> {
        let index = self.devices.binary_search_by_key(&id, |device| device.id).ok()?;
        self.devices.get(index)
    }

    /// The volume with this number.
    pub fn volume(&self, id: VolumeId) -> Option<&Volume> {
        let index = self.volumes.binary_search_by_key(&id, |volume| volume.id).ok()?;
        self.volumes.get(index)
    }

    /// The volume with this number, to be changed.
    pub fn volume_mut(&mut self, id: VolumeId) -> Option<&mut Volume> {
        let index = self.volumes.binary_search_by_key(&id, |volume| volume.id).ok()?;
        self.volumes.get_mut(index)
    }

    /// The job with this number.
    pub fn job(&self, id: JobId) -> Option<&Job> {
        self.jobs.iter().find(|job| job.id == id)
    }

    /// All extents in use, of members, logs and bitmaps.
    pub fn extents(&self) -> impl Iterator<Item = &Extent> {
        self.volumes.iter().flat_map(Volume::extents)
    }
}

impl Device {
    /// Whether it holds valid copies of the configuration and takes part in majorities.
    pub fn is_holder(&self) -> bool {
        !matches!(self.state, DeviceState::Faulty { .. })
    }
}

impl Volume {
    /// All its extents, of members, logs and bitmaps.
    pub fn extents(&self) -> impl Iterator<Item = &Extent> {
        self.sections
            .iter()
            .flat_map(Section::extents)
            .chain(&self.bitmap)
    }
}

impl Section {
    /// All its extents, of members and logs.
    pub fn extents(&self) -> impl Iterator<Item = &Extent> {
        let members = self.columns.iter().flat_map(|column| &column.members);
        self.log.iter().chain(members.flat_map(|member| &member.extents))
    }

    /// Columns that hold data.
    pub fn data_columns(&self) -> u64 {
        (self.columns.len() as u64).saturating_sub(self.parity.into())
    }

    /// Bytes of the volume per row.
    pub fn row(&self) -> u64 {
        self.data_columns() * self.unit
    }

    /// Whether the loss of some device can be made good.
    pub fn is_redundant(&self) -> bool {
        self.parity > 0 || self.columns.iter().any(|column| column.members.len() > 1)
    }
}

impl Member {
    /// Length in bytes.
    pub fn length(&self) -> u64 {
        self.extents.iter().map(|extent| extent.length).sum()
    }
}

impl Job {
    /// Whether it has not ended.
    pub fn is_live(&self) -> bool {
        matches!(self.state, JobState::Running | JobState::Paused)
    }
}

impl JobKind {
    /// Whether it changes the mapping of a volume, which then must not go away.
    pub fn concerns(&self, id: VolumeId) -> bool {
        match self {
            Self::Relayout { volume, .. } | Self::Move { volume, .. } => *volume == id,
            Self::Resync { .. } | Self::Evacuate { .. } | Self::Scrub { .. } | Self::AutoTune { .. } => false,
        }
    }
}
