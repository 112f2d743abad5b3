//! Events on media: what an [`EventLog`] has recorded is still there when its process comes back.
//!
//! ```text
//!   EventLog::record ──bell──► thread "journal" ──append, fdatasync──► events.0 │ events.1
//!                                                                      full: the other one is emptied and goes on
//! ```
//!
//! # Format
//! Two files, the segments, take turns: what is kept is between one and two times a segment's size. A segment is text, one line per
//! event: the CRC-32C of the rest of the line without its line break, as eight hexadecimal digits, a space, the event as in the
//! answer of `GET /v1/events`. Behind the last event is a mark: `{"opened":N}`, a process may have given numbers above N, or
//! `{"closed":N}`, N was the last one that was given. `grep` and `jq` can read it.
//!
//! # After a crash
//! Lines are self-contained: one that is not whole, or not what was written, is passed over, and what is behind the last good one of
//! the newer segment is cut off. Numbers must ascend, or a line is passed over, too. Events that were told to somebody may not have
//! been on media yet; so that no number is given twice, a log that was not closed goes on [`GAP`] numbers later, which is more than
//! can have been waiting, and says so in its mark before it gives one.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use api::{Event, EventLog};
use crc_fast::crc32_iscsi;
use serde::{Deserialize, Serialize};
use tracing::warn;

/// How many numbers are passed over after a crash.
pub const GAP: u64 = EventLog::CAPACITY as u64;
/// Smallest size of a segment in bytes.
pub const MIN_SEGMENT: u64 = 4 << 10;
/// Most bytes that are read of a segment: one that is larger is not ours.
const MAX_SEGMENT: u64 = 256 << 20;
/// Events that are written at a time.
const PAGE: usize = 256;

/// A journal cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} the journal of events {}", path.display())]
pub struct JournalError {
    /// What was tried.
    action: &'static str,
    /// A segment, or the folder.
    path: PathBuf,
    /// The answer.
    source: io::Error,
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> JournalError + use<> {
    let path = path.to_owned();
    move |source| JournalError { action, path, source }
}

/// What is in a line.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Line {
    Event(Event),
    Opened { opened: u64 },
    Closed { closed: u64 },
}

impl Line {
    /// The line of this, with its line break.
    fn to_text(&self) -> Vec<u8> {
        // There are string keys only and no fallible serializers: nothing can fail.
        let json = serde_json::to_string(self).unwrap_or_default();
        let sum = crc32_iscsi(json.as_bytes());
        format!("{sum:08x} {json}\n").into_bytes()
    }

    /// What `text`, without its line break, says; none if that was never written.
    fn from_text(text: &[u8]) -> Option<Self> {
        let (sum, rest) = text.split_at_checked(8)?;
        let json = rest.strip_prefix(b" ")?;
        let sum = u32::from_str_radix(std::str::from_utf8(sum).ok()?, 16).ok()?;
        if crc32_iscsi(json) != sum {
            return None;
        }
        serde_json::from_slice(json).ok()
    }
}

/// What a segment has.
#[derive(Default)]
struct Segment {
    events: Vec<Event>,
    /// It is a file.
    exists: bool,
    /// The highest number that a mark has.
    marked: u64,
    /// Its last line says that all is there.
    closed: bool,
    /// Where its last event ends.
    end: u64,
    /// Lines that are no good.
    damaged: u64,
}

impl Segment {
    fn read(path: &Path) -> Result<Self, JournalError> {
        let mut text = Vec::new();
        let mut segment = Self::default();
        match File::open(path) {
            Ok(file) => {
                segment.exists = true;
                let read = file.take(MAX_SEGMENT).read_to_end(&mut text);
                read.map_err(failed("read", path))?;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed("open", path)(error)),
        }
        let mut at = 0;
        for line in text.split_inclusive(|byte| *byte == b'\n') {
            at += line.len() as u64;
            let last = segment.last();
            let good = line.strip_suffix(b"\n").and_then(Line::from_text);
            segment.closed = false;
            match good {
                Some(Line::Event(event)) if event.sequence > last => {
                    segment.events.push(event);
                    segment.end = at;
                }
                Some(Line::Opened { opened }) => segment.marked = opened.max(segment.marked),
                Some(Line::Closed { closed }) => {
                    segment.marked = closed.max(segment.marked);
                    segment.closed = true;
                }
                _ => segment.damaged += 1,
            }
        }
        Ok(segment)
    }

    fn last(&self) -> u64 {
        self.events.last().map_or(0, |event| event.sequence)
    }

    /// The highest number that it knows of.
    fn highest(&self) -> u64 {
        self.last().max(self.marked)
    }
}

/// What was found in a journal.
#[derive(Debug)]
pub struct Recovered {
    /// Events in ascending order of their numbers.
    pub events: Vec<Event>,
    /// The last number that may have been given.
    pub last: u64,
    /// Lines that could not be read. One is usual after a crash.
    pub damaged: u64,
}

impl Recovered {
    /// A log that goes on where this ended.
    pub fn into_log(self) -> EventLog {
        EventLog::resumed(self.events, self.last)
    }
}

/// A journal that is open for writing. One process has it.
#[derive(Debug)]
pub struct EventJournal {
    paths: [PathBuf; 2],
    /// The segment that is written.
    current: usize,
    file: File,
    /// Where the next event goes. A mark may be behind it.
    size: u64,
    limit: u64,
    /// The last number that may have been given, as far as is known here.
    last: u64,
}

impl EventJournal {
    /// Opens the journal whose segments are `path` with `.0` and `.1` behind it, or makes them; a segment has `segment` bytes, at
    /// least [`MIN_SEGMENT`].
    ///
    /// # Errors
    /// The folder is not there, or a segment can neither be read nor written.
    pub fn open(path: &Path, segment: u64) -> Result<(Self, Recovered), JournalError> {
        let paths = [0, 1].map(|number| {
            let mut name = path.as_os_str().to_owned();
            name.push(format!(".{number}"));
            PathBuf::from(name)
        });
        let found = [Segment::read(&paths[0])?, Segment::read(&paths[1])?];
        let current = usize::from(found[1].highest() > found[0].highest());
        let is_new = !found.iter().any(|segment| segment.exists);
        let gap = if is_new || found[current].closed { 0 } else { GAP };
        let last = found[current].highest().saturating_add(gap);
        let mut journal = Self {
            file: open_segment(&paths[current])?,
            paths,
            current,
            size: found[current].end,
            limit: segment.max(MIN_SEGMENT),
            last,
        };
        // From now on it is not closed.
        journal.mark(&Line::Opened { opened: last })?;
        sync_folder(path)?;
        let damaged = found[0].damaged + found[1].damaged;
        let [first, second] = found;
        let (older, newer) = if current == 1 {
            (first, second)
        } else {
            (second, first)
        };
        // What is left of a segment that was about to be emptied cannot be newer than the other.
        let mut events = older.events;
        let begin = newer.events.first().map_or(u64::MAX, |event| event.sequence);
        events.retain(|event| event.sequence < begin);
        events.extend(newer.events);
        let recovered = Recovered {
            last,
            events,
            damaged,
        };
        Ok((journal, recovered))
    }

    /// Writes events, durably. If it fails, some of them may be there, and it can be done again.
    ///
    /// # Errors
    /// The file system is full, or broken.
    pub fn append(&mut self, events: &[Event]) -> Result<(), JournalError> {
        for event in events {
            let text = Line::Event(event.clone()).to_text();
            if self.size > 0 && self.size + text.len() as u64 > self.limit {
                self.turn()?;
            }
            self.write(&text)?;
            self.size += text.len() as u64;
            self.last = event.sequence.max(self.last);
        }
        self.sync()
    }

    /// Says that all that was recorded is there.
    ///
    /// # Errors
    /// As [`Self::append`].
    pub fn close(mut self) -> Result<(), JournalError> {
        self.mark(&Line::Closed { closed: self.last })
    }

    /// Writes a mark behind the last event, durably; the next event takes its place.
    fn mark(&mut self, line: &Line) -> Result<(), JournalError> {
        let text = line.to_text();
        self.write(&text)?;
        // What was there may have been longer. If this is not done any more, its rest is no line.
        let cut = self.file.set_len(self.size + text.len() as u64);
        cut.map_err(failed("cut", &self.paths[self.current]))?;
        self.sync()
    }

    /// Writes where the next event goes. What was written in part is written over the next time.
    fn write(&mut self, text: &[u8]) -> Result<(), JournalError> {
        let written = self.file.write_all_at(text, self.size);
        written.map_err(failed("write", &self.paths[self.current]))
    }

    /// Goes on in the other segment. What is in this one is durable before the other one is emptied.
    fn turn(&mut self) -> Result<(), JournalError> {
        self.sync()?;
        let other = 1 - self.current;
        let file = open_segment(&self.paths[other])?;
        file.set_len(0).map_err(failed("empty", &self.paths[other]))?;
        (self.current, self.file, self.size) = (other, file, 0);
        sync_folder(&self.paths[other])
    }

    fn sync(&self) -> Result<(), JournalError> {
        let path = &self.paths[self.current];
        self.file.sync_data().map_err(failed("write", path))
    }

    /// Keeps what `log` records, on a thread of its own, until what is returned is dropped: then all is written, and the journal is
    /// closed. What is in the log already with numbers up to `after` is not written again.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn keep(self, log: Arc<EventLog>, after: u64) -> io::Result<Keeper> {
        // One bell is enough: who hears it looks at all that is new.
        let (bell, heard) = sync_channel(1);
        let listener = bell.clone();
        log.listen(move |_| drop(listener.try_send(Bell::News)));
        // What was recorded before.
        let _ = bell.try_send(Bell::News);
        let thread = std::thread::Builder::new()
            .name("journal".to_owned())
            .spawn(move || self.write_all(&log, after, &heard))?;
        Ok(Keeper {
            bell,
            thread: Some(thread),
        })
    }

    fn write_all(mut self, log: &EventLog, mut after: u64, heard: &Receiver<Bell>) {
        let mut failing = false;
        loop {
            let end = !matches!(heard.recv(), Ok(Bell::News));
            loop {
                let page = log.page(after, PAGE);
                if page.events.is_empty() {
                    break;
                }
                match self.append(&page.events) {
                    Ok(()) => (after, failing) = (page.last, false),
                    Err(error) => {
                        // It is tried again with the next event; said once, as a full file system stays full for a while.
                        if !failing {
                            warn!(error = %block_io::error_chain(&error), "events are not kept");
                        }
                        failing = true;
                        break;
                    }
                }
            }
            if end {
                break;
            }
        }
        if failing {
            return;
        }
        if let Err(error) = self.close() {
            warn!(error = %block_io::error_chain(&error), "the journal of events is not closed");
        }
    }
}

enum Bell {
    News,
    End,
}

/// Writes a journal. Dropping it writes what is left.
#[derive(Debug)]
pub struct Keeper {
    bell: SyncSender<Bell>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Keeper {
    fn drop(&mut self) {
        // The thread takes what is in the channel, so that this cannot wait for long; it may have ended by a panic.
        let _ = self.bell.send(Bell::End);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            warn!("the thread of the journal of events panicked");
        }
    }
}

fn open_segment(path: &Path) -> Result<File, JournalError> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false).mode(0o600);
    options.open(path).map_err(failed("open", path))
}

/// The names of new segments are durable.
fn sync_folder(path: &Path) -> Result<(), JournalError> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    synced.map_err(failed("make", folder))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use api::EventKind;

    use super::*;

    /// In memory, if that is to be had: these tests make thousands of files durable.
    fn folder() -> tempfile::TempDir {
        tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap())
    }

    fn event(sequence: u64) -> Event {
        Event {
            sequence,
            time_ms: sequence * 10,
            kind: EventKind::Reset {
                cause: format!("the {sequence}th, \"quoted\"\nand broken {}", "x".repeat(80)),
            },
        }
    }

    fn events(numbers: std::ops::RangeInclusive<u64>) -> Vec<Event> {
        numbers.map(event).collect()
    }

    fn segment(path: &Path, number: u8) -> PathBuf {
        PathBuf::from(format!("{}.{number}", path.display()))
    }

    /// Two segments, the second one the newer.
    fn filled(path: &Path) -> Vec<Event> {
        let (mut journal, _) = EventJournal::open(path, MIN_SEGMENT).unwrap();
        let mut all = Vec::new();
        while journal.current == 0 || journal.size < 1000 {
            all.push(event(all.len() as u64 + 1));
            journal.append(&all[all.len() - 1..]).unwrap();
        }
        all
    }

    #[test]
    fn what_was_written_comes_back_and_numbers_go_on() {
        let folder = folder();
        let path = folder.path().join("events");
        let (mut journal, found) = EventJournal::open(&path, 0).unwrap();
        assert_eq!((found.events.len(), found.last), (0, 0));
        journal.append(&events(1..=3)).unwrap();
        journal.close().unwrap();
        let (mut journal, found) = EventJournal::open(&path, 0).unwrap();
        assert_eq!((found.events, found.last, found.damaged), (events(1..=3), 3, 0));
        journal.append(&events(4..=4)).unwrap();
        drop(journal);
        // Not closed: somebody may have been told of more.
        let (_, found) = EventJournal::open(&path, 0).unwrap();
        assert_eq!((found.events, found.last), (events(1..=4), 4 + GAP));
    }

    #[test]
    fn no_number_is_given_twice_however_lives_end() {
        let folder = folder();
        let path = folder.path().join("events");
        let (mut journal, _) = EventJournal::open(&path, 0).unwrap();
        journal.append(&events(1..=2)).unwrap();
        drop(journal);
        // Two that told of numbers which they never wrote, one that had nothing to say, and then they are known.
        for (life, last) in [2 + GAP, 2 + 2 * GAP, 2 + 3 * GAP].into_iter().enumerate() {
            let (journal, found) = EventJournal::open(&path, 0).unwrap();
            assert_eq!((found.last, found.events.len()), (last, 2));
            assert_eq!(found.damaged, 0);
            if life == 2 {
                journal.close().unwrap();
            }
        }
        let size = |number| fs::metadata(segment(&path, number)).map_or(0, |file| file.len());
        let before = size(0);
        for _ in 0..50 {
            let (journal, found) = EventJournal::open(&path, 0).unwrap();
            assert_eq!(found.last, 2 + 3 * GAP);
            journal.close().unwrap();
        }
        assert_eq!((size(0), size(1)), (before, 0), "marks do not add up");
    }

    #[test]
    fn segments_take_turns_and_the_file_does_not_grow() {
        let folder = folder();
        let path = folder.path().join("events");
        let (mut journal, _) = EventJournal::open(&path, MIN_SEGMENT).unwrap();
        for number in 1..=500 {
            journal.append(&[event(number)]).unwrap();
            let size = |number| fs::metadata(segment(&path, number)).map_or(0, |file| file.len());
            assert!(size(0) <= MIN_SEGMENT && size(1) <= MIN_SEGMENT);
        }
        drop(journal);
        let (_, found) = EventJournal::open(&path, MIN_SEGMENT).unwrap();
        let first = found.events[0].sequence;
        assert!(first > 400 && first < 490, "{first}");
        assert_eq!(found.events, events(first..=500));
    }

    #[test]
    fn a_journal_cut_at_any_byte_has_what_came_before_and_goes_on() {
        let folder = folder();
        let path = folder.path().join("events");
        let all = filled(&path);
        let newer = fs::read(segment(&path, 1)).unwrap();
        let older = fs::read(segment(&path, 0)).unwrap();
        let other = folder.path().join("cut");
        for length in 0..=newer.len() {
            fs::write(segment(&other, 0), &older).unwrap();
            fs::write(segment(&other, 1), &newer[..length]).unwrap();
            let (mut journal, found) = EventJournal::open(&other, MIN_SEGMENT).unwrap();
            let whole = newer[..length].iter().filter(|byte| **byte == b'\n').count();
            let kept = older.iter().filter(|byte| **byte == b'\n').count() + whole;
            assert_eq!(found.events, all[..kept], "{length}");
            assert!(found.last >= all.len() as u64, "a number would be given twice");
            assert!(found.damaged <= 1);
            let next = event(found.last + 1);
            journal.append(std::slice::from_ref(&next)).unwrap();
            drop(journal);
            let (_, again) = EventJournal::open(&other, MIN_SEGMENT).unwrap();
            assert_eq!(again.events.last(), Some(&next), "{length}");
            assert_eq!(again.damaged, 0, "what was torn is gone");
        }
    }

    #[test]
    fn a_changed_byte_costs_the_event_that_it_is_in() {
        let folder = folder();
        let path = folder.path().join("events");
        let all = filled(&path);
        let newer = fs::read(segment(&path, 1)).unwrap();
        for at in 0..newer.len() {
            let mut changed = newer.clone();
            changed[at] ^= 1;
            fs::write(segment(&path, 1), &changed).unwrap();
            let (_, found) = EventJournal::open(&path, MIN_SEGMENT).unwrap();
            // A changed line break joins two lines.
            assert!(found.events.len() >= all.len() - 2, "{at}");
            assert!(found.events.iter().all(|event| all.contains(event)), "{at}");
            assert!(found.events.is_sorted_by(|one, two| one.sequence < two.sequence));
        }
        for rubbish in [
            &b"\n\n\n"[..],
            b"00000000 {}\n",
            b"\xff\xff\0\0",
            b"0 {\"closed\":7}\n",
        ] {
            fs::write(segment(&path, 1), rubbish).unwrap();
            EventJournal::open(&path, MIN_SEGMENT).unwrap();
        }
    }

    #[test]
    fn a_log_is_kept_while_it_is_used_and_goes_on_after_a_restart() {
        let folder = folder();
        let path = folder.path().join("events");
        for life in 0..3_u64 {
            let (journal, found) = EventJournal::open(&path, 1 << 20).unwrap();
            assert_eq!(found.last, life * 300);
            let after = found.last;
            let log = Arc::new(found.into_log());
            assert_eq!(log.page(0, 2000).events.len() as u64, life * 300);
            log.record(EventKind::Started);
            let keeper = journal.keep(Arc::clone(&log), after).unwrap();
            for _ in 1..300 {
                log.record(EventKind::Paused);
            }
            drop(keeper);
            // It is heard, and nobody listens.
            log.record(EventKind::Resumed);
        }
        let (_, found) = EventJournal::open(&path, 1 << 20).unwrap();
        assert_eq!((found.events.len(), found.last), (900, 900));
    }

    #[test]
    fn a_folder_that_is_not_there_is_told() {
        let error = EventJournal::open(Path::new("/nowhere/at/all/events"), 0).unwrap_err();
        assert!(error.to_string().contains("/nowhere/at/all/events.0"), "{error}");
    }
}
