//! The devices of a pool, opened beside who has the pool open: only to read, past the page cache, without a lock.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::file::{ALIGN, Buffer, Buffers, open_direct};

/// Reads in flight.
const IN_FLIGHT: usize = 8;
const MAGIC: &[u8] = b"SMSVMMPD";

/// A device or image that is read.
#[derive(Debug)]
pub(super) struct Device {
    path: PathBuf,
    file: File,
    size: u64,
}

impl Device {
    /// Opens it past the page cache: what others write is not in this one's. On file systems that know no other, through it.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let mut file = match open_direct(path, OpenOptions::new().read(true))? {
            Some(file) => file,
            None => File::open(path)?,
        };
        let size = file.seek(SeekFrom::End(0))?;
        Ok(Self {
            path: path.to_owned(),
            file,
            size,
        })
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Reads a range into one of `buffers`; what lies behind the end is zero, as far as it is only a part of a block.
    fn read(&self, start: u64, length: usize, buffers: &Buffers) -> io::Result<Buffer> {
        let too_long = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let skip = usize::try_from(start % ALIGN as u64).map_err(too_long)?;
        let begin = start - skip as u64;
        let mut memory = buffers.get((skip + length).next_multiple_of(ALIGN));
        let mut done = 0;
        while let Some(rest) = memory
            .as_mut_slice()
            .get_mut(done..)
            .filter(|rest| !rest.is_empty())
        {
            match self.file.read_at(rest, begin + done as u64) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            if !done.is_multiple_of(ALIGN) {
                // The end of the device: an offset within a block cannot be read.
                break;
            }
        }
        if done < skip + length {
            if begin + (done as u64) < self.size {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            // The memory was used before.
            memory.as_mut_slice().get_mut(done..).unwrap_or_default().fill(0);
        }
        memory.narrow(skip, length);
        Ok(memory)
    }
}

/// A range of a device that is to be read.
#[derive(Debug, Clone, Copy)]
pub(super) struct Run<'a> {
    pub(super) device: &'a Device,
    pub(super) start: u64,
    pub(super) length: usize,
}

/// Reads all, several at a time. In the order of `runs`.
pub(super) fn read_all(runs: &[Run<'_>], buffers: &Buffers) -> Vec<Result<Buffer, String>> {
    let one = |run: &Run<'_>| {
        let read = run.device.read(run.start, run.length, buffers);
        read.map_err(|error| format!("{}: {error}", run.device.path.display()))
    };
    if runs.len() < 2 {
        return runs.iter().map(one).collect();
    }
    let next = AtomicUsize::new(0);
    let done = Mutex::new(Vec::with_capacity(runs.len()));
    std::thread::scope(|scope| {
        for _ in 0..IN_FLIGHT.min(runs.len()) {
            scope.spawn(|| {
                while let Some((number, run)) = {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    runs.get(number).map(|run| (number, run))
                } {
                    let read = one(run);
                    done.lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push((number, read));
                }
            });
        }
    });
    let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    done.sort_by_key(|(number, _)| *number);
    done.into_iter().map(|(_, read)| read).collect()
}

/// The devices of a pool that can be read here, by their identities.
#[derive(Debug, Default)]
pub(super) struct Devices(BTreeMap<String, Device>);

impl Devices {
    /// Opens devices and looks at their labels. Also says which could not be had, and why.
    pub(super) fn open(paths: &[PathBuf]) -> (Self, Vec<String>) {
        let (mut devices, mut notes) = (BTreeMap::new(), Vec::new());
        for path in paths {
            let opened = Device::open(path).and_then(|device| Ok((label(&device)?, device)));
            match opened {
                Ok((Some((pool, uuid)), device)) => drop(devices.insert(format!("{pool}/{uuid}"), device)),
                Ok((None, _)) => notes.push(format!("{} is no device of a pool", path.display())),
                Err(error) => notes.push(format!("cannot read {}: {error}", path.display())),
            }
        }
        (Self(devices), notes)
    }

    /// The device with this identity, in this pool.
    pub(super) fn get(&self, pool: &str, uuid: &str) -> Option<&Device> {
        self.0.get(&format!("{pool}/{uuid}"))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// The identities of pool and device by the device's label (`docs/src/formats/pool-device.md`).
fn label(device: &Device) -> io::Result<Option<(String, String)>> {
    let mut first = device.read(0, 4096, &Buffers::new(0))?.to_vec();
    let bytes = |at: usize, label: &[u8]| {
        label
            .get(at..at + 16)
            .and_then(|part| part.first_chunk().copied())
    };
    let sum = first.get(12..16).and_then(|sum| sum.first_chunk().copied());
    if !first.starts_with(MAGIC) {
        return Ok(None);
    }
    if let Some(place) = first.get_mut(12..16) {
        place.fill(0);
    }
    if sum.map(u32::from_le_bytes) != Some(crc_fast::crc32_iscsi(&first)) {
        return Ok(None);
    }
    let uuid = |bytes: [u8; 16]| {
        let hex = format!("{:032x}", u128::from_le_bytes(bytes));
        let [a, b, c, d, e] = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]];
        format!("{a}-{b}-{c}-{d}-{e}")
    };
    let (own, pool) = (bytes(40, &first), bytes(56, &first));
    Ok(pool.zip(own).map(|(pool, own)| (uuid(pool), uuid(own))))
}
