//! Images that become disks, and disks that become images, while a guest uses the pool.

use std::thread::sleep;
use std::time::Duration;

use anyhow::Result;
use stories::{Disk, Host, Pool, Story, Vm, story};

const DEVICES: [&str; 4] = ["d0.img", "d1.img", "d2.img", "d3.img"];

/// A guest that never stops writing to a file system on a disk of the pool.
fn busy<'a>(host: &'a Host, pool: &Pool<'a>) -> Result<Vm> {
    let mut vm = pool
        .vm("busy")
        .cpus(2)
        .disk(Disk::in_pool("/vm/busy.dsk"))
        .interactive()?;
    vm.guest("mke2fs -q /dev/vda > /dev/null; mkdir /vda; mount -t ext4 /dev/vda /vda")?;
    vm.guest("dd if=/dev/urandom of=/vda/old bs=1M count=8 2> /dev/null && sync")?;
    vm.guest(
        "(n=0; while [ ! -e /end ]; do n=$((n + 1)); dd if=/dev/urandom of=/vda/busy$((n % 7)) bs=1M count=2; sync; done; \
         echo done > /ended) > /dev/null 2>&1 &",
    )?;
    host.sh("dd if=/dev/urandom of=in.raw bs=1M count=20 seek=3 && truncate -s 32M in.raw")?;
    Ok(vm)
}

#[test]
fn images_come_in_and_go_out_while_a_guest_writes() {
    Story::default().limit(Duration::from_secs(400)).tell(|host| {
        for device in DEVICES {
            host.image(device, 768)?;
        }
        let pool = Pool::create(host, &DEVICES)?;
        pool.run("disk create /vm/busy.dsk --size 96M --volume safe")?;
        let mut vm = busy(host, &pool)?;
        let old = vm.guest("sha256sum < /vda/old")?;
        let place = host.folder().display().to_string();

        let said = vm.administer(&format!("disk import {place}/in.raw /vm/new.dsk --verify"))?;
        assert!(
            said.contains("32M raw imported") && said.contains("is the same"),
            "{said}"
        );
        let refused = vm.administer(&format!("disk import {place}/in.raw /vm/new.dsk"));
        let refused = refused.unwrap_err().to_string();
        assert!(refused.contains("/vm/new.dsk exists"), "{refused}");
        vm.administer("vm attach-disk --file /vm/new.dsk --id new")?;
        vm.guest_until("[ -b /dev/vdb ]")?;
        let wanted = host.sh("sha256sum < in.raw")?;
        assert_eq!(vm.guest("sha256sum < /dev/vdb")?.trim_end(), wanted);

        // Both are in use; one of them is written all the time.
        vm.guest("dd if=/dev/urandom of=/dev/vdb bs=1M count=2 seek=9 2> /dev/null && sync")?;
        let said = vm.administer(&format!("disk export /vm/busy.dsk {place}/busy.qcow2 --verify"))?;
        assert!(
            said.contains("96M qcow2 exported") && said.contains("is the same"),
            "{said}"
        );
        vm.administer(&format!("disk export /vm/new.dsk {place}/new.raw --verify"))?;
        let wanted = vm.guest("sha256sum < /dev/vdb")?;
        assert_eq!(host.sh("sha256sum < new.raw")?, wanted.trim_end());
        let status = vm.administer("disk status /vm/busy.dsk")?;
        assert!(!status.contains("moment"), "{status}");

        // What the busy disk was at that moment has what was synced before.
        vm.administer(&format!("disk import {place}/busy.qcow2 /vm/back.dsk"))?;
        vm.administer("vm attach-disk --file /vm/back.dsk --id back")?;
        vm.guest_until("[ -b /dev/vdc ]")?;
        vm.guest("mkdir /vdc; mount -t ext4 -o ro /dev/vdc /vdc")?;
        assert_eq!(vm.guest("sha256sum < /vdc/old")?, old);
        vm.guest("touch /end")?;
        vm.guest_until("[ -e /ended ]")?;
        assert_eq!(
            vm.guest("dmesg | grep -ci 'ext4-fs error\\|i/o error' || true")?,
            "0\n"
        );
        assert_eq!(vm.finish()?.exit_code(), Some(0));
        pool.check()
    });
}

#[test]
fn an_import_into_a_running_machine_that_is_broken_off_leaves_nothing() {
    story(|host| {
        for device in DEVICES {
            host.image(device, 768)?;
        }
        let pool = Pool::create(host, &DEVICES)?;
        pool.run("disk create /vm/busy.dsk --size 96M --volume safe")?;
        let mut vm = busy(host, &pool)?;
        host.sh("dd if=/dev/urandom of=large.raw bs=1M count=300")?;
        let folder = vm.folder().display().to_string();
        for signal in ["INT", "KILL"] {
            let said = host.run(&format!(
                "timeout -s {signal} 1 {} disk import large.raw /vm/large.dsk --verify --config {folder}/vm.toml",
                host.smsvmm().display()
            ))?;
            // A machine that is fast enough has ended before.
            if said.status == 0 {
                vm.administer("disk delete /vm/large.dsk")?;
            } else if signal == "INT" && !said.text().is_empty() {
                // On a slow host the second is over before the command has begun to listen for signals, and it says nothing.
                assert!(said.text().contains("nothing is left of it"), "{}", said.text());
            }
            // Who was killed could not wait for the end.
            let mut left = vm.administer("file list /vm")?;
            for _ in 0..50 {
                if !left.contains("large") {
                    break;
                }
                sleep(Duration::from_millis(100));
                left = vm.administer("file list /vm")?;
            }
            assert!(!left.contains("large") && left.contains("busy.dsk"), "{left}");
        }
        vm.guest("touch /end")?;
        vm.guest_until("[ -e /ended ]")?;
        assert_eq!(vm.finish()?.exit_code(), Some(0));
        pool.check()
    });
}
