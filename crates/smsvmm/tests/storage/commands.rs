//! What the commands print, with which status they end, what the JSON looks like.

use std::fs;
use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::place::{Place, text};

#[test]
fn a_pool_is_made_and_shown() {
    let place = Place::with_pool(&["d0.img", "d1.img", "d2.img", "d3.img"]);
    let lines = fs::read_to_string(place.path("vm.toml")).unwrap();
    assert_eq!(
        lines,
        "[pool]\ndevices = [\"d0.img\", \"d1.img\", \"d2.img\", \"d3.img\"]\n"
    );
    let made = place.pool(&["volume", "create", "data", "--size", "8M", "--layout", "mirror"]);
    assert!(made.contains("data    healthy    8M"), "{made}");
    assert!(place.pool(&["volume", "list"]).contains("mirror of 2"));
    let status = place.pool(&["pool", "status"]);
    assert!(status.starts_with("pool demo: healthy, 16"), "{status}");

    let status = place.json(&["pool", "status"]);
    assert_eq!(status["name"], "demo");
    assert_eq!(status["state"], "healthy");
    assert_eq!(status["devices"][3]["name"], "d3.img");
    assert_eq!(status["devices"][3]["state"], "active");
    assert_eq!(status["volumes"][0]["size"], 8 << 20);
    assert_eq!(status["volumes"][0]["shape"]["layout"], "mirror");
    assert_eq!(status["volumes"][0]["members"].as_array().unwrap().len(), 2);
    let again = place.json(&["pool", "status"]);
    assert_eq!(status, again, "looking changes nothing");
}

#[test]
fn a_lost_device_degrades_a_mirror_which_heals_when_it_is_back() {
    let place = Place::with_pool(&["d0.img", "d1.img", "d2.img"]);
    place.pool(&["volume", "create", "data", "--size", "8M", "--layout", "mirror"]);
    fs::rename(place.path("d0.img"), place.path("away")).unwrap();
    let status = place.json(&["pool", "status"]);
    assert_eq!(status["state"], "degraded");
    assert_eq!(status["devices"][0]["state"], "missing");
    assert_eq!(status["volumes"][0]["state"], "degraded");
    assert_eq!(status["volumes"][0]["members"][0]["state"], "missing");
    let shown = place.pool(&["pool", "status"]);
    assert!(shown.contains("missing: d0.img; attach it again"), "{shown}");

    // The pool changes without it.
    place.pool(&["volume", "create", "more", "--size", "4M", "--layout", "concat"]);
    fs::rename(place.path("away"), place.path("d0.img")).unwrap();
    let status = place.json(&["pool", "status"]);
    assert_eq!(status["devices"][0]["state"], "returned");
    assert_eq!(status["volumes"][0]["state"], "resyncing");

    let healed = place.json(&["job", "wait"]);
    assert_eq!(healed["interrupted"], false);
    assert_eq!(healed["pool"]["state"], "healthy", "{healed:#}");
    let shown = place.pool(&["pool", "status"]);
    assert!(shown.starts_with("pool demo: healthy"), "{shown}");
}

#[test]
fn nothing_known_is_destroyed_unasked() {
    let place = Place::with_pool(&["d0.img"]);
    let error = place.bad(1, &["pool", "create", "other", "d0.img"]);
    assert!(
        error.contains("d0.img carries the label of pool \"demo\"") && error.contains("--force"),
        "{error}"
    );
    let mut boot = vec![0; 64 << 20];
    boot[510..512].copy_from_slice(b"\x55\xaa");
    fs::write(place.path("disk.img"), boot).unwrap();
    let error = place.bad(1, &["pool", "create", "other", "disk.img"]);
    assert!(
        error.contains("disk.img carries a partition table (MBR)"),
        "{error}"
    );
    let error = place.bad(1, &["device", "add", "disk.img", "--config", "vm.toml"]);
    assert!(
        error.contains("disk.img carries a partition table (MBR)"),
        "{error}"
    );
    place.good(&["pool", "create", "other", "disk.img", "--force"]);
    let status = place.good(&["pool", "status", "--devices", "disk.img"]);
    assert!(status.starts_with("pool other: healthy"), "{status}");
}

#[test]
fn a_job_that_is_broken_off_goes_on_and_can_be_paused_and_cancelled() {
    let place = Place::with_pool(&["d0.img", "d1.img"]);
    place.pool(&["volume", "create", "data", "--size", "16M", "--layout", "mirror"]);
    let mut scrub = Command::new(env!("CARGO_BIN_EXE_smsvmm"))
        .args(["pool", "scrub", "--throttle", "1M", "--config", "vm.toml"])
        .current_dir(place.0.path())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let limit = Instant::now() + Duration::from_secs(20);
    let holder = format!("smsvmm (pid {})", scrub.id());
    // A device may be locked a moment before it can be seen by whom.
    let error = loop {
        let error = text(&place.run(&["pool", "status", "--config", "vm.toml"])).1;
        if error.contains(&holder) || Instant::now() > limit {
            break error;
        }
        // Who looks has the devices for a moment as well, and must not be all the time in the way.
        std::thread::sleep(Duration::from_millis(300));
    };
    assert!(
        error.contains("is in use by") && error.contains(&holder),
        "{error}"
    );
    // The job is in the pool's configuration shortly after the devices are locked.
    std::thread::sleep(Duration::from_millis(1500));
    let pid = rustix::process::Pid::from_child(&scrub);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    assert_eq!(scrub.wait().unwrap().code(), Some(1));
    let mut said = String::new();
    scrub.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(
        said.contains("SIGINT: closing the pool") && said.contains("it goes on when"),
        "{said}"
    );

    assert!(place.pool(&["job", "list"]).contains("scrub  unfinished"));
    place.pool(&["job", "pause", "1"]);
    assert_eq!(place.json(&["job", "show", "1"])["state"], "paused");
    assert!(place.pool(&["job", "wait"]).contains("job 1 is paused"));
    let error = place.bad(1, &["job", "wait", "1", "--config", "vm.toml"]);
    assert!(error.contains("`smsvmm job resume 1`"), "{error}");
    assert!(place.pool(&["job", "cancel", "1"]).contains("cancelled"));
    assert!(place.pool(&["job", "list"]).contains("no unfinished jobs"));
}

#[test]
fn devices_and_layouts_change_while_data_stay_whole() {
    let place = Place::with_pool(&["d0.img", "d1.img", "d2.img"]);
    place.pool(&["volume", "create", "data", "--size", "8M", "--layout", "mirror"]);
    place.pool(&["volume", "set-layout", "data", "--layout", "raid5"]);
    assert!(place.pool(&["volume", "list"]).contains("raid5 2+1"));
    place.pool(&["volume", "resize", "data", "--size", "12M"]);
    let error = place.bad(
        1,
        &["volume", "resize", "data", "--size", "4M", "--config", "vm.toml"],
    );
    assert!(error.contains("--shrink"), "{error}");
    let shrunk = place.pool(&["volume", "resize", "data", "--size", "4M", "--shrink"]);
    assert!(shrunk.contains("healthy    4M"), "{shrunk}");

    place.file("new.img");
    let left = place.pool(&["device", "replace", "d1.img", "new.img"]);
    let (_, lines) = left.split_once("\n\n").unwrap();
    assert_eq!(lines, "[pool]\ndevices = [\"d0.img\", \"d2.img\", \"new.img\"]\n");
    let error = place.bad(1, &["volume", "delete", "data", "--config", "vm.toml"]);
    assert!(
        error.contains("new.img belongs to pool demo, is there, and is not named"),
        "{error}"
    );
    fs::write(place.path("vm.toml"), lines).unwrap();

    let error = place.bad(1, &["device", "remove", "d0.img", "--config", "vm.toml"]);
    assert!(
        error.contains("`smsvmm device evacuate d0.img` empties it"),
        "{error}"
    );
    place.file("more.img");
    let left = place.pool(&["device", "add", "more.img", "--class", "ssd"]);
    let (_, lines) = left.split_once("\n\n").unwrap();
    fs::write(place.path("vm.toml"), lines).unwrap();
    assert_eq!(place.json(&["device", "list"])[3]["class"], "ssd");
    place.pool(&["device", "evacuate", "d0.img"]);
    place.pool(&["device", "remove", "d0.img"]);
    assert_eq!(place.json(&["device", "list"]).as_array().unwrap().len(), 3);

    let closed = place.pool(&["pool", "export"]);
    assert!(
        closed.contains("its devices can be moved: d2.img, new.img, more.img"),
        "{closed}"
    );
    let elsewhere = place.good(&["pool", "import", "more.img", "new.img", "d2.img"]);
    assert!(elsewhere.contains("pool demo: healthy"), "{elsewhere}");
    let error = place.bad(1, &["pool", "import", "more.img"]);
    assert!(
        error.contains("d2.img, new.img") || error.contains("not enough"),
        "{error}"
    );
}

#[test]
fn wrong_usage_ends_with_2_and_failures_with_1() {
    let place = Place::with_pool(&["d0.img", "d1.img"]);
    fs::write(place.path("none.toml"), "name = \"x\"\n").unwrap();
    fs::write(place.path("bad.toml"), "\n[pool]\ndevice = []\n").unwrap();
    let cases: &[(i32, &[&str], &str)] = &[
        (2, &["pool", "status"], "either by --config FILE or by --devices"),
        (
            2,
            &["pool", "status", "--config", "none.toml"],
            "none.toml has no pool; add [pool]",
        ),
        (
            2,
            &["pool", "status", "--config", "bad.toml"],
            "bad.toml:3: unknown field `device`",
        ),
        (
            2,
            &["pool", "status", "--config", "gone.toml"],
            "cannot read gone.toml: No such file",
        ),
        (2, &["pool", "create", "x"], "<DEVICE>"),
        (
            2,
            &[
                "volume",
                "create",
                "v",
                "--size",
                "1X",
                "--layout",
                "mirror",
                "--devices",
                "d0.img",
            ],
            "`1X` is not a size",
        ),
        (
            2,
            &[
                "volume",
                "create",
                "v",
                "--size",
                "1M",
                "--layout",
                "mirror",
                "--columns",
                "2",
                "--devices",
                "d0.img",
            ],
            "--columns has no meaning for this layout",
        ),
        (
            1,
            &["pool", "create", "x", "gone.img"],
            "cannot open gone.img: No such file",
        ),
        (1, &["pool", "create", "x", "gone.img"], "truncate -s"),
        (
            1,
            &["pool", "status", "--devices", "gone.img"],
            "cannot open gone.img",
        ),
        (
            1,
            &[
                "volume", "create", "v", "--size", "1G", "--layout", "mirror", "--config", "vm.toml",
            ],
            "mirror of 2 needs 2 devices with 1 GiB free each",
        ),
        (
            1,
            &[
                "volume", "create", "v", "--size", "1M", "--layout", "raid6", "--config", "vm.toml",
            ],
            "raid6 2+2 needs 4 devices",
        ),
        (
            1,
            &["volume", "delete", "v", "--config", "vm.toml"],
            "there is no volume v in this pool; `smsvmm volume list`",
        ),
        (
            1,
            &["job", "pause", "7", "--config", "vm.toml"],
            "the pool has no job 7",
        ),
        (
            1,
            &["device", "evacuate", "d9", "--config", "vm.toml"],
            "the pool has no device d9",
        ),
    ];
    for (status, arguments, expected) in cases {
        let error = place.bad(*status, arguments);
        assert!(error.contains(expected), "{arguments:?}: {error}");
    }
}
