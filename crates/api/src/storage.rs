//! Pools, their devices, volumes and jobs: what can be asked of them and what they answer.
//!
//! All sizes are numbers of bytes.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::file::{FileSystemStatus, Moved};

/// Something that a person wants done with a pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", tag = "operation")]
pub enum Operation {
    /// Take devices in that are here again, bring all copies up to date, finish all jobs.
    Heal,
    /// Have all copies agree, so that another host finds nothing to do.
    Settle,
    /// Read everything, compare copies and parity, repair.
    Scrub {
        /// Which volume; all if none.
        volume: Option<String>,
        /// At most so many bytes per second; 0 for no limit.
        throttle: u64,
    },
    /// Add devices, whose content is lost.
    AddDevices {
        /// Which.
        #[serde(deserialize_with = "crate::objects")]
        devices: Vec<NewDevice>,
    },
    /// Take an empty device out.
    RemoveDevice {
        /// Its name, number or identity.
        device: String,
    },
    /// Move everything off a device.
    EvacuateDevice {
        /// Its name, number or identity.
        device: String,
        /// Only to this one.
        to: Option<String>,
        /// At most so many bytes per second; 0 for no limit.
        throttle: u64,
    },
    /// Put another device in the place of one, which leaves the pool.
    ReplaceDevice {
        /// Name, number or identity of the one that leaves.
        device: String,
        /// The one that comes.
        #[serde(deserialize_with = "crate::object")]
        by: NewDevice,
        /// At most so many bytes per second; 0 for no limit.
        throttle: u64,
    },
    /// Make a volume, which reads as zeroes.
    CreateVolume {
        /// Its name.
        name: String,
        /// Its size.
        size: u64,
        /// Its logical block size: 512 or 4096.
        block: u32,
        /// How it is laid out.
        #[serde(deserialize_with = "crate::object")]
        shape: Shape,
        /// Which copies answer reads.
        #[serde(default)]
        read_policy: ReadPolicy,
        /// The pool's file system does not use it.
        #[serde(default)]
        raw: bool,
    },
    /// Change which copies of a volume answer reads.
    SetReadPolicy {
        /// Its name.
        name: String,
        /// Which.
        read_policy: ReadPolicy,
    },
    /// Move what makes the load off devices that have more of it than others, until no move would help.
    AutoTune {
        /// So many milliseconds of load are looked at before each decision.
        window_ms: u32,
        /// Each move at most so many bytes per second; 0 for no limit.
        throttle: u64,
    },
    /// Change a volume's size.
    ResizeVolume {
        /// Its name.
        name: String,
        /// The new size.
        size: u64,
        /// What lies behind a smaller size may be lost.
        shrink: bool,
    },
    /// Change a volume's layout.
    SetLayout {
        /// Its name.
        name: String,
        /// The new layout.
        #[serde(deserialize_with = "crate::object")]
        shape: Shape,
        /// At most so many bytes per second; 0 for no limit.
        throttle: u64,
    },
    /// Move a volume's data from one device to others.
    MoveVolume {
        /// Its name.
        name: String,
        /// Away from this device; from all that the volume may not use if none is given.
        from: Option<String>,
        /// Only to this one.
        to: Option<String>,
        /// At most so many bytes per second; 0 for no limit.
        throttle: u64,
    },
    /// Delete a volume and its data.
    DeleteVolume {
        /// Its name.
        name: String,
    },
    /// Wait for a job.
    WaitJob {
        /// Its number; all jobs if none.
        job: Option<u32>,
    },
    /// Have a job pause until it is resumed.
    PauseJob {
        /// Its number.
        job: u32,
    },
    /// Have a paused job go on, and wait for it.
    ResumeJob {
        /// Its number.
        job: u32,
    },
    /// End a job where it is.
    CancelJob {
        /// Its number.
        job: u32,
    },
    /// Change how fast a job may be, from now on and after a restart.
    ThrottleJob {
        /// Its number.
        job: u32,
        /// At most so many bytes per second; 0 for no limit.
        throttle: u64,
    },
    /// Change how a job stands to the pool's others, from now on and after a restart.
    SetJobPriority {
        /// Its number.
        job: u32,
        /// How.
        priority: JobPriority,
    },
}

/// A device that is to be part of a pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct NewDevice {
    /// Its path, or another text that `block_io::Device::open` understands.
    pub path: String,
    /// Kept for devices that fail.
    #[serde(default)]
    pub spare: bool,
    /// Storage class, say `ssd`; empty for none.
    #[serde(default)]
    pub class: String,
    /// Enclosure, rack or host, over which redundancy is spread; empty for unknown.
    #[serde(default)]
    pub enclosure: String,
    /// What it carries may be destroyed.
    #[serde(default)]
    pub force: bool,
}

/// The kinds of layouts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum LayoutKind {
    /// One extent after the other.
    Concat,
    /// Over several devices, round robin.
    Stripe,
    /// Whole copies.
    Mirror,
    /// A stripe whose every column is a mirror.
    StripeMirror,
    /// A stripe with one unit of parity per row.
    Raid5,
    /// A stripe with two units of parity per row.
    Raid6,
}

/// How a volume is, or shall be, laid out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct Shape {
    /// The kind.
    pub layout: LayoutKind,
    /// Columns, parity included; 0 for as many as is good.
    pub columns: u32,
    /// Copies of each byte; 0 for two where there are copies.
    pub copies: u32,
    /// Bytes per column and row.
    pub stripe_unit: u64,
    /// Only devices of this storage class; empty for any.
    pub class: String,
    /// Only these devices; empty for any.
    pub devices: Vec<String>,
}

/// Which copies answer a read, where there are several.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ReadPolicy {
    /// The one whose device has the least to do.
    #[default]
    Balanced,
    /// Two are asked, and the first good answer counts.
    FirstAnswer,
}

/// How well a volume, or a pool as a whole, is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Health {
    /// All copies and parity are there.
    Healthy,
    /// All devices are there, and copies or parity are being made or wait for it.
    Resyncing,
    /// Copies or parity are missing; all data are there.
    Degraded,
    /// Data are missing.
    Failed,
}

/// A pool with all that is in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct PoolStatus {
    /// Its name.
    pub name: String,
    /// Its identity.
    pub id: String,
    /// Grows by one with every change.
    pub epoch: u64,
    /// The worst of its volumes' and devices' states.
    pub state: Health,
    /// What its devices can hold.
    pub size: u64,
    /// What of that is taken.
    pub used: u64,
    /// Its devices.
    pub devices: Vec<PoolDevice>,
    /// Its volumes.
    pub volumes: Vec<VolumeStatus>,
    /// Its jobs, ended ones too.
    pub jobs: Vec<JobStatus>,
    /// Its file system, if it has one that can be looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub files: Option<FileSystemStatus>,
    /// What else a person should know: devices that cannot be read, or are not of this pool.
    pub notes: Vec<String>,
}

/// How a device stands to its pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PoolDeviceState {
    /// In use.
    Active,
    /// Waits for others to fail.
    Spare,
    /// Is being emptied.
    Evacuating,
    /// It is not there.
    Missing,
    /// It is there again with old content, and catches up when the pool is opened next.
    Returned,
    /// It failed.
    Faulty,
}

/// A device of a pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct PoolDevice {
    /// Its number within the pool: `d0`, `d1`, ...
    pub id: String,
    /// The path or address under which it was last opened.
    pub name: String,
    /// Its identity.
    pub uuid: String,
    /// How it stands to the pool.
    pub state: PoolDeviceState,
    /// What it can hold.
    pub size: u64,
    /// What of that is taken.
    pub used: u64,
    /// Its logical block size.
    pub block: u32,
    /// Storage class; empty for none.
    pub class: String,
    /// Enclosure; empty for unknown.
    pub enclosure: String,
    /// Requests that failed since the pool was opened; none if it is not open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub errors: Option<u64>,
}

/// A volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct VolumeStatus {
    /// Its name.
    pub name: String,
    /// Its identity.
    pub id: String,
    /// How well it is.
    pub state: Health,
    /// Its size.
    pub size: u64,
    /// What it takes on devices, redundancy and logs included.
    pub used: u64,
    /// Its logical block size.
    pub block: u32,
    /// How it is laid out.
    pub shape: Shape,
    /// So many devices may fail at once, whichever they are, when all is well.
    pub tolerates: u32,
    /// Which copies answer reads.
    #[serde(default)]
    pub read_policy: ReadPolicy,
    /// What is where.
    pub members: Vec<MemberStatus>,
}

/// What a part of a volume on a device is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MemberHealth {
    /// All of it is good.
    InSync,
    /// It is being filled.
    Filling,
    /// It lacks what was written while its device was away.
    Stale,
    /// Its device is not in service.
    Missing,
}

/// A part of a volume that lies on one device, or on several, one after the other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct MemberStatus {
    /// Piece of the volume's address space, from 0.
    pub section: u32,
    /// Column within it, from 0.
    pub column: u32,
    /// Names of the devices.
    pub devices: Vec<String>,
    /// Its size.
    pub size: u64,
    /// What it is good for.
    pub state: MemberHealth,
}

/// Where a job is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum JobState {
    /// It runs whenever the pool is open.
    Running,
    /// Stopped by a person until resumed.
    Paused,
    /// Ended well.
    Done,
    /// Ended by a person.
    Cancelled,
    /// Ended by an error.
    Failed,
}

/// How a job stands to others of its pool. Jobs that wait for the same volume begin in this order, then in that of their numbers. Of jobs
/// that run, one rests for three quarters of the time while another one of a higher priority is at work, for fifteen sixteenths if that is
/// two levels above. The requests of guests are not concerned.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum JobPriority {
    /// After all others.
    Low,
    /// What a job begins with.
    #[default]
    Normal,
    /// Before all others.
    High,
}

/// A long operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct JobStatus {
    /// Its number.
    pub id: u32,
    /// `resync`, `set-layout`, `move`, `evacuate`, `scrub` or `auto-tune`; of those that end with the process, `import`, `export`,
    /// `copy`, `merge`, `relocate`, `defragment`, `drain`, `check-files` or `scrub-files`; `move-disk`, which goes on in the next one.
    pub kind: String,
    /// What it does to what, in words.
    pub what: String,
    /// Where it is in its life.
    pub state: JobState,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Bytes done.
    pub done: u64,
    /// All its bytes, as far as can be said.
    pub total: u64,
    /// At most so many bytes per second; 0 for no limit.
    pub throttle: u64,
    /// How it stands to the pool's other jobs; `normal` if it has ended.
    #[serde(default)]
    pub priority: JobPriority,
    /// Bytes per second that it copied or read in the last seconds; none if it does not run, or it is too early to tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<u64>,
    /// How long the rest takes if it gets on as in the last seconds; none if that cannot be told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds_left: Option<u64>,
    /// It is done by the process that has the pool open, and ends with it, unless it is a `move-disk`: it can be waited for and
    /// cancelled, and nothing else.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub volatile: bool,
    /// Of a `move-disk` that has ended, what was moved. Of one that was gone on with by another process, what that one moved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moved: Option<Moved>,
}

/// The number of the first job that ends with the process; those that stand in the pool have smaller ones.
pub const FIRST_VOLATILE_JOB: u32 = 1_000_000_000;

impl JobStatus {
    /// Whether it has not ended.
    pub fn is_live(&self) -> bool {
        matches!(self.state, JobState::Running | JobState::Paused)
    }

    /// How far it is in percent; an unfinished job is at most at 99.
    pub fn percent(&self) -> u64 {
        match self.state {
            JobState::Done => 100,
            _ if self.total == 0 => 0,
            _ => {
                let percent = u128::from(self.done) * 100 / u128::from(self.total);
                u64::try_from(percent).unwrap_or(99).min(99)
            }
        }
    }
}

/// What was done of one kind within a window.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct RequestLoad {
    /// Requests that ended.
    pub requests: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Those of them that failed.
    pub errors: u64,
    /// Half of them took no longer, in microseconds, rounded up to a power of two.
    pub p50_us: u64,
    /// 99 % of them took no longer.
    pub p99_us: u64,
}

/// What a volume has on one device, and how much of the device's load it made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct LegLoad {
    /// Name of the volume.
    pub volume: String,
    /// Piece of the volume's address space.
    pub section: u32,
    /// Column within it, from 0.
    pub column: u32,
    /// Its part of the time that requests on the device took, in thousandths.
    pub share: u32,
    /// What was read.
    pub reads: RequestLoad,
    /// What was written.
    pub writes: RequestLoad,
}

/// The load of a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct DeviceLoad {
    /// Name of the device.
    pub device: String,
    /// How long something was in flight, in thousandths of the window.
    pub busy: u32,
    /// How many requests were in flight on average, in thousandths.
    pub depth: u64,
    /// What was read.
    pub reads: RequestLoad,
    /// What was written.
    pub writes: RequestLoad,
    /// What made the load, the most first.
    pub legs: Vec<LegLoad>,
}

/// The load of an open pool within a window, the busiest device first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct HotSpots {
    /// Length of the window in milliseconds.
    pub window_ms: u64,
    /// The devices.
    pub devices: Vec<DeviceLoad>,
}

/// What was done with a volume within a window, by files and whoever else uses it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct VolumeLoad {
    /// Its name.
    pub volume: String,
    /// What was read.
    pub reads: RequestLoad,
    /// What was written.
    pub writes: RequestLoad,
}

/// The load of an open pool within a window.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct PoolLoad {
    /// The pool's name.
    pub pool: String,
    /// Length of the window in milliseconds.
    pub window_ms: u64,
    /// The devices that are in service, the busiest first.
    pub devices: Vec<DeviceLoad>,
    /// The volumes, in the pool's order.
    pub volumes: Vec<VolumeLoad>,
}

/// What can happen to a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PoolEventKind {
    /// A device is out of service.
    DeviceFailed,
    /// A device is in service again, or new.
    DeviceAdded,
    /// A device has left the pool.
    DeviceRemoved,
    /// A volume has all its copies and parity again.
    VolumeHealthy,
    /// A volume misses copies or parity.
    VolumeDegraded,
    /// A job has ended.
    JobEnded,
    /// A job has failed.
    JobFailed,
    /// A scrub, or a read of a file, found a difference, and repaired it.
    Repaired,
    /// A volume of the file system has little space left.
    LowSpace,
    /// A volume of the file system has enough space again.
    SpaceAgain,
    /// A volume of the file system could not be flushed, and takes no more writes.
    VolumeFailed,
    /// Writes that were answered and not flushed when the pool was open last may be missing.
    UnflushedMissing,
    /// The file system takes no changes any more.
    FilesFailed,
    /// Data of a file are not what was written.
    Corrupt,
}

impl PoolEventKind {
    /// Whether it is bad news.
    pub fn is_warning(self) -> bool {
        matches!(
            self,
            Self::DeviceFailed
                | Self::VolumeDegraded
                | Self::JobFailed
                | Self::Repaired
                | Self::LowSpace
                | Self::VolumeFailed
                | Self::UnflushedMissing
                | Self::FilesFailed
                | Self::Corrupt
        )
    }
}

/// Something that happened to a pool while an operation was done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct PoolEvent {
    /// What.
    pub kind: PoolEventKind,
    /// What, for people.
    pub text: String,
}

/// What came of an operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct Outcome {
    /// The jobs that it started, or waited for, as they are now.
    pub jobs: Vec<JobStatus>,
    /// What happened meanwhile.
    pub events: Vec<PoolEvent>,
    /// It was not waited until all of these jobs had ended.
    pub interrupted: bool,
    /// The pool afterwards.
    pub pool: PoolStatus,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_at_100_percent_only_when_it_is_done() {
        let mut job = JobStatus {
            id: 1,
            kind: "scrub".to_owned(),
            what: "scrub all volumes".to_owned(),
            state: JobState::Running,
            reason: None,
            done: u64::MAX,
            total: u64::MAX,
            throttle: 0,
            priority: JobPriority::Normal,
            rate: None,
            seconds_left: None,
            volatile: false,
            moved: None,
        };
        assert_eq!(job.percent(), 99);
        job.state = JobState::Done;
        assert_eq!(job.percent(), 100);
        (job.state, job.total) = (JobState::Failed, 0);
        assert_eq!(job.percent(), 0);
    }

    #[test]
    fn an_operation_is_an_object_with_its_name() {
        let json = serde_json::to_value(Operation::PauseJob { job: 3 }).unwrap();
        assert_eq!(json, serde_json::json!({"operation": "pause-job", "job": 3}));
    }
}
