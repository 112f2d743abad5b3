//! A guest on disks of a pool: striped and mirrored volumes, snapshots while it writes, a device that fails under it, the process
//! killed in the middle.

use std::time::Duration;

use anyhow::Result;
use stories::{Disk, Host, MappedDevice, Pool, Story, VmBuilder, story};

const DEVICES: [&str; 4] = ["d0.img", "d1.img", "d2.img", "d3.img"];

/// A pool with a disk of 96 MiB on each of its volumes.
fn pool<'a>(host: &'a Host, devices: &[&str]) -> Result<Pool<'a>> {
    let pool = Pool::create(host, devices)?;
    for volume in ["safe", "fast"] {
        pool.run(&format!(
            "disk create /vm/{volume}.dsk --size 96M --volume {volume}"
        ))?;
    }
    Ok(pool)
}

fn files(host: &Host) -> Result<()> {
    for device in DEVICES {
        host.image(device, 768)?;
    }
    Ok(())
}

fn machine<'a>(pool: &Pool<'a>, name: &str) -> VmBuilder<'a> {
    pool.vm(name)
        .cpus(2)
        .disk(Disk::in_pool("/vm/safe.dsk").serial("safe").set("queues", "2"))
        .disk(Disk::in_pool("/vm/fast.dsk").serial("fast"))
}

#[test]
fn a_guest_writes_is_snapshotted_meanwhile_and_reverted() {
    story(|host| {
        files(host)?;
        let pool = pool(host, &DEVICES)?;
        let mut vm = machine(&pool, "writer").interactive()?;
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
        let taken = vm.administer("disk snapshot --name monday /vm/safe.dsk /vm/fast.dsk")?;
        assert!(taken.contains("monday"), "{taken}");
        vm.guest("kill $(cat /pid); wait; rm /vda/old /vdb/old; echo new > /vda/new; sync")?;
        let status = vm.administer("disk status /vm/safe.dsk")?;
        assert!(status.contains("monday"), "{status}");
        // What the guest uses cannot be deleted under it.
        let refused = vm.administer("disk delete /vm/safe.dsk").unwrap_err().to_string();
        assert!(
            refused.contains("open for writing") || refused.contains("in use"),
            "{refused}"
        );
        // Grows while the guest looks.
        vm.administer("disk resize /vm/fast.dsk 128M")?;
        vm.guest_until("[ $(cat /sys/block/vdb/size) = 262144 ]")?;
        let space = vm
            .guest("fstrim -v /vda; umount /vdb; blkdiscard -o 16777216 -l 1048576 /dev/vdb 2>&1; echo $?")?;
        assert!(space.contains("trimmed") && space.ends_with("0\n"), "{space}");
        vm.finish()?;

        for disk in ["safe", "fast"] {
            pool.run(&format!("disk revert /vm/{disk}.dsk@monday"))?;
        }
        let mut vm = machine(&pool, "reader").interactive()?;
        vm.guest("for disk in vda vdb; do mkdir /$disk; mount -t ext4 /dev/$disk /$disk; done")?;
        assert_eq!(
            vm.guest("cd / && sha256sum vda/old vdb/old")?,
            old,
            "as on monday"
        );
        assert_ne!(vm.try_guest("ls /vda/new")?.0, 0, "it came later");
        vm.finish()?;
        pool.check()
    });
}

#[test]
fn a_device_is_replaced_under_a_guest_that_writes_by_a_process_in_a_sandbox() {
    story(|host| {
        files(host)?;
        let pool = pool(host, &DEVICES)?;
        let new = host.image("d4.img", 768)?;
        let mut vm = machine(&pool, "writer").interactive()?;
        vm.guest("mke2fs -q /dev/vda > /dev/null; mkdir /vda; mount -t ext4 /dev/vda /vda")?;
        vm.guest("dd if=/dev/urandom of=/vda/old bs=1M count=8 2> /dev/null && sync")?;
        let old = vm.guest("sha256sum < /vda/old")?;
        vm.guest("while :; do dd if=/dev/urandom of=/vda/busy bs=1M count=1; sync; done > /dev/null 2>&1 & echo $! > /pid")?;
        // What is not below sandbox.paths cannot be opened.
        let outside = tempfile::NamedTempFile::new_in("/var/tmp")?;
        outside.as_file().set_len(64 << 20)?;
        let add = format!("device add {}", outside.path().display());
        let refused = vm.administer(&add).unwrap_err().to_string();
        assert!(refused.contains("sandbox.paths"), "{refused}");
        let said = vm.administer(&format!("device replace d0.img {}", new.display()))?;
        assert!(said.contains("d4.img\"") && !said.contains("d0.img\""), "{said}");
        let events = vm.administer("events")?;
        assert!(events.contains("d0.img has left the pool"), "{events}");
        let top = vm.administer("top --once --interval 1")?;
        assert!(top.contains("writer: running") && top.contains("d4.img"), "{top}");
        vm.guest("kill $(cat /pid); wait; sync; echo 3 > /proc/sys/vm/drop_caches")?;
        assert_eq!(vm.guest("sha256sum < /vda/old")?, old);
        vm.finish()?;
        let checked = host.administer("file --devices d4.img,d1.img,d2.img,d3.img check")?;
        assert!(!checked.contains("problem"), "{checked}");
        Ok(())
    });
}

#[test]
fn a_device_fails_under_a_guest_that_notices_nothing() {
    Story::default().changes_the_host().tell(|host| {
        let devices = [MappedDevice::PATH, "d1.img", "d2.img", "d3.img"];
        let device = MappedDevice::create(host)?;
        files(host)?;
        let pool = pool(host, &devices)?;
        // The stripe would not survive it.
        let mut vm = pool
            .vm("survivor")
            .disk(Disk::in_pool("/vm/safe.dsk"))
            .interactive()?;
        vm.guest("mke2fs -q /dev/vda > /dev/null; mkdir /vda; mount -t ext4 /dev/vda /vda")?;
        vm.guest("dd if=/dev/urandom of=/vda/before bs=1M count=8 2> /dev/null && sync")?;
        let before = vm.guest("sha256sum < /vda/before")?;
        device.fail()?;
        vm.guest("dd if=/dev/urandom of=/vda/after bs=1M count=8 2> /dev/null && sync && echo 3 > /proc/sys/vm/drop_caches")?;
        let after = vm.guest("sha256sum < /vda/after")?;
        assert_eq!(vm.guest("sha256sum < /vda/before")?, before);
        assert_eq!(vm.guest("dmesg | grep -ci 'i/o error' || true")?, "0\n");
        let status = vm.administer("pool status")?;
        assert!(status.contains("faulty") || status.contains("failed") || status.contains("degraded"), "{status}");
        vm.finish()?;

        device.mend()?;
        let mut vm = pool
            .vm("again")
            .disk(Disk::in_pool("/vm/safe.dsk"))
            .interactive()?;
        vm.guest("mkdir /vda; mount -t ext4 /dev/vda /vda")?;
        assert_eq!(vm.guest("sha256sum < /vda/before; sha256sum < /vda/after")?, before + &after);
        vm.finish().map(drop)
    });
}

#[test]
fn what_a_guest_synced_survives_the_kill_of_its_process() {
    story(|host| {
        files(host)?;
        let pool = pool(host, &DEVICES)?;
        let count = "n=0\nwhile :; do n=$((n + 1)); echo $n > /vda/n.new; dd if=/dev/urandom of=/vdb/data$((n % 20)) bs=100k count=3; sync\n\
                     mv /vda/n.new /vda/n; sync; echo $n > /synced; done\n";
        let mut first = machine(&pool, "victim")
            .file("/count", 0o644, count)
            .interactive()?;
        first.guest("for disk in vda vdb; do mke2fs -q /dev/$disk > /dev/null; mkdir /$disk; mount -t ext4 /dev/$disk /$disk; done")?;
        first.guest("sh /count > /dev/null 2>&1 & sleep 8")?;
        let synced: u64 = first.guest("cat /synced")?.trim().parse()?;
        assert!(synced > 2, "{synced} rounds");
        first.signal(rustix::process::Signal::KILL)?;
        let ended = first.wait(Duration::from_secs(20))?;
        assert_eq!(ended.signal(), Some(9));

        pool.check()?;
        let mut second = machine(&pool, "heir").interactive()?;
        second.guest("for disk in vda vdb; do mkdir /$disk; mount -t ext4 /dev/$disk /$disk; done")?;
        let found: u64 = second.guest("cat /vda/n")?.trim().parse()?;
        assert!(found >= synced, "{found} is there, {synced} was synced");
        assert_eq!(second.guest("dmesg | grep -ci 'ext4-fs error' || true")?, "0\n");
        second.finish().map(drop)
    });
}
