//! Control groups (cgroup v2): what a machine's processes may take, how all of them are ended at once, and whether memory was short.
//!
//! ```text
//!   .../smsvmm.service           what systemd delegates, or machines.control-group of host.toml
//!     ├─ manager                 this process: a group that limits others has no processes itself
//!     ├─ vm-web1                 the machine's process, its helper, passt
//!     └─ vm-db1
//! ```
//!
//! A group is made when its machine is started, and removed when it has ended. A manager that is started anew finds those of machines that run.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use api::VmName;
use crc_fast::{CrcAlgorithm, checksum};
use rustix::io::Errno;

/// Controllers that limits need, as far as the system has them.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];
/// The group of the manager itself.
const OWN: &str = "manager";
/// What `cpu.max` counts in, in microseconds.
const PERIOD: u64 = 100_000;
/// How long a group may take to become empty after its processes were killed.
const EMPTY: Duration = Duration::from_secs(2);
const LOOK: Duration = Duration::from_millis(20);

/// What a machine's processes may take.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Limits {
    /// 1 to 10000.
    pub(crate) cpu_weight: Option<u32>,
    /// Percent of one processor.
    pub(crate) cpu_max: Option<u32>,
    /// Bytes.
    pub(crate) memory_max: Option<u64>,
    /// Threads and processes.
    pub(crate) pids_max: Option<u32>,
}

impl Limits {
    /// Files, and what is written to them.
    fn files(&self) -> Vec<(&'static str, String)> {
        let cpu_max = self
            .cpu_max
            .map(|percent| format!("{} {PERIOD}", u64::from(percent) * PERIOD / 100));
        let files = [
            ("cpu.weight", self.cpu_weight.map(|weight| weight.to_string())),
            ("cpu.max", cpu_max),
            ("memory.max", self.memory_max.map(|bytes| bytes.to_string())),
            ("pids.max", self.pids_max.map(|most| most.to_string())),
        ];
        files
            .into_iter()
            .filter_map(|(file, value)| Some((file, value?)))
            .collect()
    }
}

/// The folder in which groups of machines are made. It goes with the last of them.
#[derive(Debug)]
pub(crate) struct Groups {
    folder: PathBuf,
}

fn write(path: &Path, text: &str) -> io::Result<()> {
    OpenOptions::new()
        .write(true)
        .open(path)?
        .write_all(text.as_bytes())
}

fn is(error: &io::Error, errno: Errno) -> bool {
    Errno::from_io_error(error) == Some(errno)
}

fn told(path: &Path) -> impl FnOnce(io::Error) -> String + use<'_> {
    move |error| format!("{}: {error}", path.display())
}

impl Groups {
    /// Those below `wanted`, a path in the tree of control groups, or below what was delegated to this process; where nobody delegates, as
    /// there is no systemd, below one that is named after `state`, the manager's folder.
    ///
    /// # Errors
    /// There can be none, and why.
    pub(crate) fn open(wanted: Option<&Path>, state: &Path) -> Result<Self, String> {
        let read = |path: &str| fs::read_to_string(path).map_err(told(Path::new(path)));
        let tree = mounted(&read("/proc/self/mountinfo")?).ok_or("no cgroup2 is mounted")?;
        let own = own(&read("/proc/self/cgroup")?).ok_or("this process is in no cgroup2")?;
        let below = |path: &Path| tree.join(path.strip_prefix("/").unwrap_or(path));
        let this = match wanted {
            Some(wanted) => Self::in_group(below(wanted))?,
            None if own == Path::new("/") => {
                let tag = checksum(CrcAlgorithm::Crc64Nvme, state.as_os_str().as_encoded_bytes());
                Self::in_group(tree.join(format!("smsvmm-{tag:016x}")))?
            }
            None => {
                let own = below(&own);
                let delegated = if own.ends_with(OWN) {
                    own.parent().unwrap_or(&own)
                } else {
                    &own
                };
                if !is_delegated(delegated) {
                    return Err(format!(
                        "{} is not delegated to the manager; its unit needs Delegate=yes, or name a group by \
                         machines.control-group in host.toml",
                        delegated.display()
                    ));
                }
                move_aside(delegated).map_err(told(delegated))?;
                Self::in_folder(delegated.to_owned())?
            }
        };
        Ok(this)
    }

    /// Those in a group that is ours to make, in one that has to give what it is to give.
    fn in_group(folder: PathBuf) -> Result<Self, String> {
        if let Some(above) = folder.parent() {
            pass_on(above);
        }
        Self::in_folder(folder)
    }

    /// Those in a folder, which is made if it is not there.
    pub(crate) fn in_folder(folder: PathBuf) -> Result<Self, String> {
        let made = match fs::create_dir(&folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => Ok(()),
        };
        made.map_err(told(&folder))?;
        pass_on(&folder);
        Ok(Self { folder })
    }

    /// The group of a machine.
    fn folder(&self, name: &VmName) -> PathBuf {
        self.folder.join(format!("vm-{name}"))
    }

    /// The group of a machine that is to be started, which is made, or of one that runs, by its process.
    pub(crate) fn group(&self, name: &VmName, limits: &Limits, runs: Option<u32>) -> io::Result<Group> {
        let folder = self.folder(name);
        fs::create_dir_all(&folder)?;
        for (file, value) in limits.files() {
            if let Err(error) = write(&folder.join(file), &value) {
                tracing::warn!(machine = %name, file, value, %error, "a limit cannot be set for a machine's control group");
            }
        }
        if limits.memory_max.is_some() {
            // A machine without its helper is of no use.
            let _ = write(&folder.join("memory.oom.group"), "1");
        }
        if let Some(pid) = runs {
            // It is there already, or a manager without control groups has started it.
            write(&folder.join("cgroup.procs"), &pid.to_string())?;
        }
        let shortages = Shortages::read(&folder);
        Ok(Group { folder, shortages })
    }
}

impl Drop for Groups {
    fn drop(&mut self) {
        // It stays as long as there are machines, or others, in it.
        let _ = fs::remove_dir(&self.folder);
    }
}

/// The group of a machine.
#[derive(Debug, Clone)]
pub(crate) struct Group {
    folder: PathBuf,
    /// What there had been when it was made, or found.
    shortages: Shortages,
}

impl Group {
    pub(crate) fn path(&self) -> &Path {
        &self.folder
    }

    /// Who writes 0 to it is moved into the group.
    pub(crate) fn entrance(&self) -> io::Result<File> {
        OpenOptions::new()
            .write(true)
            .open(self.folder.join("cgroup.procs"))
    }

    /// Ends all its processes at once.
    pub(crate) fn kill(&self) -> io::Result<()> {
        write(&self.folder.join("cgroup.kill"), "1")
    }

    /// When the machine's process has ended: whether memory was short, for people; then the end of what is left, and of the group.
    pub(crate) fn end(self) -> Option<String> {
        let shortage = self.shortage();
        // A kernel before 5.14 cannot; helpers end by themselves as well.
        let _ = self.kill();
        let tries = EMPTY.as_millis() / LOOK.as_millis();
        for _ in 0..tries {
            match fs::remove_dir(&self.folder) {
                Err(error) if is(&error, Errno::BUSY) => std::thread::sleep(LOOK),
                _ => return shortage,
            }
        }
        tracing::warn!(folder = %self.folder.display(), "a control group does not become empty");
        shortage
    }

    fn shortage(&self) -> Option<String> {
        let now = Shortages::read(&self.folder);
        if now.kills <= self.shortages.kills {
            return None;
        }
        let limit = fs::read_to_string(self.folder.join("memory.max")).unwrap_or_default();
        Some(match limit.trim().parse() {
            Ok(bytes) if now.of_limit > self.shortages.of_limit => format!(
                "out of memory: it needed more than {}, the limit of its control group (memory-max)",
                api::ByteSize::from_bytes(bytes)
            ),
            _ => "out of memory: the host has no more, and the kernel has ended it".to_owned(),
        })
    }
}

/// `memory.events`.
#[derive(Debug, Clone, Copy, Default)]
struct Shortages {
    /// The limit was reached, and nothing could be freed.
    of_limit: u64,
    /// Processes that were killed for memory, whoever was short of it.
    kills: u64,
}

impl Shortages {
    fn read(folder: &Path) -> Self {
        let text = fs::read_to_string(folder.join("memory.events")).unwrap_or_default();
        let count = |key: &str| {
            let mut lines = text.lines().filter_map(|line| line.split_once(' '));
            let found = lines.find(|(found, _)| *found == key);
            found.and_then(|(_, count)| count.parse().ok()).unwrap_or(0)
        };
        Self {
            of_limit: count("oom"),
            kills: count("oom_kill"),
        }
    }
}

/// Where cgroup2 is mounted, as /proc/self/mountinfo has it.
fn mounted(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        let place = mount.split(' ').nth(4)?;
        (kind.split(' ').next() == Some("cgroup2")).then(|| PathBuf::from(place))
    })
}

/// The own group, as /proc/self/cgroup has it.
fn own(groups: &str) -> Option<PathBuf> {
    groups
        .lines()
        .find_map(|line| line.strip_prefix("0::"))
        .map(PathBuf::from)
}

/// Has a group give limits to those below it.
fn pass_on(folder: &Path) {
    for controller in CONTROLLERS {
        // What is missing is told when a limit needs it.
        let _ = write(&folder.join("cgroup.subtree_control"), &format!("+{controller}"));
    }
}

/// Whether systemd leaves a group to this process.
fn is_delegated(folder: &Path) -> bool {
    ["user.delegate", "trusted.delegate"].iter().any(|name| {
        let mut value = [0; 8];
        let length = rustix::fs::getxattr(folder, *name, &mut value);
        length.is_ok_and(|length| value.get(..length) == Some(b"1".as_slice()))
    })
}

/// Moves all processes of a group into one below it: only a group without processes can give its children anything.
fn move_aside(folder: &Path) -> io::Result<()> {
    let aside = folder.join(OWN);
    match fs::create_dir(&aside) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let entrance = aside.join("cgroup.procs");
    for pid in fs::read_to_string(folder.join("cgroup.procs"))?.lines() {
        match write(&entrance, pid) {
            // It has ended meanwhile.
            Err(error) if is(&error, Errno::SRCH) => {}
            other => other?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILES: [&str; 8] = [
        "cgroup.procs",
        "cgroup.kill",
        "cpu.weight",
        "cpu.max",
        "memory.max",
        "memory.oom.group",
        "pids.max",
        "memory.events",
    ];

    /// A folder with the files that a control group would have.
    fn imitate(folder: &Path) {
        fs::create_dir_all(folder).unwrap();
        for file in FILES {
            fs::write(folder.join(file), "").unwrap();
        }
    }

    fn name() -> VmName {
        "web1".parse().unwrap()
    }

    #[test]
    fn limits_are_written_and_processes_are_moved() {
        let folder = tempfile::tempdir().unwrap();
        let of_vm = folder.path().join("vms/vm-web1");
        let groups = Groups::in_folder(folder.path().join("vms")).unwrap();
        imitate(&of_vm);
        let limits = Limits {
            cpu_weight: Some(50),
            cpu_max: Some(250),
            memory_max: Some(1 << 30),
            pids_max: None,
        };
        let group = groups.group(&name(), &limits, Some(17)).unwrap();
        let read = |file: &str| fs::read_to_string(of_vm.join(file)).unwrap();
        assert_eq!(group.path(), of_vm);
        assert_eq!(
            (read("cpu.weight"), read("cpu.max")),
            ("50".into(), "250000 100000".into())
        );
        assert_eq!(
            (read("memory.max"), read("pids.max")),
            ("1073741824".into(), String::new())
        );
        assert_eq!(
            (read("cgroup.procs"), read("memory.oom.group")),
            ("17".into(), "1".into())
        );
        group.entrance().unwrap().write_all(b"0").unwrap();
        group.kill().unwrap();
        assert_eq!(read("cgroup.kill"), "1");
    }

    #[test]
    fn why_memory_was_short_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let of_vm = folder.path().join("vm-web1");
        let groups = Groups::in_folder(folder.path().to_owned()).unwrap();
        imitate(&of_vm);
        // What was before does not count.
        fs::write(of_vm.join("memory.events"), "low 0\noom 1\noom_kill 1\n").unwrap();
        fs::write(of_vm.join("memory.max"), "1073741824\n").unwrap();
        let group = groups.group(&name(), &Limits::default(), None).unwrap();
        assert_eq!(group.shortage(), None);
        fs::write(of_vm.join("memory.events"), "low 0\noom 2\noom_kill 3\n").unwrap();
        let text = group.shortage().unwrap();
        assert!(text.contains("more than 1G, the limit"), "{text}");
        fs::write(of_vm.join("memory.events"), "low 0\noom 1\noom_kill 2\n").unwrap();
        let text = group.end().unwrap();
        assert!(text.contains("the host has no more"), "{text}");
    }

    #[test]
    fn where_groups_are() {
        let mounts = "24 29 0:21 / /proc rw - proc proc rw\n\
            30 24 0:26 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n";
        assert_eq!(mounted(mounts), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(mounted("24 29 0:21 / /proc rw - proc proc rw"), None);
        let groups = "4:memory:/x\n0::/system.slice/smsvmm.service\n";
        assert_eq!(own(groups), Some("/system.slice/smsvmm.service".into()));
        assert_eq!(own("4:memory:/x\n"), None);
    }
}
