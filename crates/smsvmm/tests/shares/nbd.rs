//! NBD exports.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use block_io::{
    AlignedBuffer, BlockDevice, Durability, NbdAddress, NbdDevice, NbdOptions, Worker, WorkerOptions,
};

use super::{Place, has, until};

const BLOCK: usize = 4096;
const BLOCKS: u64 = 64;

fn address(place: &Place, export: &str) -> NbdAddress {
    let socket = place.path("s").display().to_string();
    format!("nbd+unix:///{export}?socket={socket}").parse().unwrap()
}

/// A client that writes and reads, each block with its number and round, until it is told to end or something fails.
pub(super) struct Client {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    thread: JoinHandle<Result<(), String>>,
}

impl Client {
    pub(super) fn start(place: &Place, export: &str) -> Self {
        let (stop, done) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (seen, count) = (Arc::clone(&stop), Arc::clone(&done));
        let options = NbdOptions {
            patience: Duration::from_millis(200),
            ..NbdOptions::default()
        };
        let device = NbdDevice::open(&address(place, export), &options).unwrap();
        let thread = std::thread::spawn(move || {
            let worker = Worker::start("client", WorkerOptions::default()).unwrap();
            worker.run(move || async move {
                let mut buffer = AlignedBuffer::new(BLOCK);
                for round in 0_u64.. {
                    let at = round % BLOCKS * BLOCK as u64;
                    let byte = u8::try_from(round % 251).unwrap();
                    buffer.as_mut_slice().fill(byte);
                    // SAFETY: the buffer outlives the requests, which are awaited.
                    let memory = [unsafe { buffer.io(0, BLOCK) }];
                    let written = device.write(at, &memory, Durability::Volatile).await;
                    written.map_err(|error| format!("{error:?}"))?;
                    buffer.as_mut_slice().fill(0xff);
                    // SAFETY: as above.
                    let memory = [unsafe { buffer.io(0, BLOCK) }];
                    device
                        .read(at, &memory)
                        .await
                        .map_err(|error| format!("{error:?}"))?;
                    assert!(buffer.as_slice().iter().all(|found| *found == byte));
                    count.store(round + 1, Ordering::Relaxed);
                    if seen.load(Ordering::Relaxed) {
                        break;
                    }
                }
                Ok(())
            })
        });
        Self { stop, done, thread }
    }

    fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// It has done something more.
    pub(super) fn goes_on(&self) {
        let before = self.done();
        until("the client goes on", || self.done() > before + 2);
    }

    /// How many rounds it did; it must have had no error.
    pub(super) fn end(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap().unwrap();
        self.done.load(Ordering::Relaxed)
    }
}

fn exports(place: &Place) -> String {
    let uri = format!("nbd+unix://?socket={}", place.path("s").display());
    let list = Command::new("nbdinfo").args(["--list", &uri]).output().unwrap();
    String::from_utf8(list.stdout).unwrap()
}

#[test]
fn exports_come_and_go_while_a_client_of_another_goes_on() {
    let place = Place::new();
    place.image("a.img", 1 << 20);
    place.image("b.img", 1 << 20);
    let share = place.serve("nbd --image a=a.img --socket s", "a: nbd+unix");
    let client = Client::start(&place, "a");
    client.goes_on();

    assert_eq!(place.add("--image b=b.img"), "b is served\n");
    assert!(!place.is_free("b.img"));
    client.goes_on();
    let other = Client::start(&place, "b");
    other.goes_on();
    if has("nbdinfo") {
        let list = exports(&place);
        assert!(
            list.contains("export=\"a\"") && list.contains("export=\"b\""),
            "{list}"
        );
    }
    let status = place.status();
    assert_eq!(status["kind"], "nbd");
    let b = place.disk("b").unwrap();
    assert_eq!(b["size"], 1 << 20);
    assert_eq!(b["clients"], 1);
    assert_eq!(b["source"], place.path("b.img").display().to_string());
    assert!(b["counts"]["writes"].as_u64().unwrap() > 2);
    assert_eq!(
        b["counts"]["written-bytes"].as_u64().unwrap() % BLOCK as u64,
        0,
        "{b}"
    );
    assert_eq!(status["clients"].as_array().unwrap().len(), 2);
    assert!(
        status["clients"][0]["addresses"][0]
            .as_str()
            .unwrap()
            .starts_with("process ")
    );
    let shown = place.run("share status --management m.sock");
    assert!(shown.contains("b.img") && shown.contains("CLIENT"), "{shown}");

    // Under load: what was acknowledged is there, and nobody else notices.
    assert_eq!(place.remove("b"), "b is served no more\n");
    assert!(place.is_free("b.img"));
    assert!(place.disk("b").is_none());
    until("its client has lost it", || other.thread.is_finished());
    let rounds = other.done();
    let image = std::fs::read(place.path("b.img")).unwrap();
    for round in rounds.saturating_sub(BLOCKS - 1)..rounds {
        let at = usize::try_from(round % BLOCKS).unwrap() * BLOCK;
        // The one after the last that is known may have been done as well.
        let (own, next) = (round % 251, (round + BLOCKS) % 251);
        let found = u64::from(image[at]);
        assert!(
            found == own || (round + BLOCKS == rounds && found == next),
            "round {round}"
        );
    }
    let error = other.thread.join().unwrap().unwrap_err();
    assert!(!error.is_empty());
    client.goes_on();

    // The same name again, for another image, read-only.
    place.image("c.img", 2 << 20);
    place.add("--image b=c.img --read-only");
    let b = place.disk("b").unwrap();
    assert_eq!((&b["size"], &b["read-only"]), (&(2 << 20).into(), &true.into()));
    assert_eq!(b["counts"]["writes"], 0);

    // `client` is the only one of a.
    let metrics = get(&place, "/metrics");
    assert!(
        metrics.contains("smsvmm_share_clients{share=\"nbd\"} 1"),
        "{metrics}"
    );
    assert!(
        metrics.contains("smsvmm_share_requests_total{share=\"nbd\",disk=\"a\",operation=\"write\"}"),
        "{metrics}"
    );
    let rounds = client.end();
    assert!(rounds > 10);
    place.run("share stop --management m.sock");
    share.ended();
    assert!(!place.path("m.sock").exists() && !place.path("s").exists());
}

/// What is said at the management socket.
fn get(place: &Place, path: &str) -> String {
    use std::io::{Read, Write};
    let mut stream = std::os::unix::net::UnixStream::connect(place.path("m.sock")).unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn a_client_is_disconnected_and_may_come_again() {
    let place = Place::new();
    place.image("a.img", 1 << 20);
    let _share = place.serve("nbd --image a=a.img --socket s", "a: nbd+unix");
    let client = Client::start(&place, "a");
    client.goes_on();
    let id = |place: &Place| {
        place.status()["clients"][0]["id"]
            .as_str()
            .unwrap_or("")
            .to_owned()
    };
    let first = id(&place);
    place.run(&format!("share disconnect --management m.sock {first}"));
    // Its library connects anew, and goes on.
    client.goes_on();
    until("it came again", || !id(&place).is_empty() && id(&place) != first);
    client.end();
    let said = place.fails(&format!("share disconnect --management m.sock {first}"));
    assert!(
        said.contains("no such client is connected; `smsvmm share status` lists the clients"),
        "{said}"
    );
}

#[test]
fn what_cannot_be_is_refused_with_a_reason() {
    let place = Place::new();
    for image in ["a.img", "b.img"] {
        place.image(image, 1 << 20);
    }
    let _share = place.serve("nbd --image a=a.img --socket s", "a: nbd+unix");
    for (line, said) in [
        ("add --image a=b.img", "a is served already; choose another name"),
        ("add --image b=none.img", "none.img"),
        ("add --image c=a.img", "in use"),
        (
            "add --image b=b.img --lun 3",
            "disks that are shared by nbd have no `lun`; leave it out",
        ),
        ("add /vm/a.dsk", "this process serves images"),
        ("remove b", "b: no such disk is served"),
        ("disconnect 77", "77: no such client is connected"),
    ] {
        let (verb, rest) = line.split_once(' ').unwrap();
        let error = place.fails(&format!("share {verb} --management m.sock {rest}"));
        assert!(error.contains(said), "{line}: {error}");
    }
    // Nothing of it had an effect.
    assert_eq!(place.status()["disks"].as_array().unwrap().len(), 1);
    assert!(place.is_free("b.img"));
    // The socket is one process's.
    let error = place.fails("share nbd --image b.img --socket t --management m.sock");
    assert!(error.contains("somebody listens on m.sock already"), "{error}");
    let error = place.fails("share status --management none.sock");
    assert!(error.contains("nobody answers at none.sock"), "{error}");
}

#[test]
fn after_a_kill_the_sockets_are_taken_over() {
    let place = Place::new();
    place.image("a.img", 1 << 20);
    let line = "nbd --image a=a.img --socket s";
    drop(place.serve(line, "a: nbd+unix"));
    // The kernel closes what io_uring has when it has time.
    until("the socket is closed", || {
        std::os::unix::net::UnixStream::connect(place.path("s")).is_err()
    });
    assert!(place.path("m.sock").exists());
    let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(place.path("m.sock")).unwrap());
    assert_eq!(mode & 0o777, 0o600);
    let _share = place.serve(line, "a: nbd+unix");
    assert_eq!(place.status()["disks"][0]["name"], "a");
}

#[test]
fn disks_of_a_pool_come_go_and_grow() {
    let place = Place::new();
    place.pool(&["/a.dsk", "/b.dsk"]);
    let share = place.serve("nbd --devices d0,d1 --socket s /a.dsk", "a.dsk: nbd+unix");
    let client = Client::start(&place, "a.dsk");
    place.add("/b.dsk");
    let other = Client::start(&place, "b.dsk");
    other.goes_on();
    assert_eq!(place.status()["pool"], "tank");
    let error = place.fails("share add --management m.sock /none.dsk");
    assert!(error.contains("/none.dsk"), "{error}");

    // The pool is managed through the same socket.
    std::fs::write(place.path("share.toml"), "[management]\nsocket = \"m.sock\"\n").unwrap();
    place.run("disk --config share.toml snapshot --name monday /a.dsk");
    place.run("disk --config share.toml resize /a.dsk 24M");
    assert_eq!(place.disk("a.dsk").unwrap()["size"], 24 << 20);
    let error = place.fails("disk --config share.toml delete /b.dsk");
    assert!(error.contains("b.dsk"), "{error}");

    place.add("/a.dsk@monday");
    assert_eq!(place.disk("a.dsk@monday").unwrap()["read-only"], true);
    place.remove("a.dsk@monday");
    place.remove("b.dsk");
    until("its client has lost it", || other.thread.is_finished());
    place.run("disk --config share.toml delete /b.dsk");
    client.goes_on();
    client.end();
    place.run("share stop --management m.sock");
    share.ended();
    let checked = place.run("file --devices d0,d1 check");
    assert!(!checked.contains("problem"), "{checked}");
}
