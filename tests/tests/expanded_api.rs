//! Storage management from inside a guest: `sms-agent` on a stock kernel, allowed and not allowed.

use anyhow::Result;
use stories::{Disk, Pool, Story, Vm};

const DEVICES: [&str; 4] = ["d0.img", "d1.img", "d2.img", "d3.img"];

/// What this guest may.
const POLICY: &str = "[expanded-api]\nallow = [\"snapshot\", \"create\", \"resize\", \"move\", \"layout\", \"image\"]\n\
                      objects = [\"/vm/own/*\"]\nvolumes = [\"safe\", \"fast\"]\nmax-disks = 1\n";

/// Writes to a file, reads it again and compares, without end; mistakes are in /tmp/errors.
const LOAD: &str = "(n=0; while [ ! -e /tmp/stop ]; do n=$((n+1)); dd if=/dev/urandom of=/tmp/piece bs=64k count=8 2> /dev/null; \
                    dd if=/tmp/piece of=/own/load bs=64k conv=fsync 2> /dev/null || echo write >> /tmp/errors; \
                    dd if=/own/load bs=64k iflag=direct 2> /dev/null | cmp - /tmp/piece || echo read >> /tmp/errors; echo $n > /tmp/rounds; done) &";

/// What the agent says when it must fail.
fn refused(vm: &mut Vm, arguments: &str) -> Result<String> {
    let (status, said) = vm.try_guest(&format!("sms-agent {arguments} 2>&1"))?;
    anyhow::ensure!(status == 1, "sms-agent {arguments} ended with {status}: {said}");
    Ok(said)
}

#[test]
fn a_guest_manages_its_own_disks_and_nothing_else() {
    Story::default().agent().tell(|host| {
        for device in DEVICES {
            host.image(device, 1536)?;
        }
        let pool = Pool::create(host, &DEVICES)?;
        pool.run("disk create /vm/root.dsk --size 64M --volume safe")?;
        pool.run("disk create /vm/other.dsk --size 64M --volume fast")?;
        let mut vm = pool
            .vm("agent")
            .cpus(2)
            .toml(POLICY)
            .disk(Disk::in_pool("/vm/root.dsk").set("bus", "\"virtio-scsi\"").serial("root"))
            .with_agent()?
            .interactive()?;
        let events = vm.events()?;
        vm.guest_until("[ -b /dev/sda ]")?;
        let status = vm.guest("sms-agent status")?;
        assert!(status.contains("agent") && status.contains("observe, snapshot, create"), "{status}");

        // A disk comes, and is used.
        let made = vm.guest("sms-agent disk create /vm/own/data.dsk --size 64M --volume safe")?;
        assert_eq!(made.trim_end(), "/vm/own/data.dsk: /dev/sdb");
        vm.guest("mke2fs -q /dev/sdb > /dev/null && mkdir /own && mount -t ext4 /dev/sdb /own && echo old > /own/file && sync")?;
        let full = refused(&mut vm, "disk create /vm/own/more.dsk --size 1M")?;
        assert!(full.contains("may have 1 disks"), "{full}");
        vm.guest("sms-agent disk snapshot --name monday")?;
        assert!(vm.guest("sms-agent disk snapshots /dev/sdb")?.contains("monday"));
        let frozen = vm.guest("sms-agent freeze-image --name frozen /own/file")?;
        assert!(frozen.contains("/vm/own/data.dsk@frozen") && frozen.contains("/own frozen for"), "{frozen}");
        vm.guest("echo new > /own/file && sync")?;
        vm.guest("sms-agent disk resize /dev/sdb 80M")?;
        vm.guest_until("[ $(cat /sys/block/sdb/size) = 163840 ]")?;

        // Its volume gets another layout, and the disk another volume, while it is written and compared.
        vm.guest(LOAD)?;
        let before = vm.guest("sms-agent disk configuration-id /dev/sdb")?;
        let job = vm.guest("sms-agent volume set-layout safe --layout raid5 --wait")?;
        assert!(job.contains("done"), "{job}");
        assert!(vm.guest("sms-agent volume list")?.contains("raid5"));
        let moved = vm.guest("sms-agent disk move /dev/sdb --volume fast")?;
        assert!(moved.contains("moved"), "{moved}");
        let jobs = vm.guest("sms-agent job list")?;
        assert!(jobs.contains("move /vm/own/data.dsk to volume fast") && jobs.contains("100 %"), "{jobs}");
        let list = vm.guest("sms-agent disk list")?;
        let line = list.lines().find(|line| line.starts_with("/dev/sdb")).unwrap_or_default();
        assert!(line.contains(" fast ") && !line.contains("safe"), "{list}");
        assert_ne!(vm.guest("sms-agent disk configuration-id /dev/sdb")?, before);
        vm.guest("touch /tmp/stop; wait; [ ! -e /tmp/errors ] && [ $(cat /tmp/rounds) -gt 1 ]")?;

        // What it may not: said clearly, told to the administrator, and nothing has changed.
        let disks = vm.administer("disk list")?;
        for (arguments, reason) in [
            ("disk status /vm/other.dsk", "no disk of this guest"),
            ("disk clone /vm/other.dsk /vm/own/stolen.dsk", "no disk of this guest"),
            ("disk create /vm/evil.dsk --size 1M", "may not make"),
            ("disk delete /vm/own/data.dsk", "lacks the right `delete`"),
            ("disk attach /vm/own/../other.dsk", "`..`"),
            ("volume set-layout fs-meta --layout concat", "may not name volume fs-meta"),
            ("volume move safe --to d0", "may not name device d0"),
        ] {
            let said = refused(&mut vm, arguments)?;
            assert!(said.contains(reason), "{arguments}: {said}");
        }
        events.wait_for("disk-status from the guest was refused: /vm/other.dsk is no disk of this guest")?;
        // Forged: another version, a service action that is none, more than there may be, a fragment without a first one.
        for (cdb, sense) in [
            ("c0000000120000000000000040000000", "24/00"),
            ("c1090000110000000000000000000000", "24/00"),
            ("c101000011030000000700200000000000", "24/00"),
            ("c1010000110200000007000000400100", "24/00"),
            ("c1010000110300000007000000400000", "26/00"),
            ("c0020000110000001234000000400000", "24/00"),
        ] {
            let zeroes = if cdb.starts_with("c101") { "--zeroes 64" } else { "" };
            let said = refused(&mut vm, &format!("forge {cdb} {zeroes}"))?;
            assert!(said.contains(sense), "{cdb}: {said}");
        }
        vm.guest("usleep 1500000")?;
        refused(&mut vm, "forge c0000000120000000000000040000000")?;
        events.wait_for("EXPANDED API from the guest was refused: byte 4 of the command")?;
        assert_eq!(vm.administer("disk list")?, disks);
        assert!(vm.guest("sms-agent events")?.contains("guest-command-refused"));

        vm.guest("umount /own && sms-agent disk detach /dev/sdb")?;
        vm.guest_until("[ ! -e /dev/sdb ]")?;
        vm.guest("! dmesg | grep -iE 'i/o error|ext4-fs error|not found|call trace'")?;
        vm.finish()?;
        pool.check()
    });
}
