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
    Some(printed(
        &format!("{program} {arguments:?}"),
        &run(program, arguments)?,
    ))
}

/// The same for one that must fail; what it complains about.
pub(crate) fn fail(program: &str, arguments: &[&str]) -> Option<String> {
    Some(complaint(
        &format!("{program} {arguments:?}"),
        &run(program, arguments)?,
    ))
}

/// What a program that must have succeeded has printed.
fn printed(what: &str, output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{what}: {}\n{text}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

/// What a program that must have failed has complained about.
fn complaint(what: &str, output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{what} succeeded: {text}");
    text
}

/// Runs `program` with Debian's Python first: nbdsh starts the first `python3` of the path, which may be one without libnbd.
fn with_debians_python(program: &str, script: &str) -> Option<Output> {
    let path = std::env::var("PATH").unwrap_or_default();
    let set = format!("PATH=/usr/bin:{path}");
    run("env", &[&set, program, "-c", script])
}

/// Runs a script in nbdsh, which must succeed; what it prints. `None` if it, or Python's libnbd, is missing.
pub(crate) fn nbdsh(script: &str) -> Option<String> {
    Some(printed("nbdsh", &nbdsh_output(script)?))
}

/// The same for a script that must fail; what it complains about.
pub(crate) fn nbdsh_fails(script: &str) -> Option<String> {
    Some(complaint("nbdsh", &nbdsh_output(script)?))
}

fn nbdsh_output(script: &str) -> Option<Output> {
    let probe = with_debians_python("nbdsh", "print(1)")?;
    if !probe.status.success() {
        assert!(
            std::env::var_os("CI").is_none(),
            "nbdsh does not work: install python3-libnbd\n{}",
            String::from_utf8_lossy(&probe.stderr)
        );
        eprintln!("SKIPPED: nbdsh does not work");
        return None;
    }
    with_debians_python("nbdsh", script)
}
