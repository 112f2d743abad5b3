//! Something small that a pool remembers beside its disks: a file of two slots, which are written in turn, so that there is always a whole
//! one. What it says is the caller's affair. See `docs/src/formats/guest-jobs.md`.

use std::cell::Cell;
use std::fmt;

use block_io::{AlignedBuffer, BlockDevice, Clock, Durability};
use filesys::{Access, FileSystem, FsError, NewFile};

use super::error::DiskError;
use super::store::whole;
use super::turn::Turn;

/// Bytes of a slot.
const SLOT: usize = 1 << 20;
/// Bytes before the content of a slot.
const HEADER: usize = 32;
/// Bytes of the header that its checksum does not cover.
const UNCHECKED: usize = 16;
const VERSION: u32 = 1;
/// Most bytes that a [`Record`] holds.
pub const MAX_RECORD: usize = SLOT - HEADER;

/// A file with something that is replaced as a whole.
pub struct Record<V: BlockDevice + 'static, C: Clock + Clone + 'static> {
    files: FileSystem<V, C>,
    path: String,
    magic: [u8; 8],
    /// Of the newest whole slot.
    sequence: Cell<u64>,
    turn: Turn,
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> fmt::Debug for Record<V, C> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Record")
            .field("path", &self.path)
            .field("sequence", &self.sequence)
            .finish_non_exhaustive()
    }
}

fn slot_of(sequence: u64) -> u64 {
    (sequence % 2) * SLOT as u64
}

fn encode(magic: [u8; 8], sequence: u64, content: &[u8]) -> Vec<u8> {
    let length = u32::try_from(content.len()).unwrap_or(u32::MAX);
    let mut slot = Vec::with_capacity(HEADER + content.len());
    slot.extend(magic);
    slot.extend(VERSION.to_le_bytes());
    // The checksum, once the rest is there.
    slot.extend([0; 4]);
    slot.extend(sequence.to_le_bytes());
    slot.extend(length.to_le_bytes());
    slot.extend([0; 4]);
    slot.extend(content);
    let sum = crc_fast::crc32_iscsi(slot.get(UNCHECKED..).unwrap_or_default());
    if let Some(place) = slot.get_mut(12..UNCHECKED) {
        place.copy_from_slice(&sum.to_le_bytes());
    }
    slot.resize(slot.len().next_multiple_of(512), 0);
    slot
}

/// What a slot is.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    /// It was never written.
    Nothing,
    /// A crash has left it so, or it has decayed.
    Damaged,
    /// Something else has made it, or a newer version.
    Foreign(&'static str),
    Content(u64, Vec<u8>),
}

fn decode(magic: [u8; 8], slot: &[u8]) -> Found {
    let Some(header) = slot.first_chunk::<HEADER>() else {
        return Found::Damaged;
    };
    if header.iter().all(|byte| *byte == 0) {
        return Found::Nothing;
    }
    let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    if header[..8] != magic {
        return Found::Foreign("it is something else");
    }
    if word(8) != VERSION {
        return Found::Foreign("it has a format that this version does not know: use a newer one");
    }
    let end = usize::try_from(word(24)).map_or(usize::MAX, |length| length.saturating_add(HEADER));
    match (slot.get(UNCHECKED..end), slot.get(HEADER..end)) {
        (Some(checked), Some(content)) if crc_fast::crc32_iscsi(checked) == word(12) => {
            let sequence = u64::from(word(16)) | u64::from(word(20)) << 32;
            Found::Content(sequence, content.to_vec())
        }
        _ => Found::Damaged,
    }
}

impl<V: BlockDevice + 'static, C: Clock + Clone + 'static> Record<V, C> {
    /// The record at `path`, which begins with `magic`, and what it says: none if nothing was ever written whole.
    ///
    /// # Errors
    /// The file cannot be read, or is something else.
    pub async fn open(
        files: FileSystem<V, C>,
        path: &str,
        magic: [u8; 8],
    ) -> Result<(Self, Option<Vec<u8>>), DiskError> {
        let mut newest: Option<(u64, Vec<u8>)> = None;
        let foreign = |problem| DiskError::Name {
            name: path.to_owned(),
            problem,
        };
        match files.open_file(path, Access::Read).await {
            Ok(file) if file.size() < 2 * SLOT as u64 => return Err(foreign("it is too short")),
            Ok(file) => {
                for sequence in 0..2 {
                    let buffer = AlignedBuffer::new(SLOT);
                    file.read(slot_of(sequence), &whole(&buffer)).await?;
                    match decode(magic, buffer.as_slice()) {
                        Found::Content(sequence, content)
                            if newest.as_ref().is_none_or(|(newest, _)| sequence > *newest) =>
                        {
                            newest = Some((sequence, content));
                        }
                        Found::Foreign(problem) => return Err(foreign(problem)),
                        Found::Damaged => block_io::cover!("record: a slot was not written whole"),
                        Found::Nothing | Found::Content(..) => {}
                    }
                }
            }
            Err(FsError::NotFound { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        let (sequence, content) = newest.map_or((0, None), |(sequence, content)| (sequence, Some(content)));
        let record = Self {
            files,
            path: path.to_owned(),
            magic,
            sequence: Cell::new(sequence),
            turn: Turn::default(),
        };
        Ok((record, content))
    }

    /// It says what `content` gives when its turn has come; nothing is written if that is none. Durable afterwards.
    ///
    /// # Errors
    /// It has more than [`MAX_RECORD`] bytes, or could not be written: then it says what it said before, or this.
    pub async fn replace(
        &self,
        content: impl FnOnce() -> Option<Vec<u8>>,
        now: u64,
    ) -> Result<(), DiskError> {
        let _turn = self.turn.take().await;
        let Some(content) = content() else { return Ok(()) };
        if content.len() > MAX_RECORD {
            return Err(DiskError::Name {
                name: self.path.clone(),
                problem: "it would be too long",
            });
        }
        if let Err(error) = self.files.stat(&self.path).await {
            if !matches!(error, FsError::NotFound { .. }) {
                return Err(error.into());
            }
            let new = NewFile {
                size: 2 * SLOT as u64,
                attributes: None,
                now,
            };
            Box::pin(self.files.create(&self.path, &new)).await?;
        }
        let sequence = self.sequence.get() + 1;
        let bytes = encode(self.magic, sequence, &content);
        let mut buffer = AlignedBuffer::new(bytes.len());
        buffer.as_mut_slice().copy_from_slice(&bytes);
        let file = self.files.open_file(&self.path, Access::Write).await?;
        file.write(slot_of(sequence), &whole(&buffer), Durability::Durable)
            .await?;
        // Not before: what is not known to be whole is written over.
        self.sequence.set(sequence);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAGIC: [u8; 8] = *b"SMSVTEST";

    #[test]
    fn a_slot_is_what_was_written_or_nothing() {
        let bytes = encode(MAGIC, 7, b"hello");
        assert_eq!(decode(MAGIC, &bytes), Found::Content(7, b"hello".to_vec()));
        assert_eq!(decode(MAGIC, &[0; 512]), Found::Nothing);
        assert!(matches!(decode(*b"SMSVDISK", &bytes), Found::Foreign(_)));
        for byte in 12..HEADER + 5 {
            let mut torn = bytes.clone();
            torn[byte] ^= 1;
            assert_eq!(decode(MAGIC, &torn), Found::Damaged, "byte {byte}");
        }
        for length in 0..HEADER {
            assert_eq!(decode(MAGIC, &bytes[..length]), Found::Damaged, "{length} bytes");
        }
    }
}
