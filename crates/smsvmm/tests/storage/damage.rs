//! Devices that are not what they were, or not whose they seem to be: each is named, nothing is lost, nothing hangs.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use crate::open::{check, with_pool, write};
use crate::place::Place;

/// A pool on three files with a mirror over the first two.
fn mirror() -> Place {
    let place = Place::with_pool(&["d0.img", "d1.img", "d2.img"]);
    let create = "volume create data --size 8M --layout mirror --device d0.img --device d1.img";
    place.pool(&create.split(' ').collect::<Vec<_>>());
    place
}

/// A path in the folder as others see it.
fn absolute(place: &Place, names: &[&str]) -> Vec<String> {
    let names = names.iter().map(|name| place.path(name).display().to_string());
    names.collect()
}

#[test]
fn a_truncated_device_is_left_out_with_both_sizes() {
    let place = mirror();
    let file = File::options().write(true).open(place.path("d0.img")).unwrap();
    file.set_len(10 << 20).unwrap();
    let status = place.json(&["pool", "status"]);
    assert_eq!(status["state"], "degraded", "{status:#}");
    let notes = status["notes"].to_string();
    assert!(
        notes.contains("d0.img") && notes.contains("10485760") && notes.contains("67108864"),
        "{notes}"
    );
    place.pool(&["volume", "list"]);
    // Too small for anything.
    file.set_len(1 << 20).unwrap();
    let error = place.bad(1, &["pool", "create", "other", "d0.img", "--force"]);
    assert!(error.contains("at least 4194304 are needed"), "{error}");
    file.set_len(0).unwrap();
    let error = place.bad(1, &["pool", "create", "other", "d0.img", "--force"]);
    assert!(error.contains("at least 4194304 are needed"), "{error}");
}

#[test]
fn a_device_with_flipped_bytes_is_repaired_or_left_out_and_never_believed() {
    let place = mirror();
    let file = File::options()
        .read(true)
        .write(true)
        .open(place.path("d0.img"))
        .unwrap();
    let flip = |offset: u64| {
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).unwrap();
        file.write_all_at(&[byte[0] ^ 0x10], offset).unwrap();
    };
    // One copy of the label, and one of the slots at a time: the rest says what is true.
    for offset in [100, 4096 + 100, (256 << 10) + 100] {
        flip(offset);
        let shown = place.pool(&["job", "wait"]);
        assert!(shown.contains("nothing is left"), "{shown}");
        let status = place.json(&["pool", "status"]);
        assert_eq!(status["state"], "healthy", "{offset}: {status:#}");
    }
    // All of the private region.
    file.write_all_at(&vec![0xa5; 1 << 20], 0).unwrap();
    let status = place.json(&["pool", "status"]);
    assert_eq!(status["state"], "degraded", "{status:#}");
    let notes = status["notes"].to_string();
    assert!(notes.contains("device d0.img is left out"), "{notes}");
    let left = place.pool(&["device", "replace", "d0", "d0.img", "--force"]);
    assert!(left.contains("has 3 devices"), "{left}");
    assert_eq!(place.json(&["pool", "status"])["state"], "healthy");
}

#[test]
fn a_device_of_another_pool_is_named() {
    let place = mirror();
    place.file("foreign.img");
    place.file("blank.img");
    place.good(&["pool", "create", "other", "foreign.img"]);
    let error = place.bad(
        1,
        &["pool", "status", "--devices", "d0.img,d1.img,d2.img,foreign.img"],
    );
    assert!(error.contains("several pools"), "{error}");
    assert!(error.contains("demo") && error.contains("other"), "{error}");
    let status = place.good(&["pool", "status", "--devices", "d0.img,d1.img,d2.img,blank.img"]);
    assert!(
        status.contains("device blank.img is left out") && status.contains("nothing known"),
        "{status}"
    );
}

#[test]
fn without_a_majority_nothing_is_opened_unasked() {
    let place = mirror();
    fs::create_dir(place.path("away")).unwrap();
    for name in ["d1.img", "d2.img"] {
        fs::rename(place.path(name), place.path("away").join(name)).unwrap();
    }
    let error = place.bad(1, &["job", "wait", "--config", "vm.toml"]);
    assert!(
        error.contains("`smsvmm pool import DEVICE... --force`") && error.contains("d1.img"),
        "{error}"
    );
    let shown = place.good(&["pool", "import", "d0.img", "--force"]);
    assert!(shown.contains("pool demo: degraded"), "{shown}");
}

#[test]
fn a_device_given_twice_or_copied_is_named() {
    let place = mirror();
    let error = place.bad(1, &["job", "wait", "--devices", "d0.img,d1.img,d2.img,d0.img"]);
    assert!(error.contains("d0.img is given twice"), "{error}");
    fs::hard_link(place.path("d0.img"), place.path("link.img")).unwrap();
    let error = place.bad(1, &["job", "wait", "--devices", "d0.img,d1.img,d2.img,link.img"]);
    assert!(error.contains("given twice, under two names"), "{error}");
    let error = place.bad(1, &["pool", "status", "--devices", "d0.img,d1.img,link.img"]);
    assert!(error.contains("are the same device"), "{error}");
    fs::copy(place.path("d0.img"), place.path("copy.img")).unwrap();
    let error = place.bad(1, &["job", "wait", "--devices", "d0.img,d1.img,d2.img,copy.img"]);
    assert!(error.contains("one is a copy of the other"), "{error}");
    let error = place.bad(
        1,
        &["device", "add", "link.img", "--force", "--config", "vm.toml"],
    );
    assert!(
        error.contains("link.img is in use by this very process"),
        "{error}"
    );
    let error = place.bad(
        1,
        &["device", "add", "copy.img", "--force", "--config", "vm.toml"],
    );
    assert!(error.contains("copy.img is d0.img of this pool"), "{error}");
}

/// A pool of which both halves were changed without the other one.
fn split() -> Place {
    let place = Place::with_pool(&["d0.img", "d1.img"]);
    place.pool(&["volume", "create", "both", "--size", "4M", "--layout", "mirror"]);
    for (half, other) in [("d0.img", "d1.img"), ("d1.img", "d0.img")] {
        fs::rename(place.path(other), place.path("away")).unwrap();
        place.good(&["pool", "import", half, "--force"]);
        let volume = format!("of-{}", &half[..2]);
        place.good(&[
            "volume",
            "create",
            &volume,
            "--size",
            "4M",
            "--layout",
            "concat",
            "--devices",
            half,
        ]);
        fs::rename(place.path("away"), place.path(other)).unwrap();
    }
    place
}

#[test]
fn of_two_histories_the_preferred_one_is_kept_whichever_it_is() {
    for (kept, lost) in [("d0", "d1"), ("d1", "d0")] {
        let place = split();
        let (kept_file, lost_file) = (format!("{kept}.img"), format!("{lost}.img"));
        for arguments in [
            &["job", "wait", "--config", "vm.toml"][..],
            &["pool", "import", "d0.img", "d1.img"],
            &["pool", "status", "--config", "vm.toml"],
        ] {
            let error = place.bad(1, arguments);
            assert!(error.contains("d0.img") && error.contains("d1.img"), "{error}");
            assert!(error.contains("--prefer DEVICE"), "{error}");
        }
        let error = place.bad(1, &["pool", "import", "d0.img", "d1.img", "--prefer", "d7.img"]);
        assert!(error.contains("d7.img is not among the devices"), "{error}");
        let error = place.bad(
            2,
            &[
                "pool", "import", "d0.img", "d1.img", "--prefer", "d0.img", "--force",
            ],
        );
        assert!(error.contains("--force"), "{error}");

        let shown = place.good(&["pool", "import", &lost_file, &kept_file, "--prefer", &kept_file]);
        assert!(shown.contains("pool demo: degraded"), "{shown}");
        let order = format!("`smsvmm device replace {lost_file} {lost_file} --force`");
        assert!(shown.contains(&order), "{shown}");
        // That one is not believed until it was overwritten.
        place.bad(1, &["job", "wait", "--config", "vm.toml"]);
        let left = place.pool(&["device", "replace", &lost_file, &lost_file, "--force"]);
        assert!(left.contains("has 2 devices"), "{left}");
        assert_eq!(place.json(&["pool", "status"])["state"], "healthy");
        let volumes = place.pool(&["volume", "list"]);
        assert!(volumes.contains(&format!("of-{kept}")), "{volumes}");
        assert!(!volumes.contains(&format!("of-{lost}")), "{volumes}");
        // The other half has the same history now, and is as good.
        fs::rename(place.path(&kept_file), place.path("away")).unwrap();
        let shown = place.good(&["pool", "import", &lost_file, "--force"]);
        assert!(
            shown.contains("both") && shown.contains(&format!("of-{kept}")),
            "{shown}"
        );
    }
}

/// A file system of limited size, or one that is only read; gone when dropped.
struct Mounted(std::path::PathBuf);

impl Mounted {
    /// None, said aloud, if this user may not mount.
    fn new(at: &Path, options: &[&str]) -> Option<Self> {
        fs::create_dir_all(at).unwrap();
        let done = Command::new("mount").args(options).arg(at).output();
        match done {
            Ok(output) if output.status.success() => Some(Self(at.to_owned())),
            _ => {
                eprintln!("skipped: this user may not mount");
                None
            }
        }
    }

    fn again(&self, options: &str) {
        let done = Command::new("mount").args(["-o", options]).arg(&self.0).status();
        assert!(done.unwrap().success());
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("-l").arg(&self.0).status());
    }
}

#[test]
fn a_file_that_may_only_be_read_is_looked_at_and_not_written() {
    let place = Place::new(&[]);
    let Some(mounted) = Mounted::new(&place.path("ro"), &["-t", "tmpfs", "-o", "size=80M", "none"]) else {
        return;
    };
    place.file("ro/d0.img");
    place.good(&["pool", "create", "demo", "ro/d0.img"]);
    mounted.again("remount,ro");
    let status = place.good(&["pool", "status", "--devices", "ro/d0.img"]);
    assert!(status.starts_with("pool demo: healthy"), "{status}");
    for arguments in [
        &["job", "wait", "--devices", "ro/d0.img"][..],
        &["pool", "create", "other", "ro/d0.img", "--force"],
    ] {
        let error = place.bad(1, arguments);
        assert!(
            error.contains("cannot open ro/d0.img for writing") && error.contains("let this user write"),
            "{error}"
        );
    }
}

#[test]
fn a_leg_on_a_full_file_system_is_taken_out_and_catches_up_when_there_is_room() {
    let place = Place::new(&["d0.img", "d1.img"]);
    let Some(mounted) = Mounted::new(&place.path("full"), &["-t", "tmpfs", "-o", "size=20M", "none"]) else {
        return;
    };
    let small = "full/d2.img";
    place.file(small);
    let made = place.good(&["pool", "create", "demo", "d0.img", "d1.img", small]);
    fs::write(place.path("vm.toml"), made.split_once("\n\n").unwrap().1).unwrap();
    let create = "volume create data --size 32M --layout mirror --device d0.img --device full/d2.img";
    place.pool(&create.split(' ').collect::<Vec<_>>());
    let create = "volume create alone --size 8M --layout concat --device full/d2.img";
    place.pool(&create.split(' ').collect::<Vec<_>>());
    let devices = absolute(&place, &["d0.img", "d1.img", small]);
    with_pool(&devices, |pool| async move {
        let volume = pool.volume("data").unwrap();
        write(&volume, 0, 32, 3).await.unwrap();
        let events: Vec<String> = pool.take_events().iter().map(ToString::to_string).collect();
        assert!(events.iter().any(|event| event.contains("d2.img")), "{events:?}");
        check(&volume, 0, 32, 3).await;
        // Nothing stands in for this one.
        let alone = pool.volume("alone").unwrap();
        let error = write(&alone, 0, 8, 4).await.unwrap_err();
        assert!(
            error.device().contains("alone") || error.device().contains("d2.img"),
            "{error}"
        );
    });
    let status = place.json(&["pool", "status"]);
    assert_eq!(status["volumes"][0]["state"], "resyncing", "{status:#}");
    // Still no room: it is tried, fails, and is said.
    let output = place.run(&["job", "wait", "--config", "vm.toml"]);
    let (out, err) = crate::place::text(&output);
    assert!(err.contains("No space left on device"), "{out}{err}");
    mounted.again("remount,size=100M");
    let healed = place.json(&["job", "wait"]);
    assert_eq!(healed["pool"]["state"], "healthy", "{healed:#}");
    fs::rename(place.path("d0.img"), place.path("away")).unwrap();
    with_pool(&absolute(&place, &["d1.img", small]), |pool| async move {
        check(&pool.volume("data").unwrap(), 0, 32, 3).await;
    });
}

#[test]
fn space_of_a_new_device_on_xfs_comes_in_pieces_of_four_clusters() {
    let place = Place::new(&[]);
    fs::File::create(place.path("xfs.img"))
        .unwrap()
        .set_len(400 << 20)
        .unwrap();
    let made = Command::new("mkfs.xfs")
        .arg("-q")
        .arg(place.path("xfs.img"))
        .status();
    if !made.is_ok_and(|status| status.success()) {
        eprintln!("skipped: there is no mkfs.xfs");
        return;
    }
    let image = place.path("xfs.img").display().to_string();
    let Some(_mounted) = Mounted::new(&place.path("xfs"), &["-o", "loop", &image]) else {
        return;
    };
    let hint = |name: &str| {
        let shown = Command::new("xfs_io")
            .args(["-r", "-c", "extsize"])
            .arg(place.path(name))
            .output();
        String::from_utf8(shown.unwrap().stdout).unwrap()
    };
    for name in ["xfs/d0.img", "xfs/d1.img", "xfs/d2.img"] {
        place.file(name);
        assert!(hint(name).starts_with("[0]"), "{}", hint(name));
    }
    let large = ["-c", "extsize 1m"];
    assert!(
        Command::new("xfs_io")
            .args(large)
            .arg(place.path("xfs/d1.img"))
            .status()
            .unwrap()
            .success()
    );
    let made = place.good(&["pool", "create", "demo", "xfs/d0.img", "xfs/d1.img"]);
    fs::write(place.path("vm.toml"), made.split_once("\n\n").unwrap().1).unwrap();
    place.pool(&["device", "add", "xfs/d2.img"]);
    assert!(
        hint("xfs/d0.img").starts_with("[262144]"),
        "{}",
        hint("xfs/d0.img")
    );
    // Whoever has made the file knows better.
    assert!(
        hint("xfs/d1.img").starts_with("[1048576]"),
        "{}",
        hint("xfs/d1.img")
    );
    assert!(
        hint("xfs/d2.img").starts_with("[262144]"),
        "{}",
        hint("xfs/d2.img")
    );
}
