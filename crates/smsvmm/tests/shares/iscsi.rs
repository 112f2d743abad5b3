//! LUNs of iSCSI.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use super::{Place, has, until};

pub(crate) const TARGET: &str = "iqn.2026-11.org.example:t";
const BLOCK: usize = 512;
const BLOCKS: u32 = 64;
const TEST_UNIT_READY: [u8; 6] = [0; 6];
const REPORT_LUNS: [u8; 12] = [0xa0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0];
const READ_CAPACITY: [u8; 10] = [0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// Sense key, additional sense code and its qualifier.
const LUNS_CHANGED: Answer = Answer::Check(6, 0x3f, 0x0e);
const CAPACITY_CHANGED: Answer = Answer::Check(6, 0x2a, 0x09);
const NO_UNIT: Answer = Answer::Check(5, 0x25, 0);

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    Good(Vec<u8>),
    Check(u8, u8, u8),
}

const DONE: Answer = Answer::Good(Vec::new());

/// An initiator with one connection.
pub(crate) struct Session {
    stream: TcpStream,
    number: u32,
}

impl Session {
    pub(crate) fn log_in(portal: &str, initiator: &str) -> Self {
        let mut stream = TcpStream::connect(portal).unwrap();
        let text = format!("InitiatorName=iqn.2026-11.org.example:{initiator}\0TargetName={TARGET}\0");
        let mut request = vec![0; 48];
        (request[0], request[1]) = (0x43, 0x87);
        request[7] = u8::try_from(text.len()).unwrap();
        request.extend(text.as_bytes());
        request.resize(request.len().next_multiple_of(4), 0);
        stream.write_all(&request).unwrap();
        let mut session = Self { stream, number: 0 };
        let (head, _) = session.receive().unwrap();
        assert_eq!((head[0], head[36], head[37]), (0x23, 0, 0));
        session
    }

    fn receive(&mut self) -> std::io::Result<([u8; 48], Vec<u8>)> {
        let mut head = [0; 48];
        self.stream.read_exact(&mut head)?;
        let length = usize::from(u16::from_be_bytes([head[6], head[7]]));
        let mut data = vec![0; length.next_multiple_of(4)];
        self.stream.read_exact(&mut data)?;
        data.truncate(length);
        Ok((head, data))
    }

    /// A command to a LUN: with the data `out`, or for up to `expected` bytes.
    fn try_command(&mut self, lun: u8, cdb: &[u8], out: &[u8], expected: usize) -> std::io::Result<Answer> {
        self.number += 1;
        let mut request = vec![0; 48];
        let flags = match (out.len(), expected) {
            (0, 0) => 0x81,
            (0, _) => 0xc1,
            _ => 0xa1,
        };
        (request[0], request[1]) = (0x01, flags);
        let length = u32::try_from(out.len()).unwrap().to_be_bytes();
        request[5..8].copy_from_slice(&length[1..]);
        request[9] = lun;
        request[16..20].copy_from_slice(&self.number.to_be_bytes());
        let moved = u32::try_from(out.len().max(expected)).unwrap();
        request[20..24].copy_from_slice(&moved.to_be_bytes());
        // The login had number 0, and such requests do not count.
        request[24..28].copy_from_slice(&(self.number - 1).to_be_bytes());
        request[32..32 + cdb.len()].copy_from_slice(cdb);
        request.extend(out);
        request.resize(request.len().next_multiple_of(4), 0);
        self.stream.write_all(&request)?;
        let mut all = Vec::new();
        loop {
            let (head, data) = self.receive()?;
            match head[0] {
                0x21 if head[3] == 0 => return Ok(Answer::Good(all)),
                // Sense data in fixed format, behind their length.
                0x21 => return Ok(Answer::Check(data[4] & 15, data[14], data[15])),
                0x25 => {
                    all.extend(data);
                    if head[1] & 1 != 0 {
                        return Ok(Answer::Good(all));
                    }
                }
                // It is asked to log out, and does not.
                0x32 => {}
                other => panic!("{other:#x}"),
            }
        }
    }

    fn command(&mut self, lun: u8, cdb: &[u8], expected: usize) -> Answer {
        self.try_command(lun, cdb, &[], expected).unwrap()
    }

    /// A command, again after what it is told by the way.
    pub(crate) fn insists(
        &mut self,
        lun: u8,
        cdb: &[u8],
        out: &[u8],
        expected: usize,
    ) -> std::io::Result<Answer> {
        loop {
            match self.try_command(lun, cdb, out, expected)? {
                Answer::Check(6, ..) => {}
                other => return Ok(other),
            }
        }
    }

    /// Takes note of what it has not been told yet.
    fn listen(&mut self, lun: u8) {
        while let Answer::Check(6, ..) = self.command(lun, &TEST_UNIT_READY, 0) {}
    }

    fn luns(&mut self) -> Vec<u8> {
        let Answer::Good(list) = self.command(0, &REPORT_LUNS, 256) else {
            panic!("no list");
        };
        list[8..].chunks(8).map(|lun| lun[1]).collect()
    }
}

fn range(operation: u8, block: u32) -> [u8; 10] {
    let [a, b, c, d] = block.to_be_bytes();
    [operation, 0, a, b, c, d, 0, 0, 1, 0]
}

/// An initiator that writes and reads blocks of a LUN, its own ones from `first` on, until it is told to end, or something else than success comes.
struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    thread: JoinHandle<Option<Answer>>,
}

impl Load {
    fn start(portal: &str, initiator: &str, lun: u8, first: u32) -> Self {
        let (stop, done) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (seen, count) = (Arc::clone(&stop), Arc::clone(&done));
        let mut session = Session::log_in(portal, initiator);
        let thread = std::thread::spawn(move || {
            for round in 0_u32.. {
                let block = first + round % BLOCKS;
                let data = [u8::try_from(round % 251).unwrap(); BLOCK];
                match session.insists(lun, &range(0x2a, block), &data, 0) {
                    Ok(Answer::Good(_)) => count.store(u64::from(round) + 1, Ordering::Relaxed),
                    Ok(other) => return Some(other),
                    Err(_) => return None,
                }
                match session.insists(lun, &range(0x28, block), &[], BLOCK) {
                    Ok(Answer::Good(read)) => assert!(read == data, "round {round}"),
                    Ok(other) => return Some(other),
                    Err(_) => return None,
                }
                if seen.load(Ordering::Relaxed) {
                    break;
                }
            }
            Some(DONE)
        });
        Self { stop, done, thread }
    }

    fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    fn goes_on(&self) {
        let before = self.done();
        until("the initiator goes on", || self.done() > before + 2);
    }

    /// How it ended.
    fn end(self) -> Option<Answer> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

pub(crate) fn portal(place: &Place) -> String {
    place.status()["addresses"][0].as_str().unwrap().to_owned()
}

#[test]
fn luns_come_and_go_under_load_while_others_go_on() {
    let place = Place::new();
    place.image("a.img", 1 << 20);
    place.image("b.img", 1 << 20);
    let line = format!("iscsi --image a=a.img --listen 127.0.0.1:0 --target {TARGET}");
    let share = place.serve(&line, "--login");
    let portal = portal(&place);
    let load = Load::start(&portal, "load", 0, 0);
    let mut session = Session::log_in(&portal, "look");
    session.listen(0);
    assert_eq!(session.luns(), [0]);

    let said = place.add("--image b=b.img");
    assert_eq!(said, format!("b is served as LUN 1 of {TARGET}\n"));
    assert_eq!(session.command(0, &TEST_UNIT_READY, 0), LUNS_CHANGED);
    assert_eq!(session.command(0, &TEST_UNIT_READY, 0), DONE);
    assert_eq!(session.luns(), [0, 1]);
    session.listen(1);
    load.goes_on();
    if has("iscsi-ls") {
        let list = Command::new("iscsi-ls")
            .args(["--show-luns", &format!("iscsi://{portal}")])
            .output()
            .unwrap();
        let list = String::from_utf8(list.stdout).unwrap();
        assert!(list.contains("Lun:1"), "{list}");
    }

    let other = Load::start(&portal, "other", 1, 0);
    other.goes_on();
    let b = place.disk("b").unwrap();
    assert_eq!((&b["lun"], &b["clients"]), (&1.into(), &3.into()));
    assert!(b["counts"]["written-bytes"].as_u64().unwrap() >= 3 * BLOCK as u64);
    let status = place.status();
    let clients = status["clients"].as_array().unwrap();
    let by = |name: &str| {
        let name = format!("iqn.2026-11.org.example:{name}");
        let found = clients.iter().find(|client| client["initiator"] == name);
        found.unwrap().clone()
    };
    assert!(by("other")["counts"]["writes"].as_u64().unwrap() > 2);
    assert_eq!(by("look")["counts"]["writes"], 0);
    assert_eq!(by("look")["target"], TARGET);
    assert_eq!(status["targets"][0]["access"][0]["initiator"], "*");

    // Under load: what was acknowledged is there, and nobody else is disturbed.
    assert_eq!(place.remove("b"), "b is served no more\n");
    assert!(place.is_free("b.img"));
    until("it is told", || other.thread.is_finished());
    let rounds = other.done();
    assert_eq!(other.end(), Some(NO_UNIT));
    let image = std::fs::read(place.path("b.img")).unwrap();
    for round in rounds.saturating_sub(u64::from(BLOCKS))..rounds {
        let at = usize::try_from(round % u64::from(BLOCKS)).unwrap() * BLOCK;
        assert_eq!(u64::from(image[at]), round % 251, "round {round} of {rounds}");
    }
    assert_eq!(session.command(0, &TEST_UNIT_READY, 0), LUNS_CHANGED);
    assert_eq!(session.luns(), [0]);
    assert_eq!(session.command(1, &TEST_UNIT_READY, 0), NO_UNIT);
    load.goes_on();

    for (line, said) in [
        (
            "add --image c=b.img --lun 0",
            "LUN 0 is taken by a; choose another one",
        ),
        ("add --image a=b.img", "a is served already"),
        ("add --image c=b.img --target iqn.none", "there is no such target"),
        ("add --image c=b.img --socket s", "have no `socket`"),
        ("remove b", "no such disk is served"),
        ("disconnect 99", "no such client is connected"),
    ] {
        let (verb, rest) = line.split_once(' ').unwrap();
        let error = place.fails(&format!("share {verb} --management m.sock {rest}"));
        assert!(error.contains(said), "{line}: {error}");
    }
    assert!(place.is_free("b.img"));
    place.add("--image b.img --lun 9 --read-only");
    assert_eq!(session.luns(), [0, 9]);
    assert_eq!(place.disk("b.img").unwrap()["read-only"], true);
    assert_eq!(load.end(), Some(DONE));
    // It would be asked to log out, and waited for.
    drop(session);
    place.run("share stop --management m.sock");
    share.ended();
}

#[test]
fn a_session_is_ended_and_others_are_not() {
    let place = Place::new();
    place.image("a.img", 1 << 20);
    let line = format!("iscsi --image a=a.img --listen 127.0.0.1:0 --target {TARGET}");
    let _share = place.serve(&line, "--login");
    let portal = portal(&place);
    let (stays, goes) = (
        Load::start(&portal, "stays", 0, 0),
        Load::start(&portal, "goes", 0, BLOCKS),
    );
    goes.goes_on();
    let id = |place: &Place| {
        let status = place.status();
        let all = status["clients"].as_array().unwrap();
        let is = |client: &&serde_json::Value| client["initiator"].as_str().unwrap().ends_with(":goes");
        all.iter()
            .find(is)
            .map(|client| client["id"].as_str().unwrap().to_owned())
    };
    // It does not log out when it is asked to, and is cut.
    let client = id(&place).unwrap();
    place.run(&format!("share disconnect --management m.sock {client}"));
    assert_eq!(goes.end(), None);
    assert_eq!(id(&place), None);
    stays.goes_on();
    assert_eq!(stays.end(), Some(DONE));
    // It may come again.
    let again = Load::start(&portal, "goes", 0, 0);
    again.goes_on();
    assert_eq!(again.end(), Some(DONE));
}

#[test]
fn disks_of_a_pool_come_go_and_grow() {
    let place = Place::new();
    place.pool(&["/a.dsk", "/b.dsk", "/c.dsk"]);
    std::fs::write(
        place.path("access.toml"),
        "[[initiator]]\nname = \"iqn.2026-11.org.example:some\"\ndisks = [\"/b.dsk\"]\n[[initiator]]\nname = \"*\"\n",
    )
    .unwrap();
    let line = "iscsi --devices d0,d1 --listen 127.0.0.1:0 --access access.toml";
    let share = place.serve(&format!("{line} --target {TARGET} /a.dsk /b.dsk"), "--login");
    let portal = portal(&place);
    let load = Load::start(&portal, "load", 0, 0);
    let mut session = Session::log_in(&portal, "look");
    let mut some = Session::log_in(&portal, "some");
    session.listen(0);
    some.listen(1);
    assert_eq!((session.luns(), some.luns()), (vec![0, 1], vec![1]));

    // What is shown to somebody by name is never another disk.
    place.remove("/b.dsk");
    assert_eq!((session.luns(), some.luns()), (vec![0], vec![]));
    let error = place.fails("share add --management m.sock /c.dsk --lun 1");
    assert!(error.contains("LUN 1 is /b.dsk"), "{error}");
    place.add("/c.dsk");
    assert_eq!((session.luns(), some.luns()), (vec![0, 2], vec![]));
    std::fs::write(place.path("share.toml"), "[management]\nsocket = \"m.sock\"\n").unwrap();
    place.run("disk --config share.toml resize /b.dsk 20M");
    place.add("/b.dsk");
    assert_eq!((session.luns(), some.luns()), (vec![0, 1, 2], vec![1]));

    session.listen(0);
    session.listen(2);
    place.run("disk --config share.toml resize /c.dsk 24M");
    assert_eq!(session.command(2, &TEST_UNIT_READY, 0), CAPACITY_CHANGED);
    let Answer::Good(capacity) = session.command(2, &READ_CAPACITY, 8) else {
        panic!("no capacity");
    };
    let last = u32::from_be_bytes(capacity[..4].try_into().unwrap());
    assert_eq!((u64::from(last) + 1) * BLOCK as u64, 24 << 20);
    place.remove("/c.dsk");
    place.run("disk --config share.toml delete /c.dsk");
    load.goes_on();
    assert_eq!(load.end(), Some(DONE));
    drop((session, some));
    place.run("share stop --management m.sock");
    share.ended();
    let checked = place.run("file --devices d0,d1 check");
    assert!(!checked.contains("problem"), "{checked}");
}
