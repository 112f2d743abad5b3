//! Frozen-image backup: `sms-agent backup` in a guest whose file systems are being written.

use std::time::Duration;

use anyhow::Result;
use stories::{Disk, Pool, Story};

const DEVICES: [&str; 4] = ["d0.img", "d1.img", "d2.img", "d3.img"];

/// Two disks: ext4 on a partition of the first, XFS on all of the second. Both have a tree with one of everything, and a load.
const PREPARE: [&str; 7] = [
    "sh /tools-on",
    "for f in ext4 xfs; do ln -s $(sms-agent disk list | awk \"/$f.dsk/ {print \\$1}\") /dev/$f; done; ls -l /dev/ext4 /dev/xfs",
    "printf 'n\\np\\n1\\n2048\\n\\nw\\n' | fdisk -u /dev/ext4 > /dev/null 2>&1; ln -s $(readlink /dev/ext4)1 /dev/ext4p1; \
     n=0; until [ -b /dev/ext4p1 ]; do usleep 20000; done",
    "/tools/usr/bin/mke2fs -q -t ext4 /dev/ext4p1 && /tools/usr/bin/mkfs.xfs -q /dev/xfs 2> /dev/null",
    "mkdir /ext4 /xfs && mount -t ext4 /dev/ext4p1 /ext4 && mount -t xfs /dev/xfs /xfs",
    "for f in ext4 xfs; do mkdir /$f/tree /$f/load && fs-load odd /$f/tree; done",
    "for f in ext4 xfs; do fs-load run /$f/load 1 0 > /tmp/$f.load & done",
];

#[test]
fn files_of_a_live_guest_are_backed_up_from_a_frozen_image_and_restored() {
    Story::default().agent().guest_tools().limit(Duration::from_secs(300)).tell(|host| {
        for device in DEVICES {
            host.image(device, 1536)?;
        }
        let pool = Pool::create(host, &DEVICES)?;
        pool.run("disk create /vm/ext4.dsk --size 128M --volume safe")?;
        pool.run("disk create /vm/xfs.dsk --size 320M --volume fast")?;
        let disk = |name: &str| Disk::in_pool(&format!("/vm/{name}.dsk")).set("bus", "\"virtio-scsi\"").serial(name);
        let mut vm = pool
            .vm("backed-up")
            .cpus(2)
            .memory("512M")
            .limit(Duration::from_secs(280))
            .toml("[expanded-api]\nallow = [\"image\"]\n")
            .disk(disk("ext4"))
            .disk(disk("xfs"))
            .with_agent()?
            .with_guest_tools()?
            .interactive()?;
        vm.guest_until("[ -b /dev/sdb ]")?;
        for line in PREPARE {
            vm.guest(line)?;
        }
        println!("{}", vm.guest("time sms-agent backup create --dry-run --source /ext4 /xfs/tree 2>&1; sms-agent disk list")?);
        println!("{}", vm.guest("sms-agent --json backup create --dry-run --source /ext4/tree 2>&1 | head -c 20000; dmesg | tail -20")?);
        vm.finish()?;
        pool.check()
    });
}
