//! A server that is killed under load: its successor goes on with what was in flight.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use storage_virtualizer::vhost_user::VhostUserOptions;
use vhost_user_load::load::{Report, run};

use crate::place::{Place, serve, until_reconnected};

const READY: &str = "the server listens";
const FOLDER: &str = "VHOST_USER_TEST_FOLDER";

/// Not a test: the server of the other one, when that starts this program again.
#[test]
fn server_process() {
    let Some(folder) = std::env::var_os(FOLDER) else {
        return;
    };
    let folder = std::path::PathBuf::from(folder);
    let _served = serve(
        &folder.join("disk.img"),
        &folder.join("disk.sock"),
        VhostUserOptions::default(),
    );
    println!("\n{READY}");
    loop {
        thread::park();
    }
}

fn start(place: &Place) -> Child {
    let mut server = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "killed::server_process", "--nocapture"])
        .env(FOLDER, place.folder.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = BufReader::new(server.stdout.take().unwrap());
    assert!(output.lines().any(|line| line.unwrap().contains(READY)));
    server
}

#[test]
fn nothing_is_lost_and_nothing_forgotten_when_the_server_is_killed() {
    until_reconnected(2, [5, 20, 80], killed_under_load);
}

/// The server is killed and started again six times.
fn killed_under_load(duration: Duration) -> Report {
    let place = Place::new();
    let mut load = place.load();
    load.front_end.queues = 2;
    load.reconnect = true;
    load.duration = duration;
    load.range = Some(16 << 20);
    let mut server = start(&place);
    let running = thread::spawn(move || run(&load));
    for _ in 0..6 {
        thread::sleep(Duration::from_millis(500));
        server.kill().unwrap();
        server.wait().unwrap();
        server = start(&place);
    }
    let report = running.join().unwrap();
    server.kill().unwrap();
    server.wait().unwrap();
    report.unwrap()
}
