//! What goes over the connection.
//!
//! ```text
//!   0      1      4          8                16
//!   │ kind │ 0    │ length   │ offset         │ `length` bytes          little-endian
//! ```
//!
//! | kind | | offset | bytes |
//! |---|---|---|---|
//! | 1 piece | some bytes of the disk, in order | where | at most 1 MiB |
//! | 2 size | the disk has so many bytes | the size | |
//! | 3 end | no more pieces, or: they are the same | | |
//! | 4 work | how far it is | of all bytes, so many are done | JSON |
//! | 5 done | what came of it: the last one | | JSON |
//! | 6 problem | why there are no more pieces, or that they differ | | JSON |

use std::io::{self, Read, Write};

use api::Problem;
use api::virtual_disk::Transferred;
use block_io::AlignedBuffer;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::conversation::Work;
use crate::disks_transfer::{PIECE, Piece};

const HEAD: usize = 16;
/// The longest text in bytes.
const MAX_TEXT: usize = 1 << 20;
const SECTOR: u64 = 512;

/// A frame.
pub(super) enum Frame {
    Piece(Piece),
    Size(u64),
    End,
    Work(Work),
    Done(Box<Result<Transferred, Problem>>),
    Problem(Box<Problem>),
}

impl Frame {
    /// Writes it whole.
    pub(super) fn write(&self, to: &mut impl Write) -> io::Result<()> {
        match self {
            Self::Piece(piece) => put(to, 1, piece.offset, piece.bytes()),
            Self::Size(size) => put(to, 2, *size, &[]),
            Self::End => put(to, 3, 0, &[]),
            Self::Work(work) => put(to, 4, work.done, &json(&(&work.what, work.total))?),
            Self::Done(done) => put(to, 5, 0, &json(done)?),
            Self::Problem(problem) => put(to, 6, 0, &json(problem)?),
        }
    }

    /// Reads the next one. None at the end.
    ///
    /// # Errors
    /// The connection breaks, or the other side says something that makes no sense.
    pub(super) fn read(from: &mut impl Read) -> io::Result<Option<Self>> {
        let mut head = [0; HEAD];
        if !fill(from, &mut head)? {
            return Ok(None);
        }
        let [kind, z0, z1, z2, l0, l1, l2, l3, offset @ ..] = head;
        let length = usize::try_from(u32::from_le_bytes([l0, l1, l2, l3])).map_err(io::Error::other)?;
        let offset = u64::from_le_bytes(offset);
        let most = match kind {
            1 => usize::try_from(PIECE).map_err(io::Error::other)?,
            2 | 3 => 0,
            4..=6 => MAX_TEXT,
            _ => return Err(nonsense("a frame of an unknown kind")),
        };
        if [z0, z1, z2] != [0; 3] || length > most || (kind == 1 && length == 0) {
            return Err(nonsense("a frame of an impossible length"));
        }
        Ok(Some(match kind {
            1 => {
                let mut buffer = AlignedBuffer::new(length.next_multiple_of(512));
                if let Some(target) = buffer.as_mut_slice().get_mut(..length) {
                    from.read_exact(target)?;
                }
                Self::Piece(Piece {
                    offset,
                    buffer,
                    length,
                })
            }
            2 => Self::Size(offset),
            3 => Self::End,
            4 => {
                let (what, total) = text(from, length)?;
                let done = offset;
                Self::Work(Work { what, done, total })
            }
            5 => Self::Done(text(from, length)?),
            _ => Self::Problem(text(from, length)?),
        }))
    }
}

fn put(to: &mut impl Write, kind: u8, offset: u64, bytes: &[u8]) -> io::Result<()> {
    let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
    let mut head = vec![kind, 0, 0, 0];
    head.extend(length.to_le_bytes());
    head.extend(offset.to_le_bytes());
    to.write_all(&head)?;
    to.write_all(bytes)
}

/// False if there was an end before the first byte.
fn fill(from: &mut impl Read, mut target: &mut [u8]) -> io::Result<bool> {
    let whole = target.len();
    while !target.is_empty() {
        match from.read(target) {
            Ok(0) if target.len() == whole => return Ok(false),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => target = target.get_mut(count..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

fn json(value: &impl Serialize) -> io::Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(io::Error::other)
}

fn text<T: DeserializeOwned>(from: &mut impl Read, length: usize) -> io::Result<T> {
    let mut bytes = vec![0; length];
    from.read_exact(&mut bytes)?;
    serde_json::from_slice(&bytes).map_err(|_| nonsense("a text that is not one of smsvmm's"))
}

pub(super) fn nonsense(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the other side sent {what}; is it of this version?"),
    )
}

/// Pieces come in the order of the disk, none twice, and none lies behind its end.
pub(super) struct Order {
    at: u64,
    size: u64,
}

impl Order {
    /// Of a disk of `size` bytes.
    pub(super) fn new(size: u64) -> Self {
        Self { at: 0, size }
    }

    /// The same disk from its beginning.
    pub(super) fn again(&mut self) {
        self.at = 0;
    }

    /// Whether the piece can be the next one.
    pub(super) fn check(&mut self, piece: &Piece) -> io::Result<()> {
        let length = u64::try_from(piece.length).map_err(io::Error::other)?;
        let end = piece.offset.checked_add(length).filter(|end| *end <= self.size);
        match end {
            Some(end) if piece.offset >= self.at && piece.offset.is_multiple_of(SECTOR) => {
                // The rest of a sector is zeroes.
                self.at = end.checked_next_multiple_of(SECTOR).unwrap_or(end);
                Ok(())
            }
            _ => Err(nonsense("a piece that cannot lie there")),
        }
    }
}

#[cfg(test)]
mod tests {
    use api::ProblemKind;

    use super::*;

    fn piece(offset: u64, length: usize) -> Piece {
        let mut buffer = AlignedBuffer::new(length.next_multiple_of(512));
        buffer.as_mut_slice().fill(7);
        Piece {
            offset,
            buffer,
            length,
        }
    }

    fn bytes(frame: &Frame) -> Vec<u8> {
        let mut bytes = Vec::new();
        frame.write(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn every_frame_arrives_as_it_was() {
        let problem = Problem::new(ProblemKind::Exhausted, "no space").about("/a.dsk");
        let work = Work {
            what: "import /a.dsk".into(),
            done: 5,
            total: 9,
        };
        let frames = [
            Frame::Piece(piece(4096, 700)),
            Frame::Size(1 << 40),
            Frame::End,
            Frame::Work(work.clone()),
            Frame::Problem(Box::new(problem.clone())),
            Frame::Done(Box::new(Err(problem.clone()))),
        ];
        let all: Vec<u8> = frames.iter().flat_map(bytes).collect();
        let mut from = all.as_slice();
        let mut next = || Frame::read(&mut from).unwrap();
        assert!(
            matches!(next(), Some(Frame::Piece(piece)) if piece.offset == 4096 && piece.bytes() == [7; 700])
        );
        assert!(matches!(next(), Some(Frame::Size(size)) if size == 1 << 40));
        assert!(matches!(next(), Some(Frame::End)));
        assert!(matches!(next(), Some(Frame::Work(found)) if found == work));
        assert!(matches!(next(), Some(Frame::Problem(found)) if *found == problem));
        assert!(matches!(next(), Some(Frame::Done(found)) if found.as_ref().as_ref() == Err(&problem)));
        assert!(next().is_none());
    }

    #[test]
    fn frames_that_make_no_sense_are_refused() {
        let good = bytes(&Frame::Piece(piece(0, 512)));
        for end in 1..good.len() {
            assert!(Frame::read(&mut &good[..end]).is_err(), "cut at {end}");
        }
        for (place, value) in [(0, 0), (0, 7), (1, 1), (3, 1), (6, 0x20), (7, 0xff)] {
            let mut bad = good.clone();
            bad[place] = value;
            assert!(
                Frame::read(&mut bad.as_slice()).is_err(),
                "byte {place} is {value}"
            );
        }
        let mut empty = good.clone();
        empty[4..8].fill(0);
        assert!(Frame::read(&mut empty.as_slice()).is_err());
        let mut text = bytes(&Frame::Problem(Box::new(Problem::new(ProblemKind::Host, "x"))));
        text[HEAD] = b'!';
        assert!(Frame::read(&mut text.as_slice()).is_err());
    }

    #[test]
    fn pieces_come_in_order_and_within_the_disk() {
        let mut order = Order::new(10_000);
        order.check(&piece(0, 700)).unwrap();
        // The second sector was filled up by the first piece.
        assert!(order.check(&piece(512, 512)).is_err());
        order.check(&piece(1024, 512)).unwrap();
        assert!(order.check(&piece(1024, 512)).is_err());
        assert!(order.check(&piece(2000, 48)).is_err());
        assert!(order.check(&piece(9728, 512)).is_err());
        assert!(order.check(&piece(u64::MAX - 511, 512)).is_err());
        order.check(&piece(9728, 272)).unwrap();
    }
}
