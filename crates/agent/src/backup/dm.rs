//! File systems on logical volumes: what device mapper has put together of disks (linux/dm-ioctl.h, admin-guide/device-mapper in the kernel's
//! documentation).
//!
//! ```text
//!   /srv ──► dm-0: 0 8192 linear 8:17 2048 ──► sda1 ──► sda, byte 2097152      (the table of the volume)
//!   image of sda comes as sdc: 0 8192 linear 8:32 4096 ──► mounted to be read  (the same on the image)
//! ```
//!
//! Only targets of which each byte is at one place as it is are understood: linear and striped. Tables of others are not even read, as that of
//! `crypt` has the key in it.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use super::fiemap::Span;
use crate::host::AgentError;

const CONTROL: &str = "/dev/mapper/control";
/// Of `_IOWR(0xfd, number, struct dm_ioctl)` all but the number.
const IOCTL: libc::Ioctl = 0xc138_fd00;
const CREATE: libc::Ioctl = 3;
const REMOVE: libc::Ioctl = 4;
const SUSPEND: libc::Ioctl = 6;
const LOAD: libc::Ioctl = 9;
const STATUS: libc::Ioctl = 12;

const READ_ONLY: u32 = 1;
const STATUS_TABLE: u32 = 1 << 4;
const BUFFER_FULL: u32 = 1 << 8;
const DEFERRED_REMOVE: u32 = 1 << 17;

/// Bytes of `struct dm_ioctl` and of `struct dm_target_spec`.
const HEAD: usize = HEAD_BYTES as usize;
const HEAD_BYTES: u32 = 312;
const SPEC: usize = 40;
/// Longest table, in bytes.
const MAX_TABLE: usize = 16 << 20;
const SECTOR: u64 = 512;

/// From a byte of a disk on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Leg {
    /// The place of the disk in [`super::locate::System::disks`].
    disk: usize,
    start: u64,
}

/// A part of a volume, in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Target {
    start: u64,
    length: u64,
    /// A linear one has one leg.
    legs: Vec<Leg>,
    /// So much of each leg in turn; of a linear one all.
    chunk: u64,
}

/// Where a volume is: targets one behind the other, from 0 on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Table(Vec<Target>);

fn sectors(text: Option<&str>) -> Option<u64> {
    text?.parse::<u64>().ok()?.checked_mul(SECTOR)
}

impl Table {
    /// Reads lines as `dmsetup table` shows them. `place` knows where on which disk a device is.
    ///
    /// # Errors
    /// It is of other targets, or makes no sense; or `place` does not know. In words.
    pub(crate) fn parse(
        text: &str,
        mut place: impl FnMut((u32, u32)) -> Result<(usize, Span), String>,
    ) -> Result<Self, String> {
        let mut targets = Vec::new();
        let mut end = 0_u64;
        for line in text.lines() {
            let target = target(line, &mut place)?;
            if target.start != end {
                return Err(format!("a table with a gap: {line}"));
            }
            end = end.saturating_add(target.length);
            targets.push(target);
        }
        match targets.is_empty() {
            true => Err("no table".to_owned()),
            false => Ok(Self(targets)),
        }
    }

    /// Bytes of the volume.
    pub(crate) fn length(&self) -> u64 {
        self.0.last().map_or(0, |target| target.start + target.length)
    }

    /// Says for each run of `length` bytes from `start` on where it is: the disk's place, its first byte there, its length. False if not all of
    /// it is in the volume, or `each` wants no more.
    pub(crate) fn split(
        &self,
        mut start: u64,
        mut length: u64,
        mut each: impl FnMut(usize, u64, u64) -> bool,
    ) -> bool {
        while length > 0 {
            let at = self
                .0
                .partition_point(|target| target.start + target.length <= start);
            let Some(target) = self.0.get(at) else {
                return false;
            };
            let within = start - target.start;
            let (number, into) = (within / target.chunk, within % target.chunk);
            let legs = target.legs.len() as u64;
            let count = length.min(target.chunk - into).min(target.length - within);
            let leg = usize::try_from(number % legs)
                .ok()
                .and_then(|leg| target.legs.get(leg));
            let Some(leg) = leg else { return false };
            if !each(leg.disk, leg.start + number / legs * target.chunk + into, count) {
                return false;
            }
            start += count;
            length -= count;
        }
        true
    }

    /// The same on other disks of these numbers: first sector, sectors, type and parameters of each target.
    fn on(&self, devices: &[(u32, u32)]) -> Option<Vec<(u64, u64, &'static str, String)>> {
        let line = |target: &Target| {
            let mut text = String::new();
            let kind = match target.legs.len() {
                1 => "linear",
                count => {
                    text = format!("{count} {}", target.chunk / SECTOR);
                    "striped"
                }
            };
            for leg in &target.legs {
                let (major, minor) = devices.get(leg.disk)?;
                text.push_str(&format!(" {major}:{minor} {}", leg.start / SECTOR));
            }
            let (start, length) = (target.start / SECTOR, target.length / SECTOR);
            Some((start, length, kind, text.trim_start().to_owned()))
        };
        self.0.iter().map(line).collect()
    }
}

/// A line of a table.
fn target(
    line: &str,
    place: &mut impl FnMut((u32, u32)) -> Result<(usize, Span), String>,
) -> Result<Target, String> {
    let strange = || format!("a table that is not understood: {line}");
    let mut words = line.split_whitespace();
    let start = sectors(words.next()).ok_or_else(strange)?;
    let length = sectors(words.next()).filter(|length| *length > 0);
    let length = length.ok_or_else(strange)?;
    start.checked_add(length).ok_or_else(strange)?;
    let kind = words.next().ok_or_else(strange)?;
    check(kind)?;
    let (count, chunk) = match kind {
        "linear" => (1, length),
        _ => {
            let count = words.next().and_then(|word| word.parse::<u64>().ok());
            let chunk = sectors(words.next());
            (count.ok_or_else(strange)?, chunk.ok_or_else(strange)?)
        }
    };
    let row = count
        .checked_mul(chunk)
        .filter(|row| *row > 0)
        .ok_or_else(strange)?;
    if length % row != 0 {
        return Err(strange());
    }
    let mut legs = Vec::new();
    while let Some(device) = words.next() {
        let (major, minor) = device.split_once(':').ok_or_else(strange)?;
        let number = |text: &str| text.parse::<u32>().map_err(|_| strange());
        let (disk, span) = place((number(major)?, number(minor)?))?;
        let into = sectors(words.next()).ok_or_else(strange)?;
        // All of the leg lies within its device.
        let end = into.checked_add(length / count);
        end.filter(|end| *end <= span.length).ok_or_else(strange)?;
        let start = span.start.checked_add(into).ok_or_else(strange)?;
        legs.push(Leg { disk, start });
    }
    match legs.len() as u64 == count {
        true => Ok(Target {
            start,
            length,
            legs,
            chunk,
        }),
        false => Err(strange()),
    }
}

/// Whether a kind of target is understood.
fn check(kind: &str) -> Result<(), String> {
    match kind {
        "linear" | "striped" => Ok(()),
        kind => Err(format!(
            "a part of it is {kind}, and only linear and striped targets are understood"
        )),
    }
}

/// Puts bytes into a structure; what has no room is cut off.
fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    for (to, from) in bytes.iter_mut().skip(at).zip(value) {
        *to = *from;
    }
}

fn get<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let found = bytes.get(at..).and_then(|rest| rest.first_chunk());
    found.copied().unwrap_or([0; N])
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(get(bytes, at))
}

/// A text that ends with a zero.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// Which device a command is for.
enum Whom<'a> {
    Name(&'a str),
    Number((u32, u32)),
}

/// A command to device mapper: what it answers, its head included. `room` bytes are there for what follows that.
fn command(
    number: libc::Ioctl,
    whom: &Whom<'_>,
    flags: u32,
    (count, data): (u32, &[u8]),
    room: usize,
) -> io::Result<Vec<u8>> {
    let control = File::options().read(true).write(true).open(CONTROL)?;
    let mut bytes = vec![0; HEAD + room.max(data.len())];
    let size = u32::try_from(bytes.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    for (at, value) in [(0, 4), (12, size), (16, HEAD_BYTES), (20, count), (28, flags)] {
        put(&mut bytes, at, &u32::to_ne_bytes(value));
    }
    match whom {
        Whom::Name(name) => put(&mut bytes[..175], 48, name.as_bytes()),
        Whom::Number((major, minor)) => {
            put(&mut bytes, 40, &libc::makedev(*major, *minor).to_ne_bytes());
        }
    }
    put(&mut bytes, HEAD, data);
    // SAFETY: the structure says how long the memory is that follows it, and the kernel writes no more than that.
    match unsafe { libc::ioctl(control.as_raw_fd(), IOCTL | number, bytes.as_mut_ptr()) } {
        result if result < 0 => Err(io::Error::last_os_error()),
        _ => Ok(bytes),
    }
}

/// The targets of a device: first sector, sectors, type, and parameters or state.
fn targets(device: (u32, u32), flags: u32) -> io::Result<Vec<(u64, u64, String, String)>> {
    let mut room = 16 << 10;
    let bytes = loop {
        let bytes = command(STATUS, &Whom::Number(device), flags, (0, &[]), room)?;
        if word(&bytes, 28) & BUFFER_FULL == 0 {
            break bytes;
        }
        room *= 4;
        if room > MAX_TABLE {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
    };
    Ok(specs(&bytes))
}

/// What follows the head in an answer.
fn specs(bytes: &[u8]) -> Vec<(u64, u64, String, String)> {
    let first = word(bytes, 16) as usize;
    let data = bytes.get(first..).unwrap_or_default();
    let (mut found, mut at) = (Vec::new(), 0);
    for _ in 0..word(bytes, 20) {
        let Some(spec) = data.get(at..).filter(|spec| spec.len() > SPEC) else {
            break;
        };
        let number = |at| u64::from_ne_bytes(get(spec, at));
        found.push((number(0), number(8), text(&spec[24..SPEC]), text(&spec[SPEC..])));
        // From the first one's beginning on.
        at = word(spec, 20) as usize;
    }
    found
}

/// The table of a device in lines.
///
/// # Errors
/// It has other targets than those that are understood, or cannot be read. In words.
pub(crate) fn table(device: (u32, u32)) -> Result<String, String> {
    let failed = |error: io::Error| format!("its table cannot be read ({CONTROL}: {error})");
    for (_, _, kind, _) in targets(device, 0).map_err(failed)? {
        check(&kind)?;
    }
    let lines = targets(device, STATUS_TABLE).map_err(failed)?;
    let lines = lines.into_iter().map(|(start, length, kind, rest)| {
        // It may have been changed since.
        check(&kind).map(|()| format!("{start} {length} {kind} {rest}\n"))
    });
    lines.collect()
}

/// A volume that was put together of images. The kernel takes it apart when this is dropped and nobody uses it any more.
#[derive(Debug)]
pub(crate) struct Volume {
    name: String,
    pub(crate) path: PathBuf,
}

impl Volume {
    /// Puts one together, to read only, of disks that take the places of those in the table.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) fn new(table: &Table, disks: &[PathBuf]) -> Result<Self, AgentError> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let failed = |what: &Path| {
            let what = format!("the volume of the frozen image: {}", what.display());
            move |source| AgentError::Here { what, source }
        };
        let mut numbers = Vec::new();
        for disk in disks {
            let device = fs::metadata(disk).map_err(failed(disk))?.rdev();
            numbers.push((libc::major(device), libc::minor(device)));
        }
        let lines = table.on(&numbers);
        let lines =
            lines.ok_or_else(|| AgentError::Text("a table of more disks than there are".to_owned()))?;
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("sms-agent-image-{}-{number}", std::process::id());
        let to_kernel = |number, flags, data: (u32, &[u8])| {
            command(number, &Whom::Name(&name), flags, data, SPEC).map_err(failed(Path::new(CONTROL)))
        };
        let made = to_kernel(CREATE, READ_ONLY, (0, &[]))?;
        let minor = libc::minor(u64::from_ne_bytes(get(&made, 40)));
        let volume = Self {
            name: name.clone(),
            path: PathBuf::from(format!("/dev/dm-{minor}")),
        };
        let count = u32::try_from(lines.len()).unwrap_or(u32::MAX);
        to_kernel(LOAD, READ_ONLY, (count, &loaded(&lines)))?;
        // Without the flag it is the contrary.
        to_kernel(SUSPEND, 0, (0, &[]))?;
        Ok(volume)
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        // What is mounted of it keeps it until then. There is nothing else that could be tried.
        let _ = command(REMOVE, &Whom::Name(&self.name), DEFERRED_REMOVE, (0, &[]), SPEC);
    }
}

/// A table as the kernel takes it.
fn loaded(lines: &[(u64, u64, &'static str, String)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (start, length, kind, rest) in lines {
        let size = (SPEC + rest.len() + 1).next_multiple_of(8);
        let mut spec = vec![0; size];
        put(&mut spec, 0, &start.to_ne_bytes());
        put(&mut spec, 8, &length.to_ne_bytes());
        // From this one's beginning on.
        put(
            &mut spec,
            20,
            &u32::try_from(size).unwrap_or(u32::MAX).to_ne_bytes(),
        );
        put(&mut spec, 24, kind.as_bytes());
        put(&mut spec, SPEC, rest.as_bytes());
        bytes.extend(spec);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 8:17 is a partition that begins at 1 MiB of the first disk; 8:32 is all of the second one.
    fn place(device: (u32, u32)) -> Result<(usize, Span), String> {
        let (disk, start) = match device {
            (8, 17) => (0, 1 << 20),
            (8, 32) => (1, 0),
            (major, minor) => return Err(format!("{major}:{minor} is no disk of the host")),
        };
        let length = 1 << 30;
        Ok((disk, Span { start, length }))
    }

    fn runs(table: &Table, start: u64, length: u64) -> Option<Vec<(usize, u64, u64)>> {
        let mut runs = Vec::new();
        let all = table.split(start, length, |disk, at, count| {
            runs.push((disk, at, count));
            true
        });
        all.then_some(runs)
    }

    #[test]
    fn a_volume_of_two_pieces_is_found_on_their_disks() {
        let text = "0 8192 linear 8:17 2048\n8192 2048 linear 8:32 0\n";
        let table = Table::parse(text, place).unwrap();
        assert_eq!(table.length(), 10_240 * 512);
        assert_eq!(runs(&table, 4096, 8192).unwrap(), [(0, (2 << 20) + 4096, 8192)]);
        let border = 8192 * 512;
        assert_eq!(
            runs(&table, border - 512, 1024).unwrap(),
            [(0, (2 << 20) + border - 512, 512), (1, 0, 512)]
        );
        assert_eq!(runs(&table, 10_240 * 512 - 512, 1024), None, "behind the end");
        assert_eq!(runs(&table, u64::MAX, 1), None);
    }

    #[test]
    fn stripes_are_taken_in_turn() {
        let table = Table::parse("0 1024 striped 2 128 8:17 0 8:32 256", place).unwrap();
        let chunk = 128 * 512;
        let (first, second) = (1 << 20, 256 * 512);
        assert_eq!(
            runs(&table, chunk / 2, 3 * chunk).unwrap(),
            [
                (0, first + chunk / 2, chunk / 2),
                (1, second, chunk),
                (0, first + chunk, chunk),
                (1, second + chunk, chunk / 2),
            ]
        );
        assert_eq!(
            runs(&table, 7 * chunk, chunk).unwrap(),
            [(1, second + 3 * chunk, chunk)]
        );
    }

    #[test]
    fn other_targets_are_refused_by_name_and_nonsense_as_such() {
        for (text, reason) in [
            (
                "0 8192 crypt aes-xts-plain64 0000 0 8:17 4096",
                "a part of it is crypt",
            ),
            ("0 8 linear 8:17 0\n8 8 thin 253:2 1", "a part of it is thin"),
            (
                "0 8192 raid raid1 3 0 region_size 4096 2 - 8:17 - 8:32",
                "is raid",
            ),
            ("0 8 linear 253:1 0", "253:1 is no disk of the host"),
            ("8 8 linear 8:17 0", "gap"),
            ("0 8 linear 8:17", "not understood"),
            ("0 0 linear 8:17 0", "not understood"),
            ("0 8 linear 8:17 0 8:32 0", "not understood"),
            ("0 4194304 linear 8:17 0", "not understood"),
            ("0 8 linear 8:17 18446744073709551615", "not understood"),
            ("18446744073709551615 1 linear 8:17 0", "not understood"),
            ("0 1024 striped 0 128", "not understood"),
            ("0 1024 striped 2 0 8:17 0 8:32 0", "not understood"),
            ("0 1000 striped 2 128 8:17 0 8:32 0", "not understood"),
            ("0 1024 striped 2 128 8:17 0", "not understood"),
            ("", "no table"),
        ] {
            let refused = Table::parse(text, place).unwrap_err();
            assert!(refused.contains(reason), "{text}: {refused}");
        }
    }

    #[test]
    fn the_same_table_on_an_image_names_its_disks_from_their_beginning() {
        let text = "0 8192 linear 8:17 2048\n8192 1024 striped 2 128 8:17 0 8:32 256\n";
        let table = Table::parse(text, place).unwrap();
        let lines = table.on(&[(8, 48), (8, 64)]).unwrap();
        let shown: Vec<String> = lines
            .iter()
            .map(|(start, length, kind, rest)| format!("{start} {length} {kind} {rest}"))
            .collect();
        assert_eq!(
            shown,
            [
                "0 8192 linear 8:48 4096",
                "8192 1024 striped 2 128 8:48 2048 8:64 256"
            ]
        );
        assert_eq!(table.on(&[(8, 48)]), None);
        // As it is given to the kernel, and as that gives it.
        let mut bytes = loaded(&lines);
        let second = word(&bytes, 20) as usize;
        assert!(second.is_multiple_of(8) && bytes.len() > second + SPEC);
        let mut answer = vec![0; HEAD];
        put(&mut answer, 16, &(HEAD_BYTES).to_ne_bytes());
        put(&mut answer, 20, &2_u32.to_ne_bytes());
        answer.append(&mut bytes);
        let read = specs(&answer);
        assert_eq!(
            (read[1].0, read[1].1, read[1].2.as_str()),
            (8192, 1024, "striped")
        );
        assert_eq!(read[1].3, "2 128 8:48 2048 8:64 256");
        // A kernel that says nonsense: no more than there is.
        put(&mut answer, 20, &u32::MAX.to_ne_bytes());
        put(&mut answer, HEAD + 20, &u32::MAX.to_ne_bytes());
        assert_eq!(specs(&answer).len(), 1);
    }
}
