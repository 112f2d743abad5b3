//! What else of the host matters: kernel, memory, I/O, network, confinement, limits.

use std::fs::{self, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use api::ByteSize;
use rustix::process::{Resource, getrlimit};

use super::report::Finding;

pub(super) fn examine() -> Vec<Finding> {
    vec![
        kernel(),
        memory(),
        huge_pages(),
        io_uring(),
        tap(),
        passt(),
        landlock(),
        seccomp(),
        open_files(),
        locked_memory(),
    ]
}

fn read(path: impl AsRef<Path>) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

fn kernel() -> Finding {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy().into_owned();
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version < (6, 1) {
        let remedy = "Debian 12's Linux 6.1 is the oldest that is tested";
        return Finding::warn("kernel", format!("Linux {release}"), remedy);
    }
    Finding::ok("kernel", format!("Linux {release}"))
}

/// Memory that a new guest may take, in bytes: what the host has left, or what the control group has left if that is less.
pub fn available_memory() -> Option<ByteSize> {
    let info = read("/proc/meminfo")?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    let host = kib.checked_mul(1024)?;
    Some(ByteSize::from_bytes(
        control_group_room().map_or(host, |room| room.min(host)),
    ))
}

/// What the memory limits of this process's control groups (version 2) leave.
fn control_group_room() -> Option<u64> {
    let own = read("/proc/self/cgroup")?;
    let own = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let mut folder = Path::new("/sys/fs/cgroup").join(own);
    let mut room: Option<u64> = None;
    while folder.starts_with("/sys/fs/cgroup") {
        let number = |name: &str| read(folder.join(name))?.parse::<u64>().ok();
        if let (Some(max), Some(current)) = (number("memory.max"), number("memory.current")) {
            let left = max.saturating_sub(current);
            room = Some(room.map_or(left, |room| room.min(left)));
        }
        if !folder.pop() {
            break;
        }
    }
    room
}

fn memory() -> Finding {
    match available_memory() {
        Some(size) if size >= ByteSize::from_mib(256) => {
            Finding::ok("memory", format!("{} MiB available", size.bytes() >> 20))
        }
        Some(size) => Finding::warn(
            "memory",
            format!("only {} MiB available", size.bytes() >> 20),
            "a small Linux guest needs about 256 MiB; end something or add memory",
        ),
        None => Finding::warn(
            "memory",
            "MemAvailable of /proc/meminfo cannot be read",
            "mount /proc",
        ),
    }
}

fn huge_pages() -> Finding {
    let thp = read("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    let thp = thp
        .split_whitespace()
        .find_map(|word| word.strip_prefix('[')?.strip_suffix(']'))
        .unwrap_or("absent")
        .to_owned();
    let free = |size: &str| {
        read(format!(
            "/sys/kernel/mm/hugepages/hugepages-{size}kB/free_hugepages"
        ))
    };
    let reserved = format!(
        "free reserved pages: {} of 2 MiB, {} of 1 GiB",
        free("2048").unwrap_or_else(|| "0".to_owned()),
        free("1048576").unwrap_or_else(|| "0".to_owned())
    );
    if thp == "always" || thp == "madvise" {
        Finding::ok("huge pages", format!("transparent: {thp}; {reserved}"))
    } else {
        Finding::warn(
            "huge pages",
            format!("transparent: {thp}; {reserved}"),
            "guests run faster with `echo madvise > /sys/kernel/mm/transparent_hugepage/enabled`",
        )
    }
}

fn io_uring() -> Finding {
    /// `struct io_uring_params` has 120 bytes.
    #[repr(C, align(8))]
    struct Params([u8; 120]);
    let mut params = Params([0; 120]);
    // SAFETY: the kernel reads and writes the parameters' 120 bytes only.
    let result = unsafe { libc::syscall(libc::SYS_io_uring_setup, 4, &raw mut params) };
    if let Ok(fd) = i32::try_from(result)
        && fd >= 0
    {
        // SAFETY: the descriptor was just made by this function and is used nowhere else.
        drop(unsafe { <std::os::fd::OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd) });
        return Finding::ok("io_uring", "usable for disks");
    }
    let error = io::Error::last_os_error();
    let remedy = match read("/proc/sys/kernel/io_uring_disabled").as_deref() {
        Some("1") => {
            "allow it: `sysctl kernel.io_uring_disabled=0`, or put the user into kernel.io_uring_group"
        }
        Some("2") => "allow it: `sysctl kernel.io_uring_disabled=0`",
        _ => {
            "it is probably forbidden by the seccomp filter of a container; allow io_uring_setup, _enter and _register"
        }
    };
    Finding::warn(
        "io_uring",
        format!("refused ({error}); disks work through slower system calls"),
        remedy,
    )
}

fn tap() -> Finding {
    match OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
        Ok(_) => Finding::ok(
            "tap interfaces",
            "/dev/net/tun usable; making new ones takes CAP_NET_ADMIN",
        ),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Finding::warn(
            "tap interfaces",
            "no /dev/net/tun",
            "`modprobe tun` as root; backend = \"user\" works without",
        ),
        Err(error) => Finding::warn(
            "tap interfaces",
            format!("/dev/net/tun cannot be opened: {error}"),
            "`chmod 0666 /dev/net/tun` as root (the usual mode); backend = \"user\" works without",
        ),
    }
}

/// Where `name` lies in PATH.
pub fn find_program(name: &str) -> Option<PathBuf> {
    use std::os::unix::fs::PermissionsExt;
    let is_program = |path: &PathBuf| {
        fs::metadata(path).is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
    };
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|folder| folder.join(name))
        .find(is_program)
}

fn passt() -> Finding {
    match find_program("passt") {
        Some(path) => Finding::ok("user network", format!("{}", path.display())),
        None => Finding::warn(
            "user network",
            "passt is not installed; network cards with backend = \"user\" need it",
            "`apt install passt`",
        ),
    }
}

fn landlock() -> Finding {
    const LANDLOCK_CREATE_RULESET_VERSION: u32 = 1;
    // SAFETY: with this flag the kernel takes no pointer and returns the version of its interface.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<u8>(),
            0_usize,
            LANDLOCK_CREATE_RULESET_VERSION,
        )
    };
    if version > 0 {
        return Finding::ok("landlock", format!("version {version}"));
    }
    let error = io::Error::last_os_error();
    Finding::warn(
        "landlock",
        format!("not available ({error}); the process is confined by seccomp only"),
        "boot a kernel with CONFIG_SECURITY_LANDLOCK and \"landlock\" in the lsm= list",
    )
}

fn seccomp() -> Finding {
    const SECCOMP_GET_ACTION_AVAIL: u32 = 2;
    let action = libc::SECCOMP_RET_KILL_PROCESS;
    // SAFETY: the kernel reads the 4 bytes of `action` only.
    let result = unsafe { libc::syscall(libc::SYS_seccomp, SECCOMP_GET_ACTION_AVAIL, 0, &raw const action) };
    if result == 0 {
        return Finding::ok("seccomp", "filters can kill the process");
    }
    let error = io::Error::last_os_error();
    Finding::warn(
        "seccomp",
        format!("not available ({error})"),
        "boot a kernel with CONFIG_SECCOMP_FILTER, or run with sandbox.seccomp = \"off\"",
    )
}

fn open_files() -> Finding {
    let limit = getrlimit(Resource::Nofile);
    match limit.maximum {
        Some(maximum) if maximum < 1024 => Finding::warn(
            "open files",
            format!("limited to {maximum}"),
            "a machine with many disks needs some hundreds: raise `ulimit -Hn` (LimitNOFILE= in systemd)",
        ),
        Some(maximum) => Finding::ok("open files", format!("up to {maximum}")),
        None => Finding::ok("open files", "unlimited"),
    }
}

fn locked_memory() -> Finding {
    match getrlimit(Resource::Memlock).current {
        Some(limit) if limit < 8 << 20 => Finding::warn(
            "locked memory",
            format!("limited to {} KiB", limit >> 10),
            "registered I/O buffers may not fit: raise `ulimit -l` (LimitMEMLOCK= in systemd) to 8 MiB",
        ),
        Some(limit) => Finding::ok("locked memory", format!("up to {} MiB", limit >> 20)),
        None => Finding::ok("locked memory", "unlimited"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_finding_that_is_not_good_has_a_remedy() {
        for finding in examine() {
            assert_eq!(
                finding.remedy.is_none(),
                finding.level == super::super::Level::Ok,
                "{finding:?}"
            );
        }
    }

    #[test]
    fn programs_are_found_in_the_path() {
        assert!(find_program("sh").is_some());
        assert_eq!(find_program("no-such-program-anywhere"), None);
    }

    #[test]
    fn this_host_has_memory() {
        assert!(available_memory().unwrap() > ByteSize::from_mib(64));
    }
}
