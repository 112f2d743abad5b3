//! A guest on disks of a pool: striped and mirrored volumes, snapshots while it writes, a device that fails under it, the process
//! killed in the middle.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use stories::{Disk, Host, Outcome, Output, Story, Vm, VmBuilder, story};

const DEVICES: [&str; 4] = ["d0.img", "d1.img", "d2.img", "d3.img"];

/// Runs smsvmm on the host; its output.
fn smsvmm(host: &Host, arguments: &str) -> Result<String> {
    let words: Vec<&str> = arguments.split_whitespace().collect();
    succeeded(arguments, &host.run_smsvmm(&words)?)
}

fn succeeded(arguments: &str, output: &Output) -> Result<String> {
    let text = output.text();
    ensure!(
        output.success(),
        "smsvmm {arguments} ended with {}: {text}",
        output.status
    );
    Ok(text)
}

/// A pool with a mirrored volume `safe` and a striped one `fast`, and a disk of 96 MiB on each.
fn pool(host: &Host, devices: &[&str]) -> Result<()> {
    let list = devices.join(",");
    smsvmm(host, &format!("pool create tank {}", devices.join(" ")))?;
    smsvmm(host, &format!("file --devices {list} format --meta-size 64M"))?;
    smsvmm(
        host,
        &format!("volume --devices {list} create safe --size 512M --layout mirror"),
    )?;
    smsvmm(
        host,
        &format!("volume --devices {list} create fast --size 512M --layout stripe"),
    )?;
    smsvmm(host, &format!("file --devices {list} mkdir /vm"))?;
    smsvmm(
        host,
        &format!("disk --devices {list} create /vm/safe.dsk --size 96M --volume safe"),
    )?;
    smsvmm(
        host,
        &format!("disk --devices {list} create /vm/fast.dsk --size 96M --volume fast"),
    )?;
    Ok(())
}

fn files(host: &Host) -> Result<()> {
    for device in DEVICES {
        host.image(device, 768)?;
    }
    Ok(())
}

fn toml(host: &Host, devices: &[&str]) -> String {
    let paths: Vec<String> = devices
        .iter()
        .map(|device| format!("{:?}", host.folder().join(device)))
        .collect();
    format!("[pool]\ndevices = [{}]\n", paths.join(", "))
}

fn machine<'a>(host: &'a Host, name: &str, devices: &[&str]) -> VmBuilder<'a> {
    host.vm(name)
        .cpus(2)
        .toml(&toml(host, devices))
        .disk(Disk::in_pool("/vm/safe.dsk").serial("safe").set("queues", "2"))
        .disk(Disk::in_pool("/vm/fast.dsk").serial("fast"))
}

/// As an administrator on the same host: with the machine's vm.toml.
fn administer(vm: &Vm, arguments: &str) -> Result<String> {
    let (command, rest) = arguments.split_once(' ').context("a command")?;
    let config = vm.folder().join("vm.toml");
    let config = config.to_str().context("a path")?;
    let mut words = vec![command, "--config", config];
    words.extend(rest.split_whitespace());
    succeeded(arguments, &vm.smsvmm(&words)?)
}

fn well(ended: Outcome) -> Result<()> {
    ensure!(ended.exit_code() == Some(0), "{}: {}", ended.status, ended.log);
    Ok(())
}

#[test]
fn a_guest_writes_is_snapshotted_meanwhile_and_reverted() {
    story(|host| {
        files(host)?;
        pool(host, &DEVICES)?;
        let mut vm = machine(host, "writer", &DEVICES).interactive()?;
        assert_eq!(
            vm.guest("cat /sys/block/vda/serial /sys/block/vdb/serial")?,
            "safefast"
        );
        vm.guest("for disk in vda vdb; do mke2fs -q /dev/$disk > /dev/null; mkdir /$disk; mount -t ext4 /dev/$disk /$disk; done")?;
        vm.guest(
            "dd if=/dev/urandom of=/vda/old bs=1M count=8 2> /dev/null && cp /vda/old /vdb/old && sync",
        )?;
        let old = vm.guest("cd / && sha256sum vda/old vdb/old")?;
        vm.guest("while :; do dd if=/dev/urandom of=/vda/busy bs=1M count=1; cp /vda/busy /vdb/busy; sync; done > /dev/null 2>&1 & echo $! > /pid")?;
        let taken = administer(&vm, "disk snapshot --name monday /vm/safe.dsk /vm/fast.dsk")?;
        assert!(taken.contains("monday"), "{taken}");
        vm.guest("kill $(cat /pid); wait; rm /vda/old /vdb/old; echo new > /vda/new; sync")?;
        let status = administer(&vm, "disk status /vm/safe.dsk")?;
        assert!(status.contains("monday"), "{status}");
        // What the guest uses cannot be deleted under it.
        let refused = administer(&vm, "disk delete /vm/safe.dsk")
            .unwrap_err()
            .to_string();
        assert!(
            refused.contains("open for writing") || refused.contains("in use"),
            "{refused}"
        );
        // Grows while the guest looks.
        administer(&vm, "disk resize /vm/fast.dsk 128M")?;
        vm.guest_until("[ $(cat /sys/block/vdb/size) = 262144 ]")?;
        let space = vm
            .guest("fstrim -v /vda; umount /vdb; blkdiscard -o 16777216 -l 1048576 /dev/vdb 2>&1; echo $?")?;
        assert!(space.contains("trimmed") && space.ends_with("0\n"), "{space}");
        well(vm.finish()?)?;

        let list = DEVICES.join(",");
        for disk in ["safe", "fast"] {
            smsvmm(
                host,
                &format!("disk --devices {list} revert /vm/{disk}.dsk@monday"),
            )?;
        }
        let mut vm = machine(host, "reader", &DEVICES).interactive()?;
        vm.guest("for disk in vda vdb; do mkdir /$disk; mount -t ext4 /dev/$disk /$disk; done")?;
        assert_eq!(
            vm.guest("cd / && sha256sum vda/old vdb/old")?,
            old,
            "as on monday"
        );
        assert_ne!(vm.try_guest("ls /vda/new")?.0, 0, "it came later");
        well(vm.finish()?)?;
        let checked = smsvmm(host, &format!("file --devices {list} check"))?;
        assert!(!checked.contains("problem"), "{checked}");
        Ok(())
    });
}

#[test]
fn a_device_fails_under_a_guest_that_notices_nothing() {
    Story::default().changes_the_host().tell(|host| {
        let devices = ["/dev/dm-0", "d1.img", "d2.img", "d3.img"];
        host.sh(
            "modprobe -a loop dm-mod\n\
             truncate -s 768M backing && busybox losetup /dev/loop0 backing\n\
             echo 0 1572864 linear /dev/loop0 0 | dmsetup create --noudevsync first",
        )?;
        files(host)?;
        pool(host, &devices)?;
        // The stripe would not survive it.
        let mut vm = host
            .vm("survivor")
            .toml(&toml(host, &devices))
            .disk(Disk::in_pool("/vm/safe.dsk"))
            .interactive()?;
        vm.guest("mke2fs -q /dev/vda > /dev/null; mkdir /vda; mount -t ext4 /dev/vda /vda")?;
        vm.guest("dd if=/dev/urandom of=/vda/before bs=1M count=8 2> /dev/null && sync")?;
        let before = vm.guest("sha256sum < /vda/before")?;
        host.sh("dmsetup suspend first; echo 0 1572864 error | dmsetup load first; dmsetup resume --noudevsync first")?;
        vm.guest("dd if=/dev/urandom of=/vda/after bs=1M count=8 2> /dev/null && sync && echo 3 > /proc/sys/vm/drop_caches")?;
        let after = vm.guest("sha256sum < /vda/after")?;
        assert_eq!(vm.guest("sha256sum < /vda/before")?, before);
        assert_eq!(vm.guest("dmesg | grep -ci 'i/o error' || true")?, "0\n");
        let status = administer(&vm, "pool status")?;
        assert!(status.contains("faulty") || status.contains("failed") || status.contains("degraded"), "{status}");
        well(vm.finish()?)?;

        host.sh("dmsetup suspend first; echo 0 1572864 linear /dev/loop0 0 | dmsetup load first; dmsetup resume --noudevsync first")?;
        let mut vm = host
            .vm("again")
            .toml(&toml(host, &devices))
            .disk(Disk::in_pool("/vm/safe.dsk"))
            .interactive()?;
        vm.guest("mkdir /vda; mount -t ext4 /dev/vda /vda")?;
        assert_eq!(vm.guest("sha256sum < /vda/before; sha256sum < /vda/after")?, before + &after);
        well(vm.finish()?)
    });
}

#[test]
fn what_a_guest_synced_survives_the_kill_of_its_process() {
    story(|host| {
        files(host)?;
        pool(host, &DEVICES)?;
        let count = "n=0\nwhile :; do n=$((n + 1)); echo $n > /vda/n.new; dd if=/dev/urandom of=/vdb/data$((n % 20)) bs=100k count=3; sync\n\
                     mv /vda/n.new /vda/n; sync; echo $n > /synced; done\n";
        let mut first = machine(host, "victim", &DEVICES)
            .file("/count", 0o644, count)
            .interactive()?;
        first.guest("for disk in vda vdb; do mke2fs -q /dev/$disk > /dev/null; mkdir /$disk; mount -t ext4 /dev/$disk /$disk; done")?;
        first.guest("sh /count > /dev/null 2>&1 & sleep 8")?;
        let synced: u64 = first.guest("cat /synced")?.trim().parse()?;
        assert!(synced > 2, "{synced} rounds");
        first.signal(rustix::process::Signal::KILL)?;
        let ended = first.wait(Duration::from_secs(20))?;
        assert_eq!(ended.signal(), Some(9));

        let list = DEVICES.join(",");
        let checked = smsvmm(host, &format!("file --devices {list} check"))?;
        assert!(!checked.contains("problem"), "{checked}");
        let mut second = machine(host, "heir", &DEVICES).interactive()?;
        second.guest("for disk in vda vdb; do mkdir /$disk; mount -t ext4 /dev/$disk /$disk; done")?;
        let found: u64 = second.guest("cat /vda/n")?.trim().parse()?;
        assert!(found >= synced, "{found} is there, {synced} was synced");
        assert_eq!(second.guest("dmesg | grep -ci 'ext4-fs error' || true")?, "0\n");
        well(second.finish()?)
    });
}
