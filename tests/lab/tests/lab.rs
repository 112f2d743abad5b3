//! What a lab host can do. Needs the images of `cargo xtask setup`.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use lab::{Lab, Network};

#[test]
fn a_lab_has_the_share_runs_commands_and_gives_files_back() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("input"), "42\n").unwrap();
    let mut lab = Lab::builder().share(folder.path()).start().unwrap();
    assert_eq!(lab.folder(), folder.path());

    let output = lab
        .run("pwd; cat input; echo to stderr >&2; mkdir results; rev input > results/r; exit 3")
        .unwrap();
    assert_eq!(output.status, 3);
    assert_eq!(
        output.text(),
        format!("{}\n42\nto stderr\n", folder.path().display())
    );

    lab.fetch("results", folder.path().join("fetched")).unwrap();
    assert_eq!(
        fs::read_to_string(folder.path().join("fetched/results/r")).unwrap(),
        "24\n"
    );

    let large = vec![7_u8; 3 << 20];
    fs::write(folder.path().join("large"), &large).unwrap();
    lab.send(folder.path().join("large"), "sent").unwrap();
    assert!(
        lab.run("cmp sent/large <(head -c 3145728 /dev/zero | tr '\\0' '\\7')")
            .unwrap()
            .success()
    );
}

#[test]
fn a_lab_has_kvm_and_the_time() {
    let mut lab = Lab::builder().start().unwrap();
    assert!(
        lab.run("test -c /dev/kvm && test $(cat /sys/module/kvm_amd/parameters/npt) != N")
            .unwrap()
            .success()
    );
    let theirs: u64 = lab.run("date +%s").unwrap().text().trim().parse().unwrap();
    let ours = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs();
    assert!(ours.abs_diff(theirs) < 5, "{theirs} in the lab, {ours} here");
}

#[test]
fn a_command_that_takes_too_long_ends_the_lab() {
    let mut lab = Lab::builder().start().unwrap();
    let begin = Instant::now();
    let error = lab
        .run_streaming("sleep 100", Duration::from_secs(2), |_| ())
        .unwrap_err();
    assert!(error.is::<lab::Overdue>());
    let error = format!("{error:#}");
    for part in ["no result within 2s", "RIP=", "current_count"] {
        assert!(error.contains(part), "{part} is not in {error}");
    }
    assert!(begin.elapsed() < Duration::from_secs(20));
    assert!(lab.run("true").is_err());
}

#[test]
fn labs_on_one_segment_reach_each_other() {
    let segment = Network::Segment(format!("test {}", std::process::id()));
    let mut one = Lab::builder()
        .host_id(1)
        .network(segment.clone())
        .start()
        .unwrap();
    let two = thread::spawn(move || {
        let mut two = Lab::builder().host_id(2).network(segment).start().unwrap();
        two.run("for n in 1 2 3 4 5 6 7 8; do ping -c 1 -W 2 10.9.0.1 && exit 0; done; exit 1")
            .unwrap()
    });
    one.run("sleep 4; ip address").unwrap();
    let output = two.join().unwrap();
    assert!(output.success(), "{}", output.text());
}
