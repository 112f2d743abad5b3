//! Disks and network cards come and go while the guest runs and works.

use std::time::Duration;

use stories::{Disk, Vm, story};

/// Copies in the guest, without end, from one disk to another; its mistakes are counted in /tmp/errors.
const LOAD: &str = "(while usleep 200000; do dd if=/dev/vda of=/dev/vdb bs=64k count=16 conv=fsync 2> /dev/null || echo >> /tmp/errors; \
                    cmp -n 1048576 /dev/vda /dev/vdb || echo >> /tmp/errors; echo >> /tmp/rounds; done) & echo $! > /tmp/load";

/// Waits in the guest until a condition holds.
fn until(vm: &mut Vm, condition: &str) -> anyhow::Result<()> {
    let line = format!(
        "n=0; until {condition}; do n=$((n+1)); [ $n -lt 300 ] || break; usleep 20000; done; {condition}"
    );
    vm.guest(&line).map(drop)
}

#[test]
fn ten_times_a_disk_and_a_network_card_come_and_go_while_other_disks_work() {
    story(|host| {
        let images = [host.image("a", 4)?, host.image("b", 4)?];
        host.sh("head -c 4194304 /dev/urandom > a")?;
        host.image("late", 4)?;
        let [a, b] = images.map(Disk::new);
        let mut vm = host
            .vm("plug")
            .cpus(2)
            .disk(a)
            .disk(b)
            .limit(Duration::from_secs(220))
            .interactive()?;
        let events = vm.events()?;
        // As udev would, when the first one comes.
        vm.guest("modprobe virtio_net && dmesg -c > /dev/null")?;
        vm.guest(LOAD)?;
        for round in 1..=10 {
            let id = vm.manage(&[
                "attach-disk",
                "../late",
                "--id",
                "late",
                "--serial",
                &format!("round-{round}"),
            ])?;
            assert_eq!(id, "late\n");
            events.wait_for("late in use by the guest")?;
            vm.manage(&["attach-net", "--id", "card", "--mac", "52:54:00:00:00:0a"])?;
            events.wait_for("card in use by the guest")?;
            until(&mut vm, "[ -e /sys/block/vdc/serial ]")?;
            assert_eq!(vm.guest("cat /sys/block/vdc/serial")?, format!("round-{round}"));
            assert_eq!(
                vm.guest("cat /sys/class/net/eth0/address")?,
                "52:54:00:00:00:0a\n"
            );
            vm.guest(&format!(
                "echo {round} > /dev/vdc; sync; head -n1 /dev/vdc; ip link set eth0 up"
            ))?;
            // The one waits itself, the other leaves the waiting to us.
            vm.manage(&["detach", "late"])?;
            vm.manage(&["detach", "card", "--no-wait"])?;
            events.wait_for("card removed")?;
            until(&mut vm, "[ ! -e /sys/block/vdc ] && [ ! -e /sys/class/net/eth0 ]")?;
        }
        vm.guest("kill $(cat /tmp/load); [ $(wc -l < /tmp/rounds) -gt 3 ] && [ ! -e /tmp/errors ]")?;
        assert_eq!(host.sh("head -n1 late")?, "10");
        let status = vm.manage(&["status"])?;
        assert!(!status.contains("late") && !status.contains("card"), "{status}");
        assert_eq!(vm.kernel_warnings()?, "");
        vm.finish()?;
        Ok(())
    });
}

#[test]
fn a_disk_that_is_in_use_goes_with_errors_for_who_used_it_and_the_guest_lives() {
    story(|host| {
        let image = host.image("busy", 16)?;
        let mut vm = host.vm("user").cpus(2).interactive()?;
        let events = vm.events()?;
        vm.guest("modprobe virtio_blk")?;
        vm.manage(&["attach-disk", "../busy", "--id", "busy"])?;
        events.wait_for("busy in use by the guest")?;
        until(&mut vm, "[ -b /dev/vda ]")?;
        vm.guest("mke2fs /dev/vda > /dev/null && mkdir /data && mount -t ext4 /dev/vda /data")?;
        vm.guest("(while echo >> /tmp/written; do dd if=/dev/zero of=/data/file bs=64k count=100 conv=fsync 2> /dev/null || break; done; echo > /tmp/gone) &")?;
        until(&mut vm, "[ $(wc -l < /tmp/written) -gt 2 ]")?;
        // As a cable that is pulled.
        vm.manage(&["detach", "busy"])?;
        until(&mut vm, "[ -e /tmp/gone ]")?;
        vm.guest("umount /data")?;
        // Nobody holds the image any more: another machine, or the same, may have it.
        vm.manage(&["attach-disk", image.to_str().unwrap_or_default(), "--id", "busy"])?;
        events.wait_for("busy in use by the guest")?;
        until(&mut vm, "grep -q vd /proc/partitions")?;
        vm.guest("mount -t ext4 /dev/vd? /data && umount /data")?;
        vm.finish()?;
        Ok(())
    });
}

#[test]
fn what_cannot_be_attached_or_detached_is_refused_with_the_reason_and_does_no_harm() {
    story(|host| {
        host.sh("truncate -s 1000 odd; mkdir folder; truncate -s 1M good")?;
        let mut vm = host
            .vm("refuse")
            .disk(Disk::new(host.folder().join("good")))
            .interactive()?;
        for (arguments, reason) in [
            (&["attach-disk", "../missing"][..], "missing"),
            (&["attach-disk", "../folder"], "folder"),
            (&["attach-disk", "../good"], "in use by smsvmm (pid"),
            (&["attach-disk", "../odd", "--id", "disk0"], "disk0"),
            (&["attach-net", "--tap", "nowhere0"], "nowhere0"),
            (&["detach", "other"], "other: the machine has no such device"),
            (&["detach", "rng"], "rng"),
        ] {
            let said = vm.refuses(arguments)?;
            println!("{arguments:?}: {said}");
            assert!(said.contains(reason), "{arguments:?}: {said}");
        }
        assert_eq!(vm.guest("ls /sys/block | grep vd")?, "vda\n");
        vm.finish()?;
        Ok(())
    });
}
