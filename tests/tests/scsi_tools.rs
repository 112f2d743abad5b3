//! SCSI disks as the field's own tools see them: sg3-utils and the kernel's multipath, on disks of a pool and images on one adapter.

use std::time::Duration;

use anyhow::{Result, ensure};
use stories::{Disk, Pool, Story, Vm};

const DEVICES: [&str; 4] = ["d0.img", "d1.img", "d2.img", "d3.img"];

/// What a tool says.
fn tool(vm: &mut Vm, line: &str) -> Result<String> {
    Ok(vm
        .guest(&format!("/tools/usr/bin/{line} 2>&1"))?
        .replace('\r', ""))
}

/// What a tool says that must fail with this exit status (sg3_utils(8), EXIT STATUS).
fn fails(vm: &mut Vm, line: &str, status: i32) -> Result<String> {
    let (found, said) = vm.try_guest(&format!("/tools/usr/bin/{line} 2>&1"))?;
    ensure!(found == status, "{line}: {found} instead of {status}: {said}");
    Ok(said.replace('\r', ""))
}

fn says(vm: &mut Vm, line: &str, all: &[&str]) -> Result<()> {
    let said = tool(vm, line)?;
    for text in all {
        ensure!(said.contains(text), "{line}: no `{text}` in {said}");
    }
    Ok(())
}

/// The device of a LUN.
fn device(vm: &mut Vm, target: u8, lun: u16) -> Result<String> {
    let place = format!("/sys/bus/scsi/devices/*:0:{target}:{lun}/block");
    vm.guest_until(&format!("[ -d {place} ]"))?;
    Ok(format!("/dev/{}", vm.guest(&format!("ls {place}"))?.trim()))
}

const OUT_OF_RANGE: i32 = 5;
const UNIT_ATTENTION: i32 = 6;
/// SG_LIB_LBA_OUT_OF_RANGE.
const LBA_OUT_OF_RANGE: i32 = 22;
const MISCOMPARE: i32 = 14;
const CONFLICT: i32 = 24;
const INVALID_OPCODE: i32 = 9;

#[test]
fn disks_of_a_pool_and_images_are_luns_of_one_adapter_and_the_tools_of_the_field_agree() {
    Story::default().guest_tools().tell(|host| {
        for device in DEVICES {
            host.image(device, 512)?;
        }
        let pool = Pool::create(host, &DEVICES)?;
        for name in ["a", "b", "late"] {
            pool.run(&format!("disk create /vm/{name}.dsk --size 64M --volume safe"))?;
        }
        let image = host.image("image", 32)?;
        let machine = |name: &str| {
            let scsi = |disk: Disk| disk.set("bus", "\"virtio-scsi\"");
            pool.vm(name)
                .toml("[scsi]\nqueues = 2\n")
                .disk(scsi(Disk::in_pool("/vm/a.dsk")).serial("first"))
                .disk(
                    scsi(Disk::in_pool("/vm/b.dsk"))
                        .set("lun", "5")
                        .set("path", "[{ target = 1, access = \"non-optimized\" }]"),
                )
                .disk(scsi(Disk::new(&image)).set("target", "2"))
                .limit(Duration::from_secs(200))
                .with_guest_tools()
        };
        let mut vm = machine("tools")?.interactive()?;
        vm.guest("sh /tools-on")?;
        let a = device(&mut vm, 0, 0)?;
        what_it_is(&mut vm, &a)?;
        what_it_does(&mut vm, &a)?;
        what_it_refuses(&mut vm, &a)?;
        let ways = [device(&mut vm, 0, 5)?, device(&mut vm, 1, 5)?];
        two_ways(&mut vm, &ways)?;
        luns_come_and_go(&mut vm)?;
        let own = tool(&mut vm, &format!("sg_vpd -q -p di {a}"))?;
        let kept = reservations(&mut vm, &a, &ways)?;
        ensure!(vm.finish()?.success().is_ok(), "the first life");

        // The disk is known again at another path, and what was reserved has outlived the process.
        pool.run("file move /vm/a.dsk /vm/moved.dsk")?;
        pool.run("file move /vm/a.disk /vm/moved.disk")?;
        pool.run("file move /vm/moved.dsk /vm/a.dsk")?;
        pool.run("file move /vm/moved.disk /vm/a.disk")?;
        let mut vm = machine("tools")?.interactive()?;
        vm.guest("sh /tools-on")?;
        let a = device(&mut vm, 0, 0)?;
        ensure!(tool(&mut vm, &format!("sg_vpd -q -p di {a}"))? == own);
        let there = tool(&mut vm, &format!("sg_persist -n --read-reservation {a}"))?;
        // But for the generation, which counts from the beginning.
        let held = |text: &str| text.lines().skip(1).map(str::to_owned).collect::<Vec<_>>();
        ensure!(held(&there) == held(&kept), "{there} instead of {kept}");
        says(&mut vm, &format!("sg_persist -n --read-keys {a}"), &["0xabc"])?;
        tool(
            &mut vm,
            &format!("sg_persist -n --out --clear --param-rk=abc {a}"),
        )?;
        says(
            &mut vm,
            &format!("sg_persist -n --read-keys {a}"),
            &["there are NO registered"],
        )?;
        vm.finish()?.success()?;
        pool.check()
    });
}

/// Names, sizes, pages, logs, commands.
fn what_it_is(vm: &mut Vm, a: &str) -> Result<()> {
    says(
        vm,
        &format!("sg_inq {a}"),
        &["SMSVMM", "Unit serial number: first", "[SPC-4]"],
    )?;
    let pages = tool(vm, &format!("sg_vpd -q {a}"))?;
    for page in ["sv", "sn", "di", "ei", "bl", "bdc", "lbpv"] {
        tool(vm, &format!("sg_vpd -q -p {page} {a}")).map_err(|error| error.context(pages.clone()))?;
    }
    let names = tool(vm, &format!("sg_vpd -p di {a}"))?;
    ensure!(
        names.contains("designator type: NAA") && names.contains("UUID"),
        "{names}"
    );
    says(
        vm,
        &format!("sg_vpd -p lbpv {a}"),
        &["Unmap command supported (LBPU): 1", "(LBPRZ): 1"],
    )?;
    says(
        vm,
        &format!("sg_luns {a}"),
        &["Lun list length = 16", "0000000000000000", "0005000000000000"],
    )?;
    says(
        vm,
        &format!("sg_readcap -l {a}"),
        &[
            "Number of logical blocks=131072",
            "Logical block length=512",
            "lbpme=1, lbprz=1",
        ],
    )?;
    says(
        vm,
        &format!("sg_modes -a {a}"),
        &[
            ">> Caching, page",
            ">> Control, page",
            ">> Informational exceptions",
        ],
    )?;
    says(
        vm,
        &format!("sg_logs -a {a}"),
        &["Temperature", "Start-stop cycle counter", "Self-test results"],
    )?;
    says(
        vm,
        &format!("sg_opcodes {a}"),
        &["Compare and write", "Persistent reserve out, register", "Unmap"],
    )?;
    tool(vm, &format!("sg_turs {a}"))?;
    tool(vm, &format!("sg_requests {a}")).map(drop)
}

/// Commands that change and compare blocks, with what they leave.
fn what_it_does(vm: &mut Vm, a: &str) -> Result<()> {
    // As udev would: sg_xcopy looks for it.
    vm.guest(&format!(
        "mkdir -p /dev/block && ln -sf {a} /dev/block/$(cat /sys/block/{}/dev)",
        a.trim_start_matches("/dev/")
    ))?;
    vm.guest("dd if=/dev/urandom of=/tmp/one bs=512 count=1; dd if=/dev/urandom of=/tmp/two bs=512 count=1; cat /tmp/one /tmp/two > /tmp/both")?;
    let content = |vm: &mut Vm, block: u64, file: &str, size: u64| {
        vm.guest(&format!(
            "dd if={a} bs=512 skip={block} count={} iflag=direct 2> /dev/null | cmp - {file}",
            size / 512
        ))
    };
    tool(vm, &format!("sg_write_same --in=/tmp/one --lba=8 --num=8 {a}"))?;
    content(vm, 15, "/tmp/one", 512)?;
    tool(
        vm,
        &format!("sg_write_same --in=/tmp/two --lba=16 --num=8 --16 {a}"),
    )?;
    content(vm, 23, "/tmp/two", 512)?;
    tool(
        vm,
        &format!("sg_compare_and_write --in=/tmp/both --lba=8 --num=1 {a}"),
    )?;
    content(vm, 8, "/tmp/two", 512)?;
    fails(
        vm,
        &format!("sg_compare_and_write --in=/tmp/both --lba=8 --num=1 {a}"),
        MISCOMPARE,
    )?;
    content(vm, 8, "/tmp/two", 512)?;
    tool(vm, &format!("sg_write_verify --in=/tmp/one --lba=9 --num=1 {a}"))?;
    tool(
        vm,
        &format!("sg_verify --lba=9 --count=1 --ndo=512 --in=/tmp/one {a}"),
    )?;
    fails(
        vm,
        &format!("sg_verify --lba=9 --count=1 --ndo=512 --in=/tmp/two {a}"),
        MISCOMPARE,
    )?;
    says(vm, &format!("sg_get_lba_status --lba=8 {a}"), &["mapped"])?;
    tool(vm, &format!("sg_unmap --lba=0 --num=128 {a}"))?;
    vm.guest("head -c 65536 /dev/zero > /tmp/zeroes")?;
    content(vm, 0, "/tmp/zeroes", 65536)?;
    says(vm, &format!("sg_get_lba_status --lba=0 {a}"), &["deallocated"])?;
    vm.guest("dd if=/dev/urandom of=/tmp/data bs=64k count=4 2> /dev/null")?;
    for (program, at) in [("sg_dd", 2048), ("sgp_dd", 8192)] {
        tool(
            vm,
            &format!("{program} if=/tmp/data of={a} bs=512 seek={at} count=512 oflag=fua"),
        )?;
        content(vm, at, "/tmp/data", 256 << 10)?;
    }
    tool(
        vm,
        &format!("sg_xcopy if={a} of={a} bs=512 skip=2048 seek=16384 count=512"),
    )?;
    content(vm, 16384, "/tmp/data", 256 << 10)?;
    tool(vm, &format!("sg_sync {a}"))?;
    tool(vm, &format!("sg_senddiag --test {a}"))?;
    // The medium is fixed.
    fails(vm, &format!("sg_prevent --allow {a}"), INVALID_OPCODE)?;
    tool(vm, &format!("sg_start --stop {a}"))?;
    fails(vm, &format!("sg_turs {a}"), 2)?;
    tool(vm, &format!("sg_start --start {a}"))?;
    tool(vm, &format!("sg_turs {a}"))?;
    tool(vm, &format!("sg_reset --device {a}"))?;
    // It says that it was reset, once.
    vm.try_guest(&format!("/tools/usr/bin/sg_turs {a}"))?;
    tool(vm, &format!("sg_turs {a}")).map(drop)
}

fn what_it_refuses(vm: &mut Vm, a: &str) -> Result<()> {
    fails(vm, &format!("sg_read_buffer --length=4 {a}"), INVALID_OPCODE)?;
    // Beyond the end; a reserved bit, and where it is.
    fails(
        vm,
        &format!("sg_dd if={a} of=/dev/null bs=512 skip=131072 count=1 blk_sgio=1"),
        LBA_OUT_OF_RANGE,
    )?;
    let said = fails(
        vm,
        &format!("sg_raw {a} 9e 10 00 00 00 00 00 00 00 00 00 00 00 20 80 00"),
        OUT_OF_RANGE,
    )?;
    ensure!(
        said.contains("Invalid field in cdb") && said.contains("byte 14"),
        "{said}"
    );
    Ok(())
}

/// One disk by two targets: the kernel sees two port groups, and its multipath makes one disk of them.
fn two_ways(vm: &mut Vm, ways: &[String; 2]) -> Result<()> {
    says(
        vm,
        &format!("sg_rtpg -d {}", ways[0]),
        &["active/optimized", "active/non optimized"],
    )?;
    let names = ways
        .each_ref()
        .map(|way| tool(vm, &format!("sg_vpd -q -p di_lu {way}")));
    let [first, second] = names;
    ensure!(first? == second?, "two names");
    // Two groups of one way each.
    let numbers = vm.guest(&format!("stat -c %t:%T {} {}", ways[0], ways[1]))?;
    let ways: Vec<String> = numbers
        .split_whitespace()
        .filter_map(|number| {
            let (major, minor) = number.split_once(':')?;
            let number = |text| u32::from_str_radix(text, 16).ok();
            Some(format!("{}:{}", number(major)?, number(minor)?))
        })
        .collect();
    ensure!(ways.len() == 2, "{numbers}");
    let table = format!(
        "0 131072 multipath 0 0 2 1 round-robin 0 1 1 {} 1000 round-robin 0 1 1 {} 1000",
        ways[0], ways[1]
    );
    vm.guest(&format!(
        "/tools/usr/bin/dmsetup create two --table '{table}' && /tools/usr/bin/dmsetup mknodes"
    ))?;
    vm.guest("dd if=/tmp/data of=/dev/mapper/two bs=64k oflag=direct 2> /dev/null")?;
    // The first way goes while it is used: the other one serves on.
    vm.guest(&format!(
        "/tools/usr/bin/dmsetup message two 0 'fail_path {}'",
        ways[0]
    ))?;
    vm.guest("dd if=/dev/mapper/two bs=64k count=4 iflag=direct 2> /dev/null | cmp - /tmp/data")?;
    vm.guest("dd if=/tmp/data of=/dev/mapper/two bs=64k seek=4 oflag=direct 2> /dev/null")?;
    let status = tool(vm, "dmsetup status two")?;
    ensure!(
        status.contains(&format!("{} F", ways[0])) && status.contains(&format!("{} A", ways[1])),
        "{status}"
    );
    tool(vm, "dmsetup remove two").map(drop)
}

/// A disk comes as a LUN, grows, and goes, while no slot of the PCI bus changes.
fn luns_come_and_go(vm: &mut Vm) -> Result<()> {
    let events = vm.events()?;
    let slots = vm.guest("ls /sys/bus/pci/devices")?;
    vm.manage(&[
        "attach-disk",
        "--file",
        "/vm/late.dsk",
        "--bus",
        "virtio-scsi",
        "--target",
        "3",
        "--id",
        "late",
    ])?;
    let late = device(vm, 3, 0)?;
    events.wait_for("late in use by the guest")?;
    let status = vm.manage(&["status"])?;
    ensure!(status.contains("target 3 LUN 0"), "{status}");
    vm.guest(&format!("dd if=/tmp/data of={late} bs=64k 2> /dev/null"))?;
    vm.refuses(&[
        "attach-disk",
        "--file",
        "/vm/late.dsk",
        "--bus",
        "virtio-scsi",
        "--id",
        "again",
    ])?;
    vm.manage(&["detach", "late"])?;
    events.wait_for("late removed")?;
    vm.guest_until(&format!("[ ! -e {late} ]"))?;
    // What was in the guest's cache is on the disk. Linux counts LUNs from 256 on as flat addressing has them.
    vm.manage(&[
        "attach-disk",
        "--file",
        "/vm/late.dsk",
        "--bus",
        "virtio-scsi",
        "--target",
        "3",
        "--lun",
        "300",
        "--id",
        "late",
    ])?;
    let late = device(vm, 3, 0x4000 + 300)?;
    vm.guest(&format!(
        "dd if={late} bs=64k count=4 2> /dev/null | cmp - /tmp/data"
    ))?;
    vm.manage(&["detach", "late"])?;
    events.wait_for("late removed")?;
    ensure!(slots == vm.guest("ls /sys/bus/pci/devices")?);
    Ok(())
}

/// Two target ports, two registrants; what one reserves the other cannot write. Returns what shall be kept.
fn reservations(vm: &mut Vm, a: &str, ways: &[String; 2]) -> Result<String> {
    let [one, other] = ways;
    let out = |way: &str, what: &str| format!("sg_persist -n --out {what} {way}");
    tool(vm, &out(one, "--register --param-sark=111"))?;
    tool(vm, &out(other, "--register --param-sark=222"))?;
    says(
        vm,
        &format!("sg_persist -n --read-keys {one}"),
        &["0x111", "0x222"],
    )?;
    tool(vm, &out(one, "--reserve --param-rk=111 --prout-type=1"))?;
    says(
        vm,
        &format!("sg_persist -n --read-reservation {other}"),
        &["Key=0x111", "Write Exclusive"],
    )?;
    fails(
        vm,
        &format!("sg_write_same --in=/tmp/one --lba=0 --num=8 {other}"),
        CONFLICT,
    )?;
    tool(vm, &format!("sg_write_same --in=/tmp/one --lba=0 --num=8 {one}"))?;
    tool(
        vm,
        &out(other, "--preempt --param-rk=222 --param-sark=111 --prout-type=1"),
    )?;
    // It is told so, once.
    fails(
        vm,
        &format!("sg_write_same --in=/tmp/one --lba=0 --num=8 {one}"),
        UNIT_ATTENTION,
    )?;
    fails(
        vm,
        &format!("sg_write_same --in=/tmp/one --lba=0 --num=8 {one}"),
        CONFLICT,
    )?;
    fails(vm, &out(one, "--release --param-rk=111 --prout-type=1"), CONFLICT)?;
    tool(vm, &out(other, "--clear --param-rk=222"))?;
    says(
        vm,
        &format!("sg_persist -n --report-capabilities {a}"),
        &["Persist Through Power Loss Capable(PTPL_C): 1"],
    )?;
    tool(vm, &out(a, "--register --param-sark=abc --param-aptpl"))?;
    tool(vm, &out(a, "--reserve --param-rk=abc --prout-type=5"))?;
    let kept = tool(vm, &format!("sg_persist -n --read-reservation {a}"))?;
    ensure!(kept.contains("Key=0xabc"), "{kept}");
    Ok(kept)
}
