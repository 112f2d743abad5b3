//! `smsvmm share ... --management`: disks come and go, and clients are sent away, while others use what is theirs.
#![allow(clippy::unwrap_used)]

mod confined;
#[path = "../../../../storage-virtualizer/tests/driver/mod.rs"]
mod driver;
#[path = "../../../host-manager/tests/guest/mod.rs"]
mod guest;
mod iscsi;
mod killed;
mod nbd;
#[path = "../../../../storage-virtualizer/tests/nbd/raw.rs"]
#[allow(
    dead_code,
    clippy::cast_possible_truncation,
    reason = "a client of other tests, who use all of it"
)]
mod raw;
#[path = "../scsi_machine/mod.rs"]
mod scsi_machine;
mod vhost_user;

use std::cell::OnceCell;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;

/// A folder with images, and what happens in it.
struct Place {
    folder: tempfile::TempDir,
    /// Where what is not durable yet of its pool is kept.
    tail: OnceCell<PathBuf>,
}

impl Drop for Place {
    fn drop(&mut self) {
        // Whoever was killed last has left it.
        if let Some(tail) = self.tail.get() {
            let _ = std::fs::remove_file(tail).or_else(|_| std::fs::remove_dir(tail));
        }
    }
}

impl Place {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            tail: OnceCell::new(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn image(&self, name: &str, size: u64) {
        File::create(self.path(name)).unwrap().set_len(size).unwrap();
    }

    fn command(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_smsvmm"));
        command
            .args(line.split_whitespace())
            .current_dir(&self.folder)
            .env_remove("SMSVMM_LOG")
            .stdin(Stdio::null());
        command
    }

    fn output(&self, line: &str) -> Output {
        self.command(line).output().unwrap()
    }

    /// Does what must succeed; what it prints.
    fn run(&self, line: &str) -> String {
        let output = self.output(line);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "smsvmm {line}: {said}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Does what must fail; what it says.
    fn fails(&self, line: &str) -> String {
        let output = self.output(line);
        assert!(!output.status.success(), "smsvmm {line}");
        String::from_utf8(output.stderr).unwrap()
    }

    /// A pool of two devices, with disks of 16 MiB.
    fn pool(&self, disks: &[&str]) {
        self.image("d0", 256 << 20);
        self.image("d1", 256 << 20);
        self.run("pool create tank d0 d1");
        self.run("file --devices d0,d1 format --meta-size 32M");
        self.run("volume --devices d0,d1 create data --size 128M --layout mirror");
        for disk in disks {
            self.run(&format!("disk --devices d0,d1 create {disk} --size 16M"));
        }
        let status: Value = serde_json::from_str(&self.run("pool status --devices d0,d1 --json")).unwrap();
        let name = status["id"].as_str().unwrap().replace('-', "");
        let user = rustix::process::geteuid().as_raw();
        let tail = format!("/dev/shm/smsvmm-{user}/{name}.tail");
        self.tail.set(tail.into()).unwrap();
    }

    /// Serves, until what is returned is dropped; `ready` is a part of what it says on either output when it does.
    fn serve(&self, line: &str, ready: &str) -> Share {
        let mut child = self
            .command(&format!("share {line} --management m.sock"))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (tell, told) = std::sync::mpsc::channel();
        let said = Arc::<Mutex<String>>::default();
        let pipes: [Box<dyn std::io::Read + Send>; 2] = [
            Box::new(child.stdout.take().unwrap()),
            Box::new(child.stderr.take().unwrap()),
        ];
        for pipe in pipes {
            let (tell, said) = (tell.clone(), Arc::clone(&said));
            std::thread::spawn(move || {
                for line in BufReader::new(pipe).lines().map_while(Result::ok) {
                    said.lock().unwrap().push_str(&line);
                    let _ = tell.send(line);
                }
            });
        }
        drop(tell);
        let share = Share { child, said };
        loop {
            match told.recv_timeout(Duration::from_secs(60)) {
                Ok(line) if line.contains(ready) => return share,
                Ok(_) => {}
                Err(error) => {
                    let said = share.said.lock().unwrap().clone();
                    panic!("{error}: {said}");
                }
            }
        }
    }

    /// What is served, and to whom.
    fn status(&self) -> Value {
        serde_json::from_str(&self.run("share status --management m.sock --json")).unwrap()
    }

    fn disk(&self, name: &str) -> Option<Value> {
        let status = self.status();
        let disks = status["disks"].as_array().unwrap();
        disks.iter().find(|disk| disk["name"] == name).cloned()
    }

    fn add(&self, what: &str) -> String {
        self.run(&format!("share add --management m.sock {what}"))
    }

    fn remove(&self, name: &str) -> String {
        self.run(&format!("share remove --management m.sock {name}"))
    }

    /// Nobody has a lock on an image any more.
    fn is_free(&self, image: &str) -> bool {
        let other = Self::new();
        let path = self.path(image);
        let path = path.display();
        let mut child = other
            .command(&format!("share nbd --image {path} --socket s"))
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        !line.is_empty()
    }
}

/// A process that serves.
struct Share {
    child: Child,
    /// On both outputs.
    said: Arc<Mutex<String>>,
}

impl Share {
    /// Waits for its end, which must be a good one.
    fn ended(mut self) {
        assert!(self.child.wait().unwrap().success());
    }

    fn has_said(&self, text: &str) -> bool {
        self.said.lock().unwrap().contains(text)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Waits until something is so.
fn until(what: &str, is_so: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !is_so() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn has(program: &str) -> bool {
    let found = Command::new(program).arg("--version").output().is_ok();
    if !found {
        eprintln!("{program} is not there: left out");
    }
    found
}
