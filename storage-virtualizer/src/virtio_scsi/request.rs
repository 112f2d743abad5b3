//! Requests and responses as they lie in memory (virtio 1.2 §5.6.6).
//!
//! ```text
//!   command   readable: lun[8] tag u64 attribute u8 priority u8 crn u8 cdb[cdb_size], data to the unit
//!             writable: sense_len u32 residual u32 qualifier u16 status u8 response u8 sense[sense_size], data from the unit
//!   control   readable: type u32 …      writable: … response u8
//! ```
//! How these are cut into descriptors is the driver's choice.

use block_io::{IoBuf, list};

use super::config::{MAX_CDB_SIZE, MAX_SENSE_SIZE, Sizes};
use crate::chain::Buffers;
use crate::scsi::{Outcome, Residual};

/// Bytes of a command before its CDB.
const HEADER: usize = 19;
/// Bytes of a response before its sense data.
const RESPONSE: usize = 12;
/// Bytes of a task management request.
const TASK: usize = 24;
/// Bytes of a request about asynchronous notifications.
const NOTIFICATION: u64 = 16;

/// How the adapter did with a request (virtio 1.2 §5.6.6.1.1, §5.6.6.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Response {
    /// Delivered; for task management, done.
    Ok = 0,
    /// The command wanted to move more than there was memory for.
    Overrun = 1,
    /// Ended by task management.
    Aborted = 2,
    /// There is no such target.
    BadTarget = 3,
    /// Task management was done, though there was nothing to do.
    FunctionSucceeded = 10,
    /// There is no such function.
    FunctionRejected = 11,
    /// There is no such logical unit.
    IncorrectLun = 12,
}

/// Where a response goes: the first bytes of the memory that the device writes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Front<'a> {
    whole: &'a [IoBuf],
    /// Of the piece in which it ends, if it does not end between two.
    last: Option<IoBuf>,
    length: usize,
}

impl Front<'_> {
    fn put(&self, bytes: &[u8]) {
        list::scatter(self.whole, 0, bytes);
        if let Some(last) = self.last {
            let before = self.whole.iter().map(IoBuf::len).sum();
            last.copy_from_slice(bytes.get(before..).unwrap_or_default());
        }
    }
}

/// Cuts the first `length` bytes off `pieces`.
fn split(pieces: &mut [IoBuf], length: usize) -> Option<(Front<'_>, &[IoBuf])> {
    let mut before = 0;
    for index in 0..pieces.len() {
        let piece = pieces[index];
        let inside = length - before;
        if inside == 0 || piece.len() > inside {
            pieces[index] = piece.slice(inside, usize::MAX);
            let (whole, data) = pieces.split_at(index);
            let last = (inside > 0).then(|| piece.slice(0, inside));
            return Some((Front { whole, last, length }, data));
        }
        before += piece.len();
    }
    let front = Front {
        whole: pieces,
        last: None,
        length,
    };
    (before == length).then_some((front, &[]))
}

/// How a command stands to others of its unit (SAM-5 §8.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Attribute {
    /// In any order, or at once, which here is the same.
    Simple,
    /// Another: not supported.
    Other,
}

/// A command of the driver.
#[derive(Debug)]
pub(super) struct Request<'a> {
    /// Adapter-wide address: 1, target, LUN in two bytes, zeroes.
    pub(super) address: [u8; 8],
    pub(super) tag: u64,
    pub(super) attribute: Attribute,
    cdb: [u8; MAX_CDB_SIZE],
    cdb_length: usize,
    response: Front<'a>,
    sense_size: usize,
    pub(super) data_out: &'a [IoBuf],
    pub(super) data_in: &'a [IoBuf],
}

impl<'a> Request<'a> {
    /// Decodes the chain in `buffers`; none if it has not even room for a response.
    pub(super) fn decode(buffers: &'a mut Buffers, sizes: &Sizes) -> Option<Self> {
        let (readable, writable) = buffers.split_mut();
        let (cdb_length, sense_size) = (sizes.cdb(), sizes.sense());
        let mut bytes = [0; HEADER + MAX_CDB_SIZE];
        list::gather(readable, 0, &mut bytes[..HEADER + cdb_length]);
        let (_, data_out) = split(readable, HEADER + cdb_length)?;
        let (response, data_in) = split(writable, RESPONSE + sense_size)?;
        let (header, cdb) = bytes.split_first_chunk::<HEADER>()?;
        Some(Self {
            address: *header.first_chunk()?,
            tag: u64::from_le_bytes(*header[8..].first_chunk()?),
            // 0 simple, 1 ordered, 2 head of queue, 3 ACA.
            attribute: match header[16] {
                0 | 2 => Attribute::Simple,
                _ => Attribute::Other,
            },
            cdb: *cdb.first_chunk()?,
            cdb_length,
            response,
            sense_size,
            data_out,
            data_in,
        })
    }

    /// The command descriptor block.
    pub(super) fn cdb(&self) -> &[u8] {
        &self.cdb[..self.cdb_length]
    }

    /// Tells what came of it. Returns the bytes of memory that are written.
    pub(super) fn answer(&self, outcome: &Outcome) -> u32 {
        let expected = match self.data_in {
            [] => list::total_length(self.data_out),
            data_in => list::total_length(data_in),
        };
        let (response, residual) = match outcome.residual(expected) {
            Residual::None => (Response::Ok, 0),
            Residual::Underflow(bytes) => (Response::Ok, bytes),
            Residual::Overflow(bytes) => (Response::Overrun, bytes),
        };
        let sense = outcome.sense.as_slice();
        let sense = &sense[..sense.len().min(self.sense_size)];
        self.put(response, residual, outcome.status as u8, sense);
        let moved = if self.data_in.is_empty() { 0 } else { outcome.moved };
        u32::try_from(moved + self.response.length as u64).unwrap_or(u32::MAX)
    }

    /// Tells that the command was not delivered, or ended otherwise than by itself. Returns the bytes of memory that are
    /// written.
    pub(super) fn refuse(&self, response: Response) -> u32 {
        self.put(response, 0, 0, &[]);
        u32::try_from(self.response.length).unwrap_or(u32::MAX)
    }

    fn put(&self, response: Response, residual: u64, status: u8, sense: &[u8]) {
        let mut bytes = [0; RESPONSE + MAX_SENSE_SIZE];
        bytes[..4].copy_from_slice(&u32::try_from(sense.len()).unwrap_or(0).to_le_bytes());
        bytes[4..8].copy_from_slice(&u32::try_from(residual).unwrap_or(u32::MAX).to_le_bytes());
        bytes[10] = status;
        bytes[11] = response as u8;
        bytes[RESPONSE..RESPONSE + sense.len()].copy_from_slice(sense);
        self.response.put(&bytes[..RESPONSE + self.sense_size]);
    }
}

/// A request of the control queue.
#[derive(Debug)]
pub(super) struct ControlRequest<'a> {
    pub(super) kind: ControlKind,
    response: Front<'a>,
}

/// What a request of the control queue asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ControlKind {
    /// Task management (§5.6.6.2.1).
    Task {
        function: u32,
        address: [u8; 8],
        tag: u64,
    },
    /// To be told of events by the unit itself (§5.6.6.2.2), or whether one is to be (3): no unit here has any.
    Notification,
}

impl<'a> ControlRequest<'a> {
    /// Decodes the chain in `buffers`.
    ///
    /// # Errors
    /// Why it cannot even be answered.
    pub(super) fn decode(buffers: &'a mut Buffers) -> Result<Self, &'static str> {
        let (readable, writable) = buffers.split_mut();
        let mut bytes = [0; TASK];
        list::gather(readable, 0, &mut bytes);
        let length = list::total_length(readable);
        let [k0, k1, k2, k3, f0, f1, f2, f3, rest @ ..] = bytes;
        let (kind, room) = match u32::from_le_bytes([k0, k1, k2, k3]) {
            0 if length >= TASK as u64 => {
                let [address @ .., _, _, _, _, _, _, _, _] = rest;
                let [_, _, _, _, _, _, _, _, tag @ ..] = rest;
                let kind = ControlKind::Task {
                    function: u32::from_le_bytes([f0, f1, f2, f3]),
                    address,
                    tag: u64::from_le_bytes(tag),
                };
                (kind, 1)
            }
            1 | 2 if length >= NOTIFICATION => (ControlKind::Notification, 5),
            0..=2 => return Err("a request of the control queue is too short"),
            _ => return Err("there is no such request of the control queue"),
        };
        let (response, _) =
            split(writable, room).ok_or("a request of the control queue cannot be answered")?;
        Ok(Self { kind, response })
    }

    /// Answers. Returns the bytes of memory that are written.
    pub(super) fn answer(&self, response: Response) -> u32 {
        match self.kind {
            ControlKind::Task { .. } => self.response.put(&[response as u8]),
            // No event can be asked for.
            ControlKind::Notification => self.response.put(&[0, 0, 0, 0, response as u8]),
        }
        u32::try_from(self.response.length).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pieces of these lengths over `memory`.
    fn pieces(memory: &mut [u8], lengths: &[usize]) -> Vec<IoBuf> {
        let mut at = 0;
        lengths
            .iter()
            .map(|length| {
                let piece = &mut memory[at..at + length];
                at += length;
                // SAFETY: `memory` outlives the pieces in these tests, and is only looked at when they are not used any more.
                unsafe { IoBuf::new(piece.as_mut_ptr(), piece.len()) }
            })
            .collect()
    }

    #[test]
    fn a_response_ends_where_the_driver_cut_it_or_elsewhere() {
        for lengths in [&[12, 8][..], &[20], &[5, 7, 8], &[5, 10, 5], &[1, 19]] {
            let mut memory = [0; 20];
            let mut pieces = pieces(&mut memory, lengths);
            let (front, data) = split(&mut pieces, 12).unwrap();
            assert_eq!(list::total_length(data), 8, "{lengths:?}");
            front.put(&[7; 12]);
            list::scatter(data, 0, &[9; 8]);
            assert_eq!(memory[..12], [7; 12], "{lengths:?}");
            assert_eq!(memory[12..], [9; 8], "{lengths:?}");
        }
        let mut memory = [0; 12];
        assert!(split(&mut pieces(&mut memory, &[11]), 12).is_none());
        let mut exact = pieces(&mut memory, &[4, 8]);
        let (front, data) = split(&mut exact, 12).unwrap();
        front.put(&[1; 12]);
        assert!(data.is_empty());
        assert_eq!(memory, [1; 12]);
    }
}
