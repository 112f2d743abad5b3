//! The demo's scripted tour: what a person would type at the guest's console and in a terminal beside it, with each answer
//! checked, and what the guest wrote checked again from outside when it has powered off.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use stories::Vm;

use super::shell::{Job, Shell};
use super::storage::{self, PIECE_AT, Told, short};
use super::summary::Summary;

/// What the host serves and the guest fetches.
const GREETING: &str = "greetings from the host";

/// How long the guest may run; in the lab everything is slow.
const LIMIT: Duration = Duration::from_secs(600);

/// Records that must have come between two looks.
const PROGRESS: u64 = 10;

/// What the guest runs while things happen to its disks: writes record after record to the scratch disk, and when one is durable,
/// counts it in a file on the system disk.
const WRITER: &str = r#"import os
d, c = os.open("/dev/vdb", os.O_WRONLY | os.O_SYNC), os.open("/root/count", os.O_WRONLY | os.O_CREAT)
for n in range(1, 49000): os.pwrite(d, b"%4096d" % n, n * 4096); os.pwrite(c, b"%16d" % n, 0); os.fsync(c)
"#;

/// Shows the tour in a folder whose storage is ready; exit status 0 if all went as it should.
pub(super) fn run(shell: &Shell, mut device: Job, mut summary: Summary) -> Result<ExitCode> {
    let port = serve(GREETING)?;
    let vm = Vm::launch(shell.run_machine(), shell.folder(), LIMIT)?;
    vm.echo();
    let mut guest = Guest { vm, number: 0 };
    let walked = walk(&mut guest, shell, &mut device, &mut summary, port);
    let log = guest.vm.log();
    let result = walked.and_then(|told| {
        let outcome = guest.vm.wait(Duration::from_secs(120))?;
        ensure!(
            outcome.exit_code() == Some(0),
            "smsvmm ended with {}",
            outcome.status
        );
        summary.stop(
            "power-off",
            "the guest powered off, smsvmm's exit status is 0".into(),
        );
        storage::check(shell, &told, &mut summary)?;
        storage::heal(shell, &mut summary)
    });
    summary.print();
    match result {
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

fn walk(
    guest: &mut Guest,
    shell: &Shell,
    device: &mut Job,
    summary: &mut Summary,
    port: u16,
) -> Result<Told> {
    guest.vm.wait_for("root@guest:~#")?;
    summary.stop(
        "boot",
        "a stock Debian 12 came up to a root shell, from the mirror".into(),
    );
    guest.ask("bind 'set enable-bracketed-paste off'; stty cols 200")?;

    let kernel = guest.ask("uname -srm; nproc")?;
    summary.stop("kernel", kernel.replace('\n', ", processors: "));

    let disks = guest.ask("lsblk -o NAME,SIZE,SERIAL,MOUNTPOINTS --nodeps")?;
    ensure!(
        ["vda", "vdb", "vdc"].iter().all(|name| disks.contains(name)),
        "a disk is missing: {disks}"
    );
    summary.stop(
        "disks",
        format!(
            "{} virtio disks: vda (root), vdb (work), vdc (data)",
            disks.lines().count() - 1
        ),
    );
    let sum = write_everywhere(guest, summary)?;

    // passt: the guest's gateway is the host. On a busy machine it gives up on a guest that takes seconds to answer; hence the retries.
    let fetched = guest.ask(&format!(
        "for n in $(seq 60); do gateway=$(ip -4 route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p'); [ -n \"$gateway\" ] && break; sleep 1; done; \
         curl --silent --show-error --max-time 60 --retry 5 --retry-all-errors http://$gateway:{port}/"
    ))?;
    ensure!(
        fetched.contains(GREETING),
        "the guest fetched something else: {fetched}"
    );
    summary.stop(
        "network",
        format!("the guest fetched \"{GREETING}\" from the host through passt"),
    );

    let (before_snapshot, after_snapshot) = snapshot(guest, shell, summary)?;
    let last = fail_a_device(guest, shell, device, summary, &sum)?;
    guest.vm.type_text("poweroff\n")?;
    Ok(Told {
        sum,
        before_snapshot,
        after_snapshot,
        last,
    })
}

/// 16 MiB of noise on each disk: raw, in a new file system, in the root file system. Their checksum.
fn write_everywhere(guest: &mut Guest, summary: &mut Summary) -> Result<String> {
    let sums = guest.ask(&format!(
        "head -c 16M /dev/urandom > /tmp/16M && dd if=/tmp/16M of=/dev/vdb bs=1M seek={PIECE_AT} oflag=direct conv=fsync status=none && \
         echo 3 > /proc/sys/vm/drop_caches && sha256sum < /tmp/16M && dd if=/dev/vdb bs=1M skip={PIECE_AT} count=16 iflag=direct status=none | sha256sum",
    ))?;
    let sum = equal_lines(&sums)?.to_owned();
    summary.stop(
        "raw disk",
        format!("16 MiB written to vdb and read back, sha256 {sum}"),
    );

    let sums = guest.ask(
        "mkfs.ext4 -q /dev/vdc && mount /dev/vdc /mnt && cp /tmp/16M /mnt/copy && umount /mnt && mount /dev/vdc /mnt && \
         sha256sum < /tmp/16M && sha256sum < /mnt/copy && umount /mnt && fstrim --version > /dev/null",
    )?;
    summary.stop(
        "file system",
        format!(
            "16 MiB in a new ext4 on vdc, mounted again, sha256 {}...",
            short(equal_lines(&sums)?)
        ),
    );

    let sums = guest.ask("cp /tmp/16M /root/copy && sync && echo 3 > /proc/sys/vm/drop_caches && sha256sum < /tmp/16M && sha256sum < /root/copy")?;
    summary.stop(
        "root disk",
        format!(
            "16 MiB in the root file system on vda, sha256 {}...",
            short(equal_lines(&sums)?)
        ),
    );
    Ok(sum)
}

/// Takes a snapshot of two disks while the guest writes to both. How many records there were before and after.
fn snapshot(guest: &mut Guest, shell: &Shell, summary: &mut Summary) -> Result<(u64, u64)> {
    guest.ask(&format!(
        "cat > /root/writer.py <<'END'\n{WRITER}END\necho 0 > /root/count && sync"
    ))?;
    guest.ask("setsid -f python3 /root/writer.py")?;
    let before = guest.count_beyond(PROGRESS)?;
    shell.run("smsvmm disk snapshot /system/root.dsk /scratch/work.dsk --name busy --config vm.toml")?;
    let after = guest.count_beyond(before + PROGRESS)?;
    summary.stop(
        "snapshot, busy",
        format!(
            "of both disks, while the guest wrote: it had {before} records before and {after} soon after"
        ),
    );
    Ok((before, after))
}

/// Has a device fail while the guest writes. How many records there were at last.
fn fail_a_device(
    guest: &mut Guest,
    shell: &Shell,
    device: &mut Job,
    summary: &mut Summary,
    sum: &str,
) -> Result<u64> {
    device.kill()?;
    let failed_at = guest.count()?;
    guest.count_beyond(failed_at + PROGRESS)?;
    let again = guest.ask("echo 3 > /proc/sys/vm/drop_caches && sha256sum < /root/copy")?;
    ensure!(
        again.contains(sum),
        "the guest reads something else from its mirrored disk: {again}"
    );
    guest.ask("pkill -f writer.py; while pgrep -f writer.py; do sleep 0.1; done; sync")?;
    let complaints = guest.ask("dmesg | grep -i -e 'i/o error' -e 'ext4-fs error' || true")?;
    ensure!(complaints.is_empty(), "the guest has noticed: {complaints}");
    let status = shell.run("smsvmm pool status --config vm.toml")?;
    ensure!(status.contains("degraded"), "the pool has not noticed");
    let last = guest.count()?;
    summary.stop(
        "a device fails",
        format!("half of the mirror is gone; the guest went on from {failed_at} to {last} records and noticed nothing"),
    );
    Ok(last)
}

/// A guest at its console.
struct Guest {
    vm: Vm,
    number: u32,
}

impl Guest {
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

    /// How many records the guest's writer has counted.
    fn count(&mut self) -> Result<u64> {
        let text = self.ask("cat /root/count")?;
        text.trim()
            .parse()
            .with_context(|| format!("{text:?} is no count"))
    }

    /// Waits until there are more than that.
    fn count_beyond(&mut self, records: u64) -> Result<u64> {
        self.ask(&format!(
            "until [ $(cat /root/count) -gt {records} ]; do sleep 0.1; done"
        ))?;
        self.count()
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
