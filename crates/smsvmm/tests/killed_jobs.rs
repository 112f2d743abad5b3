//! Jobs of guests and `smsvmm share vhost-user-scsi` that is killed in the middle of them: who asks the next process for its job is told the
//! truth, nobody else is told of it, and the disks have what was written.
#![allow(clippy::unwrap_used)]

#[path = "../../../storage-virtualizer/tests/driver/mod.rs"]
mod driver;
#[path = "../../host-manager/tests/guest/mod.rs"]
mod guest;
mod scsi_machine;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use api::file::Target;
use api::storage::{JobState, JobStatus, LayoutKind};
use api::{Problem, ProblemKind};
use driver::scsi::{Answer as Answered, DATA, Initiator, lun, read, write};
use driver::{readable, writable};
use expanded_api::{Answer, Request};
use scsi_machine::machine;
use storage_virtualizer::vhost_user::front_end::VhostUserDevice;

const DISK: &str = "/vm1/a.dsk";
const DEVICES: &str = "d0,d1,d2";
/// Bytes of the disk, which is moved in steps of 16 MiB.
const SIZE: u64 = 128 << 20;
const BLOCK: usize = 4096;
const BLOCKS: u64 = SIZE / BLOCK as u64;
const ACCESS: &str = "\
[[machine]]
socket = \"one.sock\"
[machine.expanded-api]
allow = [\"move\", \"layout\"]
volumes = [\"*\"]
rate = 10000
[[machine]]
socket = \"two.sock\"
[machine.expanded-api]
allow = [\"move\", \"layout\"]
volumes = [\"*\"]
rate = 10000
";

fn smsvmm(folder: &Path, arguments: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_smsvmm"));
    command
        .args(arguments.split(' '))
        .current_dir(folder)
        .env_remove("SMSVMM_LOG")
        .stdin(Stdio::null());
    command
}

fn do_it(folder: &Path, arguments: &str) -> String {
    let output = smsvmm(folder, arguments).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments}: {said}");
    String::from_utf8(output.stdout).unwrap()
}

/// What a block of the image has.
fn first(block: u64) -> u8 {
    u8::try_from(block % 251).unwrap() + 1
}

/// A pool with two volumes between which the disk is moved, and a third one whose RAID level is changed.
fn make(folder: &Path) {
    for device in DEVICES.split(',') {
        File::create(folder.join(device))
            .unwrap()
            .set_len(768 << 20)
            .unwrap();
    }
    let mut image = File::create(folder.join("image")).unwrap();
    for block in 0..BLOCKS {
        image.write_all(&[first(block); BLOCK]).unwrap();
    }
    fs::write(folder.join("access.toml"), ACCESS).unwrap();
    do_it(folder, "pool create tank d0 d1 d2");
    for line in [
        "file --devices d0,d1,d2 format --meta-size 64M",
        "volume --devices d0,d1,d2 create safe --size 192M --layout mirror",
        "volume --devices d0,d1,d2 create fast --size 192M --layout concat",
        "volume --devices d0,d1,d2 create third --size 16M --layout concat",
        "file --devices d0,d1,d2 mkdir /vm1 --volume safe",
        "disk --devices d0,d1,d2 import image /vm1/a.dsk",
        "disk --devices d0,d1,d2 create /b.dsk --size 8M --thick --volume third",
    ] {
        do_it(folder, line);
    }
}

/// The process that serves the disk, and the machines at its sockets.
struct Server {
    child: Child,
    one: (Initiator, VhostUserDevice),
    two: (Initiator, VhostUserDevice),
    tag: u32,
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Server {
    fn start(folder: &Path) -> Self {
        let line = "share vhost-user-scsi --devices d0,d1,d2 /vm1/a.dsk --socket one.sock --socket two.sock --access access.toml";
        let mut child = smsvmm(folder, line).stderr(Stdio::piped()).spawn().unwrap();
        let mut said = BufReader::new(child.stderr.take().unwrap()).lines();
        let served = said
            .by_ref()
            .map(Result::unwrap)
            .filter(|line| line.contains("is served at"));
        assert_eq!(served.take(2).count(), 2);
        // What it says later must not fill the pipe.
        std::thread::spawn(move || said.map_while(Result::ok).for_each(drop));
        let connect = |socket: &str| {
            let mut connected = machine(&folder.join(socket));
            guest::settle(&mut connected.0, 0);
            connected
        };
        let (one, two) = (connect("one.sock"), connect("two.sock"));
        Self {
            child,
            one,
            two,
            tag: 0,
        }
    }

    fn ask(&mut self, request: &Request) -> Result<Answer, Problem> {
        self.tag += 1;
        guest::ask(&mut self.one.0, 0, self.tag, request)
    }

    fn job(&mut self, request: &Request) -> JobStatus {
        match self.ask(request).unwrap() {
            Answer::Jobs(mut jobs) => jobs.remove(0),
            other => panic!("{other:?}"),
        }
    }

    /// Does work until `is_it` is so of a job.
    fn until(&mut self, load: &mut Load, job: u32, is_it: impl Fn(&JobStatus) -> bool) -> JobStatus {
        let begin = Instant::now();
        loop {
            let status = self.job(&Request::JobStatus { job });
            if is_it(&status) {
                return status;
            }
            assert!(begin.elapsed() < Duration::from_secs(120), "{status:?}");
            (0..4).for_each(|_| load.step(&mut self.one.0));
        }
    }
}

/// Writes blocks here and there, and sees that others have what they should.
struct Load {
    content: Vec<u8>,
    random: u64,
}

impl Load {
    fn new() -> Self {
        Self {
            content: (0..BLOCKS).map(first).collect(),
            random: 1,
        }
    }

    fn block(&mut self) -> u32 {
        self.random = self
            .random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        u32::try_from((self.random >> 33) % BLOCKS).unwrap()
    }

    fn step(&mut self, driver: &mut Initiator) {
        let (block, byte) = (self.block(), (self.random >> 20).to_le_bytes()[0]);
        driver.put(DATA, &[byte; BLOCK]);
        let written = driver.command(lun(0, 0), &write(block * 8, 8), Some(readable(DATA, BLOCK)));
        assert_eq!(written, Answered::good());
        self.content[block as usize] = byte;
        let other = self.block();
        self.check(driver, other);
    }

    fn check(&self, driver: &mut Initiator, block: u32) {
        let answer = driver.command(lun(0, 0), &read(block * 8, 8), Some(writable(DATA, BLOCK)));
        assert_eq!(answer, Answered::good());
        let mut bytes = [0; BLOCK];
        driver.get(DATA, &mut bytes);
        assert_eq!(bytes, [self.content[block as usize]; BLOCK], "block {block}");
    }

    /// All of it, but for most of what was not written since it was made.
    fn check_all(&self, driver: &mut Initiator) {
        for block in 0..u32::try_from(BLOCKS).unwrap() {
            if block % 16 == 0 || self.content[block as usize] != first(block.into()) {
                self.check(driver, block);
            }
        }
    }
}

fn move_to(volume: &str, background: bool) -> Request {
    Request::MoveDisk {
        disk: DISK.into(),
        to: Target::Volume(volume.into()),
        background,
    }
}

fn volumes(server: &mut Server) -> Vec<String> {
    match server.ask(&Request::ListDisks {}).unwrap() {
        Answer::Disks(disks) => disks[0].volumes.clone(),
        other => panic!("{other:?}"),
    }
}

fn is_in_the_middle(job: &JobStatus) -> bool {
    assert!(job.is_live(), "it was too fast: {job:?}");
    job.done > 0
}

#[test]
fn jobs_of_a_guest_survive_the_kill_of_who_does_them() {
    let place = tempfile::tempdir().unwrap();
    let folder = place.path();
    make(folder);
    let mut load = Load::new();
    let mut server = Server::start(folder);

    // Killed in the middle of a move: it goes on, under its number.
    let begun = server.job(&move_to("fast", true));
    let before = server.until(&mut load, begun.id, is_in_the_middle);
    assert!(before.done < before.total && before.total == SIZE, "{before:?}");
    drop(server);
    server = Server::start(folder);
    let after = server.job(&Request::JobStatus { job: begun.id });
    assert_eq!((after.kind, after.what), (begun.kind, begun.what));
    let ended = server.until(&mut load, begun.id, |job| !job.is_live());
    assert_eq!(ended.state, JobState::Done, "{ended:?}");
    assert_eq!(volumes(&mut server), ["fast"]);
    load.check_all(&mut server.one.0);

    // Killed in the middle of another RAID level.
    let slow = server.job(&Request::SetLayout {
        volume: "third".into(),
        layout: LayoutKind::Raid5,
        columns: 0,
        copies: 0,
        stripe_unit: 0,
        devices: Vec::new(),
        throttle: 64 << 10,
    });
    server.until(&mut load, slow.id, is_in_the_middle);
    drop(server);
    server = Server::start(folder);
    let after = server.job(&Request::JobStatus { job: slow.id });
    assert_eq!(
        (after.state, after.kind.as_str()),
        (JobState::Running, "set-layout")
    );
    // Another machine is told of it as of one that there is not.
    let ask_two =
        |server: &mut Server, tag, request: &Request| guest::ask(&mut server.two.0, 0, tag, request);
    let unknown = ask_two(&mut server, 1, &Request::JobStatus { job: 4000 }).unwrap_err();
    for (tag, job) in [(2, slow.id), (4, begun.id)] {
        for (tag, request) in [
            (tag, Request::JobStatus { job }),
            (tag + 1, Request::CancelJob { job }),
        ] {
            let refused = ask_two(&mut server, tag, &request).unwrap_err();
            assert_eq!(refused.kind, ProblemKind::NotFound, "{refused}");
            let same = refused.detail.replace(&job.to_string(), "4000");
            assert_eq!(same, unknown.detail);
        }
    }
    let none = ask_two(&mut server, 6, &Request::ListJobs {}).unwrap();
    assert_eq!(none, Answer::Jobs(Vec::new()));
    server.job(&Request::CancelJob { job: slow.id });
    let ended = server.until(&mut load, slow.id, |job| !job.is_live());
    assert_eq!(ended.state, JobState::Cancelled);

    // Cancelled in the middle, and killed: that stays, and the same again moves the rest.
    let back = server.job(&move_to("safe", true));
    assert!(back.id > begun.id);
    server.until(&mut load, back.id, is_in_the_middle);
    server.job(&Request::CancelJob { job: back.id });
    drop(server);
    server = Server::start(folder);
    let ended = server.job(&Request::JobStatus { job: back.id });
    assert_eq!(ended.state, JobState::Cancelled, "{ended:?}");
    assert_eq!(volumes(&mut server), ["fast", "safe"]);
    load.check_all(&mut server.one.0);
    let moved = server.ask(&move_to("safe", false)).unwrap();
    assert!(
        matches!(moved, Answer::Moved(moved) if moved.stayed == 0 && moved.moved > 0 && moved.moved < SIZE),
        "{moved:?}"
    );
    assert_eq!(volumes(&mut server), ["safe"]);
    load.check_all(&mut server.one.0);
    drop(server);

    // People have the same.
    let said = do_it(folder, "disk --devices d0,d1,d2 move /vm1/a.dsk --volume fast");
    assert!(
        said.contains("move /vm1/a.dsk to volume fast") && said.contains("moved"),
        "{said}"
    );
    do_it(folder, "file --devices d0,d1,d2 check");
}
