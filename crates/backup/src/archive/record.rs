//! What the frames of an archive mean.

use serde::{Deserialize, Serialize};

use crate::message::Progress;
use crate::plan::Plan;

/// Version of the format.
pub const VERSION: u32 = 1;
/// Bytes of the last frame, its header included.
pub const COMMIT_FRAME: u64 = 4096;

/// JSON: [`Header`].
pub(super) const HEADER: u16 = 16;
/// JSON: [`crate::plan::Entry`].
pub(super) const ENTRY: u16 = 17;
/// JSON: a list of [`crate::plan::Extent`], more of the entry.
pub(super) const EXTENTS: u16 = 18;
/// Offset in the file (8 bytes), then the bytes.
pub(super) const DATA: u16 = 19;
/// Offset and length (8 bytes each): this reads as zeroes.
pub(super) const ZEROES: u16 = 20;
/// Offset, length, entry of the parent, offset in that entry (8 bytes each).
pub(super) const IN_PARENT: u16 = 21;
/// JSON: [`EntryEnd`].
pub(super) const ENTRY_END: u16 = 22;
/// For each entry where its frame begins in the archive (8 bytes).
pub(super) const INDEX: u16 = 23;
/// JSON: [`Commit`], and spaces.
pub(super) const COMMIT: u16 = 24;

/// The first frame.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Header {
    /// [`VERSION`].
    pub version: u32,
    /// Features without which the archive cannot be read.
    #[serde(default)]
    pub incompatible: u64,
    /// Features that need not be known.
    #[serde(default)]
    pub compatible: u64,
    /// What wrote it.
    pub writer: String,
    /// Whose backup it is, as the mover knows him.
    pub principal: String,
    /// What the agent said.
    pub plan: Plan,
    /// The disks of the frozen image, as the storage manager knows them, in the order of the plan.
    pub image: Vec<ImageIdentity>,
    /// The archive on which this one is built.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<Parent>,
}

/// A disk of the frozen image, as the storage manager knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ImageIdentity {
    /// What distinguishes the snapshot from all others.
    pub identity: String,
    /// Bytes.
    pub size: u64,
}

/// The archive on which another one is built.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Parent {
    /// The name of the backup.
    pub name: String,
    /// [`Commit::digest`] of its archive.
    pub digest: String,
}

/// The end of an entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct EntryEnd {
    /// SHA-256, in hexadecimal digits, of the payloads of all frames of the entry before this one, each after its kind (2 bytes) and its
    /// length (4 bytes).
    pub digest: String,
    /// What this entry adds to [`Commit::progress`].
    pub progress: Progress,
    /// The agent could not read the file to its end, for this reason.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// The last frame.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Commit {
    /// How many entries there are.
    pub entries: u64,
    /// Where the first frame of the index begins.
    pub index: u64,
    /// What there is.
    pub progress: Progress,
    /// SHA-256, in hexadecimal digits, of the payloads of the header, of all `EntryEnd`s and of the index, in order.
    pub digest: String,
}

/// Numbers of a payload.
pub(super) fn numbers<const N: usize>(payload: &[u8]) -> Option<[u64; N]> {
    let mut numbers = [0; N];
    let (chunks, rest) = payload.as_chunks::<8>();
    if chunks.len() != N || !rest.is_empty() {
        return None;
    }
    for (number, chunk) in numbers.iter_mut().zip(chunks) {
        *number = u64::from_le_bytes(*chunk);
    }
    Some(numbers)
}

/// In hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
