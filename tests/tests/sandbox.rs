//! The VMM is confined while the guest runs, and can still do everything that is asked of it.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use stories::{Disk, Vm, story};

/// A lab on a busy machine is slow.
const LIMIT: Duration = Duration::from_secs(220);

/// What every story's guest does first: all kinds of threads get work.
const WORK: &str = "
    dd if=/dev/zero of=/dev/vda bs=64k count=64 conv=fsync
    dd if=/dev/vda of=/dev/null bs=64k
    blkdiscard /dev/vda
    ip link set eth0 up
    udhcpc -i eth0 -n -q
    dd if=/dev/hwrng of=/dev/null bs=16 count=1
    echo guest: at work
";

/// `key` of a `/proc/.../status`.
fn status<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(":\t"))
}

/// Looks at every thread of the VMM; returns their names.
fn confined_threads(vm: &Vm) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(format!("/proc/{}/task", vm.pid()?.as_raw_nonzero()))? {
        let folder = entry?.path();
        let name = fs::read_to_string(folder.join("comm"))?.trim_end().to_owned();
        let text = fs::read_to_string(folder.join("status"))?;
        for set in ["CapEff", "CapPrm", "CapInh", "CapAmb"] {
            ensure!(
                status(&text, set) == Some("0000000000000000"),
                "{name} has capabilities:\n{text}"
            );
        }
        ensure!(
            status(&text, "NoNewPrivs") == Some("1"),
            "{name} may get privileges:\n{text}"
        );
        ensure!(
            status(&text, "Seccomp") == Some("2"),
            "{name} has no filter:\n{text}"
        );
        names.push(name);
    }
    Ok(names)
}

#[test]
fn every_thread_of_a_running_machine_is_confined() {
    story(|host| {
        let disk = host.image("disk", 64)?;
        let vm = host
            .vm("confined")
            .cpus(2)
            .disk(Disk::new(disk))
            .toml("[[net]]\nbackend = \"user\"\n[management]\nsocket = \"socket\"")
            .script(&format!("{WORK} sleep 600"))
            .limit(LIMIT)
            .start()?;
        vm.wait_for("guest: at work")?;
        // The management thread has had something to do, too.
        ensure!(vm.smsvmm(&["vm", "--socket", "socket", "status"])?.status == 0);

        let names = confined_threads(&vm)?;
        for expected in [
            "smsvmm",
            "vcpu0",
            "vcpu1",
            "io-disk0",
            "net0-q0",
            "management",
            "signals",
        ] {
            ensure!(
                names.iter().any(|name| name == expected),
                "no thread {expected} among {names:?}"
            );
        }
        ensure!(vm.smsvmm(&["vm", "--socket", "socket", "stop"])?.status == 0);
        let outcome = vm.wait(Duration::from_secs(60))?;
        ensure!(!outcome.log.contains("forbidden system call"), "{}", outcome.log);
        Ok(())
    });
}

/// The machine of a story in which devices come and go.
fn attachable(text: &str, seccomp: &str) -> String {
    format!(
        "{text}\n[management]\nsocket = \"socket\"\n[sandbox]\nseccomp = \"{seccomp}\"\npaths = [\"attachable\"]"
    )
}

fn command(vm: &Vm, arguments: &[&str]) -> Result<String> {
    let output = vm.smsvmm(&[&["vm", "--socket", "socket"], arguments].concat())?;
    let text = String::from_utf8_lossy(&output.bytes).into_owned();
    ensure!(
        output.status == 0,
        "smsvmm vm {arguments:?} ended with {}: {text}\n{}",
        output.status,
        vm.log()
    );
    Ok(text)
}

fn empty_image(path: &Path) -> Result<()> {
    let file = fs::File::create(path).with_context(|| path.display().to_string())?;
    Ok(file.set_len(32 << 20)?)
}

#[test]
fn devices_come_and_go_from_inside_the_sandbox_and_reboots_work() {
    story(|host| {
        let disk = host.image("disk", 64)?;
        let folder = host.folder().join("attaching");
        fs::create_dir_all(folder.join("attachable"))?;
        empty_image(&folder.join("attachable/inside"))?;
        empty_image(&folder.join("outside"))?;
        let script = format!(
            "{WORK}
            while [ ! -e /dev/vdb ]; do sleep 0.1; done
            dd if=/dev/zero of=/dev/vdb bs=64k count=16 conv=fsync && echo guest: got the disk
            while [ -e /dev/vdb ]; do sleep 0.1; done; echo guest: gave the disk
            while [ ! -e /sys/class/net/eth1 ]; do sleep 0.1; done
            ip link set eth1 up; udhcpc -i eth1 -n -q && echo guest: got the card
            sleep 600"
        );
        let vm = host
            .vm("attaching")
            .cpus(2)
            .disk(Disk::new(disk))
            .toml(&attachable("[[net]]\nbackend = \"user\"", "on"))
            .script(&script)
            .limit(LIMIT)
            .start()?;
        vm.wait_for("guest: at work")?;

        let refused = vm.smsvmm(&["vm", "--socket", "socket", "attach-disk", "outside"])?;
        ensure!(refused.status == 1, "a file outside of sandbox.paths was opened");
        ensure!(String::from_utf8_lossy(&refused.bytes).contains("Permission denied"));

        command(&vm, &["attach-disk", "attachable/inside", "--id", "later"])?;
        vm.wait_for("guest: got the disk")?;
        confined_threads(&vm)?;
        command(&vm, &["detach", "later", "--timeout", "2m"])?;
        vm.wait_for("guest: gave the disk")?;

        // passt cannot be started by a confined process: its helper does it.
        command(&vm, &["attach-net", "--id", "card"])?;
        vm.wait_for("guest: got the card")?;

        command(&vm, &["pause"])?;
        command(&vm, &["resume"])?;
        command(&vm, &["reset"])?;
        vm.wait_for("guest: at work")?;
        confined_threads(&vm)?;
        command(&vm, &["stop"])?;
        let outcome = vm.wait(Duration::from_secs(60))?;
        ensure!(!outcome.log.contains("forbidden system call"), "{}", outcome.log);
        ensure!(
            !folder.join("socket").exists(),
            "the management socket is still there"
        );
        Ok(())
    });
}
