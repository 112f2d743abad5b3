//! QEMU as the front-end of `smsvmm share vhost-user`: a stock Debian kernel, emulated in software on this machine, uses the
//! disk, and the server is killed and started again under it.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use stories::{Server, emulated};

const SIZE: u64 = 256 << 20;
/// Each line of the guest comes within this, or it hangs.
const PATIENCE: Duration = Duration::from_secs(120);

/// Says what it is, writes rounds of known data through the page cache and past it, reads them back, and has the kernel's
/// view of the disk said.
const SCRIPT: &str = r#"
cd /tmp
dd if=/dev/urandom of=pattern bs=1M count=8 2>/dev/null
sum=$(md5sum < pattern)
echo "disk: $(cat /sys/block/vda/size) sectors, queues $(ls /sys/block/vda/mq | wc -l), serial $(cat /sys/block/vda/serial)"
round=0
while [ $round -lt 24 ]; do
    dd if=pattern of=/dev/vda bs=64k seek=$((round * 128)) oflag=direct 2>/dev/null || exit 3
    dd if=pattern of=/dev/vda bs=1M seek=$((round * 8)) conv=fsync 2>/dev/null || exit 4
    echo 3 > /proc/sys/vm/drop_caches
    [ "$(dd if=/dev/vda bs=1M skip=$((round * 8)) count=8 2>/dev/null | md5sum)" = "$sum" ] || exit 5
    round=$((round + 1))
    echo "round $round"
done
round=0
while [ $round -lt 24 ]; do
    [ "$(dd if=/dev/vda bs=1M skip=$((round * 8)) count=8 iflag=direct 2>/dev/null | md5sum)" = "$sum" ] || exit 6
    round=$((round + 1))
done
echo "all is well"
"#;

/// A process that ends with this.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn serve(folder: &Path) -> Result<Server> {
    let arguments = "vhost-user --queues 2 --buffered --socket disk.sock --image disk.img";
    let arguments: Vec<&str> = arguments.split(' ').collect();
    Server::share(&stories::program()?, folder, &arguments)
}

/// A guest that runs [`SCRIPT`] on the disk.
fn boot(folder: &Path) -> Result<(Running, Receiver<String>)> {
    let socket = folder.join("disk.sock");
    let disk = format!("socket,id=disk,path={},reconnect=1", socket.display());
    let device = "vhost-user-blk-pci,chardev=disk,num-queues=2,queue-size=256";
    let mut command = emulated(folder, SCRIPT, &["-chardev", &disk, "-device", device])?;
    let mut guest = command
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start QEMU")?;
    let console = BufReader::new(guest.stdout.take().context("no console")?);
    let (sender, lines) = channel();
    thread::spawn(move || {
        for line in console.lines().map_while(Result::ok) {
            println!("guest: {line}");
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    Ok((Running(guest), lines))
}

fn wait_for(lines: &Receiver<String>, text: &str) -> Result<String> {
    loop {
        let line = lines
            .recv_timeout(PATIENCE)
            .with_context(|| format!("the guest never said {text:?}"))?;
        if line.contains(text) {
            return Ok(line);
        }
        ensure!(
            !line.contains("guest: status"),
            "the script ended before {text:?}: {line}"
        );
    }
}

fn tell(kills: u32) -> Result<()> {
    let folder = tempfile::tempdir()?;
    File::create(folder.path().join("disk.img"))?.set_len(SIZE)?;
    let mut server = serve(folder.path())?;
    let (_guest, lines) = boot(folder.path())?;
    let disk = wait_for(&lines, "disk: ")?;
    ensure!(
        disk.contains(&format!("{} sectors, queues 2, serial disk.img", SIZE / 512)),
        "{disk}"
    );
    for kill in 0..kills {
        wait_for(&lines, &format!("round {}", 2 + 4 * kill))?;
        thread::sleep(Duration::from_millis(u64::from(kill) * 37));
        drop(server);
        server = serve(folder.path())?;
    }
    wait_for(&lines, "all is well")?;
    wait_for(&lines, "guest: status 0")?;
    Ok(())
}

#[test]
fn a_guest_of_qemu_uses_a_disk_whose_server_is_killed_under_it() -> Result<()> {
    tell(5)
}
