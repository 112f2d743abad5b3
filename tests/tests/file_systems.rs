//! Guests' file systems on disks of a pool: ext4, XFS and btrfs of the kernels of Debian 11, 12 and 13, under a load that knows what must
//! be there, while snapshots are made, redo layers are committed, a device fails, and the whole process is killed.
//!
//! `SMSVMM_CAMPAIGN=N` makes it a campaign: N rounds of load and `kill -9`, with other random numbers each, and takes the backported
//! kernel of Debian 12 as well. (Its general one cannot mount the disk of tools: its ext4 wants a module that is not in the initrd.)

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use stories::{Disk, Host, Kernel, MappedDevice, Pool, Story, Vm, VmBuilder};

const DEVICES: [&str; 4] = ["d0.img", "d1.img", "d2.img", "d3.img"];

/// A file system: its name and that of its disk, the volume and size of the disk, how it is made and checked. XFS is not made smaller
/// than 300 MiB.
struct FileSystem {
    name: &'static str,
    volume: &'static str,
    size: &'static str,
    make: Tool,
    check: Tool,
}

const EXT4: FileSystem = FileSystem {
    name: "ext4",
    volume: "safe",
    size: "128M",
    make: Tool("mke2fs -q -t ext4 -E lazy_itable_init=0,lazy_journal_init=0 DISK"),
    check: Tool("e2fsck -fn DISK"),
};

const XFS: FileSystem = FileSystem {
    name: "xfs",
    volume: "fast",
    size: "320M",
    make: Tool("mkfs.xfs -q DISK"),
    check: Tool("xfs_repair -n DISK"),
};

const BTRFS: FileSystem = FileSystem {
    name: "btrfs",
    volume: "safe",
    size: "256M",
    make: Tool("mkfs.btrfs -q DISK"),
    check: Tool("btrfs check --readonly DISK"),
};

const ALL: [FileSystem; 3] = [EXT4, XFS, BTRFS];

/// Where the guest says what is durable: a console of its own, and the file of the host in which it ends.
const JOURNAL: &str = "[console]\nvirtio = \"file:journal\"\n";

/// A command with one of the tools; DISK is the device.
#[derive(Clone, Copy)]
struct Tool(&'static str);

impl Tool {
    fn on(self, device: &str) -> String {
        format!("/tools/usr/bin/{}", self.0.replace("DISK", device))
    }
}

impl FileSystem {
    /// Its disk, or another one with that ending of the name.
    fn disk(&self, ending: &str) -> Disk {
        let name = format!("{}{ending}", self.name);
        Disk::in_pool(&format!("/vm/{name}.dsk")).serial(&name)
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

/// A guest with the tools, whose disk comes last.
fn boot(machine: VmBuilder<'_>) -> Result<Vm> {
    let machine = machine.memory("384M").limit(Duration::from_secs(400));
    let mut vm = machine.with_guest_tools()?.interactive()?;
    vm.guest("sh /tools-on && stty raw -echo -F /dev/hvc0")?;
    Ok(vm)
}

fn device(index: usize) -> Result<String> {
    let letter = char::from(b'a' + u8::try_from(index)?);
    Ok(format!("/dev/vd{letter}"))
}

/// What the guest of a machine has said to be durable until now, whole lines.
fn journal(folder: &Path) -> Result<String> {
    let text = fs::read_to_string(folder.join("journal"))?.replace('\r', "");
    let end = text.rfind('\n').map_or(0, |end| end + 1);
    Ok(text.get(..end).unwrap_or_default().to_owned())
}

/// Waits until the guest has said more often than before that something is durable, on each of the file systems; all of it.
fn wait_for_progress(vm: &Vm, systems: &[FileSystem], before: &str, times: usize) -> Result<String> {
    let count = |journal: &str, system: &FileSystem| {
        let load = format!("/{}/", system.name);
        journal.lines().filter(|line| line.starts_with(&load)).count()
    };
    let end = Instant::now() + Duration::from_secs(200);
    loop {
        let now = journal(vm.folder())?;
        let progress = |system| count(&now, system) >= count(before, system) + times;
        if systems.iter().all(progress) {
            return Ok(now);
        }
        ensure!(Instant::now() < end, "the load does not go on: {now}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Bytes of volumes that a disk has.
fn allocated(vm: &Vm, name: &str) -> Result<u64> {
    let status = vm.administer(&format!("disk status /vm/{name}.dsk --json"))?;
    let (_, rest) = status.split_once("\"allocated\":").context("no allocation")?;
    let digits: String = rest.trim().chars().take_while(char::is_ascii_digit).collect();
    digits.parse().with_context(|| status.clone())
}

/// Everything that can be seen without a crash: loads find what they wrote, fio does, and what is deleted comes back to the pool.
fn peaceful_load(vm: &mut Vm, systems: &[FileSystem], seed: u64) -> Result<()> {
    let names: Vec<&str> = systems.iter().map(|system| system.name).collect();
    let names = names.join(" ");
    let said = vm.guest(&format!(
        "pids=; for name in {names}; do fs-load run /$name/peace {seed} 200 > /$name.said & pids=\"$pids $!\"; done; \
         bad=0; for pid in $pids; do wait $pid || bad=1; done; cat /*.said; [ $bad = 0 ]"
    ))?;
    println!("{}", said.trim());
    let jobs: Vec<String> = systems
        .iter()
        .map(|system| format!("--name={0} --filename=/{0}/fio", system.name))
        .collect();
    vm.guest(&format!(
        "/tools/usr/bin/fio --size=3M --rw=randwrite --bsrange=4k-32k --direct=1 --ioengine=libaio --iodepth=16 --thread \
         --verify=crc32c --verify_fatal=1 --randseed={seed} {} > /fio.said 2>&1 || {{ cat /fio.said; false; }}",
        jobs.join(" ")
    ))?;
    for FileSystem { name, .. } in systems {
        vm.guest(&format!(
            "dd if=/dev/urandom of=/{name}/large bs=1M count=16 2> /dev/null; sync"
        ))?;
        let full = allocated(vm, name)?;
        vm.guest(&format!(
            "rm /{name}/large /{name}/fio && sync && /tools/usr/bin/fstrim /{name}"
        ))?;
        let trimmed = allocated(vm, name)?;
        ensure!(
            trimmed + (14 << 20) < full,
            "{name}: {trimmed} of {full} bytes are left after 16 MiB were trimmed"
        );
    }
    Ok(())
}

/// A new file system on each disk, mounted.
fn make_and_mount(vm: &mut Vm, systems: &[FileSystem]) -> Result<()> {
    for (index, system) in systems.iter().enumerate() {
        let device = device(index)?;
        vm.guest(&format!("{} > /dev/null", system.make.on(&device)))?;
        system.mount(vm, &device)?;
    }
    Ok(())
}

/// Loads that go on, and say what is durable.
fn begin_loads(vm: &mut Vm, systems: &[FileSystem], seed: u64) -> Result<()> {
    for FileSystem { name, .. } in systems {
        vm.guest(&format!(
            "fs-load run /{name}/war {seed} 0 /dev/hvc0 > /{name}.said & true"
        ))?;
    }
    Ok(())
}

/// Mounts a device, looks for everything that was durable, and checks the file system.
fn everything_is_there(
    vm: &mut Vm,
    system: &FileSystem,
    device: &str,
    seed: u64,
    journal: &str,
) -> Result<()> {
    let name = system.name;
    system.mount(vm, device)?;
    let said = vm
        .guest(&format!("fs-load check /{name}/war {seed} < {journal}"))
        .with_context(|| format!("{name} on {device}, {journal}"))?;
    println!("{name}: {journal}: {}", said.trim());
    vm.guest(&format!("umount /{name}"))?;
    vm.guest(&format!("{} 2>&1", system.check.on(device)))
        .map(drop)
        .with_context(|| format!("{name} on {device} is damaged"))
}

/// Load, a snapshot of all disks under load, the end of the process; then whether everything is there, as of the end and as of the
/// snapshot.
fn survives(host: &Host, kernel: Kernel, seed: u64) -> Result<()> {
    for device in DEVICES {
        host.image(device, 768)?;
    }
    let pool = pool(host, &DEVICES, &ALL)?;
    // A folder of its own, or the journal of another round is in it.
    let round = format!("{}-{seed}", kernel.name());
    let mut machine = pool.vm(&format!("victim-{round}")).kernel(kernel).toml(JOURNAL);
    for system in &ALL {
        machine = machine.disk(system.disk(""));
    }
    let mut vm = boot(machine)?;
    make_and_mount(&mut vm, &ALL)?;
    peaceful_load(&mut vm, &ALL, seed)?;
    begin_loads(&mut vm, &ALL, seed)?;
    let until_monday = wait_for_progress(&vm, &ALL, "", 4)?;
    let disks = ALL.map(|system| format!("/vm/{}.dsk", system.name)).join(" ");
    vm.administer(&format!("disk snapshot --name monday {disks}"))?;
    wait_for_progress(&vm, &ALL, &until_monday, 4)?;
    vm.guest("! grep . /*.said /dev/null | grep FAILED")?;
    // Anywhere in what a load does.
    std::thread::sleep(Duration::from_millis(seed * 37 % 500));
    vm.signal(Signal::KILL)?;
    let folder = vm.folder().to_path_buf();
    let ended = vm.wait(Duration::from_secs(20))?;
    ensure!(ended.signal() == Some(9), "it ended before: {}", ended.log);
    let until_end = journal(&folder)?;

    pool.check()?;
    let mut machine = pool
        .vm(&format!("heir-{round}"))
        .kernel(kernel)
        .toml(JOURNAL)
        .file("/until-monday", 0o644, until_monday)
        .file("/until-end", 0o644, until_end);
    for system in &ALL {
        machine = machine.disk(system.disk(""));
    }
    for system in &ALL {
        let name = system.name;
        pool.run(&format!("disk clone /vm/{name}.dsk@monday /vm/{name}-monday.dsk"))?;
        machine = machine.disk(system.disk("-monday"));
    }
    let mut vm = boot(machine)?;
    for (index, system) in ALL.iter().enumerate() {
        everything_is_there(&mut vm, system, &device(index)?, seed, "/until-end")?;
        let clone = device(index + ALL.len())?;
        everything_is_there(&mut vm, system, &clone, seed, "/until-monday")?;
    }
    vm.finish()?;
    pool.check()
}

/// Tells it once with the first of the kernels; in a campaign, as often as that wants it, with all.
fn told(kernels: &[Kernel]) {
    let campaign = stories::campaign();
    let rounds = campaign.unwrap_or(1);
    let kernels = if campaign.is_some() {
        kernels
    } else {
        &kernels[..1]
    };
    let stories = rounds * u32::try_from(kernels.len()).unwrap_or(1);
    Story::default()
        .guest_tools()
        .limit(Duration::from_secs(600) * stories)
        .tell(|host| {
            for round in 1..=rounds {
                for kernel in kernels.iter().filter(|kernel| host.has(**kernel)) {
                    survives(host, *kernel, round.into())
                        .with_context(|| format!("{}, round {round}", kernel.name()))?;
                }
            }
            Ok(())
        });
}

#[test]
fn debian_11_finds_what_was_durable_on_ext4_xfs_and_btrfs_after_a_kill() {
    told(&[Kernel::Debian11Cloud]);
}

#[test]
fn debian_12_finds_what_was_durable_on_ext4_xfs_and_btrfs_after_a_kill() {
    told(&[Kernel::Debian12Cloud, Kernel::Debian12Backports]);
}

#[test]
fn debian_13_finds_what_was_durable_on_ext4_xfs_and_btrfs_after_a_kill() {
    told(&[Kernel::Debian13Cloud]);
}

#[test]
fn a_mirrors_device_fails_and_a_redo_layer_is_committed_under_load() {
    let story = Story::default().changes_the_host().guest_tools();
    story.limit(Duration::from_secs(600)).tell(|host| {
        let devices = [MappedDevice::PATH, "d1.img", "d2.img", "d3.img"];
        let mapped = MappedDevice::create(host)?;
        for device in &devices[1..] {
            host.image(device, 768)?;
        }
        // Both on the mirror: the stripe would not survive it.
        let systems = [
            EXT4,
            FileSystem {
                volume: "safe",
                ..XFS
            },
        ];
        let [ext4, xfs] = &systems;
        let pool = pool(host, &devices, &systems)?;
        let machine = pool
            .vm("survivor")
            .cpus(2)
            .toml(JOURNAL)
            .disk(ext4.disk("").set("queues", "2"))
            .disk(xfs.disk("").set("mode", "\"undoable\""));
        let mut vm = boot(machine)?;
        make_and_mount(&mut vm, &systems)?;
        begin_loads(&mut vm, &systems, 1)?;
        let before = wait_for_progress(&vm, &systems, "", 3)?;
        vm.administer("disk commit /vm/xfs.dsk")?;
        let before = wait_for_progress(&vm, &systems, &before, 3)?;
        mapped.fail()?;
        let until_tuesday = wait_for_progress(&vm, &systems, &before, 3)?;
        vm.administer("disk snapshot --name tuesday /vm/ext4.dsk")?;
        let until_commit = wait_for_progress(&vm, &systems, &until_tuesday, 3)?;
        vm.administer("disk commit /vm/xfs.dsk")?;
        wait_for_progress(&vm, &systems, &until_commit, 3)?;
        let status = vm.administer("pool status")?;
        ensure!(status.contains("degraded"), "{status}");
        // The loads compare everything with what they wrote, read from the disks.
        let said = vm.guest("killall fs-load; wait; cat /*.said")?;
        ensure!(said.matches(" files verified").count() == 2, "{said}");
        println!("{}", said.trim());
        for (index, system) in systems.iter().enumerate() {
            vm.guest(&format!("umount /{}", system.name))?;
            vm.guest(&format!("{} 2>&1", system.check.on(&device(index)?)))?;
        }
        vm.finish()?;

        // What was written since the commit goes; and the device is back with what it had.
        mapped.mend()?;
        pool.run("disk discard /vm/xfs.dsk")?;
        pool.run("disk revert /vm/ext4.dsk@tuesday")?;
        let machine = pool
            .vm("again")
            .toml(JOURNAL)
            .disk(ext4.disk(""))
            .disk(xfs.disk(""))
            .file("/until-tuesday", 0o644, until_tuesday)
            .file("/until-commit", 0o644, until_commit);
        let mut vm = boot(machine)?;
        everything_is_there(&mut vm, ext4, &device(0)?, 1, "/until-tuesday")?;
        everything_is_there(&mut vm, xfs, &device(1)?, 1, "/until-commit")?;
        vm.finish()?;
        pool.run("job wait")?;
        pool.run("pool scrub")?;
        pool.check()
    });
}
