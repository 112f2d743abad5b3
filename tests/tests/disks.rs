//! Disks as a guest finds and uses them: names, sizes, read-only, queues; data that stays, space that returns, errors that
//! do no harm.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::MetadataExt as _;

use stories::{Disk, Story, story};

#[test]
fn eight_disks_come_in_order_with_serial_numbers_sizes_and_queues() {
    story(|host| {
        let mut machine = host.vm("eight").cpus(2);
        let mut expected = String::new();
        for number in 1..=8_u64 {
            let image = host.image(&format!("image{number}"), number)?;
            let (serial, queues) = (format!("serial-{number}"), if number == 8 { 2 } else { 1 });
            let mut disk = Disk::new(image)
                .serial(&serial)
                .set("queues", &queues.to_string());
            if number == 3 {
                disk = disk.read_only();
            }
            machine = machine.disk(disk);
            let letter = char::from(b'`' + u8::try_from(number)?);
            let read_only = u8::from(number == 3);
            writeln!(
                expected,
                "vd{letter} {serial} {} {read_only} {queues} write back",
                number << 11
            )?;
        }
        let guest = machine
            .script(
                "cd /sys/block; for disk in vd*; do cd $disk; \
                 echo $disk $(cat serial) $(cat size ro) $(ls mq | wc -l) $(cat queue/write_cache); cd ..; done",
            )
            .run()?
            .success()?;
        assert_eq!(guest.script_output(), expected);
        Ok(())
    });
}

#[test]
fn what_a_guest_wrote_is_there_for_the_host_and_after_a_new_start() {
    Story::default().changes_the_host().tell(|host| {
        // A block device, a file on a file system that can bypass the page cache, a file on one that cannot.
        host.sh(
            "truncate -s 32M backing && busybox losetup /dev/loop0 backing\n\
             truncate -s 64M ext4 && /usr/sbin/mke2fs -q -t ext4 ext4 && mkdir mounted && busybox mount -o loop ext4 mounted\n\
             truncate -s 32M mounted/direct plain",
        )?;
        let images = ["/dev/loop0", "mounted/direct", "plain"];
        let machine = |name| {
            let mut machine = host.vm(name).cpus(2);
            for image in images {
                machine = machine.disk(Disk::new(host.folder().join(image)).set("queues", "2"));
            }
            machine
        };
        let written = machine("writer")
            .script(
                "dd if=/dev/urandom of=/tmp/data bs=1M count=12 2> /dev/null; sha256sum < /tmp/data\n\
                 dd if=/tmp/data of=/dev/vda bs=256k seek=4 conv=fsync 2> /dev/null &\n\
                 dd if=/tmp/data of=/dev/vdb bs=64k seek=16 conv=fsync 2> /dev/null &\n\
                 dd if=/tmp/data of=/dev/vdc bs=4k seek=256 conv=fsync 2> /dev/null; wait\n\
                 for disk in vda vdb vdc; do set -- $(cat /sys/block/$disk/stat); echo $disk flushes ${16}; done",
            )
            .run()?
            .success()?;
        let hash = written.script_output().split_whitespace().next().unwrap_or_default();
        assert_eq!(hash.len(), 64, "{}", written.console);
        assert_eq!(written.script_output().matches("flushes 1\n").count(), 3, "{}", written.console);
        for image in images {
            let found = host.sh(&format!("tail -c +1048577 {image} | head -c 12582912 | sha256sum"))?;
            assert!(found.starts_with(hash), "{image}: {found}");
        }
        let read = machine("reader")
            .script("for disk in vda vdb vdc; do dd if=/dev/$disk bs=1M skip=1 count=12 2> /dev/null | sha256sum; done")
            .run()?
            .success()?;
        assert_eq!(read.script_output().matches(hash).count(), 3, "{}", read.console);
        Ok(())
    });
}

#[test]
fn a_file_system_in_the_guest_gives_space_back_and_survives() {
    story(|host| {
        let image = host.image("image", 64)?;
        let allocated_kib = || -> anyhow::Result<u64> { Ok(fs::metadata(&image)?.blocks() / 2) };
        let mut vm = host.vm("trim").disk(Disk::new(&image)).interactive()?;
        vm.guest("mke2fs /dev/vda > /dev/null && mkdir /data && mount -t ext4 /dev/vda /data")?;
        vm.guest("dd if=/dev/urandom of=/data/large bs=1M count=24 conv=fsync 2> /dev/null")?;
        vm.guest("echo stays > /data/small && sync")?;
        assert!(allocated_kib()? > 24 << 10, "{} KiB", allocated_kib()?);
        vm.guest("rm /data/large && sync && fstrim /data")?;
        assert!(
            allocated_kib()? < 4 << 10,
            "{} KiB after fstrim",
            allocated_kib()?
        );
        assert_eq!(
            vm.guest("umount /data && mount -t ext4 /dev/vda /data && cat /data/small")?,
            "stays\n"
        );
        vm.guest("umount /data && blkdiscard /dev/vda")?;
        assert_eq!(allocated_kib()?, 0, "KiB after blkdiscard of everything");
        vm.finish()?;
        Ok(())
    });
}

#[test]
fn errors_of_the_host_reach_the_guest_as_errors_and_end_with_their_cause() {
    Story::default().changes_the_host().tell(|host| {
        // One disk has a hole of bad blocks, and heals later; the other is an image on a file system without space.
        host.sh(
            "modprobe -a loop dm-mod\n\
             truncate -s 16M backing && busybox losetup /dev/loop0 backing\n\
             printf '0 8192 linear /dev/loop0 0\n8192 8192 error\n16384 16384 linear /dev/loop0 16384\n' \
                | dmsetup create --noudevsync bad\n\
             mkdir full && busybox mount -t tmpfs -o size=4M tmpfs full && truncate -s 16M full/image",
        )?;
        let mut vm = host
            .vm("bad")
            .disk(Disk::new("/dev/dm-0"))
            .disk(Disk::new(host.folder().join("full/image")))
            .interactive()?;
        let read = |mib: u32| format!("dd if=/dev/vda of=/dev/null bs=1M count=1 skip={mib} iflag=direct 2>&1");
        let write = |disk: &str, mib: u32| {
            format!("dd if=/dev/zero of=/dev/{disk} bs=1M count=1 seek={mib} conv=notrunc,fsync 2>&1")
        };

        vm.guest(&read(3))?;
        let (status, said) = vm.try_guest(&read(5))?;
        assert!(status != 0 && said.contains("error"), "{status} {said}");
        assert_ne!(vm.try_guest(&write("vda", 5))?.0, 0, "a write to bad blocks is reported");
        vm.guest(&write("vda", 9))?;

        vm.guest(&write("vdb", 1))?;
        let fill = "dd if=/dev/zero of=/dev/vdb bs=1M count=12 seek=2 conv=fsync 2>&1";
        assert_ne!(vm.try_guest(fill)?.0, 0, "no space on the host");

        host.sh(
            "busybox mount -o remount,size=32M full\n\
             dmsetup suspend bad; echo 0 32768 linear /dev/loop0 0 | dmsetup load bad; dmsetup resume --noudevsync bad",
        )?;
        vm.guest(fill)?;
        vm.guest(&write("vda", 5))?;
        vm.guest(&read(5))?;
        let guest = vm.finish()?;
        for cause in ["failed on /dev/dm-0 cause=Input/output error", "full/image cause=No space left"] {
            assert!(guest.log.contains(cause), "{cause}: {}", guest.log);
        }
        Ok(())
    });
}
