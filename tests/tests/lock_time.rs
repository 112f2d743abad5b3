//! For how long a guest's file systems stand still for a frozen image, with one level of emulation: QEMU boots a stock guest on this machine,
//! whose SCSI disks `smsvmm share vhost-user-scsi` serves natively. In the lab smsvmm itself is emulated as well.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use stories::{Server, Vm, emulated_with_agent, program, run_program};

const PATIENCE: Duration = Duration::from_secs(240);
const DEVICES: &str = "d0.img,d1.img";
const ROUNDS: u32 = 3;
/// What is ours of the time may be so much on a machine with other work; it is about ten. The goal of 100 is not for machines that are shared.
const GENEROUS_MS: f64 = 2000.0;

/// Files are written, appended to, replaced and deleted, until there is /tmp/stop.
const LOAD: &str = "(n=0; while [ ! -e /tmp/stop ]; do n=$((n+1)); for f in ext4 xfs; do cd /$f; echo $n >> log; \
    dd if=/dev/zero of=new bs=64k count=16 2> /dev/null && mv new $((n % 20)); rm -f $((n * 7 % 20)); done; done; echo $n > /tmp/rounds) &";

fn serve(folder: &Path) -> Result<Server> {
    for device in DEVICES.split(',') {
        std::fs::File::create(folder.join(device))?.set_len(1 << 30)?;
    }
    run_program(folder, "pool create tank d0.img d1.img")?;
    run_program(
        folder,
        &format!("file --devices {DEVICES} format --meta-size 64M"),
    )?;
    let volume = format!("volume --devices {DEVICES} create safe --size 640M --layout mirror");
    run_program(folder, &volume)?;
    for (name, size) in [("ext4", "128M"), ("xfs", "320M")] {
        let create = format!("disk --devices {DEVICES} create /{name}.dsk --size {size} --volume safe");
        run_program(folder, &create)?;
    }
    std::fs::write(
        folder.join("access.toml"),
        "[[machine]]\nsocket = \"a.sock\"\n[machine.expanded-api]\nallow = [\"image\"]\n",
    )?;
    let arguments = format!(
        "vhost-user-scsi -v --devices {DEVICES} --queues 2 --socket a.sock --access access.toml /ext4.dsk /xfs.dsk"
    );
    let arguments: Vec<&str> = arguments.split(' ').collect();
    Server::share(&program()?, folder, &arguments)
}

fn boot(folder: &Path) -> Result<Vm> {
    let socket = format!("socket,id=scsi,path={}", folder.join("a.sock").display());
    let adapter = "vhost-user-scsi-pci,chardev=scsi,num_queues=2";
    let arguments = ["-chardev", &socket, "-device", adapter];
    let mut vm = emulated_with_agent(&folder.join("a"), &arguments, PATIENCE)?;
    vm.wait_until_ready()?;
    vm.guest("sh /tools-on")?;
    // Each comes when the kernel has looked at it, in whatever order, and is called so.
    vm.guest_until("[ -b /dev/sda ] && [ -b /dev/sdb ]")?;
    for line in [
        "ext4=/dev/$(ls /sys/class/scsi_disk/*:0/device/block) xfs=/dev/$(ls /sys/class/scsi_disk/*:1/device/block)",
        "/tools/usr/bin/mke2fs -q -t ext4 $ext4 && /tools/usr/bin/mkfs.xfs -q $xfs 2>&1",
        "mkdir /ext4 /xfs && mount -t ext4 $ext4 /ext4 && mount -t xfs $xfs /xfs",
        LOAD,
    ] {
        vm.guest(line)?;
    }
    Ok(vm)
}

/// A part of the time in what the agent says, in milliseconds.
fn part(said: &str, name: &str) -> Result<f64> {
    let (_, rest) = said
        .split_once(&format!("\"{name}-ms\": "))
        .with_context(|| format!("no {name} in {said}"))?;
    let number = rest.split([',', '}', '\r', '\n']).next().unwrap_or_default();
    Ok(number.trim().parse()?)
}

fn tell() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let server = serve(folder.path())?;
    let mut vm = boot(folder.path())?;
    for round in 0..ROUNDS {
        for (what, disks) in [
            ("/ext4", "/ext4.dsk"),
            ("/xfs", "/xfs.dsk"),
            ("/ext4 /xfs", "/ext4.dsk /xfs.dsk"),
        ] {
            let image = format!("i{round}");
            let said = vm.guest(&format!("sms-agent --json freeze-image --name {image} {what}"))?;
            let [whole, flush, ours, thaw] =
                ["frozen", "flush", "image", "thaw"].map(|name| part(&said, name));
            let (whole, flush, ours, thaw) = (whole?, flush?, ours?, thaw?);
            println!("lock time of {what}: {whole:.1} ms: flush {flush:.1}, image {ours:.1}, thaw {thaw:.1}");
            ensure!(ours + thaw < GENEROUS_MS, "{what} stood still for us: {said}");
            vm.guest(&format!("sms-agent release-image --name {image} {disks}"))?;
        }
    }
    vm.guest("touch /tmp/stop; wait; [ $(cat /tmp/rounds) -gt 5 ]")?;
    vm.guest("! dmesg | grep -iE 'i/o error|ext4-fs error|corruption|call trace'")?;
    drop(vm);
    server.end()
}

#[test]
fn file_systems_of_a_guest_of_qemu_stand_still_shortly_for_a_frozen_image() -> Result<()> {
    tell()
}
