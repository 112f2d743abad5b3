//! What an agent and a mover say to each other.
//!
//! Everything is a [frame](crate::frame): kind 1 is a [`Request`] or a [`Reply`] as JSON, kind 2 bytes of a file ([`content`]). The agent
//! speaks first, and each request has one reply, before which there may be any number of [`Reply::Working`]: so neither side can
//! block the other. An agent that says nothing for two minutes is taken for gone.
//!
//! ```text
//!   agent                          mover
//!   Hello(token) ─────────────────►
//!   ◄───────────────────── Welcome
//!   Begin(plan) ──────────────────►             asks the storage manager for the frozen image
//!   ◄─────────────────────── Begun
//!   Entries(..) ──────────────────►             reads what they name, writes the archive
//!   ◄────────── Working ... Taken
//!   Entries(.., streamed) ────────►             no reply yet
//!   content, content, ContentEnd ─►
//!   ◄─────────────────────── Taken
//!   Finish ───────────────────────►
//!   ◄──────────────────── Finished              it is a backup now, and not before
//! ```
//!
//! After [`Request::Restore`] the mover sends [`Reply::Entry`], for a file its content as frames of kind 2, and [`Reply::EntryEnd`], for each
//! entry, then [`Reply::Restored`], without being asked for each.

use api::Problem;
use serde::{Deserialize, Serialize};

use crate::plan::{Entry, Extent, Plan, Time};
use crate::raw_text::RawText;

/// Version of the messages. A mover refuses others.
pub const VERSION: u32 = 1;
/// The kind of frames that have JSON.
pub const JSON: u16 = 1;
/// The kind of frames that have bytes of a file; see [`content`].
pub const CONTENT: u16 = 2;
/// Most bytes of a file in one frame.
pub const MAX_CONTENT: usize = 1 << 20;

/// What the agent says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "say", content = "with")]
pub enum Request {
    /// The first message.
    Hello(Hello),
    /// Which backups of this machine there are. Reply: [`Reply::Backups`].
    List,
    /// Begin a backup. Reply: [`Reply::Begun`].
    Begin(Box<Plan>),
    /// The next entries. Reply: [`Reply::Taken`], when their content is in the archive. Only the last one may be streamed, or have more
    /// extents: then the reply comes after [`Self::ContentEnd`] or the last [`Self::Extents`].
    Entries(Vec<Entry>),
    /// More extents of the last entry.
    Extents {
        /// They follow those that were there.
        extents: Vec<Extent>,
        /// Even more follow.
        more: bool,
    },
    /// All bytes of the entry that the agent streams were sent; what was left out is a hole.
    ContentEnd {
        /// The file could not be read to its end, for this reason. The backup goes on, and says so.
        #[serde(default)]
        problem: Option<String>,
    },
    /// All entries were sent. Reply: [`Reply::Finished`].
    Finish {
        /// How many they were, with those before a resumption.
        entries: u64,
    },
    /// Give up the backup that was begun and what there is of it. Reply: [`Reply::Done`].
    Abandon,
    /// Send a backup. Reply: see the module.
    Restore(Selection),
    /// Read a backup, and those that it needs, and see that all checksums are right. Reply: [`Reply::Verified`].
    Verify {
        /// Its name.
        name: String,
    },
}

/// Who speaks.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Hello {
    /// [`VERSION`].
    pub version: u32,
    /// The token that `smsvmm mover token` made.
    pub token: String,
    /// What speaks: `sms-agent 0.1.0`.
    pub agent: String,
}

impl std::fmt::Debug for Hello {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { version, agent, .. } = self;
        write!(formatter, "Hello {{ version: {version}, agent: {agent:?} }}")
    }
}

/// What of a backup is to be sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Selection {
    /// The backup.
    pub name: String,
    /// These paths and what is below them; everything if none.
    #[serde(default)]
    pub paths: Vec<RawText>,
    /// Only what there is, without content.
    #[serde(default)]
    pub only_list: bool,
}

/// What the mover says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "say", content = "with")]
pub enum Reply {
    /// To [`Request::Hello`].
    Welcome(Welcome),
    /// To [`Request::List`].
    Backups(Vec<BackupInfo>),
    /// To [`Request::Begin`].
    Begun(Begun),
    /// It takes longer: so much is done. At least every ten seconds.
    Working(Progress),
    /// To [`Request::Entries`].
    Taken(Progress),
    /// To [`Request::Finish`]: the backup is complete and durable.
    Finished(Box<BackupInfo>),
    /// Of [`Request::Restore`]: an entry. Its content follows, if it has any.
    Entry(Box<Entry>),
    /// Of [`Request::Restore`]: that was the content of the entry.
    EntryEnd {
        /// When the backup was made, the file could not be read to its end, for this reason.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        problem: Option<String>,
    },
    /// Of [`Request::Restore`]: that was all, and all checksums were right.
    Restored(Progress),
    /// To [`Request::Verify`].
    Verified(Progress),
    /// It is done; there is nothing to tell.
    Done,
    /// It is refused, or failed. After [`Request::Hello`], or where the mover cannot know what comes next, it closes the connection.
    Refused(Box<Problem>),
}

/// Whom the mover has recognised.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Welcome {
    /// [`VERSION`].
    pub version: u32,
    /// The mover: `smsvmm 0.1.0`.
    pub mover: String,
    /// The principal that the token belongs to.
    pub principal: String,
}

/// A backup was begun.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Begun {
    /// So many entries are in the archive already. The agent goes on with the one after them; it must find the entries in the same order.
    pub entries: u64,
    /// The path of the last one of them, if there is one.
    #[serde(default)]
    pub last: Option<RawText>,
    /// How it reads: `devices` or `export`.
    pub reads: String,
    /// What a person should know: why it does not read devices, why nothing can stay in the parent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Progress {
    /// Entries that are done.
    pub entries: u64,
    /// Bytes of files that are done, holes not counted.
    pub bytes: u64,
    /// Bytes of them that were read from devices.
    #[serde(default)]
    pub from_devices: u64,
    /// Bytes of them that the storage manager read.
    #[serde(default)]
    pub from_export: u64,
    /// Bytes of them that the agent sent.
    #[serde(default)]
    pub from_agent: u64,
    /// Bytes that stay in the parent.
    #[serde(default)]
    pub in_parent: u64,
    /// How often it was asked again where data are, because they had been moved.
    #[serde(default)]
    pub moved: u64,
    /// Files that could not be read to their ends.
    #[serde(default)]
    pub problems: u64,
}

/// What a backup is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BackupInfo {
    /// Its name.
    pub name: String,
    /// The backup on which it is built.
    #[serde(default)]
    pub parent: Option<String>,
    /// What people want to know of it.
    pub description: String,
    /// The machine as it calls itself.
    pub host: String,
    /// When the image was frozen.
    pub frozen: Time,
    /// Whether it is complete. If not, it is no backup, and can be gone on with.
    pub complete: bool,
    /// What there is in it; of one that is not complete, nothing is known.
    pub progress: Progress,
    /// Bytes of its archive.
    pub archive: u64,
    /// Its digest, in hexadecimal digits; empty if it is not complete.
    #[serde(default)]
    pub digest: String,
}

/// The payload of a frame of kind 2: the offset in the file (8 bytes, little-endian) and the bytes. None if it is no such payload.
pub fn content(payload: &[u8]) -> Option<(u64, &[u8])> {
    let (offset, bytes) = payload.split_first_chunk::<8>()?;
    let offset = u64::from_le_bytes(*offset);
    let length = u64::try_from(bytes.len()).ok()?;
    let fits = !bytes.is_empty() && bytes.len() <= MAX_CONTENT && offset.checked_add(length).is_some();
    fits.then_some((offset, bytes))
}
