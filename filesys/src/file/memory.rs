//! Parts of scatter lists, and memory of our own.

use block_io::{AlignedBuffer, IoBuf};

/// Sum of the lengths.
pub(crate) fn length(buffers: &[IoBuf]) -> u64 {
    buffers.iter().map(|buffer| buffer.len() as u64).sum()
}

/// `length` bytes of the list from byte `skip` on.
pub(crate) fn part(buffers: &[IoBuf], skip: u64, length: u64) -> Vec<IoBuf> {
    let mut skip = usize::try_from(skip).unwrap_or(usize::MAX);
    let mut rest = usize::try_from(length).unwrap_or(usize::MAX);
    let mut parts = Vec::new();
    for buffer in buffers {
        if rest == 0 {
            break;
        }
        if skip >= buffer.len() {
            skip -= buffer.len();
            continue;
        }
        let piece = buffer.slice(skip, rest);
        skip = 0;
        rest -= piece.len();
        parts.push(piece);
    }
    parts
}

/// Copies the list into `target`; both are equally long.
pub(crate) fn gather(buffers: &[IoBuf], target: &mut [u8]) {
    let mut start = 0;
    for buffer in buffers {
        let end = (start + buffer.len()).min(target.len());
        if let Some(part) = target.get_mut(start..end) {
            buffer.copy_to_slice(part);
        }
        start = end;
    }
}

/// Copies `source` into the list; both are equally long.
pub(crate) fn scatter(buffers: &[IoBuf], source: &[u8]) {
    let mut start = 0;
    for buffer in buffers {
        let end = (start + buffer.len()).min(source.len());
        if let Some(part) = source.get(start..end) {
            buffer.copy_from_slice(part);
        }
        start = end;
    }
}

/// All of a buffer as memory for one request.
pub(crate) fn whole(buffer: &AlignedBuffer) -> [IoBuf; 1] {
    // SAFETY: the callers keep the buffer, and do not use it otherwise, until the request that gets this has ended.
    [unsafe { buffer.io(0, buffer.as_slice().len()) }]
}
