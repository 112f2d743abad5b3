//! The descriptor of a disk: which of its layers is what. See `docs/src/formats/disk-descriptor.md`.
//!
//! A disk that never had a layer has none. It is kept in two slots of a small file, and written to them in turn, so that there
//! is always a whole one.

use filesys::FileId;

use super::DiskMode;
use super::name::{MAX_DESCRIPTION, MAX_SNAPSHOT_NAME};

/// Bytes of a slot.
pub(crate) const SLOT: usize = 512 << 10;
/// Bytes before the content of a slot.
const HEADER: usize = 40;
/// Bytes of the header that its checksum does not cover.
const UNCHECKED: usize = 16;
const MAGIC: &[u8; 8] = b"SMSVDISK";
const VERSION: u16 = 1;
/// Most snapshots of a disk.
pub const MAX_SNAPSHOTS: usize = 256;
/// Most layers that wait to be deleted.
const MAX_DOOMED: usize = 1024;

/// Most bytes of reservations.
pub(crate) const MAX_RESERVATIONS: usize = 192 << 10;
/// Incompatible feature: reservations follow the snapshots.
const RESERVATIONS: u32 = 1;

/// A frozen state of a disk that has a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mark {
    /// The layer that was written until then.
    pub(crate) file: FileId,
    /// Seconds since 1970.
    pub(crate) created: u64,
    pub(crate) name: String,
    pub(crate) description: String,
}

/// Writes of which it is not decided whether they stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Redo {
    /// The layer on top of the head.
    pub(crate) file: FileId,
    /// Why there is one.
    pub(crate) mode: DiskMode,
    /// It is decided: they go.
    pub(crate) discarded: bool,
}

/// What a layer that is being made is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// To be written instead of its parent, which is a snapshot from then on.
    Snapshot {
        created: u64,
        name: String,
        description: String,
    },
    /// To be the redo layer. What was one before becomes the head.
    Redo { mode: DiskMode },
    /// To be the head, whatever it was before.
    Head,
}

/// A layer that is being made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pending {
    /// The number in its name.
    pub(crate) layer: u32,
    pub(crate) parent: FileId,
    pub(crate) purpose: Purpose,
}

/// Why a slot is not taken for a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wrong {
    /// A crash may have left it so, or it has decayed.
    Damaged(&'static str),
    /// Something else has made it.
    Foreign(&'static str),
}

impl From<&'static str> for Wrong {
    fn from(problem: &'static str) -> Self {
        Self::Damaged(problem)
    }
}

/// Which layer of a disk is what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Descriptor {
    /// The greatest is the newest.
    pub(crate) sequence: u64,
    /// The layer that has the disk's present content, but for a redo layer.
    pub(crate) head: FileId,
    /// The number of the next layer.
    pub(crate) next_layer: u32,
    /// All of the disk goes.
    pub(crate) deleted: bool,
    pub(crate) redo: Option<Redo>,
    pub(crate) pending: Option<Pending>,
    /// Layers that nobody needs by their names any more.
    pub(crate) doomed: Vec<FileId>,
    /// In the order in which they were made.
    pub(crate) snapshots: Vec<Mark>,
    /// Persistent reservations that are kept, as [`crate::scsi`] has them; empty: none.
    pub(crate) reservations: Vec<u8>,
}

impl Descriptor {
    /// Of a disk without layers.
    pub(crate) fn plain(head: FileId) -> Self {
        Self {
            sequence: 0,
            head,
            next_layer: 1,
            deleted: false,
            redo: None,
            pending: None,
            doomed: Vec::new(),
            snapshots: Vec::new(),
            reservations: Vec::new(),
        }
    }

    /// The layer that is written when the disk is in use.
    pub(crate) fn top(&self) -> FileId {
        self.redo.map_or(self.head, |redo| redo.file)
    }

    /// Whether a layer is something by itself.
    pub(crate) fn needs(&self, file: FileId) -> bool {
        self.head == file
            || self.redo.is_some_and(|redo| redo.file == file)
            || self
                .pending
                .as_ref()
                .is_some_and(|pending| pending.parent == file)
            || self.snapshots.iter().any(|mark| mark.file == file)
    }

    pub(crate) fn snapshot(&self, name: &str) -> Option<&Mark> {
        self.snapshots.iter().find(|mark| mark.name == name)
    }

    /// A layer that nobody needs by its name goes when it can.
    pub(crate) fn let_go(&mut self, file: FileId) {
        if !self.needs(file) && !self.doomed.contains(&file) {
            self.doomed.push(file);
        }
    }

    /// The layer that was being made is there.
    pub(crate) fn made(&mut self, layer: FileId) {
        let Some(pending) = self.pending.take() else {
            return;
        };
        let before = self.head;
        match pending.purpose {
            Purpose::Snapshot {
                created,
                name,
                description,
            } => {
                self.snapshots.push(Mark {
                    file: pending.parent,
                    created,
                    name,
                    description,
                });
                match &mut self.redo {
                    Some(redo) => redo.file = layer,
                    None => self.head = layer,
                }
            }
            Purpose::Redo { mode } => {
                if let Some(redo) = self.redo {
                    self.head = redo.file;
                }
                self.redo = Some(Redo {
                    file: layer,
                    mode,
                    discarded: false,
                });
            }
            Purpose::Head => self.head = layer,
        }
        self.let_go(before);
    }

    /// As the bytes of a slot: a multiple of 512.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut body = Writer::default();
        body.u64(self.head.0);
        body.u32(self.next_layer);
        match self.redo {
            None => body.0.extend([0; 3]),
            Some(redo) => body
                .0
                .extend([1, mode_to_byte(redo.mode), u8::from(redo.discarded)]),
        }
        body.0.push(u8::from(self.deleted));
        body.u64(self.redo.map_or(0, |redo| redo.file.0));
        match &self.pending {
            None => body.u32(0),
            Some(pending) => body.pending(pending),
        }
        body.u32(u32::try_from(self.doomed.len()).unwrap_or(0));
        for file in &self.doomed {
            body.u64(file.0);
        }
        body.u32(u32::try_from(self.snapshots.len()).unwrap_or(0));
        for mark in &self.snapshots {
            body.u64(mark.file.0);
            body.u64(mark.created);
            body.text(&mark.name);
            body.text(&mark.description);
        }
        let has_reservations = !self.reservations.is_empty();
        if has_reservations {
            body.u32(u32::try_from(self.reservations.len()).unwrap_or(0));
            body.0.extend(&self.reservations);
        }
        let mut slot = Writer::default();
        slot.0.extend(MAGIC);
        slot.u32(u32::from(VERSION));
        // The checksum, once the rest is there.
        slot.u32(0);
        slot.u64(self.sequence);
        // Features.
        slot.u32(if has_reservations { RESERVATIONS } else { 0 });
        slot.u32(0);
        slot.u32(u32::try_from(body.0.len()).unwrap_or(0));
        slot.u32(0);
        slot.0.extend(body.0);
        let sum = crc_fast::crc32_iscsi(slot.0.get(UNCHECKED..).unwrap_or_default());
        if let Some(place) = slot.0.get_mut(12..UNCHECKED) {
            place.copy_from_slice(&sum.to_le_bytes());
        }
        slot.0.resize(slot.0.len().next_multiple_of(512), 0);
        slot.0
    }

    /// From the bytes of a slot. None if it was never written.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn decode(slot: &[u8]) -> Result<Option<Self>, Wrong> {
        let header = slot.get(..HEADER).ok_or("it is too short")?;
        if header.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let mut reader = Reader(slot);
        if reader.take(8)? != MAGIC {
            return Err(Wrong::Foreign("it is no descriptor of a disk"));
        }
        if reader.u32()? != u32::from(VERSION) {
            return Err(Wrong::Foreign(
                "it has a format that this version does not know: use a newer one",
            ));
        }
        let sum = reader.u32()?;
        let sequence = reader.u64()?;
        let incompatible = reader.u32()?;
        let _compatible = reader.u32()?;
        let length = usize::try_from(reader.u32()?).map_err(|_| "its length cannot be")?;
        let _reserved = reader.u32()?;
        let end = HEADER.checked_add(length).ok_or("its length cannot be")?;
        let checked = slot.get(UNCHECKED..end).ok_or("its length cannot be")?;
        if crc_fast::crc32_iscsi(checked) != sum {
            return Err(Wrong::Damaged("its checksum differs"));
        }
        if incompatible & !RESERVATIONS != 0 {
            return Err(Wrong::Foreign(
                "it uses features that this version does not know: use a newer one",
            ));
        }
        let body = slot.get(HEADER..end).ok_or("its length cannot be")?;
        let mut body = Reader(body);
        let mut descriptor = Self::decode_body(sequence, &mut body)?;
        if incompatible & RESERVATIONS != 0 {
            let length = usize::try_from(body.u32()?).unwrap_or(usize::MAX);
            if length == 0 || length > MAX_RESERVATIONS {
                return Err(Wrong::Damaged("its reservations cannot be"));
            }
            descriptor.reservations = body.take(length)?.to_vec();
        }
        match body.0.is_empty() {
            true => Ok(Some(descriptor)),
            false => Err(Wrong::Damaged("it has bytes left over")),
        }
    }

    fn decode_body(sequence: u64, from: &mut Reader<'_>) -> Result<Self, &'static str> {
        let head = FileId(from.u64()?);
        let next_layer = from.u32()?;
        let [has_redo, mode, discarded, deleted] = from.bytes()?;
        let file = FileId(from.u64()?);
        let redo = match has_redo {
            0 => None,
            1 => Some(Redo {
                file,
                mode: mode_of_byte(mode)?,
                discarded: discarded != 0,
            }),
            _ => return Err("its redo layer cannot be"),
        };
        let pending = from.pending()?;
        let count = usize::try_from(from.u32()?).unwrap_or(usize::MAX);
        if count > MAX_DOOMED {
            return Err("it has too many layers to delete");
        }
        let doomed = (0..count)
            .map(|_| from.u64().map(FileId))
            .collect::<Result<_, _>>()?;
        let count = usize::try_from(from.u32()?).unwrap_or(usize::MAX);
        if count > MAX_SNAPSHOTS {
            return Err("it has too many snapshots");
        }
        let mut snapshots: Vec<Mark> = Vec::new();
        for _ in 0..count {
            let mark = Mark {
                file: FileId(from.u64()?),
                created: from.u64()?,
                name: from.text(MAX_SNAPSHOT_NAME)?,
                description: from.text(MAX_DESCRIPTION)?,
            };
            if snapshots.iter().any(|other| other.name == mark.name) {
                return Err("two snapshots have one name");
            }
            snapshots.push(mark);
        }
        Ok(Self {
            sequence,
            head,
            next_layer,
            deleted: deleted != 0,
            redo,
            pending,
            doomed,
            snapshots,
            reservations: Vec::new(),
        })
    }
}

fn mode_to_byte(mode: DiskMode) -> u8 {
    match mode {
        DiskMode::Persistent => 0,
        DiskMode::Undoable => 1,
        DiskMode::Nonpersistent => 2,
        DiskMode::Append => 3,
    }
}

fn mode_of_byte(byte: u8) -> Result<DiskMode, &'static str> {
    match byte {
        1 => Ok(DiskMode::Undoable),
        2 => Ok(DiskMode::Nonpersistent),
        3 => Ok(DiskMode::Append),
        _ => Err("its redo layer has a mode that is not known"),
    }
}

#[derive(Default)]
struct Writer(Vec<u8>);

impl Writer {
    fn u32(&mut self, value: u32) {
        self.0.extend(value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.0.extend(value.to_le_bytes());
    }

    /// Names and descriptions are checked where they come from.
    fn text(&mut self, text: &str) {
        let length = u16::try_from(text.len()).unwrap_or(0);
        self.0.extend(length.to_le_bytes());
        self.0.extend(text.as_bytes().iter().take(usize::from(length)));
    }

    fn pending(&mut self, pending: &Pending) {
        let (kind, mode) = match &pending.purpose {
            Purpose::Snapshot { .. } => (1, 0),
            Purpose::Redo { mode } => (2, mode_to_byte(*mode)),
            Purpose::Head => (3, 0),
        };
        self.0.extend([kind, mode, 0, 0]);
        self.u32(pending.layer);
        self.u64(pending.parent.0);
        if let Purpose::Snapshot {
            created,
            name,
            description,
        } = &pending.purpose
        {
            self.u64(*created);
            self.text(name);
            self.text(description);
        }
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], &'static str> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or("it ends too early")?;
        self.0 = rest;
        Ok(taken)
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], &'static str> {
        self.take(N)?.try_into().map_err(|_| "it ends too early")
    }

    fn u32(&mut self) -> Result<u32, &'static str> {
        Ok(u32::from_le_bytes(self.bytes()?))
    }

    fn u64(&mut self) -> Result<u64, &'static str> {
        Ok(u64::from_le_bytes(self.bytes()?))
    }

    fn text(&mut self, most: usize) -> Result<String, &'static str> {
        let length = usize::from(u16::from_le_bytes(self.bytes()?));
        if length > most {
            return Err("it has a text that is too long");
        }
        let text = std::str::from_utf8(self.take(length)?).map_err(|_| "it has a text that is not UTF-8")?;
        Ok(text.to_owned())
    }

    fn pending(&mut self) -> Result<Option<Pending>, &'static str> {
        let [kind, mode, ..] = self.bytes::<4>()?;
        if kind == 0 {
            return Ok(None);
        }
        let layer = self.u32()?;
        let parent = FileId(self.u64()?);
        let purpose = match kind {
            1 => Purpose::Snapshot {
                created: self.u64()?,
                name: self.text(MAX_SNAPSHOT_NAME)?,
                description: self.text(MAX_DESCRIPTION)?,
            },
            2 => Purpose::Redo {
                mode: mode_of_byte(mode)?,
            },
            3 => Purpose::Head,
            _ => return Err("it makes a layer for something that is not known"),
        };
        Ok(Some(Pending {
            layer,
            parent,
            purpose,
        }))
    }
}

/// For the fuzz target in `tests/fuzz-harness`, nothing else: parses bytes whose checksum is computed before. What is taken is written
/// again and must be the same.
///
/// # Panics
/// What was parsed is not what is written again.
#[doc(hidden)]
pub fn survives(bytes: &[u8]) -> bool {
    let mut slot = bytes.to_vec();
    let length = slot.get(32..36).and_then(|length| length.try_into().ok());
    let end = length.and_then(|length| HEADER.checked_add(usize::try_from(u32::from_le_bytes(length)).ok()?));
    if let Some(checked) = end.and_then(|end| slot.get(UNCHECKED..end)) {
        let sum = crc_fast::crc32_iscsi(checked).to_le_bytes();
        if let Some(place) = slot.get_mut(12..UNCHECKED) {
            place.copy_from_slice(&sum);
        }
    }
    match Descriptor::decode(&slot) {
        Ok(Some(descriptor)) => {
            let again = Descriptor::decode(&descriptor.encode());
            assert_eq!(again, Ok(Some(descriptor)));
            true
        }
        _ => false,
    }
}

/// For the fuzz target: a descriptor with all that there can be, as the bytes of a slot.
#[doc(hidden)]
pub fn example() -> Vec<u8> {
    let mark = |number: u64| Mark {
        file: FileId(number),
        created: 1_700_000_000 + number,
        name: format!("snapshot-{number}"),
        description: "before the upgrade".into(),
    };
    let descriptor = Descriptor {
        sequence: 7,
        head: FileId(12),
        next_layer: 4,
        deleted: false,
        redo: Some(Redo {
            file: FileId(13),
            mode: DiskMode::Append,
            discarded: false,
        }),
        pending: Some(Pending {
            layer: 4,
            parent: FileId(13),
            purpose: Purpose::Snapshot {
                created: 5,
                name: "new".into(),
                description: String::new(),
            },
        }),
        doomed: vec![FileId(3)],
        snapshots: (1..=3).map(mark).collect(),
        reservations: b"reserved".to_vec(),
    };
    descriptor.encode()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full() -> Descriptor {
        let descriptor = Descriptor::decode(&example()).unwrap().unwrap();
        Descriptor {
            deleted: true,
            ..descriptor
        }
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        let mut descriptor = full();
        for _ in 0..2 {
            let bytes = descriptor.encode();
            assert!(bytes.len().is_multiple_of(512));
            assert_eq!(Descriptor::decode(&bytes), Ok(Some(descriptor.clone())));
            descriptor = Descriptor::plain(FileId(9));
        }
        assert_eq!(Descriptor::decode(&[0; 512]), Ok(None));
    }

    #[test]
    fn every_changed_bit_is_noticed() {
        let bytes = full().encode();
        let length = HEADER + usize::try_from(u32::from_le_bytes(bytes[32..36].try_into().unwrap())).unwrap();
        for bit in 0..length * 8 {
            let mut changed = bytes.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            Descriptor::decode(&changed).unwrap_err();
            survives(&changed);
        }
        for end in 0..length {
            Descriptor::decode(&bytes[..end]).unwrap_err();
        }
    }

    #[test]
    fn the_largest_descriptor_fits_into_a_slot() {
        let mut descriptor = full();
        descriptor.doomed = (0..MAX_DOOMED as u64).map(FileId).collect();
        descriptor.snapshots = (0..MAX_SNAPSHOTS)
            .map(|number| Mark {
                file: FileId(number as u64),
                created: 0,
                name: format!("{number:063}"),
                description: "x".repeat(MAX_DESCRIPTION),
            })
            .collect();
        descriptor.reservations = vec![7; MAX_RESERVATIONS];
        let bytes = descriptor.encode();
        assert!(bytes.len() <= SLOT, "{} bytes", bytes.len());
        assert_eq!(Descriptor::decode(&bytes), Ok(Some(descriptor)));
    }

    #[test]
    fn a_layer_that_was_made_is_what_it_was_made_for() {
        // A snapshot of a disk with a redo layer: the redo layer is what was frozen.
        let mut descriptor = full();
        descriptor.made(FileId(20));
        assert_eq!(descriptor.top(), FileId(20));
        assert_eq!(descriptor.head, FileId(12));
        assert_eq!(descriptor.snapshot("new").map(|mark| mark.file), Some(FileId(13)));
        // A commit while it is written: the redo layer is the head, and there is a new one.
        descriptor.pending = Some(Pending {
            layer: 5,
            parent: FileId(20),
            purpose: Purpose::Redo {
                mode: DiskMode::Append,
            },
        });
        descriptor.made(FileId(21));
        assert_eq!((descriptor.head, descriptor.top()), (FileId(20), FileId(21)));
        assert_eq!(descriptor.doomed, [FileId(3), FileId(12)]);
        // A revert: what a snapshot needs stays.
        let mut descriptor = Descriptor::plain(FileId(1));
        descriptor.snapshots = full().snapshots;
        descriptor.pending = Some(Pending {
            layer: 6,
            parent: FileId(2),
            purpose: Purpose::Head,
        });
        descriptor.made(FileId(22));
        assert_eq!((descriptor.head, descriptor.doomed.len()), (FileId(22), 0));
    }
}
