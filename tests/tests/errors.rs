//! What a user does wrong, and what he is told: one line that names the object, what is the matter and what to do; the
//! documented exit status; and nothing half-started, so that after the remedy the same command works.
//!
//! Mistakes in vm.toml and on the command line need no KVM: crates/smsvmm/tests/mistakes.rs.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use stories::{Disk, Host, Kernel, Story};

/// An ordinary user of the host, and his group.
const USER: u32 = 1000;

/// A mistake.
struct Mistake {
    /// The user's whole vm.toml, but for its name, memory and consoles where this has none.
    toml: &'static str,
    /// Whether an ordinary user makes it; else root.
    user: bool,
    /// What the message says, among others.
    says: &'static [&'static str],
}

const fn root(toml: &'static str, says: &'static [&'static str]) -> Mistake {
    Mistake {
        toml,
        user: false,
        says,
    }
}

const fn user(toml: &'static str, says: &'static [&'static str]) -> Mistake {
    Mistake {
        toml,
        user: true,
        says,
    }
}

/// A kernel that is fine.
const KERNEL: &str = "[boot]\nkernel = \"kernel\"\n";

/// What is wrong with files, memory and network of the host. `KERNEL` stands before each that has no `[boot]`.
const MISTAKES: &[Mistake] = &[
    // Kernel and initrd.
    root("[boot]\nkernel = \"none\"", &["kernel", "/none", "No such file"]),
    root("[boot]\nkernel = \"short\"", &["/short", "is truncated"]),
    root("[boot]\nkernel = \"empty\"", &["/empty", "not a kernel"]),
    root("[boot]\nkernel = \"text\"", &["/text", "not a kernel"]),
    root("[boot]\nkernel = \"folder\"", &["/folder", "not a regular file"]),
    root(
        "[boot]\nkernel = \"kernel\"\ninitrd = \"none\"",
        &["initrd", "/none", "No such file"],
    ),
    user(
        "[boot]\nkernel = \"secret\"",
        &["kernel", "/secret", "Permission denied"],
    ),
    // Memory.
    root(
        "memory = \"64G\"",
        &["65536 MiB is more than this host has", "lower `memory`"],
    ),
    root(
        "memory = { size = \"256M\", huge-pages = \"2M\" }",
        &["128 huge pages", "nr_hugepages"],
    ),
    // Disks.
    root("[[disk]]\nimage = \"none\"", &["disk0", "/none", "No such file"]),
    root("[[disk]]\nimage = \"folder\"", &["disk0", "/folder", "neither"]),
    root(
        "[[disk]]\nimage = \"empty\"",
        &["disk0", "/empty", "is empty", "truncate"],
    ),
    root(
        "[[disk]]\nimage = \"cut\"",
        &["/cut", "cut off", "ext", "needs 16777216"],
    ),
    root(
        "[[disk]]\nimage = \"/dev/null\"",
        &["disk0", "/dev/null", "neither"],
    ),
    root(
        "[[disk]]\nimage = \"/dev/loop0\"",
        &["disk0", "/dev/loop0", "in use"],
    ),
    root(
        "[[disk]]\nimage = \"frozen/image\"",
        &[
            "disk0",
            "frozen/image",
            "Read-only file system",
            "or open it read-only",
        ],
    ),
    user(
        "[[disk]]\nimage = \"secret\"",
        &["disk0", "/secret", "Permission denied"],
    ),
    user(
        "[[disk]]\nimage = \"readable\"",
        &["disk0", "/readable", "Permission denied", "or open it read-only"],
    ),
    root(
        "[[disk]]\nimage = \"busy\"",
        &["disk0", "/busy", "in use by smsvmm (pid HOLDER)"],
    ),
    root(
        "[[disk]]\nimage = \"busy\"\nread-only = true",
        &["disk0", "/busy", "in use by smsvmm (pid HOLDER)"],
    ),
    // Network.
    root(
        "[[net]]\nbackend = \"tap\"\ntap = \"tap9\"",
        &["net0", "tap9", "ip tuntap add"],
    ),
    root(
        "[[net]]\nbackend = \"tap\"\ntap = \"tap0\"",
        &["net0", "tap0", "busy"],
    ),
    root(
        "[[net]]\nbackend = \"tap\"\ntap = \"lo\"",
        &["net0", "lo", "not a tap interface"],
    ),
    user(
        "[[net]]\nbackend = \"tap\"\ntap = \"tap1\"",
        &["net0", "tap1", "user"],
    ),
    root(
        "[[net]]\nbackend = \"user\"\nforward = [\"tcp:7777:22\"]",
        &["net0", "7777"],
    ),
    // Sockets, consoles, places.
    root(
        "[management]\nsocket = \"text\"",
        &["/text", "not a socket", "remove it"],
    ),
    root(
        "[management]\nsocket = \"holder/vm.sock\"",
        &["vm.sock", "somebody listens"],
    ),
    root(
        "[management]\nsocket = \"nowhere/vm.sock\"",
        &["nowhere/vm.sock", "No such file"],
    ),
    root(
        "[console]\nserial = \"file:nowhere/log\"",
        &["console", "nowhere/log", "No such file"],
    ),
    root("[console]\nserial = \"socket:text\"", &["console", "/text"]),
    root(
        "[sandbox]\npaths = [\"none\"]",
        &["sandbox.paths", "/none", "must exist"],
    ),
    // The host.
    root(
        "cpus = { count = 1, affinity = [\"900\"] }",
        &["cpus.affinity", "no CPU 900", "/sys/devices/system/cpu/online"],
    ),
];

/// All that a start could leave behind: files with their sizes.
fn files(folder: &Path) -> Result<BTreeMap<String, u64>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let entry = entry?;
        let data = entry.metadata()?;
        found.insert(entry.path().display().to_string(), data.len());
        if data.is_dir() {
            found.extend(files(&entry.path())?);
        }
    }
    Ok(found)
}

/// Starts the machine of `toml`; its exit status and what it says on standard error.
fn start(host: &Host, toml: &str, as_user: bool) -> Result<(Option<i32>, String)> {
    fs::write(host.folder().join("vm.toml"), toml)?;
    let mut command = Command::new(host.smsvmm());
    command.args(["run", "vm.toml"]).current_dir(host.folder());
    if as_user {
        command.uid(USER).gid(USER);
    }
    let output = command.output()?;
    Ok((
        output.status.code(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    ))
}

/// The vm.toml of a mistake: keys of the top level come first.
fn whole(toml: &str) -> String {
    let (top, sections) = match toml.find("[") {
        Some(0) => ("", toml),
        _ => (toml, ""),
    };
    let memory = if top.contains("memory") {
        ""
    } else {
        "memory = \"256M\"\n"
    };
    let kernel = if toml.contains("[boot]") { "" } else { KERNEL };
    let serial = if toml.contains("[console]") {
        ""
    } else {
        "[console]\nserial = \"null\"\n"
    };
    format!("name = \"wrong\"\n{memory}{top}\n{kernel}{serial}{sections}\n")
}

/// Files, interfaces and a machine that holds some of them.
fn prepare(host: &Host) -> Result<()> {
    let kernel = host.kernel_file(Kernel::Debian12Cloud, "bzImage");
    host.sh(&format!(
        "chmod 755 .
        cp {} kernel
        head -c 1000000 kernel > short
        : > empty; echo not a kernel > text; mkdir folder
        cp kernel secret; chmod 600 secret
        truncate -s 16M readable; chmod 644 readable
        truncate -s 16M cut; mke2fs -F cut > mke2fs.log; truncate -s 9M cut
        truncate -s 16M loop; mke2fs -F loop > mke2fs.log; losetup /dev/loop0 loop; mkdir mounted; mount /dev/loop0 mounted
        mkdir frozen; mount -t tmpfs none frozen; truncate -s 16M frozen/image; mount -o remount,ro frozen
        /bin/ip tuntap add dev tap0 mode tap; /bin/ip tuntap add dev tap1 mode tap user 4711
        truncate -s 16M busy",
        kernel.display()
    ))?;
    Ok(())
}

#[test]
fn each_mistake_gets_one_clear_line_and_leaves_nothing_behind() {
    Story::default().changes_the_host().tell(|host| {
        prepare(host)?;
        let holder = host
            .vm("holder")
            .disk(Disk::new(host.folder().join("busy")))
            .toml("[[net]]\nbackend = \"tap\"\ntap = \"tap0\"\n[[net]]\nforward = [\"tcp:7777:22\"]")
            .interactive()?;
        let pid = holder.pid()?.as_raw_nonzero().to_string();
        fs::write(host.folder().join("vm.toml"), "")?;
        let before: Vec<String> = files(host.folder())?.into_keys().collect();
        // A helper that was started in vain has a moment to end.
        let processes = "sleep 1; cat /proc/[0-9]*/comm 2> /dev/null | grep -E 'smsvmm|passt' | sort";
        let running = host.sh(processes)?;
        let mut wrong = Vec::new();
        for mistake in MISTAKES {
            let toml = whole(mistake.toml);
            let (status, said) = start(host, &toml, mistake.user)?;
            println!("{:?}:\n    {}", mistake.toml, said.trim_end());
            let clear = said.lines().count() == 1
                && said.starts_with("smsvmm: ")
                && mistake.says.iter().all(|part| said.contains(&part.replace("HOLDER", &pid)));
            let after: Vec<String> = files(host.folder())?.into_keys().collect();
            if status != Some(1) || !clear || before != after {
                wrong.push(format!("{:?}: status {status:?}, says {said:?}, not {:?}; {after:?}", mistake.toml, mistake.says));
            }
        }
        ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
        let still_running = host.sh(processes)?;
        ensure!(still_running == running, "{still_running} are running, not {running}");

        // Now that no mistake is made, the same files serve.
        holder.finish()?;
        let (status, said) = {
            let initrd = host.kernel_file(Kernel::Debian12Cloud, "initrd");
            let toml = format!("memory = \"256M\"\n[boot]\nkernel = \"kernel\"\ninitrd = {initrd:?}\n[[disk]]\nimage = \"busy\"\n");
            start(host, &format!("name = \"right\"\n{toml}"), false)?
        };
        ensure!(status == Some(0) && said.contains("powered off"), "{status:?}: {said}");
        Ok(())
    });
}

#[test]
fn who_may_not_use_kvm_is_told_the_group() {
    Story::default().changes_the_host().tell(|host| {
        prepare(host)?;
        fs::set_permissions("/dev/kvm", fs::Permissions::from_mode(0o600))?;
        let (status, said) = start(host, &whole(""), true)?;
        fs::set_permissions("/dev/kvm", fs::Permissions::from_mode(0o666))?;
        ensure!(
            status == Some(1)
                && said.lines().count() == 1
                && said.contains("no permission to use /dev/kvm; join the group"),
            "{status:?}: {said}"
        );
        Ok(())
    });
}
