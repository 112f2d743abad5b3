//! Devices that fail, processes that are killed.

use std::fs;
use std::io::{Read, Write};
use std::process::Stdio;
use std::time::Duration;

use crate::help::{command, noise, read, same, try_write, with_files, write};
use crate::place::text;

#[test]
fn a_device_fails_and_the_files_are_still_there() {
    let place = with_files();
    let content = noise(1, 4 << 20);
    write(&place, &["/a"], &content);
    write(&place, &["/b"], &content);
    for device in ["d0.img", "d1.img", "d2.img", "d3.img"] {
        fs::rename(place.path(device), place.path("away")).unwrap();
        // Looking changes nothing; writing takes the device out of service.
        same(&read(&place, &["/a"]), &content);
        write(&place, &["/c"], &content);
        same(&read(&place, &["/c"]), &content);
        fs::rename(place.path("away"), place.path(device)).unwrap();
        // What is behind is not read.
        same(&read(&place, &["/c"]), &content);
        place.pool(&["file", "delete", "/c"]);
        place.pool(&["job", "wait"]);
        assert_eq!(place.json(&["pool", "status"])["state"], "healthy");
    }
    same(&read(&place, &["/b"]), &content);
    assert!(place.pool(&["file", "check"]).contains("all is well"));
}

#[test]
fn a_writer_that_is_killed_leaves_a_file_system_that_is_well() {
    let place = with_files();
    let kept = noise(2, 2 << 20);
    write(&place, &["/kept"], &kept);
    let content = noise(3, 16 << 20);
    for round in 0..4 {
        let path = format!("/killed{round}");
        let mut child = command(&place, &["file", "write", &path])
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = child.stdin.take().unwrap();
        // It takes what it is given, and waits for more.
        input
            .write_all(&content[..(4 << 20) + round * (2 << 20)])
            .unwrap();
        std::thread::sleep(Duration::from_millis(20 * round as u64));
        child.kill().unwrap();
        child.wait().unwrap();
        drop(input);
        // First those that only look.
        let found = place.pool(&["file", "list"]);
        assert!(found.contains("kept\n"), "{found}");
        same(&read(&place, &["/kept"]), &kept);
        assert!(place.pool(&["file", "check"]).contains("all is well"));
        // Then one that writes.
        write(&place, &["/next"], &content[..1 << 20]);
        same(&read(&place, &["/next"]), &content[..1 << 20]);
        if found.contains(&path[1..]) {
            place.pool(&["file", "delete", &path]);
        }
    }
    place.pool(&["job", "wait"]);
    assert!(place.pool(&["file", "check"]).contains("all is well"));
    let free = place.json(&["pool", "status"])["files"]["free"].as_u64().unwrap();
    assert_eq!(free, 45 << 20, "nothing is left of what was killed");
}

#[test]
fn a_writer_that_is_interrupted_cleans_up_behind_itself() {
    let place = with_files();
    let mut child = command(&place, &["file", "write", "/a"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    input.write_all(&noise(4, 6 << 20)).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let output = child.wait_with_output().unwrap();
    let error = text(&output).1;
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(
        error.contains("closing the pool") && error.contains("was broken off"),
        "{error}"
    );
    assert_eq!(place.pool(&["file", "list"]), "");
}

#[test]
fn several_look_at_once_and_nobody_writes_meanwhile() {
    let place = with_files();
    write(&place, &["/a"], &noise(5, 8 << 20));
    let mut reader = command(&place, &["file", "read", "/a"]).spawn().unwrap();
    // It has the pool open when something comes, and waits for the rest of its output to be taken.
    let output = reader.stdout.as_mut().unwrap();
    output.read_exact(&mut [0]).unwrap();
    assert_eq!(place.pool(&["file", "list"]), "a\n");
    let output = try_write(&place, &["/b"], b"b");
    let holder = format!("smsvmm (pid {})", reader.id());
    assert!(text(&output).1.contains(&holder), "{output:?}");
    reader.kill().unwrap();
    reader.wait().unwrap();
    write(&place, &["/b"], b"b");
}

#[test]
fn a_reader_that_has_seen_enough_is_no_error() {
    let place = with_files();
    write(&place, &["/a"], &noise(6, 8 << 20));
    let mut reader = command(&place, &["file", "read", "/a"]).spawn().unwrap();
    drop(reader.stdout.take());
    let output = reader.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
}
