//! Writes while the next bytes are made.
//!
//! What is put in order fills a buffer; a thread writes full ones, whole blocks past the page cache, while the next one is filled. A tail that is no
//! whole block goes through the page cache, and is written again with what follows it. Files grow from the front: what a program that was
//! killed has left of one is a beginning.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use super::{ALIGN, Buffer, Buffers, open_direct};

/// Bytes that are written at once.
const SIZE: usize = 4 << 20;
/// Buffers: one is filled, one is written, one waits.
const COUNT: usize = 3;

struct Job {
    buffer: Buffer,
    /// Bytes of the buffer that are to be written.
    length: usize,
    /// Where, in the file.
    place: u64,
}

/// A file that is written behind.
#[derive(Debug)]
pub struct WriteBehind {
    file: File,
    /// None when it ends.
    jobs: Option<SyncSender<Job>>,
    done: Receiver<(io::Result<()>, Buffer)>,
    thread: Option<JoinHandle<()>>,
    /// The buffer that is being filled, where its first byte belongs, and how much is in it.
    buffer: Buffer,
    place: u64,
    filled: usize,
    free: Vec<Buffer>,
    /// So many are being written, or wait for that.
    away: usize,
    /// Nothing is written behind what is missing.
    failed: bool,
}

/// How far a place is into its block.
fn into_block(place: u64) -> usize {
    // Less than a block.
    usize::try_from(place % ALIGN as u64).unwrap_or(0)
}

impl WriteBehind {
    /// Writes to `file`, which is that of `path` and can be read, from byte `place` on.
    ///
    /// # Errors
    /// The file cannot be opened again or read, or there are no threads.
    pub(crate) fn new(file: File, path: &Path, place: u64) -> io::Result<Self> {
        let buffers = Buffers::new(0);
        let mut buffer = buffers.get(SIZE);
        // Buffers begin with a whole block: what of that is there already.
        let filled = into_block(place);
        if let Some(head) = buffer
            .as_mut_slice()
            .get_mut(..filled)
            .filter(|head| !head.is_empty())
        {
            file.read_exact_at(head, place - filled as u64)?;
        }
        let direct = open_direct(path, OpenOptions::new().write(true))?;
        let through = file.try_clone()?;
        let (jobs, to_do) = sync_channel::<Job>(COUNT);
        let (tell, done) = sync_channel(COUNT);
        let write = move || {
            for Job {
                buffer,
                length,
                place,
            } in to_do
            {
                let bytes = buffer.get(..length).unwrap_or_default();
                let written = write_at(direct.as_ref(), &through, bytes, place);
                if tell.send((written, buffer)).is_err() {
                    break;
                }
            }
        };
        let thread = std::thread::Builder::new().name("write-behind".into());
        Ok(Self {
            file,
            jobs: Some(jobs),
            done,
            thread: Some(thread.spawn(write)?),
            buffer,
            place: place - filled as u64,
            filled,
            free: (1..COUNT).map(|_| buffers.get(SIZE)).collect(),
            away: 0,
            failed: false,
        })
    }

    /// Puts bytes to a place. Those that follow the last ones are gathered.
    ///
    /// # Errors
    /// Something could not be written, these or others before.
    pub(crate) fn put(&mut self, place: u64, bytes: &[u8]) -> io::Result<()> {
        if place != self.place + self.filled as u64 {
            self.submit()?;
            (self.place, self.filled) = (place, 0);
        }
        self.write_all(bytes)
    }

    /// The file has this length; what was not written to is zero.
    ///
    /// # Errors
    /// It cannot have it.
    pub(crate) fn set_len(&self, length: u64) -> io::Result<()> {
        self.file.set_len(length)
    }

    /// Makes what was written durable.
    ///
    /// # Errors
    /// It could not be written.
    pub(crate) fn sync(&mut self) -> io::Result<()> {
        self.flush()?;
        self.file.sync_all()
    }

    /// Everything that was written from byte `place` on is none any more.
    ///
    /// # Errors
    /// What was written before could not be, or the file cannot be cut.
    pub(crate) fn cut(&mut self, place: u64) -> io::Result<()> {
        self.flush()?;
        self.file.set_len(place)?;
        let filled = into_block(place);
        if let Some(head) = self.buffer.as_mut_slice().get_mut(..filled) {
            self.file.read_exact_at(head, place - filled as u64)?;
        }
        (self.place, self.filled) = (place - filled as u64, filled);
        Ok(())
    }

    /// Waits for one buffer.
    fn back(&mut self) -> io::Result<()> {
        let gone = || io::Error::other("the thread that writes is gone");
        let (written, buffer) = self.done.recv().map_err(|_| gone())?;
        self.away -= 1;
        self.free.push(buffer);
        self.failed |= written.is_err();
        written
    }

    /// Has what was gathered written, and begins behind it; a tail that is no whole block stays.
    fn submit(&mut self) -> io::Result<()> {
        if self.failed {
            return Err(io::Error::other("what was to be written before could not be"));
        }
        if self.filled == 0 {
            return Ok(());
        }
        while self.free.is_empty() {
            self.back()?;
        }
        let Some(mut next) = self.free.pop() else {
            return Ok(());
        };
        let tail = match into_block(self.place) {
            0 => self.filled % ALIGN,
            // It is for the page cache anyway; what follows begins with a block.
            _ => 0,
        };
        let stay = self.filled - tail;
        if let (Some(to), Some(from)) = (
            next.as_mut_slice().get_mut(..tail),
            self.buffer.get(stay..self.filled),
        ) {
            to.copy_from_slice(from);
        }
        let job = Job {
            buffer: std::mem::replace(&mut self.buffer, next),
            length: self.filled,
            place: self.place,
        };
        self.place += stay as u64;
        self.filled = tail;
        self.away += 1;
        let sent = self.jobs.as_ref().is_some_and(|jobs| jobs.send(job).is_ok());
        match sent {
            true => Ok(()),
            false => Err(io::Error::other("the thread that writes is gone")),
        }
    }
}

impl Write for WriteBehind {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // A buffer ends where a block does.
        let end = SIZE - into_block(self.place);
        if self.filled >= end {
            self.submit()?;
        }
        let end = SIZE - into_block(self.place);
        let count = bytes.len().min(end - self.filled);
        let place = self
            .buffer
            .as_mut_slice()
            .get_mut(self.filled..self.filled + count);
        if let (Some(place), Some(bytes)) = (place, bytes.get(..count)) {
            place.copy_from_slice(bytes);
        }
        self.filled += count;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.submit()?;
        while self.away > 0 {
            self.back()?;
        }
        Ok(())
    }
}

impl Drop for WriteBehind {
    fn drop(&mut self) {
        // Who wants to know whether it could be written has asked before.
        let _ = self.flush();
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Whole blocks past the page cache, as far as that can be, and the rest through it.
fn write_at(direct: Option<&File>, through: &File, bytes: &[u8], place: u64) -> io::Result<()> {
    let whole = match into_block(place) {
        0 => bytes.len() / ALIGN * ALIGN,
        _ => 0,
    };
    let (blocks, tail) = bytes.split_at(whole);
    let mut done = 0;
    if let Some(direct) = direct {
        while let Some(rest) = blocks.get(done..).filter(|rest| !rest.is_empty()) {
            match direct.write_at(rest, place + done as u64) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // A device with larger blocks than any that we know.
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => break,
                Err(error) => return Err(error),
            }
        }
    }
    through.write_all_at(blocks.get(done..).unwrap_or_default(), place + done as u64)?;
    through.write_all_at(tail, place + whole as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(seed: u64, size: usize) -> Vec<u8> {
        (0..size as u64)
            .map(|number| ((number + seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56).to_le_bytes()[0])
            .collect()
    }

    fn file(folder: &Path) -> (File, std::path::PathBuf) {
        let path = folder.join("f");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path);
        (file.unwrap(), path)
    }

    #[test]
    fn a_stream_is_whole_with_pieces_flushes_and_goings_on_of_all_lengths() {
        let folder = tempfile::tempdir().unwrap();
        let all = noise(1, 11_000_003);
        let mut at = 0;
        for (number, end) in [1, 5000, 4096 * 3, 6_000_001, 10_000_000, all.len()]
            .into_iter()
            .enumerate()
        {
            let (opened, path) = file(folder.path());
            let mut behind = WriteBehind::new(opened, &path, at as u64).unwrap();
            for piece in all[at..end].chunks(701_003) {
                behind.write_all(piece).unwrap();
                if number % 2 == 0 {
                    behind.flush().unwrap();
                }
            }
            match number % 3 {
                0 => behind.sync().unwrap(),
                _ => drop(behind),
            }
            at = end;
            assert!(std::fs::read(&path).unwrap() == all[..end], "up to {end}");
        }
    }

    #[test]
    fn pieces_go_where_they_belong_and_what_is_cut_off_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let (opened, path) = file(folder.path());
        opened.set_len(20 << 20).unwrap();
        let mut wanted = vec![0; 20 << 20];
        let mut behind = WriteBehind::new(opened, &path, 0).unwrap();
        for (place, length) in [
            (4096, 8192),
            (12_288, 100),
            (12_388, 5_000_000),
            (6_000_001, 9_000_000),
            (16 << 20, 1 << 20),
        ] {
            let bytes = noise(place as u64, length);
            wanted[place..place + length].copy_from_slice(&bytes);
            behind.put(place as u64, &bytes).unwrap();
        }
        behind.flush().unwrap();
        assert!(std::fs::read(&path).unwrap() == wanted);
        behind.cut(10_001).unwrap();
        behind.write_all(b"end").unwrap();
        drop(behind);
        wanted.truncate(10_001);
        wanted.extend(b"end");
        assert!(std::fs::read(&path).unwrap() == wanted);
    }

    #[test]
    fn what_cannot_be_written_is_told_and_nothing_is_written_behind_it() {
        let (opened, path) = (File::open("/dev/full").unwrap(), Path::new("/dev/full"));
        let mut behind = WriteBehind::new(opened, path, 0).unwrap();
        behind.write_all(&[1; 5000]).unwrap();
        assert!(behind.flush().is_err());
        assert!(behind.write_all(&vec![1; 2 * SIZE]).is_err());
        assert!(behind.flush().is_err());
    }
}
