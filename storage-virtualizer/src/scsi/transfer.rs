//! Data to and from the initiator.
//!
//! What a command wants to move and what the transport has room for are two numbers, and both are right: the smaller one is
//! moved, the transport tells of the difference (SPC-4 §4.3.5.6: allocation length; SAM-5 §5.4.3: residuals).

use std::borrow::Cow;

use block_io::{IoBuf, list};

use super::sense::Sense;
use super::{Check, Command};

/// What a command moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Moved {
    /// What it would have moved with enough room.
    pub(super) wanted: u64,
    /// What it has moved.
    pub(super) moved: u64,
}

impl Moved {
    pub(super) const NOTHING: Self = Self { wanted: 0, moved: 0 };

    pub(super) fn all(length: u64) -> Self {
        Self {
            wanted: length,
            moved: length,
        }
    }
}

/// Puts parameter data into the buffer, cut to the allocation length.
pub(super) fn put(command: &Command<'_>, data: &[u8], allocation: u64) -> Moved {
    let wanted = (data.len() as u64).min(allocation);
    let data = data
        .get(..usize::try_from(wanted).unwrap_or(usize::MAX))
        .unwrap_or(data);
    list::scatter(command.data_in, 0, data);
    Moved {
        wanted,
        moved: wanted.min(list::total_length(command.data_in)),
    }
}

/// The longest parameter list that any command takes.
const MAX_PARAMETERS: u64 = 1 << 16;

/// Takes a parameter list of `length` bytes. One of which not everything came is an error, as nothing of it can be used.
pub(super) fn take(command: &Command<'_>, length: u64) -> Check<Vec<u8>> {
    if length > MAX_PARAMETERS || length > list::total_length(command.data_out) {
        return Err(Sense::illegal(super::Code::PARAMETER_LIST_LENGTH_ERROR).into());
    }
    let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
    list::gather(command.data_out, 0, &mut bytes);
    Ok(bytes)
}

/// The first `length` bytes of the list.
pub(super) fn first(buffers: &[IoBuf], length: u64) -> Cow<'_, [IoBuf]> {
    if list::total_length(buffers) == length {
        return Cow::Borrowed(buffers);
    }
    part(buffers, 0, length).into()
}

/// `length` bytes of the list from byte `start` on, or what there is of them.
pub(super) fn part(buffers: &[IoBuf], start: u64, length: u64) -> Vec<IoBuf> {
    let mut left = usize::try_from(length).unwrap_or(usize::MAX);
    let mut result = Vec::new();
    for buffer in list::after(buffers, start) {
        if left == 0 {
            break;
        }
        let piece = buffer.slice(0, left);
        left -= piece.len();
        result.push(piece);
    }
    result
}

/// Big-endian numbers of CDBs and parameter lists; bytes that are not there are zeroes.
pub(super) mod number {
    fn take<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
        let mut result = [0; N];
        for (index, byte) in result.iter_mut().enumerate() {
            *byte = bytes.get(at + index).copied().unwrap_or(0);
        }
        result
    }

    pub(crate) fn u16(bytes: &[u8], at: usize) -> u16 {
        u16::from_be_bytes(take(bytes, at))
    }

    pub(crate) fn u24(bytes: &[u8], at: usize) -> u32 {
        let [a, b, c] = take(bytes, at);
        u32::from_be_bytes([0, a, b, c])
    }

    pub(crate) fn u32(bytes: &[u8], at: usize) -> u32 {
        u32::from_be_bytes(take(bytes, at))
    }

    pub(crate) fn u64(bytes: &[u8], at: usize) -> u64 {
        u64::from_be_bytes(take(bytes, at))
    }
}

/// `length` as the 16-bit number of a parameter list's header.
pub(super) fn length16(length: usize) -> [u8; 2] {
    u16::try_from(length).unwrap_or(u16::MAX).to_be_bytes()
}

/// `length` as the 32-bit number of a parameter list's header.
pub(super) fn length32(length: usize) -> [u8; 4] {
    u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes()
}
