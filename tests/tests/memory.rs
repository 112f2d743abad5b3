//! Guest memory: all of it is there, also above the hole below 4 GiB, and it lies in the pages that vm.toml asks for.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use stories::{Disk, Story, Vm, story};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Value of a `Key:   value kB` line, in bytes; several such lines are added up.
fn kilobytes(text: &str, key: &str) -> u64 {
    text.lines()
        .filter_map(|line| {
            line.strip_prefix(key)?
                .strip_prefix(':')?
                .split_whitespace()
                .next()
        })
        .filter_map(|value| value.parse::<u64>().ok())
        .sum::<u64>()
        * KIB
}

/// Value of a line without a unit, as `/proc/meminfo` counts huge pages.
fn count(text: &str, key: &str) -> u64 {
    kilobytes(text, key) / KIB
}

/// What the guest's kernel uses as RAM: (first, last) of each piece.
fn ram(vm: &mut Vm) -> Result<Vec<(u64, u64)>> {
    vm.guest("grep 'System RAM' /proc/iomem")?
        .lines()
        .map(|line| {
            let (range, _) = line.trim().split_once(' ').context("no range")?;
            let (first, last) = range.split_once('-').context("no end")?;
            Ok((u64::from_str_radix(first, 16)?, u64::from_str_radix(last, 16)?))
        })
        .collect()
}

/// The guest's total agrees with `size` but for what its kernel keeps for itself: its own image, and a page structure per page.
fn total_is(vm: &mut Vm, size: u64) -> Result<()> {
    let total = kilobytes(&vm.guest("cat /proc/meminfo")?, "MemTotal");
    let least = size - size / 32 - 64 * MIB;
    ensure!(
        (least..size).contains(&total),
        "{} MiB of {} MiB",
        total / MIB,
        size / MIB
    );
    Ok(())
}

/// How the VMM's memory is mapped, in bytes of one kind.
fn mapped_as(vm: &Vm, kind: &str) -> Result<u64> {
    let maps = fs::read_to_string(format!("/proc/{}/smaps", vm.pid()?.as_raw_nonzero()))?;
    Ok(kilobytes(&maps, kind))
}

#[test]
fn half_a_gibibyte_lies_below_the_hole_in_small_pages_if_so_wanted() {
    story(|host| {
        let mut vm = host
            .vm("small")
            .memory("512M")
            .argument("--set=memory.huge-pages=none")
            .interactive()?;
        let expected = [(0x1000, 0x9_FBFF), (MIB, 512 * MIB - 1)];
        assert_eq!(
            ram(&mut vm)?,
            expected,
            "page 0 is the BIOS's, 640 KiB to 1 MiB are no RAM"
        );
        total_is(&mut vm, 512 * MIB)?;
        let (resident, huge) = (mapped_as(&vm, "Rss")?, mapped_as(&vm, "AnonHugePages")?);
        ensure!(
            resident > 64 * MIB && huge == 0,
            "{huge} of {resident} bytes in huge pages"
        );
        vm.finish()?;
        Ok(())
    });
}

#[test]
fn five_gibibytes_go_on_above_the_hole_and_keep_what_processors_and_devices_write() {
    Story::default().host_memory_mib(8192).tell(|host| {
        let image = host.image("random", 64)?;
        let written = host.sh("head -c 67108864 /dev/urandom > random; sha256sum < random")?;
        let mut vm = host
            .vm("large")
            .memory("5G")
            .disk(Disk::new(image))
            .interactive()?;
        let expected = [(0x1000, 0x9_FBFF), (MIB, 3 * GIB - 1), (4 * GIB, 6 * GIB - 1)];
        assert_eq!(ram(&mut vm)?, expected, "the hole is from 3 to 4 GiB");
        total_is(&mut vm, 5 * GIB)?;

        // Linux takes what lies above 4 GiB ("Normal") first. The disk writes into it, processors copy it there, the disk
        // reads it back from there.
        let free = "awk '/^Node/ {zone = $4} /nr_free_pages/ && zone == \"Normal\" {print $2}' /proc/zoneinfo";
        let before: u64 = vm.guest(free)?.trim().parse()?;
        assert_eq!(vm.guest("cat /dev/vda > /tmp/0; sha256sum < /tmp/0")?.trim(), written);
        vm.guest("for n in 1 2 3; do { echo $n; cat /tmp/0; } > /tmp/$n; done")?;
        let after: u64 = vm.guest(free)?.trim().parse()?;
        let used = before.saturating_sub(after) * 4 * KIB;
        ensure!(used > 3 * 64 * MIB, "only {used} bytes of this lie above 4 GiB");
        vm.guest("for n in 1 2 3; do [ $(head -n1 /tmp/$n) = $n ] && tail -c +3 /tmp/$n | cmp - /tmp/0 || exit; done")?;
        vm.guest("blockdev --flushbufs /dev/vda; dd if=/dev/zero of=/dev/vda bs=1M count=64 conv=fsync 2> /dev/null")?;
        vm.guest("dd if=/tmp/0 of=/dev/vda bs=1M conv=fsync 2> /dev/null")?;
        assert_eq!(host.sh("sha256sum < random")?, written);

        // The default: transparent huge pages, as far as the host has them.
        let (resident, huge) = (mapped_as(&vm, "Rss")?, mapped_as(&vm, "AnonHugePages")?);
        ensure!(huge > resident / 2, "{huge} of {resident} bytes in huge pages");
        vm.finish()?;
        Ok(())
    });
}

#[test]
fn reserved_huge_pages_are_used_and_given_back_and_too_few_are_an_error_that_tells_the_remedy() {
    Story::default().changes_the_host().tell(|host| {
        let meminfo = || fs::read_to_string("/proc/meminfo");
        let nr_hugepages = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
        let machine = |name| {
            host.vm(name)
                .memory("256M")
                .argument("--set=memory.huge-pages=2M")
        };

        fs::write(nr_hugepages, "100")?;
        let refused = machine("refused").run()?;
        assert_eq!(refused.exit_code(), Some(1), "{}", refused.log);
        for part in ["128 huge pages of 2 MiB", "echo 128 >", nr_hugepages] {
            assert!(refused.log.contains(part), "no {part:?} in: {}", refused.log);
        }
        assert_eq!(refused.console, "", "nothing was started");
        let checked = host.run_smsvmm(&[
            "run",
            "--dry-run",
            "refused/vm.toml",
            "--set=memory.huge-pages=2M",
        ])?;
        assert_ne!(checked.status, 0);
        let said = checked.text();
        assert!(
            said.contains("128 huge pages") && said.contains("100 are free"),
            "{said}"
        );
        let refused = machine("gigantic")
            .argument("--set=memory=1G")
            .argument("--set=memory.huge-pages=1G")
            .run()?;
        assert_eq!(refused.exit_code(), Some(1), "{}", refused.log);
        assert!(
            refused.log.contains("1 huge pages of 1024 MiB"),
            "{}",
            refused.log
        );

        fs::write(nr_hugepages, "130")?;
        let image = host.image("image", 4)?;
        let mut vm = machine("huge").disk(Disk::new(image)).interactive()?;
        // The rings of disks hold such memory. What a guest reads back before and after a reboot is in its pages, not in those of before.
        let round = |vm: &mut Vm| -> Result<()> {
            let status = fs::read_to_string(format!("/proc/{}/status", vm.pid()?.as_raw_nonzero()))?;
            assert_eq!(kilobytes(&status, "VmPin"), 256 * MIB);
            vm.guest("dd if=/dev/urandom of=/tmp/random bs=64k count=32 2> /dev/null")?;
            vm.guest("dd if=/tmp/random of=/dev/vda bs=64k oflag=direct 2> /dev/null")?;
            vm.guest("head -c 2097152 /dev/vda | cmp - /tmp/random")?;
            let written = vm.guest("sha256sum < /tmp/random")?;
            assert_eq!(
                host.sh("head -c 2097152 image | sha256sum")?.trim(),
                written.trim()
            );
            Ok(())
        };
        round(&mut vm)?;
        // Reserved at once, so that the guest is never killed for want of one; taken as the guest touches them.
        let used = |text: &str| 130 - count(text, "HugePages_Free") + count(text, "HugePages_Rsvd");
        assert_eq!(used(&meminfo()?), 128);
        let mapped = mapped_as(&vm, "Shared_Hugetlb")? + mapped_as(&vm, "Private_Hugetlb")?;
        ensure!(mapped > 64 * MIB, "{} MiB in huge pages", mapped / MIB);
        // A reboot forgets all content, and needs the same pages again.
        vm.guest("dd if=/dev/urandom of=/tmp/much bs=1M count=32 2> /dev/null")?;
        vm.type_text("reboot -f\n")?;
        vm.wait_until_ready()?;
        assert_eq!(used(&meminfo()?), 128);
        round(&mut vm)?;
        total_is(&mut vm, 256 * MIB)?;
        vm.finish()?;
        // What rings held comes back a little later; a machine that starts then waits for it.
        let mut vm = machine("next").interactive()?;
        total_is(&mut vm, 256 * MIB)?;
        vm.finish()?;
        let begin = Instant::now();
        while used(&meminfo()?) != 0 {
            ensure!(begin.elapsed() < Duration::from_secs(20), "all are given back");
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    });
}
