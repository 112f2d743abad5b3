//! The flight recorder: the last requests of each disk, kept in memory for whoever asks what happened just now.
//!
//! A [`Recorder`] belongs to a disk's `controls`. It has one ring of [`RECORDS`] records for each thread that serves the disk, so each
//! ring has one writer and needs no locked instruction. A request is recorded when it ends: six stores into one place of the ring, the
//! oldest of which is overwritten. Nothing is allocated, and the clock is the worker's ([`block_io::moment_nanos`]), which is read once
//! per turn whether there is a recorder or not; so the time of a record is exact to what the worker does in one turn. All that is 40
//! instructions on x86-64, less than one subtraction of `Instant`s, which a clock that is a number spares `count_time`.
//!
//! Readers are other threads. A record has a number, which is zero while it is written (a seqlock): what was overwritten while it was read
//! is left out and counted as missed. Records hold no content, only what was done where.
//!
//! ```text
//!   worker 0: request ends ─► ring 0 ─┐
//!   worker 1: request ends ─► ring 1 ─┴─► Recorder::after(Position) ─► trace, dump, log after a failure, panic
//! ```
//!
//! A reader goes on where it stopped by a [`Position`]: the number of the last record of every ring. A time would not do: records of several
//! threads become visible in another order than they end.

use std::fmt::{self, Write as _};
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Arc, LazyLock, Mutex, OnceLock, PoisonError, TryLockError, Weak};
use std::thread::ThreadId;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use block_io::Operation;

/// Records of a ring.
pub const RECORDS: usize = 256;
/// Records that are logged when a request fails.
const LOGGED: usize = 16;
/// Shortest time between two such logs of one disk.
const LOG_PERIOD: Duration = Duration::from_secs(60);
/// Bits of lengths and latencies; what is beyond them is shown as the most that they hold: 256 TiB, three days.
const LOW: u64 = (1 << 48) - 1;

/// All recorders of the process, for when it panics.
static ALL: Mutex<Vec<Weak<Recorder>>> = Mutex::new(Vec::new());

/// When the clock of [`block_io::moment_nanos`] was 0, in nanoseconds since 1970.
static EPOCH: LazyLock<u64> = LazyLock::new(|| {
    let own = block_io::moment_nanos();
    let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    // 2554 is far.
    u64::try_from(wall.as_nanos())
        .unwrap_or(u64::MAX)
        .saturating_sub(own)
});

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// With success.
    Done,
    /// With an error of the disk.
    Failed,
    /// The disk's device cannot do such a thing.
    Unsupported,
}

/// What a request asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Asked {
    /// None for what does not go to the disk, such as a question for its identifier.
    pub(crate) operation: Option<Operation>,
    /// In bytes; of the first range of several.
    pub(crate) offset: u64,
    /// In bytes; of all ranges together.
    pub(crate) length: u64,
}

impl Asked {
    /// Of a request that cannot be understood.
    pub(crate) const NOTHING: Self = Self {
        operation: None,
        offset: 0,
        length: 0,
    };
}

/// A request that has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    /// When it ended, in nanoseconds since 1970, by the clock as it was when the process began.
    pub time_ns: u64,
    /// From being taken to being answered, in nanoseconds.
    pub latency_ns: u64,
    /// What it did; none if it did not go to the disk, as a question for the disk's identifier.
    pub operation: Option<Operation>,
    /// First byte on the disk; of the first range of several.
    pub offset: u64,
    /// In bytes; of all ranges together.
    pub length: u64,
    /// The queue by which it came.
    pub queue: u16,
    /// How it ended.
    pub ended: Ended,
}

impl fmt::Display for Record {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (seconds, nanos) = (self.time_ns / 1_000_000_000, self.time_ns % 1_000_000_000);
        let operation: &dyn fmt::Display = match &self.operation {
            Some(operation) => operation,
            None => &"other",
        };
        let ended = match self.ended {
            Ended::Done => "ok",
            Ended::Failed => "FAILED",
            Ended::Unsupported => "UNSUPPORTED",
        };
        write!(
            formatter,
            "{seconds}.{nanos:09} queue {} {operation} {}+{} {} us {ended}",
            self.queue,
            self.offset,
            self.length,
            self.latency_ns / 1000,
        )
    }
}

/// A place for a record.
#[derive(Debug, Default)]
struct Slot {
    /// Zero while the others are written.
    number: AtomicU64,
    /// By [`block_io::moment_nanos`].
    end: AtomicU64,
    offset: AtomicU64,
    /// From the low end: length 48 bits, operation 8, how it ended 8.
    what: AtomicU64,
    /// From the low end: latency 48 bits, queue 16.
    how_long: AtomicU64,
}

/// The last requests that one thread did for a disk.
#[derive(Debug)]
pub(crate) struct Ring {
    /// Number of the last record; the first is 1.
    last: AtomicU64,
    slots: Box<[Slot; RECORDS]>,
    owner: Weak<Recorder>,
}

/// A place is the lowest byte of a record's number: no division, and no check of bounds.
const _: () = assert!(RECORDS == 1 << u8::BITS);

fn place(number: u64) -> usize {
    let [low, ..] = number.to_le_bytes();
    low.into()
}

impl Ring {
    fn new(owner: Weak<Recorder>) -> Self {
        Self {
            last: AtomicU64::new(0),
            slots: Box::new(std::array::from_fn(|_| Slot::default())),
            owner,
        }
    }

    /// Records a request that came by `queue` at `begin` and ends at `end` ([`block_io::moment_nanos`]). Only the ring's thread may call this; another one would spoil records, and
    /// nothing else.
    pub(crate) fn record(&self, queue: u16, asked: Asked, ended: Ended, begin: u64, end: u64) {
        let number = self.last.load(Ordering::Relaxed).wrapping_add(1);
        let slot = &self.slots[place(number)];
        let what = asked.length.min(LOW)
            | u64::from(asked.operation.map_or(0, code_of)) << 48
            | u64::from(ended as u8) << 56;
        let latency = end.saturating_sub(begin).min(LOW);
        slot.number.store(0, Ordering::Relaxed);
        // A reader that sees any of the following stores sees the zero.
        fence(Ordering::Release);
        slot.end.store(end, Ordering::Relaxed);
        slot.offset.store(asked.offset, Ordering::Relaxed);
        slot.what.store(what, Ordering::Relaxed);
        slot.how_long
            .store(latency | u64::from(queue) << 48, Ordering::Relaxed);
        slot.number.store(number, Ordering::Release);
        self.last.store(number, Ordering::Release);
        if ended == Ended::Failed {
            self.tell_failure();
        }
    }

    #[cold]
    fn tell_failure(&self) {
        if let Some(recorder) = self.owner.upgrade() {
            recorder.log_failure();
        }
    }

    /// The record of this number; none if it was overwritten or is being so.
    fn get(&self, number: u64) -> Option<Record> {
        let slot = &self.slots[place(number)];
        if slot.number.load(Ordering::Acquire) != number {
            return None;
        }
        let end = slot.end.load(Ordering::Relaxed);
        let offset = slot.offset.load(Ordering::Relaxed);
        let what = slot.what.load(Ordering::Relaxed);
        let how_long = slot.how_long.load(Ordering::Relaxed);
        // With the writer's: if one of these is of a later record, the number is no longer this one.
        fence(Ordering::Acquire);
        if slot.number.load(Ordering::Relaxed) != number {
            return None;
        }
        let [.., operation, ended] = what.to_le_bytes();
        let [.., low, high] = how_long.to_le_bytes();
        Some(Record {
            time_ns: EPOCH.wrapping_add(end),
            latency_ns: how_long & LOW,
            operation: operation_of(operation),
            offset,
            length: what & LOW,
            queue: u16::from_le_bytes([low, high]),
            ended: match ended {
                0 => Ended::Done,
                1 => Ended::Failed,
                _ => Ended::Unsupported,
            },
        })
    }

    /// Gives all records after this number to `found`; returns the number of the last one, and how many are gone.
    fn after(&self, after: u64, found: &mut Vec<Record>) -> (u64, u64) {
        let last = self.last.load(Ordering::Acquire);
        // A number from elsewhere, beyond the last one, counts as the last one.
        let after = after.min(last);
        let first = last.saturating_sub(RECORDS as u64).max(after) + 1;
        let before = found.len();
        found.extend((first..=last).filter_map(|number| self.get(number)));
        let got = found.len() - before;
        (last, (last - after).saturating_sub(got as u64))
    }
}

fn code_of(operation: Operation) -> u8 {
    match operation {
        Operation::Read => 1,
        Operation::Write => 2,
        Operation::Flush => 3,
        Operation::Discard => 4,
        Operation::WriteZeroes => 5,
    }
}

fn operation_of(code: u8) -> Option<Operation> {
    Some(match code {
        1 => Operation::Read,
        2 => Operation::Write,
        3 => Operation::Flush,
        4 => Operation::Discard,
        5 => Operation::WriteZeroes,
        _ => return None,
    })
}

/// Up to where a reader has seen a disk's records: the last number of each ring. As text: numbers with commas between them; empty is the
/// beginning.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Position(Vec<u64>);

impl fmt::Display for Position {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, number) in self.0.iter().enumerate() {
            if place > 0 {
                formatter.write_char(',')?;
            }
            write!(formatter, "{number}")?;
        }
        Ok(())
    }
}

impl FromStr for Position {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.is_empty() {
            return Ok(Self::default());
        }
        text.split(',')
            .map(str::parse)
            .collect::<Result<_, _>>()
            .map(Self)
    }
}

/// What a reader has not seen yet.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Records {
    /// In the order in which they ended.
    pub records: Vec<Record>,
    /// Where to go on.
    pub position: Position,
    /// How many were overwritten before they could be read.
    pub missed: u64,
}

/// The last requests of a disk.
#[derive(Debug, Default)]
pub struct Recorder {
    name: OnceLock<String>,
    /// By the thread that writes it; none is ever taken out, so that positions stay valid.
    rings: Mutex<Vec<(ThreadId, Arc<Ring>)>>,
    logged: Mutex<Option<Instant>>,
}

impl Recorder {
    /// A recorder without records, of which [`write_all`] tells as long as it is there.
    pub(crate) fn new() -> Arc<Self> {
        // The clock is read before there is anything to record.
        LazyLock::force(&EPOCH);
        let recorder = Arc::new(Self::default());
        let mut all = ALL.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|other| other.strong_count() > 0);
        all.push(Arc::downgrade(&recorder));
        recorder
    }

    /// Says which disk it is, for the log; the first name stays.
    pub fn set_name(&self, name: &str) {
        // It may have one already.
        let _ = self.name.set(name.to_owned());
    }

    fn name(&self) -> &str {
        self.name.get().map_or("(unnamed)", String::as_str)
    }

    /// The ring of the thread that calls.
    pub(crate) fn ring(self: &Arc<Self>) -> Arc<Ring> {
        let own = std::thread::current().id();
        let mut rings = self.rings.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, ring)) = rings.iter().find(|(thread, _)| *thread == own) {
            return Arc::clone(ring);
        }
        let ring = Arc::new(Ring::new(Arc::downgrade(self)));
        rings.push((own, Arc::clone(&ring)));
        ring
    }

    /// What was recorded after `position`.
    pub fn after(&self, position: &Position) -> Records {
        let rings = self.rings.lock().unwrap_or_else(PoisonError::into_inner);
        gather(&rings, position)
    }

    /// Logs the last records, because a request failed; not too often.
    fn log_failure(&self) {
        let now = Instant::now();
        {
            let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
            if logged.is_some_and(|last| now.duration_since(last) < LOG_PERIOD) {
                return;
            }
            *logged = Some(now);
        }
        let records = self.after(&Position::default()).records;
        let disk = self.name();
        for record in &records[records.len().saturating_sub(LOGGED)..] {
            tracing::warn!(disk, "before a request failed: {record}");
        }
    }
}

fn gather(rings: &[(ThreadId, Arc<Ring>)], position: &Position) -> Records {
    let mut all = Records::default();
    for (place, (_, ring)) in rings.iter().enumerate() {
        let after = position.0.get(place).copied().unwrap_or(0);
        let (last, missed) = ring.after(after, &mut all.records);
        all.position.0.push(last);
        all.missed += missed;
    }
    // Stable: records of one ring stay in their order.
    all.records.sort_by_key(|record| record.time_ns);
    all
}

/// Writes the last records of all disks, for example when the process panics: waits for nothing, and leaves out what another thread, or the
/// one that panics, holds just now.
///
/// # Errors
/// Writing fails.
pub fn write_all(output: &mut dyn std::io::Write) -> std::io::Result<()> {
    let all = match ALL.try_lock() {
        Ok(all) => all,
        Err(TryLockError::Poisoned(all)) => all.into_inner(),
        Err(TryLockError::WouldBlock) => return Ok(()),
    };
    for recorder in all.iter().filter_map(Weak::upgrade) {
        let records = match recorder.rings.try_lock() {
            Ok(rings) => gather(&rings, &Position::default()).records,
            Err(_) => continue,
        };
        if records.is_empty() {
            continue;
        }
        writeln!(output, "last requests of disk {}:", recorder.name())?;
        for record in &records {
            writeln!(output, "  {record}")?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;

    fn write(offset: u64, length: u64) -> Asked {
        Asked {
            operation: Some(Operation::Write),
            offset,
            length,
        }
    }

    fn low_half(number: u64) -> u16 {
        let [low, high, ..] = number.to_le_bytes();
        u16::from_le_bytes([low, high])
    }

    fn note(ring: &Ring, asked: Asked) {
        let begin = block_io::moment_nanos();
        ring.record(3, asked, Ended::Done, begin, begin + 7000);
    }

    #[test]
    fn records_come_in_order_and_a_reader_goes_on_where_it_stopped() {
        let recorder = Recorder::new();
        let ring = recorder.ring();
        note(&ring, write(0, 512));
        note(&ring, write(512, u64::MAX));
        let first = recorder.after(&Position::default());
        let found: Vec<_> = first.records.iter().map(|one| (one.offset, one.length)).collect();
        assert_eq!(
            found,
            [(0, 512), (512, LOW)],
            "what does not fit is the most that fits"
        );
        let record = first.records[0];
        assert_eq!((record.queue, record.latency_ns), (3, 7000));
        assert_eq!(
            (record.operation, record.ended),
            (Some(Operation::Write), Ended::Done)
        );
        note(
            &ring,
            Asked {
                operation: None,
                ..write(0, 20)
            },
        );
        let position: Position = first.position.to_string().parse().unwrap();
        let second = recorder.after(&position);
        assert_eq!((second.records.len(), second.missed), (1, 0));
        assert_eq!(second.records[0].operation, None);
        assert_eq!(recorder.after(&second.position).records, []);
    }

    #[test]
    fn the_oldest_are_overwritten_and_counted_as_missed() {
        let recorder = Recorder::new();
        let ring = recorder.ring();
        let count = RECORDS as u64 + 5;
        (0..count).for_each(|offset| note(&ring, write(offset, 1)));
        let seen = recorder.after(&"2".parse().unwrap());
        assert_eq!((seen.records.len(), seen.missed), (RECORDS, 3));
        let offsets: Vec<u64> = seen.records.iter().map(|record| record.offset).collect();
        assert_eq!(offsets, (5..count).collect::<Vec<_>>());
        let foreign = recorder.after(&"99999,7".parse().unwrap());
        assert_eq!((foreign.records.len(), foreign.missed), (0, 0));
        assert_eq!(foreign.position, seen.position);
        assert!("1,x".parse::<Position>().is_err());
    }

    #[test]
    fn each_thread_has_a_ring_and_readers_see_one_order() {
        let recorder = Recorder::new();
        note(&recorder.ring(), write(0, 1));
        let other = Arc::clone(&recorder);
        std::thread::spawn(move || note(&other.ring(), write(1, 1)))
            .join()
            .unwrap();
        note(&recorder.ring(), write(2, 1));
        let seen = recorder.after(&Position::default());
        let offsets: Vec<u64> = seen.records.iter().map(|record| record.offset).collect();
        assert_eq!(offsets, [0, 1, 2]);
        assert_eq!(seen.position.to_string(), "2,1");
    }

    #[test]
    fn a_reader_never_sees_half_of_a_record() {
        let recorder = Recorder::new();
        let stop = Arc::new(AtomicBool::new(false));
        let writer = {
            let (recorder, stop) = (Arc::clone(&recorder), Arc::clone(&stop));
            std::thread::spawn(move || {
                let ring = recorder.ring();
                for number in 1_u64.. {
                    // All fields say the same.
                    let asked = write(number, number);
                    ring.record(low_half(number), asked, Ended::Done, 0, number);
                    if stop.load(Ordering::Relaxed) {
                        return number;
                    }
                }
                0
            })
        };
        let (mut position, mut seen, mut missed) = (Position::default(), 0, 0);
        let mut last = 0;
        let mut read = |position: &mut Position| {
            let page = recorder.after(position);
            for record in &page.records {
                let number = record.offset;
                assert!(number > last, "{number} after {last}");
                assert_eq!((record.length, record.latency_ns), (number, number));
                assert_eq!(record.queue, low_half(number));
                assert_eq!(record.time_ns, *EPOCH + number);
                last = number;
            }
            seen += page.records.len() as u64;
            missed += page.missed;
            *position = page.position;
        };
        let end = Instant::now() + Duration::from_millis(300);
        while Instant::now() < end {
            read(&mut position);
        }
        stop.store(true, Ordering::Relaxed);
        let written = writer.join().unwrap();
        read(&mut position);
        assert!(seen > 0);
        assert_eq!(seen + missed, written, "none is lost without a word");
    }

    #[test]
    fn all_disks_are_written_for_a_panic_and_one_that_is_held_is_left_out() {
        let (free, held) = (Recorder::new(), Recorder::new());
        for (recorder, name) in [(&free, "the-free-one"), (&held, "the-held-one")] {
            recorder.set_name(name);
            note(&recorder.ring(), write(4096, 512));
        }
        let _lock = held.rings.lock().unwrap();
        let mut text = Vec::new();
        write_all(&mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        let (_, after) = text.split_once("last requests of disk the-free-one:\n").unwrap();
        assert!(
            after
                .lines()
                .next()
                .unwrap()
                .contains(" queue 3 write 4096+512 7 us ok"),
            "{text}"
        );
        assert!(!text.contains("the-held-one"), "{text}");
    }
}
