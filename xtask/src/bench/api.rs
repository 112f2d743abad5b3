//! `cargo xtask bench api`: how long the management interface of a manager takes while the disks of its pool are busy.
//!
//! ```text
//!   8 × vhost-user-load ── vhost-user ──► smsvmm serve ──► a mirror on four files     4 KiB, half reads, half writes
//!                         a scrub ────────►   ▲
//!   this program ──── GET, one connection each ┘                                      p50, p99 of each resource
//! ```
//! It is the interface's own time that counts, so the files are in memory. All programs share the processors: the load average is printed beside.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use lab::finish;
use serde_json::{Value, json};

use super::disks::Server;
use crate::{build, host};

/// What 99 of 100 requests shall be answered within.
const GOAL: Duration = Duration::from_millis(50);
/// Machines, each with one disk.
const MACHINES: usize = 8;
const DEVICES: usize = 4;
/// Bytes of each device, of which only what is written takes space.
const DEVICE: u64 = 256 << 20;
/// Bytes of each disk.
const DISK: u64 = 16 << 20;
/// Bytes per second of the scrub, which has twice the disks to read: it shall outlast the measurement.
const THROTTLE: u64 = 4 << 20;
/// Between two requests: who asks all the time measures itself.
const PAUSE: Duration = Duration::from_millis(2);
/// How long the manager may take to open its pool, and the load to begin.
const PATIENCE: Duration = Duration::from_secs(20);

/// What is asked for: method, path, body.
const RESOURCES: [(&str, &str, &str); 12] = [
    ("GET", "/healthz", ""),
    ("GET", "/v1/host", ""),
    ("GET", "/v1/vms", ""),
    ("GET", "/v1/pools", ""),
    ("GET", "/v1/pools/bench", ""),
    ("GET", "/v1/pools/bench/jobs", ""),
    ("GET", "/v1/attachments", ""),
    ("GET", "/v1/attachments/counters", ""),
    ("GET", "/v1/events?after=0", ""),
    ("GET", "/metrics", ""),
    (
        "POST",
        "/v1/storage",
        r#"{"to":"load","request":{"window_ms":0}}"#,
    ),
    (
        "POST",
        "/v1/storage",
        r#"{"to":"disk","request":{"operation":"list","path":"/"}}"#,
    ),
];

/// What to run.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// How long to ask, in seconds
    #[arg(long, default_value_t = 15.0)]
    seconds: f64,
    /// Requests in flight of each machine
    #[arg(long, default_value_t = 4)]
    depth: u16,
    /// Files in this folder instead of memory
    #[arg(long, default_value = "/dev/shm")]
    folder: PathBuf,
    /// Measure these programs, which are built, instead of building them
    #[arg(long, value_name = "FOLDER")]
    programs: Option<PathBuf>,
}

/// A manager with its pool and the load on it.
struct Place {
    folder: PathBuf,
    smsvmm: PathBuf,
    load: PathBuf,
}

/// Runs all and prints.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let program = |name| {
        options
            .programs
            .as_ref()
            .map_or_else(|| build::release(name), |folder| Ok(folder.join(name)))
    };
    let (smsvmm, load) = (program("smsvmm")?, program("vhost-user-load")?);
    let folder = tempfile::Builder::new()
        .prefix("bench-api.")
        .tempdir_in(&options.folder)?;
    let place = Place {
        folder: folder.path().to_path_buf(),
        smsvmm,
        load,
    };
    host::step("making the pool and its disks");
    place.make()?;
    let _manager = place.serve()?;
    for (pattern, seconds) in [("idle", options.seconds / 3.0), ("busy", options.seconds)] {
        let busy = pattern == "busy";
        host::step(match busy {
            true => "asking a busy manager",
            false => "asking a manager that has nothing else to do",
        });
        let loads = match busy {
            true => place.begin_load(options)?,
            false => Vec::new(),
        };
        let before = load_average();
        let times = place.ask_all(Duration::from_secs_f64(seconds))?;
        let job = place.job()?;
        print(&times);
        println!("load average {before} before, {} after", load_average());
        if busy {
            println!("the scrub: {job}");
            place.tell_load(loads)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn load_average() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or("?").to_owned()
}

impl Place {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    fn device(&self, number: usize) -> PathBuf {
        self.path(&format!("d{number}.img"))
    }

    fn socket(&self) -> PathBuf {
        self.path("manager.sock")
    }

    /// Makes the pool, a mirror, and a disk for each machine.
    fn make(&self) -> Result<()> {
        let devices: Vec<PathBuf> = (0..DEVICES).map(|number| self.device(number)).collect();
        for device in &devices {
            fs::File::create(device)?.set_len(DEVICE)?;
        }
        finish(
            Command::new(&self.smsvmm)
                .args(["pool", "create", "bench"])
                .args(&devices),
        )?;
        self.command(&["file", "format"])?;
        let size = (2 * DISK * MACHINES as u64).to_string();
        self.command(&[
            "volume", "create", "mirror", "--size", &size, "--layout", "mirror",
        ])?;
        let size = DISK.to_string();
        for number in 0..MACHINES {
            let path = format!("/m{number}.dsk");
            self.command(&["disk", "create", &path, "--size", &size, "--thick"])?;
        }
        Ok(())
    }

    fn command(&self, arguments: &[&str]) -> Result<()> {
        let mut command = Command::new(&self.smsvmm);
        command.args(arguments);
        for number in 0..DEVICES {
            command.arg("--devices").arg(self.device(number));
        }
        finish(&mut command)?;
        Ok(())
    }

    /// Starts the manager, with machines that are defined and do not run.
    fn serve(&self) -> Result<Server> {
        let devices: Vec<PathBuf> = (0..DEVICES).map(|number| self.device(number)).collect();
        for name in ["state", "runtime"] {
            fs::create_dir(self.path(name))?;
        }
        let config = format!(
            "state = {:?}\nruntime = {:?}\n[management]\nsocket = {:?}\n[[pool]]\ndevices = {devices:?}\n",
            self.path("state"),
            self.path("runtime"),
            self.socket(),
        );
        fs::write(self.path("host.toml"), config)?;
        let mut command = Command::new(&self.smsvmm);
        command.arg("serve").arg(self.path("host.toml"));
        let log = fs::File::create(self.path("log"))?;
        let manager = Server(
            command
                .stdin(Stdio::null())
                .stdout(log.try_clone()?)
                .stderr(log)
                .spawn()?,
        );
        let begin = Instant::now();
        while self.ask("GET", "/readyz", "").is_err() {
            let said = || fs::read_to_string(self.path("log")).unwrap_or_default();
            ensure!(
                begin.elapsed() < PATIENCE,
                "the manager does not answer: {}",
                said()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        fs::write(self.path("vmlinuz"), "none")?;
        for number in 0..MACHINES {
            let name = format!("m{number}");
            let machine = format!(
                "name = \"{name}\"\nmemory = \"64M\"\n[boot]\nkernel = {:?}\n[[disk]]\nfile = \"/{name}.dsk\"\n",
                self.path("vmlinuz")
            );
            let body = json!({"config": machine}).to_string();
            self.ask("PUT", &format!("/v1/vms/{name}"), &body)?;
        }
        Ok(manager)
    }

    /// Has all machines use their disks, and a scrub read all of them.
    fn begin_load(&self, options: &Options) -> Result<Vec<Child>> {
        // It is stopped when all has been asked.
        let seconds = (options.seconds + PATIENCE.as_secs_f64()).to_string();
        let depth = options.depth.to_string();
        let loads: Vec<Child> = (0..MACHINES)
            .map(|number| {
                let mut command = Command::new(&self.load);
                command.args([
                    "--json",
                    "--pattern",
                    "mixed",
                    "--depth",
                    &depth,
                    "--seconds",
                    &seconds,
                ]);
                command
                    .arg("--attach")
                    .arg(format!("m{number}/disk0=/m{number}.dsk"));
                command.arg("--seed").arg((number + 1).to_string());
                command.arg("--socket").arg(self.socket());
                Ok(command.stdin(Stdio::null()).stdout(Stdio::null()).spawn()?)
            })
            .collect::<Result<_>>()?;
        let begin = Instant::now();
        while self.requests()?.len() < MACHINES {
            ensure!(begin.elapsed() < PATIENCE, "the load does not begin");
            std::thread::sleep(Duration::from_millis(20));
        }
        let scrub = json!({"to": "begin", "request": {"operation": "scrub", "volume": "mirror", "throttle": THROTTLE}});
        self.ask("POST", "/v1/storage", &scrub.to_string())?;
        Ok(loads)
    }

    /// Reads and writes of each disk so far.
    fn requests(&self) -> Result<Vec<u64>> {
        let answer: Value = serde_json::from_str(&self.ask("GET", "/v1/attachments/counters", "")?)?;
        let all = answer.as_array().context("no list of disks")?;
        let number = |disk: &Value, key: &str| disk[key].as_u64().unwrap_or(0);
        Ok(all
            .iter()
            .map(|disk| number(disk, "reads") + number(disk, "writes"))
            .collect())
    }

    /// Says how much the load was, and ends it.
    fn tell_load(&self, mut loads: Vec<Child>) -> Result<()> {
        let (before, begin) = (self.requests()?, Instant::now());
        std::thread::sleep(Duration::from_secs(1));
        let after: u64 = self.requests()?.iter().sum();
        let rate = (after - before.iter().sum::<u64>()) as f64 / begin.elapsed().as_secs_f64();
        println!("the load: {MACHINES} machines, {rate:.0} requests of 4 KiB per second");
        for load in &mut loads {
            // The manager sees machines that die every day.
            load.kill()?;
            load.wait()?;
        }
        Ok(())
    }

    /// How the last job is.
    fn job(&self) -> Result<String> {
        let jobs: Value = serde_json::from_str(&self.ask("GET", "/v1/pools/bench/jobs", "")?)?;
        let last = jobs.as_array().and_then(|jobs| jobs.last());
        Ok(last.map_or_else(
            || "none".to_owned(),
            |job| format!("{}, {} of {} bytes", job["state"], job["done"], job["total"]),
        ))
    }

    /// One request, as any client sends it.
    fn ask(&self, method: &str, path: &str, body: &str) -> Result<String> {
        ask(&self.socket(), method, path, body)
    }

    /// Asks for everything in turns; how long each took.
    fn ask_all(&self, time: Duration) -> Result<Vec<Vec<Duration>>> {
        let mut times = vec![Vec::new(); RESOURCES.len()];
        let begin = Instant::now();
        while begin.elapsed() < time {
            for ((method, path, body), times) in RESOURCES.iter().zip(&mut times) {
                let asked = Instant::now();
                self.ask(method, path, body)?;
                times.push(asked.elapsed());
                std::thread::sleep(PAUSE);
            }
        }
        Ok(times)
    }
}

fn ask(socket: &Path, method: &str, path: &str, body: &str) -> Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let length = body.len();
    let request =
        format!("{method} {path} HTTP/1.1\r\nhost: bench\r\ncontent-length: {length}\r\n\r\n{body}");
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    match answer.split_once("\r\n\r\n") {
        Some((head, body)) if head.starts_with("HTTP/1.1 2") => Ok(body.to_owned()),
        _ => bail!("{method} {path}: {answer}"),
    }
}

fn print(times: &[Vec<Duration>]) {
    println!(
        "\nmilliseconds from connecting to the end of the answer\n{:<40}{:>8}{:>9}{:>9}{:>9}",
        "", "requests", "p50", "p99", "most"
    );
    for ((method, path, body), times) in RESOURCES.iter().zip(times) {
        let mut sorted = times.clone();
        sorted.sort_unstable();
        let at =
            |percent: usize| sorted.get((sorted.len() * percent / 100).min(sorted.len().saturating_sub(1)));
        let [middle, slow, most] = [50, 99, 100].map(|percent| at(percent).copied().unwrap_or_default());
        let millis = |time: Duration| time.as_secs_f64() * 1e3;
        let what = match *body {
            "" => String::new(),
            body if body.contains("load") => " load".to_owned(),
            _ => " list of disks".to_owned(),
        };
        println!(
            "{:<40}{:>8}{:>9.2}{:>9.2}{:>9.2}{}",
            format!("{method} {path}{what}"),
            sorted.len(),
            millis(middle),
            millis(slow),
            millis(most),
            if slow > GOAL { "  above the goal" } else { "" },
        );
    }
    println!("the goal: p99 below {} ms", GOAL.as_millis());
}
