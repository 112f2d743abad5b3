//! What is left to the threads of a process that serves. That they serve all the same is what the other tests see.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::MetadataExt;
use std::process::Child;

use rustix::process::{Pid, Signal, kill_process};

use super::nbd::Client;
use super::{Place, until};

/// What root keeps to reach what is others', and memory that rings hold, each a bit of `/proc/PID/status`.
const DAC_OVERRIDE: u64 = 1 << 1;
const OPENING: u64 = DAC_OVERRIDE | 1 << 2 | 1 << 3 | 1 << 14;

/// A process that serves, without a management socket if its arguments name none.
struct Running(Child);

impl Running {
    /// Starts it; `ready` is a part of what it says on either output when it serves.
    fn start(place: &Place, line: &str, ready: &str) -> Self {
        let mut command = place.command(&format!("share {line}"));
        let (mut said, write) = std::io::pipe().unwrap();
        command.stdout(write.try_clone().unwrap()).stderr(write);
        let running = Self(command.spawn().unwrap());
        drop(command);
        let mut lines = BufReader::new(&mut said).lines();
        let is_ready = lines.any(|line| line.unwrap().contains(ready));
        assert!(is_ready, "share {line}");
        std::thread::spawn(move || said.read_to_end(&mut Vec::new()));
        running
    }

    /// A line of the status of each of its threads, by the threads' names.
    fn of_threads(&self, key: &str) -> Vec<(String, String)> {
        let threads = fs::read_dir(format!("/proc/{}/task", self.0.id())).unwrap();
        let read = |thread: fs::DirEntry| {
            // One that has ended meanwhile does not matter.
            let status = fs::read_to_string(thread.path().join("status")).ok()?;
            let value = |key: &str| {
                let line = status.lines().find_map(|line| line.strip_prefix(key));
                line.unwrap_or_default().trim().to_owned()
            };
            Some((value("Name:"), value(key)))
        };
        // The kernel's own, which do requests of a ring, make no system calls.
        let is_ours = |(name, _): &(String, String)| !name.starts_with("iou-");
        threads.flatten().filter_map(read).filter(is_ours).collect()
    }

    /// All threads are confined, and have no capabilities but those that `kept` says of a thread of this name.
    fn is_confined(&self, kept: impl Fn(&str) -> u64) {
        // The first thread is the last one.
        let all_have = |key: &str, value: &str| self.of_threads(key).iter().all(|(_, found)| found == value);
        until("all have a filter", || all_have("Seccomp:", "2"));
        assert!(all_have("NoNewPrivs:", "1"));
        for set in ["CapEff:", "CapPrm:", "CapInh:"] {
            for (name, found) in self.of_threads(set) {
                let found = u64::from_str_radix(&found, 16).unwrap();
                assert_eq!(found & !kept(&name), 0, "{set} {found:x} of {name}");
            }
        }
    }

    fn has(&self, thread: &str) -> bool {
        self.of_threads("Name:").iter().any(|(name, _)| name == thread)
    }

    /// Ends it by a signal; it must end well.
    fn ends(mut self) {
        kill_process(Pid::from_child(&self.0), Signal::TERM).unwrap();
        assert!(self.0.wait().unwrap().success());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[test]
fn all_kinds_are_confined_and_end_in_order() {
    let place = Place::new();
    place.pool(&["/a.dsk"]);
    place.image("a.img", 1 << 20);
    for (line, ready, thread) in [
        (
            "nbd --devices d0,d1 --io-helpers 1 --socket s /a.dsk",
            "a.dsk: nbd",
            "nbd",
        ),
        (
            "iscsi --devices d0,d1 --listen 127.0.0.1:0 --initiator iqn.2026-11.org.example:a /a.dsk",
            "iscsi-ls",
            "expanded-look",
        ),
        (
            "vhost-user --image a.img --threads 2 --socket s",
            "is served at s",
            "vhost-user",
        ),
        (
            "vhost-user-scsi --devices d0,d1 --socket s /a.dsk",
            "is served at s",
            "vhost-user",
        ),
    ] {
        let share = Running::start(&place, line, ready);
        share.is_confined(|_| 0);
        assert!(share.has(thread), "{line}: {:?}", share.of_threads("Name:"));
        if ready.contains("nbd") {
            let client = Client::start(&place, "a.dsk");
            client.goes_on();
            client.end();
            assert_ne!(fs::metadata(place.tail.get().unwrap()).unwrap().blocks(), 0);
        }
        share.ends();
        assert!(!place.path("s").exists(), "{line}");
        assert_eq!(
            fs::metadata(place.tail.get().unwrap()).unwrap().blocks(),
            0,
            "{line}"
        );
    }
    let checked = place.run("file --devices d0,d1 check");
    assert!(!checked.contains("problem"), "{checked}");
}

#[test]
fn images_of_others_are_reached_again_and_added_by_threads_that_are_confined() {
    let (far, place) = (Place::new(), Place::new());
    far.image("a.img", 1 << 20);
    far.image("b.img", 1 << 20);
    let socket = far.path("s").display().to_string();
    let serve = || {
        let line = "nbd --image a=a.img --image b=b.img --socket s";
        Running::start(&far, line, "b: nbd")
    };
    let uri = |export: &str| format!("{export}=nbd+unix:///{export}?socket={socket}");
    let other = serve();
    let line = format!("nbd --image {} --socket s --management m.sock", uri("a"));
    let share = Running::start(&place, &line, "a: nbd");
    let kept = |thread: &str| match thread {
        "nbd" => 0,
        "nbd-connector" => DAC_OVERRIDE,
        // The first thread, and that of management.
        _ => OPENING,
    };
    assert!(share.has("nbd-connector"));
    share.is_confined(kept);
    place.add(&format!("--image {}", uri("b")));
    share.is_confined(kept);
    let (client, of_added) = (Client::start(&place, "a"), Client::start(&place, "b"));
    client.goes_on();
    of_added.goes_on();
    drop(other);
    let _other = serve();
    client.goes_on();
    of_added.goes_on();
    client.end();
    of_added.end();
    // It opens files, wherever they are, and makes none.
    place.image("c.img", 1 << 20);
    place.add("--image c.img");
    assert!(!place.is_free("c.img"));
    place.remove("c.img");
    share.ends();
    assert!(!place.path("m.sock").exists() && !place.path("s").exists());
}
