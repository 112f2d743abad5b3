//! File systems that stand still: fakes, and real ones to be measured.

use super::*;

#[test]
fn what_cannot_be_frozen_is_an_error_and_nothing_is_done() {
    let folder = tempfile::tempdir().unwrap();
    let system = FileSystem {
        mount: folder.path().to_owned(),
        // Neither a folder nor allowed.
        root: File::open("/dev/null").unwrap(),
        disks: BTreeSet::new(),
    };
    let acted = while_frozen(&[system], Duration::from_secs(1), || Ok(()));
    assert!(matches!(acted, Err(AgentError::Here { .. })), "{acted:?}");
}
#[test]
fn the_parts_of_the_time_are_what_took_it() {
    let act = || {
        std::thread::sleep(Duration::from_millis(20));
        Ok(())
    };
    let ((), still) = while_frozen(&[] as &[FileSystem], Duration::from_secs(60), act).unwrap();
    assert!(still.act >= Duration::from_millis(20), "{still:?}");
    assert_eq!(still.whole(), still.flush + still.act + still.thaw);
}

#[test]
fn parts_are_told_in_milliseconds() {
    let still = Still {
        flush: Duration::from_micros(40_250),
        act: Duration::from_micros(7_500),
        thaw: Duration::from_micros(250),
        each: vec![one("/srv", 40_250, 48_000)],
    };
    assert_eq!(
        still.parts().to_string(),
        "48.0 ms: 40.2 ms to be flushed, 7.5 ms for the image, 0.2 ms to be thawed"
    );
    assert_eq!(
        serde_json::to_string(&still.parts()).unwrap(),
        r#"{"frozen-ms":48.0,"flush-ms":40.25,"image-ms":7.5,"thaw-ms":0.25,"file-systems":[{"mount":"/srv","flush-ms":40.25,"frozen-ms":48.0}]}"#
    );
    let still = Still {
        each: vec![one("/srv", 40_250, 48_000), one("/home", 10_000, 47_900)],
        ..still
    };
    let said = still.parts().to_string();
    assert!(
        said.ends_with("0.2 ms to be thawed; /srv 48.0 ms, /home 47.9 ms"),
        "{said}"
    );
}

fn one(name: &str, flush: u64, whole: u64) -> One {
    One {
        name: name.to_owned(),
        flush: Duration::from_micros(flush),
        whole: Duration::from_micros(whole),
    }
}

/// One that takes as long as it is told, and writes down what is done to it.
struct Fake {
    name: &'static str,
    freezes: Option<Duration>,
    log: std::sync::Arc<Mutex<Vec<(Instant, String)>>>,
}

impl Fake {
    fn log(&self, what: &str) {
        let line = (Instant::now(), format!("{what} {}", self.name));
        self.log.lock().unwrap().push(line);
    }
}

impl Freezable for Fake {
    fn name(&self) -> String {
        self.name.to_owned()
    }

    fn flush(&self) {
        std::thread::sleep(Duration::from_millis(20));
        self.log("flush");
    }

    fn freeze(&self) -> io::Result<()> {
        let Some(time) = self.freezes else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        std::thread::sleep(time);
        self.log("freeze");
        Ok(())
    }

    fn thaw(&self) -> io::Result<()> {
        self.log("thaw");
        Ok(())
    }
}

type Log = std::sync::Arc<Mutex<Vec<(Instant, String)>>>;

fn fakes<const N: usize>(all: [(&'static str, Option<u64>); N]) -> (Vec<Fake>, Log) {
    let log = Log::default();
    let fake = |(name, freezes): (_, Option<u64>)| Fake {
        name,
        freezes: freezes.map(Duration::from_millis),
        log: log.clone(),
    };
    (all.map(fake).into(), log)
}

fn said(log: &Log) -> Vec<String> {
    log.lock().unwrap().iter().map(|(_, what)| what.clone()).collect()
}

#[test]
fn all_are_flushed_before_one_stands_still_and_their_times_do_not_add_up() {
    let (systems, log) = fakes([("a", Some(200)), ("b", Some(400)), ("c", Some(400))]);
    let act = || {
        log.lock().unwrap().push((Instant::now(), "act".to_owned()));
        std::thread::sleep(Duration::from_millis(100));
        Ok(7)
    };
    let (made, still) = while_frozen(&systems, Duration::from_secs(60), act).unwrap();
    assert_eq!(made, 7);
    let said = said(&log);
    assert_eq!(said.len(), 6 + 3 + 1 + 3, "{said:?}");
    let parts = [
        ("flush", 0..6),
        ("freeze", 6..9),
        ("act", 9..10),
        ("thaw", 10..13),
    ];
    for (what, range) in parts {
        assert!(said[range].iter().all(|line| line.starts_with(what)), "{said:?}");
    }
    // 1000 ms one after the other.
    assert!((400..900).contains(&still.flush.as_millis()), "{still:?}");
    let names: Vec<&str> = still.each.iter().map(|one| one.name.as_str()).collect();
    assert_eq!(names, ["a", "b", "c"]);
    for one in &still.each {
        assert!(
            one.whole <= still.whole() && one.whole >= still.act + one.flush,
            "{still:?}"
        );
    }
    assert!(still.each[0].flush < still.each[1].flush, "{still:?}");
}

#[test]
fn the_limit_is_for_all_together_also_while_one_does_not_come_to_a_standstill() {
    let (systems, log) = fakes([("quick", Some(0)), ("slow", Some(1500))]);
    let begin = Instant::now();
    let act = || -> Result<(), AgentError> { panic!("not all stand still") };
    let error = while_frozen(&systems, Duration::from_millis(200), act).unwrap_err();
    assert!(
        error.to_string().contains("not all file systems could be frozen"),
        "{error}"
    );
    let log = log.lock().unwrap();
    let when = |what: &str| {
        log.iter()
            .find(|(_, line)| line == what)
            .map(|(time, _)| *time - begin)
    };
    // The one that stood still went on when the time was over, and the other one as soon as it could.
    assert!(
        when("thaw quick").unwrap() < when("thaw slow").unwrap(),
        "{log:?}"
    );
    assert!(
        when("thaw slow").unwrap() >= Duration::from_millis(1500),
        "{log:?}"
    );
}

#[test]
fn a_host_that_does_not_answer_in_time_has_made_no_image() {
    let (systems, log) = fakes([("a", Some(0)), ("b", Some(0))]);
    let act = || {
        // Until the watchdog has thawed both.
        while said(&log).iter().filter(|line| line.starts_with("thaw")).count() < 2 {
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    };
    let error = while_frozen(&systems, Duration::from_millis(100), act).unwrap_err();
    assert!(error.to_string().contains("not one of a frozen state"), "{error}");
}

#[test]
fn if_one_cannot_be_frozen_the_others_go_on() {
    let (systems, log) = fakes([("a", Some(0)), ("odd", None), ("c", Some(100))]);
    let act = || -> Result<(), AgentError> { panic!("not all stand still") };
    let error = while_frozen(&systems, Duration::from_secs(60), act).unwrap_err();
    assert!(error.to_string().contains("odd cannot be frozen"), "{error}");
    let said = said(&log);
    assert_eq!(
        said.iter().filter(|line| line.starts_with("thaw")).count(),
        2,
        "{said:?}"
    );
}

/// A file system on a file of this machine's disk, in which files are made and deleted without a pause.
struct Written {
    system: FileSystem,
    load: std::process::Child,
    _folder: tempfile::TempDir,
}

impl Written {
    fn new(make: &[&str]) -> Self {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let (image, mount) = (folder.path().join("image"), folder.path().join("mount"));
        File::create(&image).unwrap().set_len(1 << 30).unwrap();
        fs::create_dir(&mount).unwrap();
        let run = |command: &mut std::process::Command| assert!(command.status().unwrap().success());
        run(std::process::Command::new(make[0]).args(&make[1..]).arg(&image));
        run(std::process::Command::new("mount")
            .args(["-o", "loop"])
            .arg(&image)
            .arg(&mount));
        let line = "i=0; while :; do head -c 1048576 /dev/urandom > f$((i % 60)); rm -f f$(((i + 30) % 60)); i=$((i + 1)); done";
        let load = std::process::Command::new("sh")
            .args(["-c", line])
            .current_dir(&mount)
            .spawn()
            .unwrap();
        let root = File::open(&mount).unwrap();
        let disks = BTreeSet::new();
        Self {
            system: FileSystem { mount, root, disks },
            load,
            _folder: folder,
        }
    }
}

impl Drop for Written {
    fn drop(&mut self) {
        let _ = self.load.kill();
        let _ = self.load.wait();
        // It is detached when nobody has a file of it open any more.
        let _ = std::process::Command::new("umount")
            .arg("-l")
            .arg(&self.system.mount)
            .status();
    }
}

/// `cargo test -p agent -- --ignored --nocapture at_once`, as root.
#[test]
#[ignore = "a measurement, which needs root and loop devices"]
fn frozen_at_once_and_one_after_the_other() {
    let written = [
        Written::new(&["mkfs.ext4", "-q"]),
        Written::new(&["mkfs.xfs", "-q", "-f"]),
    ];
    let limit = Duration::from_secs(10);
    let mut ratios = Vec::new();
    std::thread::sleep(Duration::from_secs(2));
    for _ in 0..15 {
        for one in &written {
            one.system.flush();
        }
        let begin = Instant::now();
        for one in &written {
            one.system.freeze().unwrap();
        }
        let before = begin.elapsed();
        for one in &written {
            one.system.thaw().unwrap();
        }
        std::thread::sleep(Duration::from_millis(500));
        let systems = [&written[0].system, &written[1].system].map(|system| FileSystem {
            mount: system.mount.clone(),
            root: system.root.try_clone().unwrap(),
            disks: BTreeSet::new(),
        });
        let ((), still) = while_frozen(&systems, limit, || Ok(())).unwrap();
        ratios.push(still.flush.as_secs_f64() / before.as_secs_f64());
        println!(
            "flush: one after the other {before:.1?}, at once {:.1?}",
            still.flush
        );
        std::thread::sleep(Duration::from_millis(500));
    }
    ratios.sort_by(f64::total_cmp);
    println!("ratio: {:.2} ({:.2} to {:.2})", ratios[7], ratios[0], ratios[14]);
}
