//! Reads the next bytes of a file while those before are used.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::mpsc::{Receiver, sync_channel};

use super::{ALIGN, Buffer, Buffers, open_direct};

/// Bytes that are read at once.
const SIZE: usize = 1 << 20;
/// Pieces that wait to be used.
const AHEAD: usize = 4;

/// A file from its first byte on, read ahead.
#[derive(Debug)]
pub(crate) struct ReadAhead {
    pieces: Receiver<io::Result<Buffer>>,
    piece: Buffer,
    used: usize,
    ended: bool,
}

impl ReadAhead {
    /// The file at `path`.
    ///
    /// # Errors
    /// It cannot be opened, or there are no threads.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        Self::of(&File::open(path)?, path)
    }

    /// This file, which was opened at `path`.
    ///
    /// # Errors
    /// It cannot be opened again, or there are no threads.
    pub(crate) fn of(file: &File, path: &Path) -> io::Result<Self> {
        let through = file.try_clone()?;
        let metadata = through.metadata()?;
        let is_it = |direct: &File| {
            let found = direct.metadata();
            found.is_ok_and(|found| (found.dev(), found.ino()) == (metadata.dev(), metadata.ino()))
        };
        // Another file may have its name now.
        let direct = open_direct(path, OpenOptions::new().read(true)).unwrap_or_default();
        let direct = direct.filter(is_it);
        let (send, pieces) = sync_channel(AHEAD);
        let read = move || {
            let buffers = Buffers::new(AHEAD + 2);
            let mut place = 0;
            loop {
                let piece = read_at(direct.as_ref().unwrap_or(&through), &buffers, place);
                let count = piece.as_ref().map_or(0, |piece| piece.len());
                place += count as u64;
                // Nobody wants it any more, or that was the end.
                if send.send(piece).is_err() || count < SIZE {
                    return;
                }
            }
        };
        std::thread::Builder::new()
            .name("read-ahead".into())
            .spawn(read)?;
        Ok(Self {
            pieces,
            piece: Buffer::from(Vec::new()),
            used: 0,
            ended: false,
        })
    }
}

/// A piece; a short one is the last.
fn read_at(file: &File, buffers: &Buffers, place: u64) -> io::Result<Buffer> {
    let mut piece = buffers.get(SIZE);
    let mut done = 0;
    while let Some(rest) = piece
        .as_mut_slice()
        .get_mut(done..)
        .filter(|rest| !rest.is_empty())
    {
        match file.read_at(rest, place + done as u64) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        }
        if !done.is_multiple_of(ALIGN) {
            // The end: an offset within a block cannot be read.
            break;
        }
    }
    piece.narrow(0, done);
    Ok(piece)
}

impl Read for ReadAhead {
    fn read(&mut self, target: &mut [u8]) -> io::Result<usize> {
        if self.used == self.piece.len() && !self.ended {
            // Given back first, so that it is there for the next one.
            self.piece = Buffer::from(Vec::new());
            self.used = 0;
            match self.pieces.recv() {
                Ok(piece) => self.piece = piece.inspect_err(|_| self.ended = true)?,
                Err(_) => self.ended = true,
            }
        }
        let rest = self.piece.get(self.used..).unwrap_or_default();
        let count = rest.len().min(target.len());
        if let (Some(target), Some(bytes)) = (target.get_mut(..count), rest.get(..count)) {
            target.copy_from_slice(bytes);
        }
        self.used += count;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_any_length_comes_whole_and_may_be_left_in_the_middle() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        for size in [0, 1, 4096, SIZE - 1, SIZE, SIZE + 1, 7 * SIZE + 5000] {
            let bytes: Vec<u8> = (0..size)
                .map(|number| (number / 3 % 251).to_le_bytes()[0])
                .collect();
            std::fs::write(&path, &bytes).unwrap();
            let mut read = Vec::new();
            ReadAhead::open(&path).unwrap().read_to_end(&mut read).unwrap();
            assert!(read == bytes, "{size}");
            let mut first = [0; 10];
            let _ = ReadAhead::open(&path).unwrap().read(&mut first).unwrap();
        }
        assert!(ReadAhead::open(&folder.path().join("none")).is_err());
    }
}
