//! The iSCSI initiator of Linux, stock Debian's open-iscsi, in a guest with `smsvmm share iscsi` on its host: discovery, mutual CHAP, a file
//! system over two portals of which one goes under load, reservations, logout and login.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use stories::{Host, Server, Story, Vm};

use crate::network::{HOST, make_tap, set_address};

const LIMIT: Duration = Duration::from_secs(300);
/// Addresses of the host besides that of the tap interface, each a portal.
///
/// Not over the user network: an initiator that gives up a connection resets it, so that nothing of it comes later; passt would pass
/// on that it ended, and what its host has not sent yet would still be sent when the portal is there again, and be written over
/// what the initiator wrote by the other portal since.
const PORTALS: [&str; 2] = ["10.9.1.1", "10.9.2.1"];
const TARGET: &str = "iqn.2026-11.org.example:disks";
const MIB: u64 = 64;

/// As an administrator would set it for multipathing: CHAP both ways, and a lost connection is given up soon.
const ISCSID: &str = "\
discovery.sendtargets.auth.authmethod = CHAP
discovery.sendtargets.auth.username = guest
discovery.sendtargets.auth.password = 0123456789abcdef
discovery.sendtargets.auth.username_in = storage
discovery.sendtargets.auth.password_in = fedcba9876543210
node.session.auth.authmethod = CHAP
node.session.auth.username = guest
node.session.auth.password = 0123456789abcdef
node.session.auth.username_in = storage
node.session.auth.password_in = fedcba9876543210
node.session.timeo.replacement_timeout = 1
node.conn[0].timeo.noop_out_interval = 1
node.conn[0].timeo.noop_out_timeout = 2
node.conn[0].iscsi.HeaderDigest = CRC32C
node.conn[0].iscsi.DataDigest = CRC32C
";

/// Writes files of random data with their sums, syncing each, until it is told to stop.
const LOAD: &str = "\
n=0
while [ ! -e /stop ]; do
    n=$((n + 1))
    dd if=/dev/urandom of=/disk/file$((n % 12)) bs=64k count=$((n % 16 + 1)) 2> /dev/null || echo \"write $n\" >> /failed
    (cd /disk && sha256sum file$((n % 12)) > sum$((n % 12))) || echo \"sum $n\" >> /failed
    sync
    echo $n > /rounds
done
echo done > /stopped
";

fn serve(host: &Host) -> Result<Server> {
    let mut command = Command::new(host.smsvmm());
    command.current_dir(host.folder()).args(["share", "iscsi"]);
    command.args(["--image", "disk.img", "--target", TARGET]);
    command.args(["--chap-user", "guest", "--chap-secret", "guest.secret"]);
    command.args([
        "--mutual-chap-user",
        "storage",
        "--mutual-chap-secret",
        "storage.secret",
    ]);
    for portal in PORTALS {
        command.args(["--listen", portal]);
    }
    Server::listening(command, &format!("{}:3260", PORTALS[0]))
}

fn admin(vm: &mut Vm, arguments: &str) -> Result<String> {
    Ok(vm
        .guest(&format!("/tools/usr/bin/iscsiadm {arguments} 2>&1"))?
        .replace('\r', ""))
}

/// The disk of the session over a portal.
fn device(vm: &mut Vm, portal: &str) -> Result<String> {
    let find = format!(
        "for s in /sys/class/iscsi_session/session*; do a=$(cat $s/device/connection*/iscsi_connection/connection*/persistent_address); \
         [ \"$a\" != {portal} ] || ls $s/device/target*/*:0/block; done"
    );
    vm.guest_until(&format!("[ -n \"$({find} 2> /dev/null)\" ]"))?;
    Ok(vm.guest(&find)?.trim().to_owned())
}

fn login(vm: &mut Vm) -> Result<[String; 2]> {
    for portal in PORTALS {
        admin(vm, &format!("-m node -T {TARGET} -p {portal} --login"))?;
    }
    Ok([device(vm, PORTALS[0])?, device(vm, PORTALS[1])?])
}

#[test]
fn the_initiator_of_linux_uses_a_disk_over_two_portals_of_which_one_goes() {
    Story::default()
        .guest_tools()
        .changes_the_host()
        .limit(LIMIT)
        .tell(|host| {
            host.image("disk.img", MIB)?;
            host.sh("echo 0123456789abcdef > guest.secret; echo fedcba9876543210 > storage.secret; chmod 600 *.secret")?;
            make_tap(host, "tap0", "")?;
            for portal in PORTALS {
                host.sh(&format!("/bin/ip address add {portal}/32 dev lo"))?;
            }
            let server = serve(host)?;
            let mut vm = host
                .vm("initiator")
                .limit(LIMIT)
                .file("load", 0o755, LOAD)
                .file("etc/passwd", 0o644, "root:x:0:0:root:/:/bin/sh\n")
                .file("etc/iscsi/iscsid.conf", 0o600, ISCSID)
                .file(
                    "etc/iscsi/initiatorname.iscsi",
                    0o600,
                    "InitiatorName=iqn.2026-11.org.example:guest\n",
                )
                .toml("[[net]]\nbackend = \"tap\"\ntap = \"tap0\"")
                .with_guest_tools()?
                .interactive()?;
            vm.guest("sh /tools-on")?;
            set_address(&mut vm)?;
            vm.guest(&format!("ip route add default via {HOST}"))?;
            vm.guest("modprobe sd_mod; mkdir -p /run/lock/iscsi /disk; /tools/usr/bin/iscsid")?;
            let found = admin(&mut vm, &format!("-m discovery -t sendtargets -p {}", PORTALS[0]))?;
            for portal in PORTALS {
                ensure!(found.contains(&format!("{portal}:3260,1 {TARGET}")), "{found}");
            }
            let ways = login(&mut vm)?;
            a_portal_goes(host, &mut vm, &ways)?;
            reservations(&mut vm, &ways)?;
            what_was_written_is_there_after_a_logout(&mut vm)?;
            vm.finish()?;
            server.end()
        });
}

/// A file system on both ways to the disk, under load.
fn a_portal_goes(host: &Host, vm: &mut Vm, ways: &[String; 2]) -> Result<()> {
    let numbers = ways
        .each_ref()
        .map(|way| vm.guest(&format!("cat /sys/block/{way}/dev")));
    let [first, second] = numbers;
    let (first, second) = (first?.trim().to_owned(), second?.trim().to_owned());
    vm.guest(&format!(
        "/tools/usr/bin/dmsetup create two --table '0 {} multipath 1 queue_if_no_path 0 1 1 round-robin 0 2 1 {first} 1 {second} 1' && \
         /tools/usr/bin/dmsetup mknodes",
        MIB * 2048
    ))?;
    vm.guest("/tools/usr/bin/mke2fs -q -t ext4 /dev/mapper/two && mount -t ext4 /dev/mapper/two /disk")?;
    vm.guest("sh /load > /dev/null 2>&1 &")?;
    let rounds = |vm: &mut Vm, more: u32| -> Result<()> {
        let now: u32 = vm.guest("cat /rounds 2> /dev/null || echo 0")?.trim().parse()?;
        vm.guest_until(&format!(
            "[ $(cat /rounds 2> /dev/null || echo 0) -ge {} ]",
            now + more
        ))
        .context("the load stands still")
    };
    rounds(vm, 2)?;
    host.sh(&format!("/bin/ip address delete {}/32 dev lo", PORTALS[1]))?;
    let status = "/tools/usr/bin/dmsetup status two";
    vm.guest_until(&format!("{status} | grep -q '{second} F'"))?;
    rounds(vm, 2)?;
    let said = vm.guest(status)?;
    ensure!(said.contains(&format!("{first} A")), "{said}");
    host.sh(&format!("/bin/ip address add {}/32 dev lo", PORTALS[1]))?;
    // The session comes back by itself; the way is taken again as multipathd would do it.
    vm.guest_until(&format!(
        "[ $(cat /sys/block/{}/device/state) = running ]",
        ways[1]
    ))?;
    vm.guest(&format!(
        "/tools/usr/bin/dmsetup message two 0 'reinstate_path {second}'"
    ))?;
    rounds(vm, 2)?;
    vm.guest("touch /stop")?;
    vm.guest_until("[ -e /stopped ]")?;
    vm.guest("[ ! -e /failed ]")?;
    vm.guest("umount /disk && echo 3 > /proc/sys/vm/drop_caches && /tools/usr/bin/dmsetup remove two")
        .map(drop)
}

/// Each session is an initiator port of its own.
fn reservations(vm: &mut Vm, ways: &[String; 2]) -> Result<()> {
    let persist = |vm: &mut Vm, arguments: &str, way: &str| {
        vm.guest(&format!(
            "/tools/usr/bin/sg_persist -n {arguments} /dev/{way} 2>&1"
        ))
    };
    for way in ways {
        // Whatever there is to be told.
        vm.guest(&format!(
            "until /tools/usr/bin/sg_turs /dev/{way} > /dev/null 2>&1; do usleep 1000; done"
        ))?;
    }
    persist(vm, "--out --register --param-sark=a1", &ways[0])?;
    persist(vm, "--out --reserve --param-rk=a1 --prout-type=1", &ways[0])?;
    let write = |way: &str| {
        format!(
            "dd if=/dev/zero of=/dev/{way} bs=4k seek={} count=1 oflag=direct 2>&1",
            MIB * 256 - 1
        )
    };
    vm.guest(&write(&ways[0]))?;
    let (status, said) = vm.try_guest(&write(&ways[1]))?;
    ensure!(
        status != 0 && said.contains("Invalid exchange"),
        "{status}: {said}"
    );
    persist(vm, "--out --clear --param-rk=a1", &ways[0])?;
    // It is told that reservations were preempted only where it had registered.
    vm.guest(&write(&ways[1])).map(drop)
}

fn what_was_written_is_there_after_a_logout(vm: &mut Vm) -> Result<()> {
    admin(vm, &format!("-m node -T {TARGET} --logout"))?;
    vm.guest_until("[ ! -e /sys/class/iscsi_session/session1 ]")?;
    let wrong = format!(
        "-m node -T {TARGET} -p {} -o update -n node.session.auth.password -v 0123456789wrong",
        PORTALS[1]
    );
    admin(vm, &wrong)?;
    let refused = format!(
        "/tools/usr/bin/iscsiadm -m node -T {TARGET} -p {} --login 2>&1",
        PORTALS[1]
    );
    let (status, said) = vm.try_guest(&refused)?;
    // ISCSI_ERR_LOGIN_AUTH_FAILED.
    ensure!(status == 24, "{status}: {said}");
    admin(vm, &format!("-m node -T {TARGET} -p {} --login", PORTALS[0]))?;
    let way = device(vm, PORTALS[0])?;
    vm.guest(&format!(
        "/tools/usr/bin/e2fsck -fn /dev/{way} 2>&1 && mount -t ext4 -o ro /dev/{way} /disk && cd /disk && sha256sum -c sum* > /dev/null && cd / && umount /disk"
    ))?;
    admin(vm, &format!("-m node -T {TARGET} --logout")).map(drop)
}
