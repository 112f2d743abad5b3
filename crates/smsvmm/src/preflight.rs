//! `smsvmm run --dry-run`: could this machine be started on this host?
//!
//! Opens what may be opened without changing anything (kernel, images under the lock that a start would take) and only looks
//! at the rest (sockets, memory, network). Unlike a start, it does not end at the first problem.

use std::fs::{self, File};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use api::Problem;
use api::virtual_disk::VirtualDiskStatus;
use block_io::{BlockDevice, HostDevice, OpenOptions, error_chain};
use serde::Serialize;
use storage_manager::Flow;
use vmm::boot::{BootFiles, Kernel};
use vmm::config::{ConsoleSpec, DiskConfig, HugePages, NetBackend, NetConfig, VmConfig};
use vmm::host::{self, Finding, Report};

use crate::exit::Exit;
use crate::{manager_disks, output};

/// What `--dry-run --json` prints.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Answer<'a> {
    can_start: bool,
    checks: &'a [Finding],
    configuration: &'a VmConfig,
}

pub(crate) fn report(config: &VmConfig, json: bool) -> anyhow::Result<Exit> {
    let report = Report {
        findings: examine(config),
    };
    let can_start = report.can_boot();
    if json {
        output::print_json(&Answer {
            can_start,
            checks: &report.findings,
            configuration: config,
        })?;
    } else {
        let verdict = if can_start {
            "This machine can be started."
        } else {
            "This machine cannot be started; see FAIL above."
        };
        output::print(&format!("{}\n{report}\n{verdict}\n", toml::to_string(config)?))?;
    }
    Ok(if can_start { Exit::Success } else { Exit::Failed })
}

fn examine(config: &VmConfig) -> Vec<Finding> {
    let mut findings = vec![kvm(), kernel(config), memory(config)];
    findings.extend(processors(config));
    let (pool, mut pool_disks) = pool(config);
    findings.extend(pool);
    findings.extend(config.disks.iter().map(|disk| match &disk.file {
        Some(file) => pool_disk(disk, file, pool_disks.next()),
        None => image(disk),
    }));
    findings.extend(config.nets.iter().map(net));
    findings.extend(console("console.serial", &config.console.serial));
    findings.extend(
        config
            .console
            .virtio
            .as_ref()
            .and_then(|spec| console("console.virtio", spec)),
    );
    findings.extend(
        config
            .management
            .as_ref()
            .map(|management| socket("management.socket", &management.socket)),
    );
    findings
}

fn kvm() -> Finding {
    match host::can_boot_stock_kernel() {
        Ok(_) => Finding::ok("host", "KVM runs stock kernels"),
        Err(error) => Finding::fail(
            "host",
            error_chain(&error),
            "`smsvmm host check` shows everything",
        ),
    }
}

fn kernel(config: &VmConfig) -> Finding {
    let boot = &config.boot;
    let files = BootFiles {
        kernel: boot.kernel.clone(),
        initrd: boot.initrd.clone(),
        command_line: boot.cmdline.clone(),
    };
    match Kernel::open(files) {
        Ok(_) => Finding::ok("boot", format!("{} can be booted", boot.kernel.display())),
        Err(error) => Finding::fail(
            "boot",
            error_chain(&error),
            "set boot.kernel, boot.initrd, boot.cmdline",
        ),
    }
}

fn memory(config: &VmConfig) -> Finding {
    let size = config.memory.size;
    let reserved = match config.memory.huge_pages {
        HugePages::None | HugePages::Transparent => None,
        HugePages::Size2M => Some(2 << 10),
        HugePages::Size1G => Some(1 << 20),
    };
    if let Some(kib) = reserved {
        let path = format!("/sys/kernel/mm/hugepages/hugepages-{kib}kB/free_hugepages");
        let free: u64 = fs::read_to_string(&path)
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(0);
        let needed = size.bytes() / (kib << 10);
        if free < needed {
            return Finding::fail(
                "memory",
                format!("{size} takes {needed} huge pages of {kib} KiB, {free} are free"),
                format!(
                    "`echo {needed} > {}` as root, or memory.huge-pages = \"thp\"",
                    path.replace("free_", "nr_")
                ),
            );
        }
        return Finding::ok("memory", format!("{needed} of {free} free huge pages"));
    }
    match host::available_memory() {
        Some(available) if available < size => Finding::fail(
            "memory",
            format!(
                "{size} is more than the {} MiB that this host has available",
                available.bytes() >> 20
            ),
            "set memory to less, or end something",
        ),
        Some(available) => Finding::ok(
            "memory",
            format!("{size} of {} MiB available", available.bytes() >> 20),
        ),
        None => Finding::warn("memory", "cannot find out how much this host has", "mount /proc"),
    }
}

fn processors(config: &VmConfig) -> Option<Finding> {
    let error = check_processors(config).err()?;
    Some(Finding::fail("cpus", error.to_string(), ""))
}

/// Refuses processors of the host that are not there.
pub(crate) fn check_processors(config: &VmConfig) -> anyhow::Result<()> {
    const ONLINE: &str = "/sys/devices/system/cpu/online";
    let last: Option<u16> = fs::read_to_string(ONLINE)
        .ok()
        .and_then(|online| online.trim().rsplit([',', '-']).next()?.parse().ok());
    // Where the kernel does not say, it refuses them itself, later.
    let Some(last) = last else { return Ok(()) };
    let mut wanted = config.cpus.affinity.iter().flat_map(|cpus| cpus.iter());
    if let Some(absent) = wanted.find(|cpu| *cpu > last) {
        anyhow::bail!(
            "cpus.affinity: this host has no CPU {absent}, the last is {last}; name CPUs of {ONLINE}"
        );
    }
    Ok(())
}

/// Looks at the pool and, in the order of the configuration, at the disks in it, without changing anything.
fn pool(
    config: &VmConfig,
) -> (
    Option<Finding>,
    impl Iterator<Item = Result<VirtualDiskStatus, Problem>>,
) {
    const TOPIC: &str = "pool";
    if let Some(socket) = &config.manager {
        let (finding, disks) = manager(socket, config);
        return (Some(finding), disks.into_iter());
    }
    let Some(pool) = &config.pool else {
        return (None, Vec::new().into_iter());
    };
    let files = config.disks.iter().filter_map(|disk| disk.file.as_deref());
    let disks = files.map(|file| file.split_once('@').map_or(file, |(disk, _)| disk).to_owned());
    match storage_manager::look_at_disks(pool.devices.clone(), disks.collect(), &mut |_| Flow::GoOn) {
        Ok((status, disks)) => {
            let text = format!(
                "{}: {} devices, {} volumes",
                status.name,
                status.devices.len(),
                status.volumes.len()
            );
            (Some(Finding::ok(TOPIC, text)), disks.into_iter())
        }
        Err(problem) => {
            let remedy = problem.remedy.clone().unwrap_or_default();
            let finding = Finding::fail(TOPIC, problem.detail, remedy);
            (Some(finding), Vec::new().into_iter())
        }
    }
}

/// Asks the manager how its disks are that the configuration names.
fn manager(socket: &Path, config: &VmConfig) -> (Finding, Vec<Result<VirtualDiskStatus, Problem>>) {
    const TOPIC: &str = "manager";
    let path = socket.display();
    if let Err(error) = UnixStream::connect(socket) {
        let text = format!("nobody answers at {path}: {error}");
        let finding = Finding::fail(TOPIC, text, "start `smsvmm serve`, or name its socket");
        return (finding, Vec::new());
    }
    let disks = config.disks.iter();
    let found = disks.filter_map(|disk| Some(manager_disks::look(socket, disk, disk.file.as_deref()?)));
    (
        Finding::ok(TOPIC, format!("it answers at {path}")),
        found.collect(),
    )
}

/// What was found of a disk of the pool; nothing if the pool cannot be opened.
fn pool_disk(disk: &DiskConfig, file: &str, found: Option<Result<VirtualDiskStatus, Problem>>) -> Finding {
    const TOPIC: &str = "disk";
    match found {
        Some(Ok(_)) => Finding::ok(
            TOPIC,
            format!("{}: {file} in the pool, {}", disk.id, disk.mode.name()),
        ),
        Some(Err(problem)) => {
            let remedy = problem.remedy.clone();
            let remedy = remedy.unwrap_or_else(|| "`smsvmm disk list` shows what there is".to_owned());
            Finding::fail(TOPIC, format!("{}: {}", disk.id, problem.detail), remedy)
        }
        None => Finding::fail(
            TOPIC,
            format!("{}: {file} is in a pool that cannot be opened", disk.id),
            "see pool above",
        ),
    }
}

fn image(disk: &DiskConfig) -> Finding {
    const TOPIC: &str = "disk";
    if let Some(socket) = &disk.vhost_user {
        return served_disk(disk, socket);
    }
    let Some(image) = &disk.image else {
        // The configuration was checked.
        return Finding::fail(
            TOPIC,
            format!("{}: lies on nothing", disk.id),
            "give it an image or a file",
        );
    };
    let path = image.display();
    let options = OpenOptions {
        read_only: disk.read_only,
        ..OpenOptions::default()
    };
    // Under the lock that a start takes, for a moment.
    let device = match HostDevice::open(image, &options) {
        Ok(device) => device,
        Err(error) => {
            let remedy = "give a raw image or block device that this user may open";
            return Finding::fail(TOPIC, format!("{}: {}", disk.id, error_chain(&error)), remedy);
        }
    };
    if device.geometry().size == 0 {
        return Finding::fail(
            TOPIC,
            format!("{}: {path} is empty", disk.id),
            "give it a size, for example by `truncate -s 10G`",
        );
    }
    if let Err(error) = check_contents(disk) {
        return Finding::fail(
            TOPIC,
            format!("{}: {error:#}", disk.id),
            "use the whole image, or make it larger",
        );
    }
    let mode = if disk.read_only { "read-only" } else { "writable" };
    Finding::ok(
        TOPIC,
        format!(
            "{}: {path}, {} MiB, {mode}",
            disk.id,
            device.geometry().size >> 20
        ),
    )
}

/// Looks whether somebody is there; what the disk is like shows when it is used.
fn served_disk(disk: &DiskConfig, socket: &Path) -> Finding {
    const TOPIC: &str = "disk";
    let path = socket.display();
    match UnixStream::connect(socket) {
        Ok(_) => Finding::ok(TOPIC, format!("{}: served at {path}", disk.id)),
        Err(error) => Finding::fail(
            TOPIC,
            format!("{}: nobody serves at {path}: {error}", disk.id),
            "start the server first, for example `smsvmm share vhost-user`",
        ),
    }
}

/// Refuses an image that is too small for what lies on it. One that cannot be read is left to those who open it.
pub(crate) fn check_contents(disk: &DiskConfig) -> anyhow::Result<()> {
    let Some(image) = &disk.image else { return Ok(()) };
    if let Ok(Some(found)) = host::find_cut_off(image) {
        anyhow::bail!(
            "{} is cut off: it has {} bytes, and {} on it needs {}",
            image.display(),
            found.size,
            found.contents,
            found.needed
        );
    }
    Ok(())
}

fn net(net: &NetConfig) -> Finding {
    const TOPIC: &str = "net";
    let tap = match (net.backend, &net.tap) {
        (NetBackend::Tap, Some(tap)) => tap,
        _ => {
            return match host::find_program("passt") {
                Some(path) => Finding::ok(TOPIC, format!("{}: user network by {}", net.id, path.display())),
                None => Finding::fail(
                    TOPIC,
                    format!("{}: passt is not installed", net.id),
                    "`apt install passt`",
                ),
            };
        }
    };
    if let Err(error) = File::options().read(true).write(true).open("/dev/net/tun") {
        let remedy = "`smsvmm host check` says what to do; backend = \"user\" works without";
        return Finding::fail(
            TOPIC,
            format!("{}: /dev/net/tun cannot be opened: {error}", net.id),
            remedy,
        );
    }
    let folder = Path::new("/sys/class/net").join(tap.as_str());
    let attribute = |name: &str| {
        fs::read_to_string(folder.join(name))
            .ok()
            .map(|text| text.trim().to_owned())
    };
    let user = rustix::process::geteuid();
    match attribute("tun_flags") {
        Some(_) => match attribute("owner") {
            Some(owner) if !user.is_root() && owner != user.as_raw().to_string() => Finding::fail(
                TOPIC,
                format!("{}: the tap interface {tap} belongs to user {owner}", net.id),
                format!(
                    "`ip tuntap add dev {tap} mode tap user {}` as root",
                    user.as_raw()
                ),
            ),
            _ => Finding::ok(TOPIC, format!("{}: tap interface {tap}", net.id)),
        },
        None if folder.exists() => Finding::fail(
            TOPIC,
            format!("{}: {tap} is not a tap interface", net.id),
            "name another interface",
        ),
        None => Finding::fail(
            TOPIC,
            format!("{}: there is no tap interface {tap}", net.id),
            format!(
                "`ip tuntap add dev {tap} mode tap user {} && ip link set {tap} up` as root",
                user.as_raw()
            ),
        ),
    }
}

fn console(topic: &'static str, spec: &ConsoleSpec) -> Option<Finding> {
    match spec {
        ConsoleSpec::Stdio | ConsoleSpec::Null | ConsoleSpec::Pty(None) => None,
        ConsoleSpec::Pty(Some(path)) | ConsoleSpec::File(path) => Some(match folder_problem(path) {
            None => Finding::ok(topic, path.display().to_string()),
            Some(problem) => Finding::fail(topic, problem, "choose another path"),
        }),
        ConsoleSpec::Socket(path) => Some(socket(topic, path)),
    }
}

/// A socket that is to be made at `path`.
fn socket(topic: &'static str, path: &Path) -> Finding {
    if let Some(problem) = folder_problem(path) {
        return Finding::fail(topic, problem, "choose another path");
    }
    match fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.file_type().is_socket() => Finding::fail(
            topic,
            format!("{} exists and is not a socket", path.display()),
            "remove it or choose another path",
        ),
        Ok(_) if UnixStream::connect(path).is_ok() => Finding::fail(
            topic,
            format!("somebody listens on {} already", path.display()),
            "end that machine first or choose another path",
        ),
        _ => Finding::ok(topic, path.display().to_string()),
    }
}

/// Why nothing can be made at `path`.
fn folder_problem(path: &Path) -> Option<String> {
    let folder = path.parent()?;
    match rustix::fs::access(folder, rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK) {
        Ok(()) => None,
        Err(error) => Some(format!(
            "cannot write to the folder {}: {error}",
            folder.display()
        )),
    }
}
