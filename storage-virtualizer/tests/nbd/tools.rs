//! Programs from Debian: libnbd-bin, python3-libnbd, qemu-utils, openssl.

use std::io::ErrorKind;
use std::process::{Command, Output, Stdio};

/// Runs `program`. `None`, said aloud, if this machine has no such program; in CI (`CI` is set) that is a failure.
pub(crate) fn run(program: &str, arguments: &[&str]) -> Option<Output> {
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output();
    match output {
        Ok(output) => Some(output),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            assert!(
                std::env::var_os("CI").is_none(),
                "{program} is not installed: apt-get install libnbd-bin python3-libnbd qemu-utils openssl"
            );
            eprintln!("SKIPPED: {program} is not installed");
            None
        }
        Err(error) => panic!("cannot run {program}: {error}"),
    }
}

/// The same for a program that must succeed; what it prints.
pub(crate) fn succeed(program: &str, arguments: &[&str]) -> Option<String> {
    let output = run(program, arguments)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}\n{text}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Some(text)
}

/// The same for one that must fail; what it complains about.
pub(crate) fn fail(program: &str, arguments: &[&str]) -> Option<String> {
    let output = run(program, arguments)?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        !output.status.success(),
        "{program} {arguments:?} succeeded: {text}"
    );
    Some(text)
}

/// Runs a script in nbdsh; `None` if it, or Python's libnbd, is missing.
pub(crate) fn nbdsh(script: &str) -> Option<String> {
    let probe = run("nbdsh", &["-c", "print(1)"])?;
    if !probe.status.success() {
        assert!(
            std::env::var_os("CI").is_none(),
            "nbdsh does not work: install python3-libnbd"
        );
        eprintln!("SKIPPED: nbdsh does not work");
        return None;
    }
    succeed("nbdsh", &["-c", script])
}
