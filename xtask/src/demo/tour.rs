//! The demo's scripted tour: what a person would type at the guest's console, with each answer checked, and what the guest
//! wrote checked again from outside when it has powered off.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use stories::Vm;

/// What the host serves and the guest fetches.
const GREETING: &str = "greetings from the host";

/// How long the whole tour may take; in the lab everything is slow.
const LIMIT: Duration = Duration::from_secs(600);

/// One line of the summary.
struct Stop {
    title: &'static str,
    result: String,
    seconds: f64,
}

/// Runs the guest by a command, in a folder that is ready, and shows the tour; exit status 0 if all went as it should.
pub(crate) fn run(folder: &Path, command: Command) -> Result<ExitCode> {
    let port = serve(GREETING)?;
    let vm = Vm::launch(command, folder, LIMIT)?;
    vm.echo();
    let mut tour = Tour {
        vm,
        number: 0,
        stops: Vec::new(),
        last: Instant::now(),
    };
    let result = walk(&mut tour, port);
    let log = tour.vm.log();
    let mut stops = tour.stops;
    let ended = result.and_then(|()| {
        let before = Instant::now();
        let outcome = tour.vm.wait(Duration::from_secs(120))?;
        ensure!(
            outcome.exit_code() == Some(0),
            "smsvmm ended with {}",
            outcome.status
        );
        stops.push(Stop {
            title: "power-off",
            result: "the guest powered off, smsvmm's exit status is 0".into(),
            seconds: before.elapsed().as_secs_f64(),
        });
        let before = Instant::now();
        let sum = sha256(folder, "scratch.img")?;
        let told = stops
            .iter()
            .find(|stop| stop.title == "raw disk")
            .map(|stop| stop.result.clone())
            .unwrap_or_default();
        ensure!(
            told.contains(&sum),
            "the host finds checksum {sum} on scratch.img, the guest said {told}"
        );
        stops.push(Stop {
            title: "seen from the host",
            result: format!(
                "scratch.img has the same checksum, {}...",
                sum.get(..12).unwrap_or(&sum)
            ),
            seconds: before.elapsed().as_secs_f64(),
        });
        Ok(())
    });
    summary(&stops);
    match ended {
        Ok(()) => {
            println!("The demo went as it should.");
            Ok(ExitCode::SUCCESS)
        }
        Err(error) => {
            println!("The demo FAILED: {error:#}\nsmsvmm says:\n{log}");
            Ok(ExitCode::FAILURE)
        }
    }
}

fn walk(tour: &mut Tour, port: u16) -> Result<()> {
    tour.vm.wait_for("root@guest:~#")?;
    tour.stop("boot", "a stock Debian 12 came up to a root shell".to_owned());
    tour.ask("bind 'set enable-bracketed-paste off'; stty cols 200")?;

    let kernel = tour.ask("uname -srm; nproc")?;
    tour.stop("kernel", kernel.replace('\n', ", processors: "));

    let disks = tour.ask("lsblk -o NAME,SIZE,SERIAL,MOUNTPOINTS --nodeps")?;
    ensure!(
        ["vda", "vdb", "vdc"].iter().all(|name| disks.contains(name)),
        "a disk is missing: {disks}"
    );
    tour.stop(
        "disks",
        format!(
            "{} virtio disks: vda, vdb (scratch), vdc (data)",
            disks.lines().count() - 1
        ),
    );

    let sums = tour.ask(
        "head -c 16M /dev/urandom > /tmp/16M && dd if=/tmp/16M of=/dev/vdb bs=1M oflag=direct conv=fsync status=none && \
         echo 3 > /proc/sys/vm/drop_caches && sha256sum < /tmp/16M && dd if=/dev/vdb bs=1M count=16 iflag=direct status=none | sha256sum",
    )?;
    let sum = equal_lines(&sums)?;
    tour.stop(
        "raw disk",
        format!("16 MiB written to vdb and read back, sha256 {sum}"),
    );

    let sums = tour.ask(
        "mkfs.ext4 -q /dev/vdc && mount /dev/vdc /mnt && cp /tmp/16M /mnt/copy && umount /mnt && mount /dev/vdc /mnt && \
         sha256sum < /tmp/16M && sha256sum < /mnt/copy && umount /mnt && fstrim --version > /dev/null",
    )?;
    let sum = equal_lines(&sums)?;
    tour.stop(
        "file system",
        format!(
            "16 MiB in a new ext4 on vdc, mounted again, sha256 {}...",
            sum.get(..12).unwrap_or(sum)
        ),
    );

    let sums = tour.ask("cp /tmp/16M /root/copy && sync && echo 3 > /proc/sys/vm/drop_caches && sha256sum < /tmp/16M && sha256sum < /root/copy")?;
    let sum = equal_lines(&sums)?;
    tour.stop(
        "root disk",
        format!(
            "16 MiB in the root file system on vda, sha256 {}...",
            sum.get(..12).unwrap_or(sum)
        ),
    );

    // passt: the guest's gateway is the host.
    let fetched = tour.ask(&format!(
        "for n in $(seq 60); do gateway=$(ip -4 route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p'); [ -n \"$gateway\" ] && break; sleep 1; done; \
         curl --silent --show-error --max-time 60 http://$gateway:{port}/"
    ))?;
    ensure!(
        fetched.contains(GREETING),
        "the guest fetched something else: {fetched}"
    );
    tour.stop(
        "network",
        format!("the guest fetched \"{GREETING}\" from the host through passt"),
    );

    tour.vm.type_text("poweroff\n")
}

/// A guest at its console.
struct Tour {
    vm: Vm,
    number: u32,
    stops: Vec<Stop>,
    last: Instant,
}

impl Tour {
    /// Types a command, waits for its end, and returns its output; an error when it fails.
    fn ask(&mut self, command: &str) -> Result<String> {
        self.number += 1;
        let (begin, end) = (
            format!("tour-{}-begin", self.number),
            format!("tour-{}-end-", self.number),
        );
        // Quotes in the middle of the marks: what is typed must not look like what is answered.
        let (typed_begin, typed_end) = (begin.replace("tour-", "tour''-"), end.replace("tour-", "tour''-"));
        self.vm.type_text(&format!(
            "echo {typed_begin}; {{ {command}; }}; echo {typed_end}$?.\n"
        ))?;
        self.vm.wait_for(&end)?;
        self.vm.wait_for(".")?;
        let text = self.vm.console();
        let answer = text
            .split_once(&format!("{begin}\n"))
            .context("the answer has no beginning")?
            .1;
        let (output, status) = answer.split_once(&end).context("the answer has no end")?;
        ensure!(
            status.starts_with("0."),
            "the guest's command failed: {command}\n{output}"
        );
        Ok(output.trim_end().to_owned())
    }

    fn stop(&mut self, title: &'static str, result: String) {
        let seconds = self.last.elapsed().as_secs_f64();
        self.last = Instant::now();
        self.stops.push(Stop {
            title,
            result,
            seconds,
        });
    }
}

/// The one checksum that all lines of a text agree on.
fn equal_lines(text: &str) -> Result<&str> {
    let mut sums = text
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .filter(|word| word.len() == 64);
    let first = sums.next().context("there is no checksum")?;
    let mut count = 1;
    for sum in sums {
        ensure!(sum == first, "checksums differ: {text}");
        count += 1;
    }
    ensure!(count == 2, "{count} checksums instead of 2: {text}");
    Ok(first)
}

fn sha256(folder: &Path, file: &str) -> Result<String> {
    let mut bytes = vec![0; 16 << 20];
    File::open(folder.join(file))?.read_exact(&mut bytes)?;
    let piece = folder.join("piece");
    std::fs::write(&piece, bytes)?;
    let output = lab::finish(Command::new("sha256sum").arg(piece))?;
    Ok(String::from_utf8_lossy(&output)
        .split_whitespace()
        .next()
        .unwrap_or_default()
        .to_owned())
}

/// Serves one text to everybody who asks on a port of the loopback; returns the port.
fn serve(text: &'static str) -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let port = listener.local_addr()?.port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { continue };
            let mut request = [0; 1024];
            let answer = format!(
                "HTTP/1.0 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{text}\n",
                text.len() + 1
            );
            // A client that goes away early is no concern of the server's.
            drop(
                stream
                    .read(&mut request)
                    .and_then(|_| stream.write_all(answer.as_bytes())),
            );
        }
    });
    Ok(port)
}

fn summary(stops: &[Stop]) {
    println!("\n\nSummary");
    for Stop {
        title,
        result,
        seconds,
    } in stops
    {
        println!("  {seconds:6.1} s  {title:<18}  {result}");
    }
}
