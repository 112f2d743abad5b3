//! What a guest is answered.

use api::file::Moved;
use api::storage::{Health, JobStatus, Shape};
use api::virtual_disk::{ChangedRange, SnapshotStatus, VirtualDiskStatus};
use api::{DeviceId, Problem, Right, VmName};
use serde::{Deserialize, Serialize};

/// What came of a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// It is done.
    Answer(Box<Answer>),
    /// It was refused, or failed.
    Problem(Problem),
}

/// What a request answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// It is done; there is nothing to tell.
    Done,
    /// Who asks, and what it may do.
    Description(Box<Description>),
    /// Disks, in order of their paths.
    Disks(Vec<GuestDisk>),
    /// One disk.
    Disk(Box<VirtualDiskStatus>),
    /// Volumes.
    Volumes(Vec<GuestVolume>),
    /// A disk that the guest gets now, by hot-plug.
    Attached(AttachedDisk),
    /// What was moved.
    Moved(Moved),
    /// Jobs.
    Jobs(Vec<JobStatus>),
    /// A frozen image.
    Image(Image),
    /// Where data are.
    Extents(Vec<Extent>),
    /// A configuration identifier.
    ConfigurationId(String),
    /// Ranges, in order.
    Changed(Vec<ChangedRange>),
    /// There is no such service on this host.
    NotConfigured(String),
}

/// Who asks, and what it may do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Description {
    /// The virtual machine as its administrator calls it.
    pub vm: VmName,
    /// Version of the commands, as `1.0`.
    pub version: String,
    /// Version of smsvmm.
    pub product: String,
    /// What the guest may do.
    pub rights: Vec<Right>,
    /// Disks to which it may do it, beside those that it can write: paths, or beginnings with `*`.
    pub objects: Vec<String>,
    /// Volumes that it may name.
    pub volumes: Vec<String>,
    /// Devices that it may name.
    pub devices: Vec<String>,
    /// How much.
    pub quota: Quota,
}

/// How much a guest may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Quota {
    /// Most snapshots of a disk.
    pub snapshots: u32,
    /// Most disks.
    pub disks: u32,
    /// Most bytes of its disks; none if there is no limit.
    pub bytes: Option<u64>,
    /// Most jobs at once.
    pub jobs: u32,
    /// Requests per second.
    pub rate: u32,
}

/// A disk that the guest has or may have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct GuestDisk {
    /// Its path in the pool; none if it is no disk of a pool.
    pub path: Option<String>,
    /// The device of the machine, if it is attached.
    pub id: Option<DeviceId>,
    /// Its serial number (VPD page 80h), by which the guest finds it, if it is attached.
    pub serial: Option<String>,
    /// Bytes.
    pub size: u64,
    /// Bytes of volumes that it has with its snapshots; 0 if that is not known.
    pub allocated: u64,
    /// The guest cannot write it.
    pub read_only: bool,
    /// The volumes on which it is.
    pub volumes: Vec<String>,
    /// In the order in which they were made.
    pub snapshots: Vec<SnapshotStatus>,
}

/// A volume as a guest sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct GuestVolume {
    /// Its name.
    pub name: String,
    /// How well it is.
    pub state: Health,
    /// Bytes.
    pub size: u64,
    /// Bytes that no file has; none if that is not known.
    pub free: Option<u64>,
    /// How it is laid out; devices are not told.
    pub shape: Shape,
    /// So many devices may fail.
    pub tolerates: u32,
    /// The guest may name it.
    pub yours: bool,
}

/// A disk that was attached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct AttachedDisk {
    /// Its path.
    pub path: String,
    /// The device of the machine.
    pub id: DeviceId,
    /// Its serial number (VPD page 80h), by which the guest finds it.
    pub serial: String,
    /// Bytes.
    pub size: u64,
}

/// A frozen image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Image {
    /// What it is called.
    pub name: String,
    /// Its disks, all at one moment.
    pub disks: Vec<ImageDisk>,
}

/// A disk of a frozen image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ImageDisk {
    /// The disk.
    pub disk: String,
    /// Its snapshot.
    pub snapshot: String,
    /// The disk's configuration identifier.
    pub configuration: String,
}

/// A run of a disk's bytes on a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Extent {
    /// First byte of the disk.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// The volume.
    pub volume: String,
    /// First byte on the volume.
    pub start: u64,
}

/// Something that happened to the machine, as its guest may know it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct GuestEvent {
    /// Its number: 1 for the first event of the machine's process.
    pub sequence: u64,
    /// Milliseconds since 1970.
    pub time_ms: u64,
    /// What: `device-attached`, `guest-command-refused` ...
    pub event: String,
    /// To what.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub object: Option<String>,
    /// Why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// What EVENTS answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct GuestEvents {
    /// In ascending order; empty if nothing happened in time.
    pub events: Vec<GuestEvent>,
    /// The number to ask after next time.
    pub last: u64,
    /// So many events after the given number are no longer kept.
    pub missed: u64,
}

#[cfg(test)]
mod tests {
    use api::ProblemKind;

    use super::*;

    #[test]
    fn an_outcome_says_whether_it_is_an_answer() {
        let done = Outcome::Answer(Box::new(Answer::ConfigurationId("12".into())));
        let text = serde_json::to_string(&done).unwrap();
        assert_eq!(text, r#"{"answer":{"configuration-id":"12"}}"#);
        assert_eq!(serde_json::from_str::<Outcome>(&text).unwrap(), done);
        let problem = Outcome::Problem(Problem::new(ProblemKind::Forbidden, "no"));
        let text = serde_json::to_string(&problem).unwrap();
        assert_eq!(serde_json::from_str::<Outcome>(&text).unwrap(), problem);
    }
}
