//! A guest of ours on disks that other processes serve over vhost-user: `smsvmm share vhost-user` on a pool, and QEMU's storage
//! daemon; killed and started again under it, hung, attached while it runs.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rustix::process::Signal;
use stories::{Disk, Host, Kernel, Server, Story, Vm};

const DEVICES: &str = "d0.img,d1.img";
/// How long a machine may run. Most of these stories is waiting for servers to come and go, on a host that has one processor.
const PATIENCE: Duration = Duration::from_secs(360);

fn tell<F: FnOnce(&Host) -> Result<()>>(story: F) {
    Story::default().limit(2 * PATIENCE).tell(story);
}

/// A pool of two devices with a mirrored volume, and two disks on it.
fn pool(host: &Host) -> Result<()> {
    host.image("d0.img", 768)?;
    host.image("d1.img", 768)?;
    host.administer("pool create tank d0.img d1.img")?;
    host.administer(&format!("file --devices {DEVICES} format --meta-size 64M"))?;
    host.administer(&format!(
        "volume --devices {DEVICES} create safe --size 512M --layout mirror"
    ))?;
    host.administer(&format!("file --devices {DEVICES} mkdir /vm"))?;
    for disk in ["root", "data"] {
        host.administer(&format!(
            "disk --devices {DEVICES} create /vm/{disk}.dsk --size 128M --volume safe"
        ))?;
    }
    Ok(())
}

/// Both disks of the pool, served by one process.
fn serve(host: &Host) -> Result<Server> {
    let arguments = format!(
        "vhost-user --devices {DEVICES} --queues 2 --socket root.sock --socket data.sock /vm/root.dsk /vm/data.dsk"
    );
    let arguments: Vec<&str> = arguments.split(' ').collect();
    Server::share(host.smsvmm(), host.folder(), &arguments)
}

/// The host's view of a disk: its line of `smsvmm vm status`.
fn status(vm: &Vm, disk: &str) -> Result<String> {
    let text = vm.manage(&["status"])?;
    let line = text
        .lines()
        .find(|line| line.starts_with("disk") && line.contains(disk));
    Ok(line.unwrap_or_default().to_owned())
}

fn wait_for_state(vm: &Vm, disk: &str, state: &str) -> Result<()> {
    let begin = Instant::now();
    while !status(vm, disk)?.contains(state) {
        ensure!(
            begin.elapsed() < Duration::from_secs(60),
            "{disk} is not {state}: {}",
            status(vm, disk)?
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// Writes files of random data with their sums, syncing each, until it is told to stop; then all are checked.
const LOAD: &str = r#"
n=0
while [ ! -e /stop ]; do
    n=$((n + 1))
    dd if=/dev/urandom of=/disk/file$((n % 24)) bs=64k count=$((n % 32 + 1)) 2> /dev/null || echo "write $n" >> /failed
    (cd /disk && sha256sum file$((n % 24)) > sum$((n % 24))) || echo "sum $n" >> /failed
    sync
    echo $n > /rounds
done
echo done > /stopped
"#;

/// Mounts the disk, and compares all files with their sums.
const CHECK: &str = r#"
mkdir -p /disk
mount -t ext4 /dev/vda /disk && cd /disk || exit 1
for sum in sum*; do
    sha256sum -c $sum > /dev/null || exit 1
done
cd / && umount /disk
"#;

/// A guest that can load and check its disk, which is served at `socket`.
fn loaded(host: &Host, name: &str, kernel: Kernel, socket: &str) -> Result<Vm> {
    host.vm(name)
        .cpus(2)
        .kernel(kernel)
        .file("/load", 0o644, LOAD)
        .file("/check", 0o644, CHECK)
        .disk(Disk::served_at(host.folder().join(socket)).set("queues", "2"))
        .limit(PATIENCE)
        .interactive()
}

#[test]
fn a_disk_of_a_pool_goes_on_when_its_server_is_killed_and_started_again() {
    tell(|host| {
        pool(host)?;
        let mut server = serve(host)?;
        let mut vm = loaded(host, "front", Kernel::Debian12Cloud, "root.sock")?;
        assert_eq!(vm.guest("cat /sys/block/vda/serial")?.trim(), "root.dsk");
        assert_eq!(vm.guest("ls /sys/block/vda/mq | wc -l")?.trim(), "2");
        let line = status(&vm, "disk0")?;
        assert!(
            line.contains("active") && line.contains("128M") && line.contains("root.sock"),
            "{line}"
        );
        vm.guest("mke2fs -q /dev/vda > /dev/null; mkdir /disk; mount -t ext4 /dev/vda /disk")?;
        vm.guest(
            "dd if=/dev/urandom of=/disk/old bs=1M count=8 2> /dev/null; sha256sum /disk/old > /old; sync",
        )?;
        vm.guest("sh /load > /dev/null 2>&1 &")?;
        for kill in 0_u64..5 {
            std::thread::sleep(Duration::from_millis(700 + 137 * kill));
            drop(server);
            if kill == 2 {
                wait_for_state(&vm, "disk0", "waiting")?;
            }
            server = serve(host)?;
            wait_for_state(&vm, "disk0", "active")?;
        }
        let rounds: u32 = vm.guest("cat /rounds")?.trim().parse()?;
        vm.guest_until(&format!("[ $(cat /rounds) -gt {rounds} ]"))?;
        vm.guest("touch /stop; until [ -e /stopped ]; do usleep 20000; done; umount /disk")?;
        vm.guest("[ ! -e /failed ]")?;
        vm.guest("mount -t ext4 /dev/vda /disk; sha256sum -c /old > /dev/null && umount /disk")?;
        vm.guest("sh /check")?;
        assert_eq!(
            vm.guest("dmesg | grep -ciE 'i/o error|ext4-fs error' || true")?
                .trim(),
            "0"
        );
        let events = vm.manage(&["events"])?;
        assert_eq!(events.matches("is back").count(), 5, "{events}");
        // A reboot makes a new machine on the same connection.
        vm.begin("reboot -f")?;
        vm.wait_until_ready()?;
        vm.guest("sh /check")?;
        let ended = vm.finish()?;
        assert_eq!(ended.exit_code(), Some(0));
        server.end()?;
        let checked = host.administer(&format!("file --devices {DEVICES} check"))?;
        assert!(!checked.contains("problem"), "{checked}");
        Ok(())
    });
}

#[test]
fn a_served_disk_is_attached_and_detached_while_the_guest_runs_and_the_guest_is_paused_meanwhile() {
    tell(|host| {
        pool(host)?;
        let server = serve(host)?;
        let mut vm = host
            .vm("plugged")
            .argument("--set")
            .argument("memory.shared=true")
            .limit(PATIENCE)
            .interactive()?;
        // As udev would, when the first one comes.
        vm.guest("modprobe virtio_blk")?;
        let socket = host.folder().join("data.sock");
        let socket = socket.display().to_string();
        vm.manage(&[
            "attach-disk",
            "--vhost-user",
            &socket,
            "--id",
            "data",
            "--queues",
            "2",
        ])?;
        vm.guest_until("[ -e /sys/block/vda ]")?;
        vm.guest("dd if=/dev/urandom of=/random bs=1M count=4 2> /dev/null; dd if=/random of=/dev/vda bs=256k oflag=direct 2> /dev/null")?;
        vm.manage(&["pause"])?;
        drop(server);
        wait_for_state(&vm, "data", "waiting")?;
        let server = serve(host)?;
        wait_for_state(&vm, "data", "active")?;
        vm.manage(&["resume"])?;
        vm.guest("[ \"$(dd if=/dev/vda bs=256k count=16 iflag=direct 2> /dev/null | sha256sum)\" = \"$(sha256sum < /random)\" ]")?;
        vm.manage(&["detach", "data"])?;
        vm.guest_until("[ ! -e /sys/block/vda ]")?;
        // It is free for the next one, also under the same name.
        vm.manage(&["attach-disk", "--vhost-user", &socket, "--id", "data"])?;
        vm.guest_until("[ -e /sys/block/vda ]")?;
        let outside = vm.smsvmm(&[
            "vm",
            "--config",
            "vm.toml",
            "attach-disk",
            "--vhost-user",
            "/run/other.sock",
        ])?;
        assert!(
            !outside.success() && outside.text().contains("sandbox.paths"),
            "{}",
            outside.text()
        );
        vm.finish()?;
        server.end()
    });
}

/// LUN 0 of the first adapter: which of the disks is `sda` is left to chance.
const FIRST: &str = "$(ls /sys/bus/scsi/devices/0:0:0:0/block)";

#[test]
fn an_adapter_with_all_disks_of_a_server_is_there_from_the_start_or_attached_and_goes_on_with_the_next_server()
 {
    tell(|host| {
        pool(host)?;
        let serve = || {
            let arguments = format!(
                "vhost-user-scsi --devices {DEVICES} --queues 2 --socket a.sock --socket b.sock /vm/root.dsk /vm/data.dsk"
            );
            let arguments: Vec<&str> = arguments.split(' ').collect();
            Server::share(host.smsvmm(), host.folder(), &arguments)
        };
        let mut server = serve()?;
        let mut vm = host
            .vm("adapter")
            .file("/load", 0o644, LOAD)
            .file("/check", 0o644, CHECK.replace("vda", FIRST))
            .disk(
                Disk::served_at(host.folder().join("a.sock"))
                    .set("bus", "\"virtio-scsi\"")
                    .set("queues", "2"),
            )
            .limit(PATIENCE)
            .interactive()?;
        let luns = |host: u8| format!("ls -d /sys/bus/scsi/devices/{host}:0:0:[01]/block | wc -l");
        vm.guest_until(&format!("[ $({}) = 2 ]", luns(0)))?;
        let first = format!("/dev/{FIRST}");
        vm.guest(&format!(
            "mke2fs -q {first} > /dev/null; mkdir /disk; mount -t ext4 {first} /disk"
        ))?;
        vm.guest("sh /load > /dev/null 2>&1 &")?;
        for kill in 0_u64..2 {
            std::thread::sleep(Duration::from_millis(900 + 137 * kill));
            drop(server);
            wait_for_state(&vm, "disk0", "waiting")?;
            server = serve()?;
            wait_for_state(&vm, "disk0", "active")?;
        }
        let rounds: u32 = vm.guest("cat /rounds")?.trim().parse()?;
        vm.guest_until(&format!("[ $(cat /rounds) -gt {rounds} ]"))?;
        vm.guest(
            "touch /stop; until [ -e /stopped ]; do usleep 20000; done; umount /disk; [ ! -e /failed ]",
        )?;
        // A second adapter, with the same disks: another initiator.
        let socket = host.folder().join("b.sock").display().to_string();
        let attach = [
            "attach-disk",
            "--vhost-user",
            &socket,
            "--bus",
            "virtio-scsi",
            "--id",
            "other",
        ];
        vm.manage(&attach)?;
        vm.guest_until(&format!("[ $({}) = 2 ]", luns(1)))?;
        let sum = |disk: &str| format!("$(head -c 1048576 /dev/{disk} | sha256sum)");
        let other = FIRST.replace("/0:", "/1:");
        vm.guest(&format!("[ \"{}\" = \"{}\" ]", sum(FIRST), sum(&other)))?;
        vm.manage(&["detach", "other"])?;
        vm.guest_until("[ ! -e /sys/bus/scsi/devices/1:0:0:0 ]")?;
        vm.begin("reboot -f")?;
        vm.wait_until_ready()?;
        vm.guest_until(&format!("[ $({}) = 2 ]", luns(0)))?;
        vm.guest("sh /check")?;
        vm.finish()?;
        server.end()
    });
}

/// A disk of QEMU's storage daemon.
fn storage_daemon(folder: &Path) -> Result<Server> {
    let socket = folder.join("qemu.sock");
    let mut command = Command::new("qemu-storage-daemon");
    command.arg("--blockdev").arg(format!(
        "driver=file,node-name=disk,filename={},cache.direct=off",
        folder.join("disk.img").display()
    ));
    command.arg("--export").arg(format!(
        "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={},writable=on,num-queues=2",
        socket.display()
    ));
    Server::other(command, &socket)
}

#[test]
fn qemus_storage_daemon_serves_a_guest_and_is_killed_and_started_again_while_nothing_is_in_flight() {
    tell(|host| {
        host.image("disk.img", 128)?;
        let mut server = storage_daemon(host.folder())?;
        let mut vm = loaded(host, "guest", Kernel::Debian13Cloud, "qemu.sock")?;
        vm.guest("mke2fs -q /dev/vda > /dev/null; mkdir /disk; mount -t ext4 /dev/vda /disk")?;
        vm.guest("sh /load > /dev/null 2>&1 & sleep 5; touch /stop")?;
        vm.guest("until [ -e /stopped ]; do usleep 20000; done; umount /disk; [ ! -e /failed ]")?;
        vm.guest("sh /check")?;
        // It keeps no record of what is in flight.
        for _ in 0..2 {
            drop(server);
            wait_for_state(&vm, "disk0", "waiting")?;
            server = storage_daemon(host.folder())?;
            wait_for_state(&vm, "disk0", "active")?;
            vm.guest("echo 3 > /proc/sys/vm/drop_caches; sh /check")?;
        }
        // Driver and device part and meet again.
        vm.guest("cd /sys/bus/virtio/drivers/virtio_blk; d=$(ls -d virtio*); echo $d > unbind; echo $d > bind; cd /")?;
        vm.guest("sh /check")?;
        // What a server takes with it, the guest learns from a device that has failed; after a reset it is as new.
        vm.guest("while :; do dd if=/dev/vda of=/dev/null bs=4k count=64 iflag=direct 2> /dev/null; done &")?;
        server.signal(Signal::STOP)?;
        std::thread::sleep(Duration::from_secs(1));
        drop(server);
        let _server = storage_daemon(host.folder())?;
        wait_for_state(&vm, "disk0", "failed")?;
        let events = vm.manage(&["events"])?;
        assert!(events.contains("has kept no record of them"), "{events}");
        vm.manage(&["reset"])?;
        vm.wait_until_ready()?;
        vm.guest("sh /check")?;
        vm.finish()?;
        Ok(())
    });
}

#[test]
fn a_server_that_is_missing_or_hangs_is_named_and_the_machine_ends() {
    tell(|host| {
        host.image("disk.img", 64)?;
        let socket = host.folder().join("disk.sock");
        let machine = |name| {
            host.vm(name)
                .disk(Disk::served_at(&socket))
                .limit(PATIENCE)
                .interactive()
        };
        let error = machine("missing")
            .err()
            .map(|error| format!("{error:#}"))
            .unwrap_or_default();
        for part in ["disk0", "disk.sock", "nobody serves there", "No such file"] {
            assert!(error.contains(part), "{part} is not in {error}");
        }
        let arguments = "vhost-user --buffered --socket disk.sock --image disk.img";
        let arguments: Vec<&str> = arguments.split(' ').collect();
        let server = Server::share(host.smsvmm(), host.folder(), &arguments)?;
        let mut vm = machine("hung")?;
        vm.guest("dd if=/dev/zero of=/dev/vda bs=64k count=8 oflag=direct 2> /dev/null")?;
        server.signal(Signal::STOP)?;
        vm.guest("dd if=/dev/vda of=/dev/null bs=64k count=8 iflag=direct 2> /dev/null &")?;
        // The guest lives, but for its disk; and so does management.
        assert_eq!(vm.guest("echo alive")?.trim(), "alive");
        assert!(status(&vm, "disk0")?.contains("active"));
        vm.manage(&["stop"])?;
        let ended = vm.wait(Duration::from_secs(90))?;
        assert_eq!(ended.exit_code(), Some(1), "{}", ended.log);
        assert!(
            ended.log.contains("device `disk0` still has requests in flight"),
            "{}",
            ended.log
        );
        server.signal(Signal::CONT)?;
        // The next machine has the disk.
        let mut vm = machine("next")?;
        vm.guest("dd if=/dev/vda of=/dev/null bs=64k count=8 iflag=direct 2> /dev/null")?;
        vm.finish()?;
        server.end()
    });
}
