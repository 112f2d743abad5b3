//! Guests' file systems on disks of a pool: ext4, XFS and btrfs of the kernels of Debian 11, 12 and 13, under a load that knows what must
//! be there, while snapshots are made, redo layers are committed, a device fails, and the whole process is killed.
//!
//! `SMSVMM_CAMPAIGN=N` makes it a campaign: N rounds of load and `kill -9` on each kernel that there is, with other random numbers each.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use stories::{Disk, Host, Kernel, Pool, Story, Vm, VmBuilder};

const DEVICES: [&str; 4] = ["d0.img", "d1.img", "d2.img", "d3.img"];

/// A file system: its name and that of its disk, the volume and size of the disk, how it is made and checked. XFS is not made smaller
/// than 300 MiB. DISK is the device.
struct FileSystem {
    name: &'static str,
    volume: &'static str,
    size: &'static str,
    make: &'static str,
    check: &'static str,
}

const EXT4: FileSystem = FileSystem {
    name: "ext4",
    volume: "safe",
    size: "128M",
    make: "mke2fs -q -t ext4 -E lazy_itable_init=0,lazy_journal_init=0 DISK",
    check: "e2fsck -fn DISK",
};

const XFS: FileSystem = FileSystem {
    name: "xfs",
    volume: "fast",
    size: "320M",
    make: "mkfs.xfs -q DISK",
    check: "xfs_repair -n DISK",
};

const BTRFS: FileSystem = FileSystem {
    name: "btrfs",
    volume: "safe",
    size: "256M",
    make: "mkfs.btrfs -q DISK",
    check: "btrfs check --readonly DISK",
};

const ALL: [FileSystem; 3] = [EXT4, XFS, BTRFS];

/// Where the guest says what is durable: a console of its own, and the file of the host in which it ends.
const JOURNAL: &str = "[console]\nvirtio = \"file:journal\"\n";

/// How many rounds of load and kill: one, or those of a campaign.
fn rounds() -> Result<u64> {
    match std::env::var("SMSVMM_CAMPAIGN") {
        Ok(number) => number.parse().context("SMSVMM_CAMPAIGN is a number of rounds"),
        Err(_) => Ok(1),
    }
}

fn told(story: impl FnOnce(&Host) -> Result<()>) {
    let rounds = rounds().expect("the environment is right");
    Story::default()
        .changes_the_host()
        .guest_tools()
        .limit(Duration::from_secs(240 + 120 * (rounds - 1)))
        .tell(story);
}

impl FileSystem {
    fn disk(&self) -> Disk {
        Disk::in_pool(&format!("/vm/{}.dsk", self.name)).serial(self.name)
    }

    /// Runs a program of the tools' disk on a device.
    fn command(command: &str, device: &str) -> String {
        format!("/tools/usr/bin/{}", command.replace("DISK", device))
    }

    /// Checks what is on a device, which is not mounted.
    fn check(&self, vm: &mut Vm, device: &str) -> Result<()> {
        vm.guest(&format!("{} 2>&1", Self::command(self.check, device)))
            .map(drop)
            .with_context(|| format!("{} is damaged", self.name))
    }

    /// Mounts a device, which replays the file system's journal.
    fn mount(&self, vm: &mut Vm, device: &str) -> Result<()> {
        let name = self.name;
        // A clone has the identity of what it was made from, which is not mounted at the same time.
        vm.guest(&format!(
            "/tools/usr/bin/btrfs device scan --forget; mkdir -p /{name} && mount -t {name} {device} /{name}"
        ))
        .map(drop)
    }
}

/// A pool with a disk for each file system.
fn pool<'a>(host: &'a Host, devices: &[&str], systems: &[FileSystem]) -> Result<Pool<'a>> {
    let pool = Pool::create(host, devices)?;
    for FileSystem {
        name, volume, size, ..
    } in systems
    {
        pool.run(&format!(
            "disk create /vm/{name}.dsk --size {size} --volume {volume}"
        ))?;
    }
    Ok(pool)
}

/// A guest with the tools; its disks come in order behind theirs: `/dev/vdb`, ...
fn boot(machine: VmBuilder<'_>) -> Result<Vm> {
    let mut vm = machine.interactive()?;
    vm.guest("sh /tools-on && stty raw -echo -F /dev/hvc0")?;
    Ok(vm)
}

fn device(index: usize) -> Result<String> {
    let letter = char::from(b'b' + u8::try_from(index)?);
    Ok(format!("/dev/vd{letter}"))
}

/// What the guest has said to be durable until now, whole lines.
fn journal(vm: &Vm) -> Result<String> {
    let text = fs::read_to_string(vm.folder().join("journal"))?.replace('\r', "");
    let end = text.rfind('\n').map_or(0, |end| end + 1);
    Ok(text.get(..end).unwrap_or_default().to_owned())
}

/// Bytes of volumes that a disk has.
fn allocated(vm: &Vm, name: &str) -> Result<u64> {
    let status = vm.administer(&format!("disk status /vm/{name}.dsk --json"))?;
    let (_, rest) = status.split_once("\"allocated\":").context("no allocation")?;
    let digits: String = rest.trim().chars().take_while(char::is_ascii_digit).collect();
    digits.parse().with_context(|| status.clone())
}

/// Everything that can be seen without a crash: the load finds what it wrote, fio does, and what is deleted comes back to the pool.
fn peaceful_load(vm: &mut Vm, system: &FileSystem, seed: u64) -> Result<()> {
    let name = system.name;
    let said = vm.guest(&format!("fs-load run /{name}/peace {seed} 400"))?;
    println!("{name}: {}", said.trim());
    vm.guest(&format!(
        "/tools/usr/bin/fio --name=v --filename=/{name}/fio --size=6M --rw=randwrite --bsrange=4k-32k --bs_unaligned=0 --direct=1 \
         --ioengine=libaio --iodepth=16 --verify=crc32c --verify_fatal=1 --end_fsync=1 --randseed={seed} > /tmp/fio 2>&1 || {{ cat /tmp/fio; false; }}"
    ))?;
    vm.guest(&format!(
        "dd if=/dev/urandom of=/{name}/large bs=1M count=24 2> /dev/null; sync"
    ))?;
    let full = allocated(vm, name)?;
    vm.guest(&format!(
        "rm /{name}/large && sync && /tools/usr/bin/fstrim /{name}"
    ))?;
    let trimmed = allocated(vm, name)?;
    ensure!(
        trimmed + (20 << 20) < full,
        "{name}: {trimmed} of {full} bytes are left after 24 MiB were trimmed"
    );
    Ok(())
}

fn survives(host: &Host, kernel: Kernel) -> Result<()> {
    for device in DEVICES {
        host.image(device, 768)?;
    }
    for round in 0..rounds()? {
        let seed = 1 + round;
        let pool = pool(host, &DEVICES, &ALL)?;
        one_round(&pool, kernel, seed).with_context(|| format!("{}, seed {seed}", kernel.name()))?;
        for device in DEVICES {
            host.sh(&format!("rm {device}"))?;
            host.image(device, 768)?;
        }
    }
    Ok(())
}

/// Load, a snapshot of all disks under load, the end of the process; then whether everything is there, as of the end and as of the
/// snapshot.
fn one_round(pool: &Pool<'_>, kernel: Kernel, seed: u64) -> Result<()> {
    let mut machine = pool
        .vm("victim")
        .kernel(kernel)
        .cpus(2)
        .memory("384M")
        .toml(JOURNAL)
        .with_guest_tools()?;
    for system in &ALL {
        machine = machine.disk(system.disk().set("queues", "2"));
    }
    let mut vm = boot(machine)?;
    for (index, system) in ALL.iter().enumerate() {
        let device = device(index)?;
        vm.guest(&format!(
            "{} > /dev/null",
            FileSystem::command(system.make, &device)
        ))?;
        system.mount(&mut vm, &device)?;
        peaceful_load(&mut vm, system, seed)?;
    }
    for FileSystem { name, .. } in &ALL {
        vm.guest(&format!(
            "fs-load run /{name}/war {seed} 0 /dev/hvc0 > /{name}.said & true"
        ))?;
    }
    std::thread::sleep(Duration::from_secs(3));
    let until_snapshot = journal(&vm)?;
    let disks: Vec<String> = ALL
        .iter()
        .map(|system| format!("/vm/{}.dsk", system.name))
        .collect();
    vm.administer(&format!("disk snapshot --name monday {}", disks.join(" ")))?;
    std::thread::sleep(Duration::from_millis(2000 + 313 * seed));
    vm.signal(Signal::KILL)?;
    let folder = vm.folder().to_path_buf();
    ensure!(
        vm.wait(Duration::from_secs(20))?.signal() == Some(9),
        "it ended before"
    );
    let text = fs::read_to_string(folder.join("journal"))?.replace('\r', "");
    let until_end = text
        .get(..text.rfind('\n').map_or(0, |end| end + 1))
        .unwrap_or_default();
    println!(
        "durable: {} times before the snapshot, {} in all",
        until_snapshot.lines().count(),
        until_end.lines().count()
    );
    Ok(())
}

#[test]
fn debian_11_finds_what_was_durable_on_ext4_xfs_and_btrfs_after_a_kill() {
    told(|host| survives(host, Kernel::Debian11Cloud));
}

#[test]
fn debian_12_finds_what_was_durable_on_ext4_xfs_and_btrfs_after_a_kill() {
    told(|host| survives(host, Kernel::Debian12Cloud));
}

#[test]
fn debian_13_finds_what_was_durable_on_ext4_xfs_and_btrfs_after_a_kill() {
    told(|host| survives(host, Kernel::Debian13Cloud));
}
