//! One device: its label and its two slots, read and written.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use block_io::{AlignedBuffer, BlockDevice, Durability, IoError, ZeroMode};
use tracing::warn;

use crate::bytes;
use crate::format::label::{LABEL_SIZE, Label, LabelError};
use crate::format::slot::{self, Header};
use crate::format::{DecodeError, decode, private_size};
use crate::model::{BLOCK, Configuration};

/// A labelled device that is open.
#[derive(Debug)]
pub(crate) struct Media<D> {
    pub(crate) device: Rc<D>,
    pub(crate) label: Label,
    /// Of the newest valid slot; 0 if there is none.
    pub(crate) sequence: u64,
    /// The slot that is written next: the one that does not hold the newest valid configuration.
    pub(crate) next: usize,
}

impl<D> Clone for Media<D> {
    fn clone(&self) -> Self {
        Self {
            device: Rc::clone(&self.device),
            label: self.label.clone(),
            ..*self
        }
    }
}

/// A valid slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) header: Header,
    /// Shared by all devices that hold the same one.
    pub(crate) configuration: Rc<Configuration>,
}

/// Configurations that were read from other devices: nearly all devices of a pool hold the same one, so it is decoded, checked
/// and kept once.
#[derive(Debug, Default)]
pub(crate) struct Known(RefCell<VecDeque<(Vec<u8>, Rc<Configuration>)>>);

impl Known {
    /// The present one, the one before, and some more for devices that are behind.
    const MOST: usize = 8;

    fn decode(&self, bytes: &[u8]) -> Result<Rc<Configuration>, DecodeError> {
        let mut known = self.0.borrow_mut();
        if let Some((_, same)) = known.iter().find(|(other, _)| other == bytes) {
            return Ok(Rc::clone(same));
        }
        let decoded = Rc::new(decode(bytes)?);
        if known.len() >= Self::MOST {
            known.pop_front();
        }
        known.push_back((bytes.to_vec(), Rc::clone(&decoded)));
        Ok(decoded)
    }
}

/// Which copies of the label are damaged, or missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LabelCopies {
    BothGood,
    PrimaryBad,
    CopyBad,
}

/// Why a device of a pool cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum MediaError {
    /// It fails.
    #[error(transparent)]
    Io(#[from] IoError),
    /// It has no label of ours, or a bad one and no copy.
    #[error(transparent)]
    Label(#[from] LabelError),
    /// A slot is valid, but this program cannot read what is in it.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// A slot is valid, but was written to another device: this is a copy, or its label was.
    #[error("its configuration was written to another device: it is a copy of one, or its label is")]
    Copied,
}

async fn read_label<D: BlockDevice>(device: &D, offset: u64) -> Result<Result<Label, LabelError>, IoError> {
    let size = device.size();
    if offset.checked_add(BLOCK).is_none_or(|end| end > size) {
        return Ok(Err(LabelError::Absent));
    }
    let block = bytes::read(device, offset, LABEL_SIZE).await?;
    Ok(Label::decode(block.as_slice(), size))
}

/// The label of `device`, from whichever copy is good.
pub(crate) async fn read_labels<D: BlockDevice>(device: &D) -> Result<(Label, LabelCopies), MediaError> {
    let primary = match read_label(device, 0).await {
        Ok(Ok(label)) => {
            let copy = read_label(device, label.copy_offset()).await;
            let good = matches!(&copy, Ok(Ok(copy)) if *copy == label);
            let copies = if good {
                LabelCopies::BothGood
            } else {
                LabelCopies::CopyBad
            };
            return Ok((label, copies));
        }
        // A good label that is not for this program or this device: the copy says the same.
        Ok(Err(error))
            if !matches!(
                error,
                LabelError::Absent | LabelError::Damaged | LabelError::Nonsense(_)
            ) =>
        {
            return Err(error.into());
        }
        Ok(Err(error)) => MediaError::Label(error),
        Err(error) => MediaError::Io(error),
    };
    let Some(private) = private_size(device.size()) else {
        return Err(primary);
    };
    match read_label(device, private - BLOCK).await {
        Ok(Ok(label)) if label.data_start == private => Ok((label, LabelCopies::PrimaryBad)),
        _ => Err(primary),
    }
}

/// What a slot holds, if it is valid.
async fn read_slot<D: BlockDevice>(
    device: &D,
    label: &Label,
    number: usize,
    known: &Known,
) -> Result<Option<Held>, MediaError> {
    let offset = label.slot_offset(number);
    let start = bytes::read(device, offset, LABEL_SIZE).await?;
    let Some(needed) = Header::needed(start.as_slice(), label.slot_size) else {
        return Ok(None);
    };
    let whole = if needed > BLOCK {
        bytes::read(device, offset, usize::try_from(needed).unwrap_or(usize::MAX)).await?
    } else {
        start
    };
    let Some((header, configuration)) = Header::decode(whole.as_slice()) else {
        return Ok(None);
    };
    // Left behind by an earlier life of the device.
    if header.pool != label.pool {
        return Ok(None);
    }
    if header.device != label.device {
        return Err(MediaError::Copied);
    }
    let configuration = known.decode(configuration)?;
    let same = configuration.pool == header.pool
        && configuration.epoch == header.epoch
        && configuration.incarnations.last().map(|last| last.id) == Some(header.incarnation);
    if !same {
        let object = "the pool".to_owned();
        let problem = "the slot's header says otherwise";
        return Err(DecodeError::Malformed { object, problem }.into());
    }
    Ok(Some(Held {
        header,
        configuration,
    }))
}

/// A device as it is found.
pub(crate) type Opened<D> = (Media<D>, LabelCopies, Option<Held>);

/// Reads label and slots; writes nothing.
pub(crate) async fn open<D: BlockDevice>(device: &Rc<D>, known: &Known) -> Result<Opened<D>, MediaError> {
    let (label, copies) = read_labels(&**device).await?;
    let mut newest: Option<(usize, Held)> = None;
    let mut failed = None;
    for number in [0, 1] {
        match read_slot(&**device, &label, number, known).await {
            Ok(Some(held)) => {
                let newer = newest
                    .as_ref()
                    .is_none_or(|(_, best)| best.header.sequence < held.header.sequence);
                if newer {
                    newest = Some((number, held));
                }
            }
            Ok(None) => {}
            Err(error) => failed = Some(error),
        }
    }
    // If one slot cannot be read, nobody knows whether the other one is the newest.
    if let Some(error) = failed {
        return Err(error);
    }
    let media = Media {
        device: Rc::clone(device),
        label,
        sequence: newest.as_ref().map_or(0, |(_, held)| held.header.sequence),
        next: newest.as_ref().map_or(0, |(number, _)| 1 - number),
    };
    Ok((media, copies, newest.map(|(_, held)| held)))
}

impl<D: BlockDevice> Media<D> {
    /// Writes both copies of the label, whichever is bad.
    pub(crate) async fn repair_label(&self, copies: LabelCopies) -> Result<(), IoError> {
        let offset = match copies {
            LabelCopies::BothGood => return Ok(()),
            LabelCopies::PrimaryBad => 0,
            LabelCopies::CopyBad => self.label.copy_offset(),
        };
        warn!(device = %self.label.device, offset, "a damaged copy of the label is repaired from the other one");
        write_label(&*self.device, &self.label, offset).await
    }

    /// Writes the slot that does not hold the newest valid configuration, durably.
    pub(crate) async fn put(&mut self, header: Header, configuration: &[u8]) -> Result<(), IoError> {
        let sequence = self.sequence + 1;
        let header = Header {
            pool: self.label.pool,
            device: self.label.device,
            sequence,
            ..header
        };
        let size = slot::size(&header.previous, configuration.len());
        let head = header.encode(configuration);
        let mut buffer = AlignedBuffer::new(usize::try_from(size).unwrap_or(usize::MAX));
        let (start, rest) = buffer.as_mut_slice().split_at_mut(head.len());
        start.copy_from_slice(&head);
        rest[..configuration.len()].copy_from_slice(configuration);
        let offset = self.label.slot_offset(self.next);
        bytes::write(&*self.device, offset, &buffer, Durability::Durable).await?;
        self.sequence = sequence;
        self.next = 1 - self.next;
        Ok(())
    }
}

async fn write_label<D: BlockDevice>(device: &D, label: &Label, offset: u64) -> Result<(), IoError> {
    let mut buffer = AlignedBuffer::new(LABEL_SIZE);
    buffer.as_mut_slice().copy_from_slice(&label.encode());
    bytes::write(device, offset, &buffer, Durability::Durable).await
}

/// Why a device cannot become one of a pool.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// It fails.
    #[error(transparent)]
    Io(#[from] IoError),
    /// There is no room for the private region.
    #[error("the device has {0} bytes, and at least 4 MiB are needed")]
    TooSmall(u64),
    /// It cannot be written.
    #[error("the device is read-only")]
    ReadOnly,
    /// A block would be larger than the unit of our metadata.
    #[error("the device has blocks of {0} bytes, and at most 4096 are supported")]
    BlockSize(u32),
}

/// Makes `device` one of a pool: empties its private region, then writes the label. Destroys whatever was there: ask
/// [`inspect`](super::inspect()) first. A crash leaves a device that is blank, or has the label and no configuration.
///
/// # Errors
/// The device fails, or is none for a pool.
pub async fn format_device<D: BlockDevice>(
    device: &D,
    identity: crate::model::Uuid,
    pool: crate::model::Uuid,
    pool_name: &str,
) -> Result<Label, FormatError> {
    let geometry = device.geometry();
    if geometry.read_only {
        return Err(FormatError::ReadOnly);
    }
    if u64::from(geometry.logical_block) > BLOCK {
        return Err(FormatError::BlockSize(geometry.logical_block));
    }
    // What does not fill a block at the end is not used.
    let size = geometry.size / BLOCK * BLOCK;
    let label = Label::new(identity, pool, pool_name, size, geometry.logical_block);
    let label = label.ok_or(FormatError::TooSmall(size))?;
    // First of all the label that may be there: what follows makes its device unusable.
    device.write_zeroes(0, BLOCK, ZeroMode::MayUnmap).await?;
    device
        .write_zeroes(label.copy_offset(), BLOCK, ZeroMode::MayUnmap)
        .await?;
    device.flush().await?;
    device
        .write_zeroes(0, label.data_start, ZeroMode::MayUnmap)
        .await?;
    device.flush().await?;
    write_label(device, &label, label.copy_offset()).await?;
    write_label(device, &label, 0).await?;
    Ok(label)
}
