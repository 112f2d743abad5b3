//! A pool with a file system, and bytes that go in and come out.

use std::io::Write;
use std::process::{Command, Output, Stdio};

use crate::place::{Place, text};

/// A pool on four small files with a file system, and two volumes for data.
pub(crate) fn with_files() -> Place {
    let place = Place::with_pool(&["d0.img", "d1.img", "d2.img", "d3.img"]);
    place.pool(&["file", "format"]);
    place.pool(&["volume", "create", "data", "--size", "32M", "--layout", "mirror"]);
    place.pool(&["volume", "create", "more", "--size", "16M", "--layout", "raid5"]);
    place
}

pub(crate) fn command(place: &Place, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_smsvmm"));
    command
        .args(arguments)
        .args(["--config", "vm.toml"])
        .current_dir(place.0.path())
        .env_remove("SMSVMM_LOG")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// `smsvmm file write` with `bytes` through a pipe.
pub(crate) fn try_write(place: &Place, arguments: &[&str], bytes: &[u8]) -> Output {
    let arguments = [&["file", "write"], arguments].concat();
    let mut child = command(place, &arguments).stdin(Stdio::piped()).spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    let bytes = bytes.to_vec();
    let writer = std::thread::spawn(move || {
        // A command that is refused does not read.
        let _ = input.write_all(&bytes);
    });
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    output
}

pub(crate) fn write(place: &Place, arguments: &[&str], bytes: &[u8]) -> String {
    let output = try_write(place, arguments, bytes);
    let (out, err) = text(&output);
    assert!(output.status.success(), "{arguments:?}: {out}{err}");
    out
}

pub(crate) fn read(place: &Place, arguments: &[&str]) -> Vec<u8> {
    let output = command(place, &[&["file", "read"], arguments].concat())
        .output()
        .unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{arguments:?}: {err}");
    output.stdout
}

/// Bytes that do not compress and do not repeat.
pub(crate) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    let next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    };
    std::iter::repeat_with(next).take(length).collect()
}

/// Compares without printing what is long.
pub(crate) fn same(found: &[u8], expected: &[u8]) {
    assert_eq!(found.len(), expected.len());
    let differ = found.iter().zip(expected).position(|(one, other)| one != other);
    assert_eq!(differ, None, "the first byte that differs");
}
