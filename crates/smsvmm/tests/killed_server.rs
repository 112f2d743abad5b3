//! `smsvmm share vhost-user` on a disk of a pool, killed and started again under a front-end that checks everything: what it was
//! told is written is there, also where no flush has been between.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use vhost_user_load::front_end;
use vhost_user_load::load::{Load, Pattern, run};
use vhost_user_load::pattern::Data;

fn smsvmm(folder: &Path, arguments: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_smsvmm"));
    command
        .args(arguments.split(' '))
        .current_dir(folder)
        .env_remove("SMSVMM_LOG")
        .stdin(Stdio::null());
    command
}

fn do_it(folder: &Path, arguments: &str) {
    let output = smsvmm(folder, arguments).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments}: {said}");
}

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn serve(folder: &Path) -> Server {
    let arguments = "share vhost-user --devices d0.img,d1.img --queues 2 --socket disk.sock /disk.dsk";
    let mut child = smsvmm(folder, arguments).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let server = Server(child);
    assert!(lines.any(|line| line.unwrap().contains("is served at")));
    // What it says later must not fill the pipe.
    thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
    server
}

#[test]
fn what_a_front_end_was_told_is_written_survives_the_kill_of_the_server() {
    let place = tempfile::tempdir().unwrap();
    let folder = place.path();
    for device in ["d0.img", "d1.img"] {
        let file = std::fs::File::create(folder.join(device)).unwrap();
        file.set_len(768 << 20).unwrap();
    }
    do_it(folder, "pool create tank d0.img d1.img");
    do_it(folder, "file --devices d0.img,d1.img format --meta-size 64M");
    do_it(
        folder,
        "volume --devices d0.img,d1.img create safe --size 512M --layout mirror",
    );
    do_it(
        folder,
        "disk --devices d0.img,d1.img create /disk.dsk --size 128M --volume safe",
    );
    let mut server = serve(folder);
    let load = Load {
        front_end: front_end::Options {
            socket: folder.join("disk.sock"),
            queues: 2,
            queue_size: 128,
            block_size: 4096,
            segment: None,
            inflight: true,
            patience: Duration::from_secs(60),
            greeting: None,
        },
        pattern: Pattern::Mixed,
        depth: 16,
        duration: Duration::from_secs(6),
        range: None,
        once: false,
        stride: None,
        data: Data::default(),
        verify: true,
        // Seldom, so that most kills meet writes that no flush has followed.
        flush_every: 5000,
        reconnect: true,
        patience: Duration::from_secs(60),
        pid: None,
        seed: 3,
    };
    let running = thread::spawn(move || run(&load));
    for _ in 0..4 {
        thread::sleep(Duration::from_secs(1));
        drop(server);
        server = serve(folder);
    }
    let report = running.join().unwrap().unwrap();
    assert!(
        report.reconnects >= 2 && report.verified_blocks > 50,
        "{report:?}"
    );
    drop(server);
    do_it(folder, "file --devices d0.img,d1.img check");
}
