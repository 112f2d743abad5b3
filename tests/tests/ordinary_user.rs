//! An ordinary user in group kvm needs nothing else: no root, no capability, no file in a certain place; and no library when
//! the program is the static one.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use stories::{Disk, Host, Story};

/// The user, and the number of group kvm on this host.
const USER: u32 = 1000;
const KVM: u32 = 994;

/// What the guest does: blocks of the disk, an address by DHCP, and the host's web server, which passt shows as the gateway.
const WORK: &str = "
    set -e
    dd if=/dev/urandom of=/tmp/data bs=64k count=64
    dd if=/tmp/data of=/dev/vda bs=64k conv=fsync
    echo 3 > /proc/sys/vm/drop_caches
    dd if=/dev/vda bs=64k count=64 | cmp - /tmp/data
    ip link set eth0 up
    udhcpc -i eth0 -n -q -s /lease
    wget -q -O - http://$(cat /tmp/gateway):8080/greeting
";

/// What the guest does with its address.
const LEASE: &str = "#!/bin/sh
    [ \"$1\" = bound ] || exit 0
    ip address add $ip/24 dev $interface
    ip route add default via $router
    echo $router > /tmp/gateway
";

/// A host on which only root and group kvm may use KVM, with a web server.
fn usual_host(host: &Host) -> Result<()> {
    chown("/dev/kvm", Some(0), Some(KVM))?;
    fs::set_permissions("/dev/kvm", fs::Permissions::from_mode(0o660))?;
    fs::set_permissions(host.folder(), fs::Permissions::from_mode(0o755))?;
    host.sh("mkdir www; echo hello from the host > www/greeting
        busybox httpd -p 8080 -h www")?;
    Ok(())
}

fn boots(host: &Host, name: &str, program: &Path) -> Result<()> {
    let disk = host.image(&format!("{name}.raw"), 16)?;
    chown(&disk, Some(USER), Some(USER))?;
    let machine = host
        .vm(name)
        .program(program)
        .disk(Disk::new(disk))
        .toml("[[net]]\nbackend = \"user\"")
        .file("lease", 0o755, LEASE)
        .script(WORK);

    let stranger = machine.clone().run_by(USER, USER).run()?;
    ensure!(
        stranger.exit_code() == Some(1) && stranger.log.contains("no permission to use /dev/kvm"),
        "who is not in group kvm: {:?}: {}",
        stranger.exit_code(),
        stranger.log
    );

    let guest = machine.run_by(USER, KVM).run()?.success()?;
    ensure!(
        guest.script_output().contains("hello from the host"),
        "{}",
        guest.console
    );
    // Not even a warning.
    ensure!(guest.log.lines().count() == 1, "{}", guest.log);
    Ok(())
}

#[test]
fn a_user_in_group_kvm_boots_a_machine_with_disk_and_network() {
    Story::default().changes_the_host().tell(|host| {
        usual_host(host)?;
        boots(host, "usual", host.smsvmm())
    });
}

#[test]
fn so_does_a_static_build_in_another_folder() {
    Story::default().changes_the_host().static_program().tell(|host| {
        usual_host(host)?;
        let elsewhere: PathBuf = host.folder().join("some/where else");
        fs::create_dir_all(&elsewhere)?;
        let program = elsewhere.join("smsvmm-1.0");
        fs::copy(host.static_smsvmm(), &program)?;
        let interpreter = b"/ld-linux-x86-64.so";
        let bytes = fs::read(&program)?;
        ensure!(
            !bytes
                .windows(interpreter.len())
                .any(|window| window == interpreter),
            "the program is not static"
        );
        boots(host, "moved", &program)
    });
}
