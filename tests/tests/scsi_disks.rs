//! SCSI disks, as a guest's own sd driver finds and uses them.

use stories::{Disk, Kernel, story};

#[test]
fn each_kernels_sd_driver_finds_reads_writes_and_trims_a_disk() {
    story(|host| {
        for kernel in Kernel::ALL.into_iter().filter(|kernel| host.has(*kernel)) {
            let name = kernel.name();
            let disk = host.image(&format!("{name}.img"), 64)?;
            let read_only = host.image(&format!("{name}-ro.img"), 32)?;
            let mut vm = host
                .vm(name)
                .kernel(kernel)
                .cpus(2)
                .disk(
                    Disk::new(disk)
                        .set("bus", "\"virtio-scsi\"")
                        .set("queues", "2")
                        .serial("first"),
                )
                .disk(Disk::new(read_only).set("bus", "\"virtio-scsi\"").read_only())
                .interactive()?;
            vm.guest_until("[ -b /dev/sda ] && [ -b /dev/sdb ]")?;
            // Adapters are scanned side by side: which disk comes first is anybody's guess.
            vm.guest(
                "dmesg -c > /dev/null; for disk in sda sdb; do [ $(cat /sys/block/$disk/size) = 131072 ] && name=disk || name=read-only; \
                 ln -s $disk /dev/$name; ln -s /sys/block/$disk /tmp/$name; done",
            )?;
            let seen = vm.guest(
                "for disk in disk read-only; do cd /tmp/$disk; echo $(cat device/vendor device/model size ro) \
                 $(cat device/scsi_level device/queue_type queue/write_cache) $(tail -c +5 device/vpd_pg80); done",
            )?;
            let expected = "SMSVMM DISK 131072 0 7 simple write back first\n\
                            SMSVMM DISK 65536 1 7 simple write through disk1\n";
            assert_eq!(seen.replace('\r', ""), expected, "{name}");
            vm.guest(
                "dd if=/dev/urandom of=/tmp/data bs=1M count=8 2> /dev/null; \
                 dd if=/tmp/data of=/dev/disk bs=256k seek=4 conv=fsync oflag=direct 2> /dev/null; \
                 dd if=/dev/disk bs=1M skip=1 count=8 iflag=direct 2> /dev/null | cmp - /tmp/data",
            )?;
            let sums = vm.guest("sha256sum < /tmp/data")?;
            vm.guest("! dd if=/tmp/data of=/dev/read-only bs=4k count=1 conv=fsync 2> /dev/null")?;
            vm.guest("[ $(cat /tmp/disk/queue/discard_max_bytes) != 0 ] && blkdiscard -o 16777216 -l 1048576 /dev/disk")?;
            assert_eq!(vm.kernel_warnings()?, "", "{name}");
            vm.finish()?.success()?;
            let found = host.sh(&format!(
                "tail -c +1048577 {name}.img | head -c 8388608 | sha256sum"
            ))?;
            assert_eq!(found.trim(), sums.trim(), "{name}");
        }
        Ok(())
    });
}
