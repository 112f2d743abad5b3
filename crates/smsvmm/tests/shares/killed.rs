//! The server of a pool's disk is killed and started again: what clients of NBD and iSCSI were told is written, zeroed or discarded is there, though
//! nobody has flushed it. What is not durable yet lies in a file in `/dev/shm` (decision 26): if that goes, something is missing; if there cannot be one,
//! they are answered later.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use block_io::nbd::protocol::{command, option, reply};

use super::iscsi::{self, Answer, Session, TARGET};
use super::raw;
use super::{Place, Share, until};

const SECTOR: usize = 512;
/// Sectors of a block, the smallest piece for which space is given or taken.
const BLOCK: u64 = 8;
/// Of the disk.
const SECTORS: u64 = (16 << 20) / SECTOR as u64;
/// Read at once.
const PIECE: u64 = 128;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Write,
    WriteZeroes,
    Trim,
    Flush,
}

#[derive(Debug, Clone, Copy)]
struct Change {
    kind: Kind,
    sector: u64,
    count: u64,
    /// What its sectors are full of.
    stamp: u64,
}

impl Change {
    /// A write has a stamp that no other one has; for the rest it is 0.
    fn new(kind: Kind, sector: u64, count: u64) -> Self {
        static STAMP: AtomicU64 = AtomicU64::new(1);
        let stamp = match kind {
            Kind::Write => STAMP.fetch_add(1, Ordering::Relaxed),
            _ => 0,
        };
        Self {
            kind,
            sector,
            count,
            stamp,
        }
    }

    fn sectors(&self) -> std::ops::Range<usize> {
        let start = usize::try_from(self.sector).unwrap();
        start..start + usize::try_from(self.count).unwrap()
    }

    fn data(&self) -> Vec<u8> {
        let words = self.sectors().len() * SECTOR / 8;
        self.stamp.to_le_bytes().repeat(words)
    }
}

/// Somebody who uses the disk.
trait Client: Send + Sized + 'static {
    /// How many changes it asks for before one is answered.
    const DEPTH: usize;
    /// Sectors that it writes at most at once.
    const LARGEST: u64;

    /// Serves the disk; where that is.
    fn serve(place: &Place) -> (Share, String);
    fn connect(place: &Place, at: &str, number: usize) -> Self;
    fn begin(&mut self, cookie: u64, change: &Change) -> io::Result<()>;
    /// Waits until one is answered, which must have succeeded: its cookie.
    fn end(&mut self) -> io::Result<u64>;
    fn read(&mut self, sector: u64, count: u64) -> Vec<u8>;

    /// One after the other.
    fn all(&mut self, changes: &[Change]) {
        for (cookie, change) in (0..).zip(changes) {
            self.begin(cookie, change).unwrap();
            assert_eq!(self.end().unwrap(), cookie);
        }
    }
}

struct Nbd(raw::Client);

impl Client for Nbd {
    const DEPTH: usize = 16;
    const LARGEST: u64 = 128;

    fn serve(place: &Place) -> (Share, String) {
        let share = place.serve("nbd --devices d0,d1 --socket s /a.dsk", "a.dsk: nbd+unix");
        (share, String::new())
    }

    fn connect(place: &Place, _: &str, _: usize) -> Self {
        let mut client = raw::Client::greeted(&place.path("s"));
        let kinds = client.option(option::GO, b"\0\0\0\x05a.dsk\0\0");
        assert_eq!(kinds.last(), Some(&reply::ACK));
        Self(client)
    }

    fn begin(&mut self, cookie: u64, change: &Change) -> io::Result<()> {
        let asked = match change.kind {
            Kind::Write => command::WRITE,
            Kind::WriteZeroes => command::WRITE_ZEROES,
            Kind::Trim => command::TRIM,
            Kind::Flush => command::FLUSH,
        };
        let bytes = |sectors| sectors * SECTOR as u64;
        let mut message = self
            .0
            .request(asked, 0, cookie, bytes(change.sector), bytes(change.count));
        if change.kind == Kind::Write {
            message.extend(change.data());
        }
        self.0.stream.write_all(&message)
    }

    fn end(&mut self) -> io::Result<u64> {
        let answer = self.0.answer()?;
        assert_eq!(answer.error, 0);
        Ok(answer.cookie)
    }

    fn read(&mut self, sector: u64, count: u64) -> Vec<u8> {
        let (offset, length) = (sector * SECTOR as u64, count * SECTOR as u64);
        assert_eq!(self.0.ask(command::READ, 0, offset, length, &[]), 0);
        self.0.take(usize::try_from(length).unwrap()).unwrap()
    }
}

struct Iscsi {
    session: Session,
    /// One at a time: it is asked for when its answer is.
    next: Option<(u64, Change)>,
}

impl Client for Iscsi {
    const DEPTH: usize = 1;
    /// More would have to be asked for by the target.
    const LARGEST: u64 = 16;

    fn serve(place: &Place) -> (Share, String) {
        let line = format!("iscsi --devices d0,d1 --listen 127.0.0.1:0 --target {TARGET} /a.dsk");
        let share = place.serve(&line, "--login");
        let portal = iscsi::portal(place);
        (share, portal)
    }

    fn connect(_: &Place, at: &str, number: usize) -> Self {
        let session = Session::log_in(at, &format!("client{number}"));
        Self { session, next: None }
    }

    fn begin(&mut self, cookie: u64, change: &Change) -> io::Result<()> {
        self.next = Some((cookie, *change));
        Ok(())
    }

    fn end(&mut self) -> io::Result<u64> {
        let (cookie, change) = self.next.take().unwrap();
        let sector = change.sector.to_be_bytes();
        let count = u32::try_from(change.count).unwrap().to_be_bytes();
        let mut cdb = [0; 16];
        let mut data = Vec::new();
        // WRITE (16), WRITE SAME (16) with NDOB, UNMAP, SYNCHRONIZE CACHE (16)
        (cdb[0], cdb[1]) = match change.kind {
            Kind::Write => (0x8a, 0),
            Kind::WriteZeroes => (0x93, 1),
            Kind::Trim => (0x42, 0),
            Kind::Flush => (0x91, 0),
        };
        match change.kind {
            Kind::Trim => {
                cdb[8] = 24;
                data = vec![0, 22, 0, 16, 0, 0, 0, 0];
                data.extend([&sector[..], &count, &[0; 4]].concat());
            }
            _ => {
                cdb[2..10].copy_from_slice(&sector);
                cdb[10..14].copy_from_slice(&count);
            }
        }
        if change.kind == Kind::Write {
            data = change.data();
        }
        let length = if change.kind == Kind::Trim { 10 } else { 16 };
        let answer = self.session.insists(0, &cdb[..length], &data, 0)?;
        assert_eq!(answer, Answer::Good(Vec::new()), "{change:?}");
        Ok(cookie)
    }

    fn read(&mut self, sector: u64, count: u64) -> Vec<u8> {
        let mut cdb = [0; 16];
        cdb[0] = 0x88;
        cdb[2..10].copy_from_slice(&sector.to_be_bytes());
        cdb[13] = u8::try_from(count).unwrap();
        let length = usize::try_from(count).unwrap() * SECTOR;
        match self.session.insists(0, &cdb, &[], length).unwrap() {
            Answer::Good(bytes) => bytes,
            other => panic!("{other:?}"),
        }
    }
}

/// What sectors have, by number.
struct Content {
    /// Their stamps, as was answered.
    sure: Vec<u64>,
    /// What they may have as well, as it was asked for.
    maybe: Vec<Option<u64>>,
}

impl Content {
    fn new() -> Self {
        let sectors = usize::try_from(SECTORS).unwrap();
        Self {
            sure: vec![0; sectors],
            maybe: vec![None; sectors],
        }
    }

    fn is_busy(&self, change: &Change) -> bool {
        self.maybe[change.sectors()].iter().any(Option::is_some)
    }

    fn asked(&mut self, change: &Change) {
        self.maybe[change.sectors()].fill(Some(change.stamp));
    }

    fn answered(&mut self, change: &Change) {
        self.maybe[change.sectors()].fill(None);
        self.sure[change.sectors()].fill(change.stamp);
    }

    /// How many sectors of `part` have what they cannot have. What they have is sure now.
    fn wrong(&mut self, client: &mut impl Client, part: std::ops::Range<u64>) -> usize {
        let mut wrong = 0;
        for piece in part.step_by(usize::try_from(PIECE).unwrap()) {
            let bytes = client.read(piece, PIECE);
            for (at, sector) in (usize::try_from(piece).unwrap()..).zip(bytes.chunks_exact(SECTOR)) {
                let stamp = u64::from_le_bytes(sector[..8].try_into().unwrap());
                let whole = sector.chunks_exact(8).all(|word| word == stamp.to_le_bytes());
                let maybe = self.maybe[at].take();
                wrong += usize::from(!whole || stamp != self.sure[at] && Some(stamp) != maybe);
                self.sure[at] = stamp;
            }
        }
        wrong
    }
}

/// First writes of all kinds from `start` on, and changes of what is there in `old`: all in blocks that have not been changed by others.
fn some_changes<C: Client>(start: u64, old: u64) -> Vec<Change> {
    let mut changes = Vec::new();
    for place in 0..60 {
        let (new, there) = (start + place * 40, old + place * 40);
        // A whole block, several, and a part of one. Then more of the last, and some again.
        changes.push(Change::new(Kind::Write, new, BLOCK));
        changes.push(Change::new(Kind::Write, new + BLOCK, C::LARGEST.min(2 * BLOCK)));
        changes.push(Change::new(Kind::Write, new + 3 * BLOCK + 3, 2));
        changes.push(Change::new(Kind::Write, new + 3 * BLOCK + 1, 3));
        changes.push(Change::new(Kind::Write, new + 1, 2));
        // Of what is there: a write, zeroes in place and not, and nothing.
        changes.push(Change::new(Kind::Write, there + 2, 9));
        changes.push(Change::new(Kind::WriteZeroes, there + 2 * BLOCK, BLOCK + 3));
        changes.push(Change::new(Kind::Trim, there + 4 * BLOCK, BLOCK));
    }
    changes
}

fn what_was_answered_is_there<C: Client>() {
    let place = Place::new();
    place.pool(&["/a.dsk"]);
    let mut content = Content::new();
    let (share, at) = C::serve(&place);
    let mut client = C::connect(&place, &at, 0);
    let base: Vec<Change> = (0..5000)
        .step_by(usize::try_from(C::LARGEST).unwrap())
        .map(|sector| Change::new(Kind::Write, sector, C::LARGEST))
        .collect();
    client.all(&base);
    drop(client);
    place.run("share stop --management m.sock");
    share.ended();
    base.iter().for_each(|change| content.answered(change));

    let mut old = 0;
    for start in [8192, 16384] {
        let (share, at) = C::serve(&place);
        let mut client = C::connect(&place, &at, 0);
        assert_eq!(content.wrong(&mut client, 0..SECTORS), 0);
        let changes = some_changes::<C>(start, old);
        old += 2480;
        let begin = Instant::now();
        client.all(&changes);
        drop(share);
        let took = begin.elapsed();
        changes.iter().for_each(|change| content.answered(change));
        let is_last = start == 16384;
        if is_last {
            // The journal says them durably some seconds after the first one, if nobody asks.
            std::fs::remove_file(place.tail.get().unwrap()).unwrap();
        }
        let (share, at) = C::serve(&place);
        let mut client = C::connect(&place, &at, 0);
        assert_eq!(share.has_said("may miss writes"), is_last);
        let wrong = content.wrong(&mut client, 0..SECTORS);
        match is_last {
            false => assert_eq!(wrong, 0),
            // Had it taken longer, all might be durable.
            true => assert!(wrong > 0 || took > Duration::from_secs(3), "{took:?}"),
        }
    }
    place.run("file --devices d0,d1 check");
}

fn nothing_is_lost_without_memory_for_the_tail<C: Client>() {
    let place = Place::new();
    place.pool(&["/a.dsk"]);
    let tail = place.tail.get().unwrap();
    let _ = std::fs::remove_file(tail);
    std::fs::create_dir(tail).unwrap();
    let (share, at) = C::serve(&place);
    let mut client = C::connect(&place, &at, 0);
    let changes = &some_changes::<C>(8192, 0)[..160];
    client.all(changes);
    drop(share);
    let mut content = Content::new();
    changes.iter().for_each(|change| content.answered(change));
    let (_share, at) = C::serve(&place);
    let mut client = C::connect(&place, &at, 0);
    assert_eq!(content.wrong(&mut client, 0..SECTORS), 0);
    std::fs::remove_dir(tail).unwrap();
}

/// A client that changes its own part of the disk until its server has gone.
fn load<C: Client>(
    mut client: C,
    mut content: Content,
    part: std::ops::Range<u64>,
    done: &AtomicU64,
) -> Content {
    let mut random = part.start + content.sure.iter().sum::<u64>();
    let mut below = |limit: u64| {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % limit
    };
    let mut change = || {
        let blocks = 1 + below(C::LARGEST / BLOCK);
        let block = part.start + below((part.end - part.start - C::LARGEST) / BLOCK) * BLOCK;
        match below(100) {
            0 => Change::new(Kind::Flush, 0, 0),
            1..10 => Change::new(Kind::Trim, block, blocks * BLOCK),
            10..20 => Change::new(Kind::WriteZeroes, block, blocks * BLOCK),
            20..50 => Change::new(Kind::Write, block + below(BLOCK), 1 + below(BLOCK)),
            _ => Change::new(Kind::Write, block, blocks * BLOCK),
        }
    };
    let mut flying = BTreeMap::new();
    for cookie in 0.. {
        let next = change();
        if content.is_busy(&next) {
            continue;
        }
        content.asked(&next);
        flying.insert(cookie, next);
        if client.begin(cookie, &next).is_err() {
            break;
        }
        if flying.len() == C::DEPTH {
            let Ok(ended) = client.end() else { break };
            content.answered(&flying.remove(&ended).unwrap());
            done.fetch_add(1, Ordering::Relaxed);
        }
    }
    // What had been answered before it went.
    while flying.len() < C::DEPTH
        && let Ok(ended) = client.end()
    {
        content.answered(&flying.remove(&ended).unwrap());
    }
    content
}

fn nothing_is_lost_under_load<C: Client>(clients: usize) {
    let place = Place::new();
    place.pool(&["/a.dsk"]);
    let length = SECTORS / u64::try_from(clients).unwrap();
    let part = move |number: usize| {
        let start = u64::try_from(number).unwrap() * length;
        start..start + length
    };
    let mut contents: Vec<Content> = (0..clients).map(|_| Content::new()).collect();
    for round in 0..5 {
        let (share, at) = C::serve(&place);
        let done = Arc::<AtomicU64>::default();
        let running: Vec<JoinHandle<Content>> = contents
            .drain(..)
            .enumerate()
            .map(|(number, content)| {
                let (client, done) = (C::connect(&place, &at, number), Arc::clone(&done));
                thread::spawn(move || load(client, content, part(number), &done))
            })
            .collect();
        until("the clients are at work", || done.load(Ordering::Relaxed) > 50);
        thread::sleep(Duration::from_millis(23 * round));
        drop(share);
        contents.extend(running.into_iter().map(|one| one.join().unwrap()));
        let (_share, at) = C::serve(&place);
        let mut client = C::connect(&place, &at, 0);
        for (number, content) in contents.iter_mut().enumerate() {
            let wrong = content.wrong(&mut client, part(number));
            assert_eq!(wrong, 0, "round {round}, client {number}");
        }
    }
    place.run("file --devices d0,d1 check");
}

#[test]
fn what_nbd_has_answered_survives_a_kill() {
    what_was_answered_is_there::<Nbd>();
}

#[test]
fn what_iscsi_has_answered_survives_a_kill() {
    what_was_answered_is_there::<Iscsi>();
}

#[test]
fn nbd_answers_only_what_survives_a_kill() {
    nothing_is_lost_without_memory_for_the_tail::<Nbd>();
}

#[test]
fn iscsi_answers_only_what_survives_a_kill() {
    nothing_is_lost_without_memory_for_the_tail::<Iscsi>();
}

#[test]
fn nothing_is_lost_by_kills_under_clients_of_nbd() {
    nothing_is_lost_under_load::<Nbd>(2);
}

#[test]
fn nothing_is_lost_by_kills_under_initiators() {
    nothing_is_lost_under_load::<Iscsi>(4);
}
