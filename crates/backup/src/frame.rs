//! Frames: what connections and archives are made of.
//!
//! ```text
//!   0       4      6     8        12    16       24       32
//!   │ SMBF  │ kind │ 0   │ length │ crc │ number │ stream │ `length` bytes       little-endian
//! ```
//!
//! `crc` is the CRC-32C of the header, with `crc` zero, and the bytes after it. `number` counts from 0 in each direction of a connection, and in an
//! archive, so that a frame that is lost, doubled or in another place is noticed. `stream` is 0 on a connection; in an archive it is a random
//! number that all its frames have, so that those of another one, left in the same place, are noticed.

use std::io::{self, Read, Write};

/// Bytes of a frame before its payload.
pub const HEAD: usize = 32;
/// Longest payload in bytes.
pub const MAX_PAYLOAD: usize = 4 << 20;
/// Memory for a payload grows by so much at once.
const GROWTH: usize = 64 << 10;
const MAGIC: [u8; 4] = *b"SMBF";

/// A frame that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The connection or file failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It ends within a frame.
    #[error("it ends within frame {number}")]
    Truncated {
        /// The frame.
        number: u64,
    },
    /// What is there is not the frame that should be.
    #[error("frame {number}: {reason}")]
    Wrong {
        /// The frame that should be there.
        number: u64,
        /// Why it is not.
        reason: &'static str,
    },
}

/// What a frame is, beside its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// What the payload means.
    pub kind: u16,
    /// Bytes of the payload.
    pub length: usize,
}

/// Writes frames.
#[derive(Debug)]
pub struct FrameWriter<W> {
    to: W,
    stream: u64,
    number: u64,
}

impl<W: Write> FrameWriter<W> {
    /// Frames of `stream` with numbers from `number` on.
    pub fn new(to: W, stream: u64, number: u64) -> Self {
        Self { to, stream, number }
    }

    /// Writes a frame whose payload are these parts together.
    ///
    /// # Errors
    /// What is below fails, or the payload is longer than [`MAX_PAYLOAD`].
    pub fn write(&mut self, kind: u16, parts: &[&[u8]]) -> io::Result<()> {
        let length: usize = parts.iter().map(|part| part.len()).sum();
        let too_long = || io::Error::new(io::ErrorKind::InvalidInput, "a frame is too long");
        if length > MAX_PAYLOAD {
            return Err(too_long());
        }
        let length = u32::try_from(length).map_err(|_| too_long())?;
        let mut head = [0; HEAD];
        let mut at = 0;
        let mut put = |bytes: &[u8]| {
            if let Some(place) = head.get_mut(at..at + bytes.len()) {
                place.copy_from_slice(bytes);
            }
            at += bytes.len();
        };
        put(&MAGIC);
        put(&kind.to_le_bytes());
        put(&[0; 2]);
        put(&length.to_le_bytes());
        put(&[0; 4]);
        put(&self.number.to_le_bytes());
        put(&self.stream.to_le_bytes());
        let crc = checksum(&head, parts);
        if let Some(place) = head.get_mut(12..16) {
            place.copy_from_slice(&crc.to_le_bytes());
        }
        self.to.write_all(&head)?;
        for part in parts {
            self.to.write_all(part)?;
        }
        self.number += 1;
        Ok(())
    }

    /// What is below.
    pub fn get_mut(&mut self) -> &mut W {
        &mut self.to
    }

    /// What is below.
    pub fn into_inner(self) -> W {
        self.to
    }

    /// The number of the next frame.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// The next frame is this one.
    pub(crate) fn set_number(&mut self, number: u64) {
        self.number = number;
    }
}

fn checksum(head: &[u8; HEAD], parts: &[&[u8]]) -> u32 {
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
    digest.update(head);
    for part in parts {
        digest.update(part);
    }
    // The digest of a 32-bit sum has no more than 32 bits.
    u32::try_from(digest.finalize()).unwrap_or_default()
}

/// Reads frames.
#[derive(Debug)]
pub struct FrameReader<R> {
    from: R,
    stream: Option<u64>,
    number: Option<u64>,
    /// Memory for payloads, as large as the longest yet: clearing it each time would cost as much as filling it.
    payload: Vec<u8>,
    /// Bytes of the last one.
    length: usize,
}

impl<R: Read> FrameReader<R> {
    /// Frames of `stream`, or of the one that the first frame tells, with numbers from `number` on, or from that of the first frame on.
    pub fn new(from: R, stream: Option<u64>, number: Option<u64>) -> Self {
        Self {
            from,
            stream,
            number,
            payload: Vec::new(),
            length: 0,
        }
    }

    /// What is below.
    pub fn get_mut(&mut self) -> &mut R {
        &mut self.from
    }

    /// What is below.
    pub(crate) fn get_ref(&self) -> &R {
        &self.from
    }

    /// The number of the next frame; 0 if that is not known.
    pub fn number(&self) -> u64 {
        self.number.unwrap_or(0)
    }

    /// The stream, if it is known.
    pub fn stream(&self) -> Option<u64> {
        self.stream
    }

    /// Reads the next frame, none at the end. Its payload is `Self::payload`.
    ///
    /// # Errors
    /// What is below fails or ends within the frame, or this is not the frame that should be here. Afterwards nothing that follows can
    /// be read.
    pub fn read(&mut self) -> Result<Option<Head>, FrameError> {
        let number = self.number();
        let wrong = |reason| FrameError::Wrong { number, reason };
        let mut head = [0; HEAD];
        match fill(&mut self.from, &mut head)? {
            0 => return Ok(None),
            HEAD => {}
            _ => return Err(FrameError::Truncated { number }),
        }
        let [
            m0,
            m1,
            m2,
            m3,
            k0,
            k1,
            z0,
            z1,
            l0,
            l1,
            l2,
            l3,
            c0,
            c1,
            c2,
            c3,
            rest @ ..,
        ] = head;
        let [n0, n1, n2, n3, n4, n5, n6, n7, s0, s1, s2, s3, s4, s5, s6, s7] = rest;
        if [m0, m1, m2, m3] != MAGIC {
            return Err(wrong("it does not begin as a frame"));
        }
        let kind = u16::from_le_bytes([k0, k1]);
        let length = usize::try_from(u32::from_le_bytes([l0, l1, l2, l3])).unwrap_or(usize::MAX);
        if length > MAX_PAYLOAD || [z0, z1] != [0; 2] {
            return Err(wrong("its header makes no sense"));
        }
        let found = u64::from_le_bytes([n0, n1, n2, n3, n4, n5, n6, n7]);
        if self.number.is_some_and(|expected| expected != found) {
            return Err(wrong("it has another number"));
        }
        let stream = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        if self.stream.is_some_and(|expected| expected != stream) {
            return Err(wrong("it belongs to another stream"));
        }
        if self.fill_payload(length)? != length {
            return Err(FrameError::Truncated { number });
        }
        let sum = u32::from_le_bytes([c0, c1, c2, c3]);
        if let Some(place) = head.get_mut(12..16) {
            place.fill(0);
        }
        if checksum(&head, &[self.payload()]) != sum {
            return Err(wrong("its checksum is wrong"));
        }
        self.stream = Some(stream);
        self.number = Some(found.wrapping_add(1));
        Ok(Some(Head { kind, length }))
    }

    /// The payload of the frame that was read last.
    pub fn payload(&self) -> &[u8] {
        self.payload.get(..self.length).unwrap_or_default()
    }

    /// Reads as much of a payload as there is.
    fn fill_payload(&mut self, length: usize) -> io::Result<usize> {
        self.length = 0;
        while self.length < length {
            // Memory grows with what has come, not with what is claimed.
            let end = length.min(self.length + GROWTH);
            if self.payload.len() < end {
                self.payload.resize(end, 0);
            }
            let place = self.payload.get_mut(self.length..end).unwrap_or_default();
            let count = fill(&mut self.from, place)?;
            self.length += count;
            if self.length < end {
                break;
            }
        }
        Ok(self.length)
    }
}

/// Reads as much as there is.
fn fill(from: &mut impl Read, target: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while let Some(rest) = target.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match from.read(rest) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two() -> Vec<u8> {
        let mut writer = FrameWriter::new(Vec::new(), 7, 0);
        writer.write(1, &[b"abc", b"de"]).unwrap();
        writer.write(2, &[]).unwrap();
        writer.into_inner()
    }

    #[test]
    fn frames_come_back_as_they_were_written() {
        let bytes = two();
        let mut reader = FrameReader::new(&bytes[..], None, Some(0));
        assert_eq!(reader.read().unwrap(), Some(Head { kind: 1, length: 5 }));
        assert_eq!((reader.payload(), reader.stream()), (&b"abcde"[..], Some(7)));
        assert_eq!(reader.read().unwrap(), Some(Head { kind: 2, length: 0 }));
        assert_eq!(reader.read().unwrap(), None);
    }

    #[test]
    fn every_flipped_bit_and_every_end_within_a_frame_is_noticed() {
        let bytes = two();
        let read = |bytes: &[u8]| {
            let mut reader = FrameReader::new(bytes, Some(7), Some(0));
            while reader.read()?.is_some() {}
            Ok::<_, FrameError>(reader.number())
        };
        assert_eq!(read(&bytes).unwrap(), 2);
        for bit in 0..bytes.len() * 8 {
            let mut bytes = bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(read(&bytes).is_err(), "bit {bit}");
        }
        for length in 1..bytes.len() {
            assert_eq!(read(&bytes[..length]).is_ok(), length == HEAD + 5, "{length}");
        }
        let twice = [&bytes[..HEAD + 5], &bytes[..HEAD + 5]].concat();
        assert!(read(&twice).is_err());
    }
}
