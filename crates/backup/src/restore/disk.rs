//! A whole disk as a raw file.

use std::fs::OpenOptions;
use std::io;
use std::path::Path;

use super::{RestoreError, Restored};
use crate::archive::{Chain, ChainError, Sink};
use crate::file::WriteBehind;
use crate::plan::{Entry, Kind};
use crate::raw_text::RawText;

struct RawFile<'a> {
    wanted: Option<&'a RawText>,
    file: WriteBehind,
    found: Vec<String>,
    restored: Restored,
}

impl Sink for RawFile<'_> {
    fn entry(&mut self, _number: u64, entry: &Entry) -> io::Result<bool> {
        let Kind::Disk { size, .. } = entry.kind else {
            return Ok(false);
        };
        if self.wanted.is_some_and(|wanted| *wanted != entry.path) {
            return Ok(false);
        }
        self.found.push(entry.path.to_string());
        if self.found.len() > 1 {
            return Ok(false);
        }
        self.restored.entries += 1;
        self.file.set_len(size)?;
        Ok(true)
    }

    fn data(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.restored.bytes += bytes.len() as u64;
        self.file.put(offset, bytes)
    }

    fn zeroes(&mut self, _offset: u64, _length: u64) -> io::Result<()> {
        // The file is new: it is zero.
        Ok(())
    }

    fn end(&mut self, _problem: Option<&str>) -> io::Result<()> {
        self.file.sync()
    }
}

/// Writes a disk of the backup to a new file. `disk` is its path in the backup; not needed if it has only one.
///
/// # Errors
/// See [`RestoreError`]. Then there is no new file.
pub fn restore_disk(chain: &mut Chain, disk: Option<&RawText>, to: &Path) -> Result<Restored, RestoreError> {
    let failed = |source| RestoreError::Target {
        path: to.to_owned(),
        source,
    };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(to);
    let behind = file.and_then(|file| WriteBehind::new(file, to, 0));
    let mut sink = RawFile {
        wanted: disk,
        file: behind.map_err(failed)?,
        found: Vec::new(),
        restored: Restored::default(),
    };
    let read = chain.read(&mut sink);
    let done = match read {
        Err(ChainError::Sink(error)) => Err(failed(error)),
        Err(error) => Err(error.into()),
        Ok(()) if sink.found.len() == 1 => Ok(sink.restored),
        Ok(()) if sink.found.is_empty() => Err(RestoreError::Nothing(match disk {
            Some(disk) => format!("the backup has no disk {disk}"),
            None => "the backup has no whole disk, only files: restore it to a folder".into(),
        })),
        Ok(()) => Err(RestoreError::Nothing(format!(
            "the backup has several disks: say which of {}",
            sink.found.join(", ")
        ))),
    };
    if done.is_err() {
        let _ = std::fs::remove_file(to);
    }
    done
}
