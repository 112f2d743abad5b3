//! Where the bytes of a file are on its disk: `FS_IOC_FIEMAP` (linux/fiemap.h, filesystems/fiemap in the kernel's documentation).
//!
//! Only what the file system says without reservation is taken from the disk: bytes that it keeps in another form (compressed, enciphered,
//! beside other data) or of which it does not know where they are, are read through the file system instead.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// `FS_IOC_FIEMAP`.
const FIEMAP: libc::Ioctl = 0xc020_660b;
/// Extents that are asked for at once.
const BATCH: usize = 256;

/// Flags of an extent.
const LAST: u32 = 0x0001;
const UNKNOWN: u32 = 0x0002;
const DELALLOC: u32 = 0x0004;
const ENCODED: u32 = 0x0008;
const ENCRYPTED: u32 = 0x0080;
const NOT_ALIGNED: u32 = 0x0100;
const INLINE: u32 = 0x0200;
const TAIL: u32 = 0x0400;
const UNWRITTEN: u32 = 0x0800;
/// Joined from blocks that are mapped one by one; shared with other files. What is on the disk is what the file has.
const MERGED: u32 = 0x1000;
const SHARED: u32 = 0x2000;

/// `struct fiemap_extent`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct RawExtent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

/// `struct fiemap` with room for extents.
#[repr(C)]
struct RawMap {
    start: u64,
    length: u64,
    flags: u32,
    mapped: u32,
    count: u32,
    reserved: u32,
    extents: [RawExtent; BATCH],
}

/// How the bytes of a part of a file are had. What no piece has is a hole: zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Piece {
    /// Zeroes for which there is room on the disk.
    Zeroes { offset: u64, length: u64 },
    /// On the disk, from this byte on.
    Disk { offset: u64, length: u64, start: u64 },
    /// Only through the file system.
    Content { offset: u64, length: u64 },
}

/// The part of a disk on which a file system is, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) start: u64,
    pub(crate) length: u64,
}

/// What an extent of a file of `size` bytes is; none if all of it is behind the file's end.
fn piece(extent: &RawExtent, size: u64, span: Span) -> Option<Piece> {
    let offset = extent.logical;
    let length = extent.length.min(size.checked_sub(offset)?);
    if length == 0 {
        return None;
    }
    let odd = UNKNOWN | DELALLOC | ENCODED | ENCRYPTED | NOT_ALIGNED | INLINE | TAIL;
    // Nor what a later kernel may say.
    let unknown = !(LAST | UNWRITTEN | MERGED | SHARED | odd);
    if extent.flags & (odd | unknown) != 0 {
        return Some(Piece::Content { offset, length });
    }
    if extent.flags & UNWRITTEN != 0 {
        return Some(Piece::Zeroes { offset, length });
    }
    let end = extent.physical.checked_add(extent.length);
    let start = span.start.checked_add(extent.physical);
    match (start, end) {
        (Some(start), Some(end))
            if end <= span.length && start.is_multiple_of(512) && offset.is_multiple_of(512) =>
        {
            Some(Piece::Disk {
                offset,
                length,
                start,
            })
        }
        // Not on this disk.
        _ => Some(Piece::Content { offset, length }),
    }
}

/// Joins what lies one behind the other.
fn push(pieces: &mut Vec<Piece>, next: Piece) {
    let joined = match (pieces.last().copied(), next) {
        (
            Some(Piece::Disk {
                offset,
                length,
                start,
            }),
            Piece::Disk {
                offset: next,
                length: more,
                start: from,
            },
        ) if offset + length == next && start + length == from => Some(Piece::Disk {
            offset,
            length: length + more,
            start,
        }),
        (
            Some(Piece::Content { offset, length }),
            Piece::Content {
                offset: next,
                length: more,
            },
        ) if offset + length == next => Some(Piece::Content {
            offset,
            length: length + more,
        }),
        _ => None,
    };
    match (joined, pieces.last_mut()) {
        (Some(joined), Some(last)) => *last = joined,
        _ => pieces.push(next),
    }
}

/// The pieces of a file of `size` bytes on a file system at `span` of its disk, in order and not overlapping. A file system that cannot tell
/// has its files read through it.
///
/// # Errors
/// Those of the system.
pub(crate) fn pieces(file: &File, size: u64, span: Span) -> io::Result<Vec<Piece>> {
    let mut pieces = Vec::new();
    let mut from = 0;
    while from < size {
        let mut map = RawMap {
            start: from,
            length: u64::MAX - from,
            flags: 0,
            mapped: 0,
            count: u32::try_from(BATCH).unwrap_or(0),
            reserved: 0,
            extents: [RawExtent::default(); BATCH],
        };
        // SAFETY: the memory is as the kernel wants it, with room for as many extents as it says, and lives until the call returns.
        if unsafe { libc::ioctl(file.as_raw_fd(), FIEMAP, &raw mut map) } < 0 {
            let error = io::Error::last_os_error();
            return match error.raw_os_error() {
                Some(libc::EOPNOTSUPP | libc::ENOTTY | libc::EBADR) => Ok(whole(size)),
                _ => Err(error),
            };
        }
        let count = usize::try_from(map.mapped).unwrap_or(usize::MAX).min(BATCH);
        let Some(found) = map.extents.get(..count).filter(|found| !found.is_empty()) else {
            break;
        };
        for extent in found {
            let end = extent.logical.checked_add(extent.length);
            let Some(end) = end.filter(|end| extent.logical >= from && *end > from) else {
                // An order that is none: nothing of it is believed.
                return Ok(whole(size));
            };
            from = end;
            if let Some(piece) = piece(extent, size, span) {
                push(&mut pieces, piece);
            }
        }
        if found.last().is_some_and(|last| last.flags & LAST != 0) {
            break;
        }
    }
    Ok(pieces)
}

fn whole(size: u64) -> Vec<Piece> {
    vec![Piece::Content {
        offset: 0,
        length: size,
    }]
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    const SPAN: Span = Span {
        start: 1 << 20,
        length: 1 << 30,
    };

    fn raw(logical: u64, physical: u64, length: u64, flags: u32) -> RawExtent {
        RawExtent {
            logical,
            physical,
            length,
            flags,
            ..RawExtent::default()
        }
    }

    #[test]
    fn the_structures_are_the_kernels() {
        assert_eq!(size_of::<RawExtent>(), 56);
        assert_eq!(std::mem::offset_of!(RawMap, extents), 32);
    }

    #[test]
    fn the_table_of_flags() {
        let disk = |length| {
            Some(Piece::Disk {
                offset: 4096,
                length,
                start: (1 << 20) + 8192,
            })
        };
        let content = |length| Some(Piece::Content { offset: 4096, length });
        let zeroes = |length| Some(Piece::Zeroes { offset: 4096, length });
        for (flags, expected) in [
            (0, disk(4096)),
            (LAST, disk(4096)),
            (MERGED | SHARED, disk(4096)),
            (UNWRITTEN | LAST, zeroes(4096)),
            (UNKNOWN | DELALLOC, content(4096)),
            (UNWRITTEN | UNKNOWN, content(4096)),
            (ENCODED, content(4096)),
            (ENCODED | ENCRYPTED, content(4096)),
            (NOT_ALIGNED | INLINE, content(4096)),
            (NOT_ALIGNED | TAIL, content(4096)),
            (1 << 20, content(4096)),
        ] {
            assert_eq!(
                piece(&raw(4096, 8192, 4096, flags), 1 << 20, SPAN),
                expected,
                "{flags:x}"
            );
        }
        // The file's end.
        assert_eq!(piece(&raw(4096, 8192, 4096, 0), 5000, SPAN), disk(904));
        assert_eq!(piece(&raw(4096, 8192, 4096, 0), 4096, SPAN), None);
        assert_eq!(piece(&raw(4096, 8192, 4096, 0), 1, SPAN), None);
        // Not on the disk, or not in its sectors.
        assert_eq!(piece(&raw(4096, 1 << 30, 4096, 0), 1 << 20, SPAN), content(4096));
        assert_eq!(piece(&raw(4096, u64::MAX, 4096, 0), 1 << 20, SPAN), content(4096));
        assert_eq!(piece(&raw(4096, 100, 4096, 0), 1 << 20, SPAN), content(4096));
    }

    #[test]
    fn what_lies_together_is_one_piece() {
        let mut pieces = Vec::new();
        for extent in [
            raw(0, 0, 4096, 0),
            raw(4096, 4096, 4096, 0),
            raw(8192, 0, 4096, 0),
        ] {
            push(&mut pieces, piece(&extent, 1 << 20, SPAN).unwrap());
        }
        assert_eq!(pieces.len(), 2);
        assert!(matches!(pieces[0], Piece::Disk { length: 8192, .. }));
    }

    #[test]
    fn pieces_of_a_real_file_are_in_order_and_within_it() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[1; 10_000]).unwrap();
        file.sync_all().unwrap();
        let span = Span {
            start: 0,
            length: u64::MAX,
        };
        let mut at = 0;
        for piece in pieces(&file, 10_000, span).unwrap() {
            let (Piece::Zeroes { offset, length }
            | Piece::Disk { offset, length, .. }
            | Piece::Content { offset, length }) = piece;
            assert!(offset >= at && length > 0);
            at = offset + length;
        }
        assert!(at <= 10_000);
        assert_eq!(pieces(&file, 0, span).unwrap(), []);
    }
}
