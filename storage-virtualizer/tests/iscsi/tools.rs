//! Debian's clients: libiscsi's tools, and QEMU's block driver where it is installed.

use std::process::{Command, Output};

use crate::initiator::{Login, TARGET, WRITE, rw16};
use crate::{Served, pattern};

/// Families of libiscsi's test suite that have to pass, without those whose expectations are not the standard's
/// (docs/src/iscsi.md).
const FAMILIES: [&str; 12] = [
    "iSCSI.*",
    "SCSI.Inquiry.Standard",
    "SCSI.Mandatory.*",
    "SCSI.ModeSense6.*",
    "SCSI.Read10.*",
    "SCSI.Read16.*",
    "SCSI.Write10.*",
    "SCSI.Write16.*",
    "SCSI.Verify10.*",
    "SCSI.ProutRegister.*",
    "SCSI.ProutPreempt.*",
    "SCSI.ReportSupportedOpcodes.*",
];

/// What a program says; none if it is not installed.
fn run(program: &str, arguments: &[&str]) -> Option<Output> {
    match Command::new("timeout")
        .arg("60")
        .arg(program)
        .args(arguments)
        .output()
    {
        Ok(output) if output.status.code() == Some(127) => {
            println!("skipped: {program} is not installed (cargo xtask setup)");
            None
        }
        Ok(output) => Some(output),
        Err(error) => panic!("{program}: {error}"),
    }
}

fn said(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

#[test]
fn libiscsi_finds_the_target_and_its_units() {
    let served = Served::start();
    let portal = format!("iscsi://{}", served.address());
    let Some(listed) = run("iscsi-ls", &["--show-luns", &portal]) else {
        return;
    };
    let text = said(&listed);
    assert!(listed.status.success(), "{text}");
    assert!(
        text.contains(TARGET) && text.contains("Lun:0") && text.contains("Lun:1"),
        "{text}"
    );
    let unit = format!("{portal}/{TARGET}/1");
    let capacity = said(&run("iscsi-readcapacity16", &[&unit]).unwrap());
    assert!(capacity.contains("Total size:4194304"), "{capacity}");
    let inquiry = said(&run("iscsi-inq", &[&unit]).unwrap());
    assert!(inquiry.contains("SMSVMM"), "{inquiry}");
}

#[test]
fn libiscsis_test_suite_passes() {
    for family in FAMILIES {
        let served = Served::start();
        let unit = format!("iscsi://{}/{TARGET}/0", served.address());
        let Some(output) = run("iscsi-test-cu", &["--dataloss", "--test", family, &unit]) else {
            return;
        };
        let text = said(&output);
        // `[FAILED]` is also said of commands that have to fail; the summary counts what went wrong.
        let asserts = text
            .lines()
            .find_map(|line| line.trim_start().strip_prefix("asserts"));
        let counts: Vec<&str> = asserts.unwrap_or_default().split_whitespace().collect();
        let passed: u32 = counts.get(2).and_then(|count| count.parse().ok()).unwrap_or(0);
        assert!(passed > 0 && counts.get(3) == Some(&"0"), "{family}: {text}");
    }
}

#[test]
fn qemus_driver_reads_what_was_written() {
    let served = Served::start();
    let mut initiator = served.login(&Login::default());
    let data = pattern(256 << 10, 5);
    assert_eq!(initiator.write(0, &rw16(WRITE, 0, 512), &data, 0, 0).status, 0);
    assert_eq!(initiator.log_out(0, 0), 0);
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("copy");
    let unit = format!("iscsi://{}/{TARGET}/0", served.address());
    let Some(output) = run(
        "qemu-img",
        &["convert", "-O", "raw", &unit, copy.to_str().unwrap()],
    ) else {
        return;
    };
    let text = said(&output);
    if text.contains("Unknown protocol") || text.contains("qemu-block-extra") {
        println!("skipped: qemu-block-extra is not installed (cargo xtask setup)");
        return;
    }
    assert!(output.status.success(), "{text}");
    let copied = std::fs::read(&copy).unwrap();
    assert_eq!(copied.len() as u64, crate::BLOCKS * 512);
    assert!(copied[..data.len()] == data);
}
