//! The sandbox, for real: each test starts this program once more as a child that enters the sandbox and then does something
//! that is allowed or forbidden.

#![allow(clippy::unwrap_used, clippy::expect_used)] // also in the tests' helpers

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use vmm::config::{SandboxConfig, Seccomp};
use vmm::sandbox::{self, Kind, Opens, Sandbox, ServerPart, ServerPlaces, ServerSandbox};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

/// Names what the child shall do.
const DEED: &str = "SANDBOX_DEED";
/// A folder for the child.
const FOLDER: &str = "SANDBOX_FOLDER";

/// A child that did what it was asked to do.
struct Outcome {
    status: ExitStatus,
    output: String,
}

impl Outcome {
    #[track_caller]
    fn assert_success(&self) {
        assert!(self.status.success(), "{}: {}", self.status, self.output);
    }

    /// It was ended for calling `call` on thread `thread`, and said so in a line.
    #[track_caller]
    fn assert_ended_for(&self, call: &str, thread: &str) {
        assert_eq!(
            self.status.code(),
            Some(sandbox::EXIT_STATUS),
            "{}: {}",
            self.status,
            self.output
        );
        let line = self
            .output
            .lines()
            .find_map(|line| line.find("smsvmm: thread").map(|start| &line[start..]));
        let line = line.unwrap_or_else(|| panic!("no message: {}", self.output));
        assert!(
            line.starts_with(&format!("smsvmm: thread {thread} made the forbidden system call")),
            "{line}"
        );
        assert!(line.contains(&format!("({call})")), "{line}");
        assert!(!self.output.contains("went on"), "{}", self.output);
    }
}

/// Has a child do `deed`, a name in [`child`], in `folder`.
fn in_child(deed: &str, folder: &Path) -> Outcome {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "child", "--nocapture", "--test-threads=1"]);
    command
        .env(DEED, deed)
        .env(FOLDER, folder)
        .env("RUST_BACKTRACE", "1")
        .stdin(Stdio::null());
    let output = command.output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    Outcome {
        status: output.status,
        output: String::from_utf8_lossy(&text).into_owned(),
    }
}

fn config() -> SandboxConfig {
    SandboxConfig {
        seccomp: Seccomp::On,
        landlock: true,
        paths: Vec::new(),
    }
}

fn prepared(config: &SandboxConfig) -> Sandbox {
    Sandbox::prepare(config, Vec::new()).unwrap()
}

/// What a child does; in the parent's run of this test there is nothing to do.
#[test]
fn child() {
    let Ok(deed) = std::env::var(DEED) else { return };
    let folder = PathBuf::from(std::env::var_os(FOLDER).unwrap());
    let (deed, kind) = deed.split_once(' ').unwrap_or((&deed, "main"));
    let kind = Kind::ALL
        .into_iter()
        .find(|candidate| candidate.name() == kind)
        .unwrap();
    match deed {
        "work" => on_thread(kind, &config(), move || ordinary_work(kind)),
        "panic" => panicking_threads(kind),
        "socket" => on_thread(kind, &config(), || {
            // SAFETY: a plain call without pointers.
            unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0) };
        }),
        "execve" => on_thread(kind, &config(), || {
            let arguments = [c"/bin/true".as_ptr(), std::ptr::null()];
            // SAFETY: a valid path and a list that ends with null.
            unsafe { libc::execve(arguments[0], arguments.as_ptr(), arguments[1..].as_ptr()) };
        }),
        "fork" => on_thread(kind, &config(), || {
            // SAFETY: without arguments; the child would end at once.
            unsafe {
                if libc::fork() == 0 {
                    libc::_exit(0)
                }
            }
        }),
        "executable" => on_thread(kind, &config(), || map(libc::PROT_READ | libc::PROT_EXEC)),
        "make-executable" => on_thread(kind, &config(), || {
            let page = map(libc::PROT_READ | libc::PROT_WRITE);
            // SAFETY: the page is ours, and nothing uses it.
            unsafe { libc::mprotect(page, 4096, libc::PROT_READ | libc::PROT_EXEC) };
        }),
        "tiocsti" => on_thread(kind, &config(), || {
            // SAFETY: valid pointers.
            unsafe { libc::ioctl(0, libc::TIOCSTI, c"x".as_ptr()) };
        }),
        "kill-others" => on_thread(kind, &config(), || {
            // SAFETY: without pointers; signal 0 does nothing.
            unsafe { libc::syscall(libc::SYS_tgkill, 1, 1, 0) };
        }),
        "open-anything" => on_thread(kind, &config(), || {
            let error = File::open("/etc/passwd").unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EACCES));
        }),
        "log" => {
            let config = SandboxConfig {
                seccomp: Seccomp::Log,
                landlock: false,
                ..config()
            };
            on_thread(kind, &config, move || {
                drop(UnixDatagram::unbound().unwrap());
                drop(File::open("/etc/passwd").unwrap());
                ordinary_work(kind);
            });
        }
        "off" => {
            let config = SandboxConfig {
                seccomp: Seccomp::Off,
                landlock: false,
                ..config()
            };
            on_thread(kind, &config, || {
                assert!(Command::new("/bin/true").status().unwrap().success());
            });
        }
        "files" => files(&folder),
        "remove" => removes_its_socket(&folder),
        "server" => parts_of_a_server(&folder),
        "server-socket" => {
            on_server_thread(&server(&folder, None), ServerPart::Serves, || {
                drop(TcpListener::bind("127.0.0.1:0"));
            });
        }
        "privileges" => privileges(),
        "chain" => a_chain_of_threads(),
        "cleanup" => {
            sandbox::before_message(|| {
                // SAFETY: writes initialised bytes.
                unsafe { libc::write(2, c"terminal restored\n".as_ptr().cast(), 18) };
            });
            on_thread(kind, &config(), || {
                // SAFETY: without arguments.
                unsafe { libc::syscall(libc::SYS_vhangup) };
            });
        }
        other => panic!("unknown deed {other}"),
    }
}

/// Enters the sandbox as `kind` on a thread called `under-test`, and runs `work` there.
fn on_thread<T>(kind: Kind, config: &SandboxConfig, work: impl FnOnce() -> T + Send + 'static) {
    let sandbox = prepared(config);
    let enter = sandbox.thread(kind);
    let thread = thread::Builder::new()
        .name("under-test".to_owned())
        .spawn(move || {
            enter().unwrap();
            work();
            eprintln!("went on");
        });
    thread.unwrap().join().unwrap();
}

fn map(protection: libc::c_int) -> *mut libc::c_void {
    // SAFETY: new memory that nobody has.
    unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            4096,
            protection,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    }
}

/// What any thread may do: memory, locks, threads, eventfds, epoll, time, logs.
fn ordinary_work(kind: Kind) {
    // Memory: small, large, growing, given back.
    let mut large = vec![1_u8; 64 << 20];
    large.resize(80 << 20, 2);
    drop(large);
    let small: Vec<Vec<u8>> = (1..2000).map(|size| vec![0; size]).collect();
    drop(small);

    // Eventfds and epoll, where there is a loop.
    if kind != Kind::Signals {
        let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let epoll = Epoll::new().unwrap();
        let interest = EpollEvent::new(EventSet::IN, 7);
        epoll
            .ctl(ControlOperation::Add, event.as_raw_fd(), interest)
            .unwrap();
        event.try_clone().unwrap().write(1).unwrap();
        assert_eq!(epoll.wait(1000, &mut [EpollEvent::default()]).unwrap(), 1);
        assert_eq!(event.read().unwrap(), 1);
    }

    // Threads, channels, locks, sleep, time.
    let (sender, receiver) = mpsc::channel();
    let threads: Vec<_> = (0..4)
        .map(|number| {
            let sender = sender.clone();
            thread::Builder::new()
                .name(format!("helper{number}"))
                .spawn(move || {
                    thread::sleep(Duration::from_millis(2));
                    sender
                        .send(std::collections::HashMap::from([(number, vec![0_u8; 1 << 20])]))
                        .unwrap();
                })
        })
        .collect();
    assert_eq!(receiver.iter().take(4).map(|map| map.len()).sum::<usize>(), 4);
    assert!(receiver.recv_timeout(Duration::from_millis(5)).is_err());
    threads
        .into_iter()
        .for_each(|thread| thread.unwrap().join().unwrap());
    assert!(std::time::SystemTime::now() > std::time::UNIX_EPOCH);
    let _ = thread::available_parallelism();

    eprintln!("a log line");
}

/// A panic ends its thread with a message and a backtrace, not the process.
fn panicking_threads(kind: Kind) {
    let sandbox = prepared(&config());
    let enter = sandbox.thread(kind);
    let thread = thread::spawn(move || {
        enter().unwrap();
        panic!("a bug in a device");
    });
    assert!(thread.join().is_err());
    eprintln!("survived");
}

/// Landlock: inside of what is configured works, outside not.
fn files(folder: &Path) {
    let config = SandboxConfig {
        seccomp: Seccomp::Off,
        landlock: true,
        paths: vec![folder.join("inside"), folder.join("single.img")],
    };
    let mut kept = File::options()
        .read(true)
        .write(true)
        .open(folder.join("outside.img"))
        .unwrap();
    on_thread(Kind::Management, &config, {
        let folder = folder.to_owned();
        move || {
            let open = |path: PathBuf| OpenOptions::new().read(true).write(true).open(path);
            let mut inside = open(folder.join("inside/disk.img")).unwrap();
            inside.write_all(b"x").unwrap();
            inside.set_len(100).unwrap();
            open(folder.join("single.img")).unwrap();
            let forbidden = |result: io::Result<()>| {
                assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::EACCES));
            };
            forbidden(open(folder.join("outside.img")).map(drop));
            forbidden(File::open("/etc/passwd").map(drop));
            forbidden(File::create(folder.join("inside/new.img")).map(drop));
            forbidden(fs::remove_file(folder.join("inside/disk.img")));
            forbidden(Command::new("/bin/true").status().map(drop));
            // What was open before stays as usable as it was.
            kept.write_all(b"y").unwrap();
            kept.set_len(10).unwrap();
        }
    });
}

/// Sockets of the VM can be removed when it ends, and nothing else.
fn removes_its_socket(folder: &Path) {
    let sandbox = Sandbox::prepare(&config(), vec![folder.join("inside/web1.sock")]).unwrap();
    sandbox.enter().unwrap();
    assert!(fs::symlink_metadata(folder.join("inside/web1.sock")).is_ok());
    fs::remove_file(folder.join("inside/web1.sock")).unwrap();
    let error = fs::remove_file(folder.join("outside.img")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EACCES));
}

/// The sandbox of a program that serves disks at a socket in `folder/inside`.
fn server(folder: &Path, opens: Option<Opens>) -> ServerSandbox {
    let sockets = vec![folder.join("inside/web1.sock")];
    ServerSandbox::prepare(&ServerPlaces { sockets, opens }).unwrap()
}

fn on_server_thread(sandbox: &ServerSandbox, part: ServerPart, work: impl FnOnce() + Send + 'static) {
    let enter = sandbox.thread(part);
    let thread = thread::Builder::new()
        .name("under-test".to_owned())
        .spawn(move || {
            enter().unwrap();
            work();
        });
    thread.unwrap().join().unwrap();
}

/// What each part of a program that serves disks can reach.
fn parts_of_a_server(folder: &Path) {
    let forbidden = |result: io::Result<()>| {
        let error = result.unwrap_err().raw_os_error().unwrap();
        assert!([libc::EACCES, libc::EPERM].contains(&error), "{error}");
    };
    let writing = |path: PathBuf| OpenOptions::new().read(true).write(true).open(path).map(drop);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (inside, outside) = (folder.join("inside"), folder.join("outside.img"));
    let sandbox = server(folder, None);

    let (own, other) = (inside.clone(), outside.clone());
    on_server_thread(&sandbox, ServerPart::Serves, move || {
        forbidden(File::open("/etc/passwd").map(drop));
        forbidden(writing(own.join("disk.img")));
        forbidden(fs::remove_file(&other));
        fs::remove_file(own.join("web1.sock")).unwrap();
    });
    let other = outside.clone();
    on_server_thread(&sandbox, ServerPart::Connects, move || {
        drop(File::open("/etc/passwd").unwrap());
        drop(TcpStream::connect(address).unwrap());
        forbidden(writing(other.clone()));
        forbidden(fs::remove_file(&other));
        forbidden(TcpListener::bind("127.0.0.1:0").map(drop));
        forbidden(Command::new("/bin/true").status().map(drop));
    });
    for what in [Opens::Devices, Opens::DevicesAndSockets] {
        let (own, other) = (inside.clone(), outside.clone());
        on_server_thread(&server(folder, Some(what)), ServerPart::Opens, move || {
            writing(other.clone()).unwrap();
            drop(TcpStream::connect(address).unwrap());
            forbidden(File::create(own.join("new.img")).map(drop));
            forbidden(fs::rename(own.join("disk.img"), own.join("moved.img")));
            forbidden(TcpListener::bind("127.0.0.1:0").map(drop));
            forbidden(Command::new("/bin/true").status().map(drop));
            let socket = other.with_extension("sock");
            let made = UnixListener::bind(&socket).map(drop);
            match what {
                Opens::Devices => {
                    forbidden(made);
                    forbidden(fs::remove_file(&other));
                }
                Opens::DevicesAndSockets => {
                    made.unwrap();
                    fs::remove_file(&socket).unwrap();
                }
            }
        });
    }
}

/// No capabilities in any set, no way to get any.
fn privileges() {
    // Opened first: afterwards no file can be opened.
    let mut own = File::open("/proc/thread-self/status").unwrap();
    let before = fs::read_to_string("/proc/thread-self/status").unwrap();
    let had_capabilities = !before.contains("CapEff:\t0000000000000000");
    prepared(&config()).enter().unwrap();
    let mut text = String::new();
    own.read_to_string(&mut text).unwrap();
    let value = |key: &str| {
        let line = text.lines().find(|line| line.starts_with(key)).unwrap();
        u64::from_str_radix(line.split_whitespace().nth(1).unwrap(), 16).unwrap()
    };
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
        assert_eq!(value(set), 0, "{set}");
    }
    if had_capabilities {
        assert_eq!(value("CapBnd:"), 0);
    }
    assert_eq!(value("NoNewPrivs:"), 1);
    assert_eq!(value("Seccomp:"), 2);
    // SAFETY: without pointers.
    assert_eq!(unsafe { libc::prctl(libc::PR_GET_DUMPABLE) }, 0);
}

/// Main starts a vCPU, that one a network queue; management starts a disk worker: all get through their hooks, and work.
fn a_chain_of_threads() {
    let sandbox = prepared(&config());
    for chain in [
        vec![Kind::Main, Kind::Vcpu, Kind::NetQueue],
        vec![Kind::Management, Kind::DiskWorker],
    ] {
        chain_of(sandbox.clone(), chain).join().unwrap();
    }
    eprintln!("all worked");
}

fn chain_of(sandbox: Sandbox, mut chain: Vec<Kind>) -> thread::JoinHandle<()> {
    let kind = chain.remove(0);
    let enter = sandbox.thread(kind);
    let thread = thread::Builder::new()
        .name(kind.name().replace(' ', "-"))
        .spawn(move || {
            enter().unwrap();
            ordinary_work(kind);
            if !chain.is_empty() {
                chain_of(sandbox, chain).join().unwrap();
            }
        });
    thread.unwrap()
}

fn empty() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

#[test]
fn every_kind_of_thread_can_do_ordinary_work() {
    for kind in Kind::ALL {
        let outcome = in_child(&format!("work {}", kind.name()), empty().path());
        outcome.assert_success();
        assert!(outcome.output.contains("went on"), "{}", outcome.output);
    }
}

#[test]
fn no_kind_of_thread_may_make_an_internet_socket_or_start_a_program() {
    for kind in Kind::ALL {
        for (deed, call) in [("socket", "socket"), ("execve", "execve"), ("fork", "clone")] {
            in_child(&format!("{deed} {}", kind.name()), empty().path()).assert_ended_for(call, "under-test");
        }
    }
}

#[test]
fn no_memory_becomes_executable() {
    for kind in Kind::ALL {
        in_child(&format!("executable {}", kind.name()), empty().path())
            .assert_ended_for("mmap", "under-test");
        in_child(&format!("make-executable {}", kind.name()), empty().path())
            .assert_ended_for("mprotect", "under-test");
    }
}

#[test]
fn requests_and_signals_are_checked_by_their_arguments() {
    for kind in Kind::ALL {
        in_child(&format!("tiocsti {}", kind.name()), empty().path()).assert_ended_for("ioctl", "under-test");
        in_child(&format!("kill-others {}", kind.name()), empty().path())
            .assert_ended_for("tgkill", "under-test");
    }
}

#[test]
fn a_thread_that_opens_nothing_is_refused_without_harm() {
    for kind in [
        Kind::Main,
        Kind::Signals,
        Kind::Vcpu,
        Kind::DiskWorker,
        Kind::NetQueue,
    ] {
        let outcome = in_child(&format!("open-anything {}", kind.name()), empty().path());
        outcome.assert_success();
        assert!(outcome.output.contains("went on"), "{}", outcome.output);
    }
}

#[test]
fn a_panic_ends_its_thread_and_not_the_process() {
    for kind in Kind::ALL {
        let outcome = in_child(&format!("panic {}", kind.name()), empty().path());
        outcome.assert_success();
        assert!(outcome.output.contains("a bug in a device"), "{}", outcome.output);
        assert!(outcome.output.contains("survived"), "{}", outcome.output);
    }
}

#[test]
fn threads_get_narrower_filters_than_those_that_start_them() {
    let outcome = in_child("chain", empty().path());
    outcome.assert_success();
    assert!(outcome.output.contains("all worked"), "{}", outcome.output);
}

#[test]
fn violations_can_be_logged_only_and_the_filter_switched_off() {
    for kind in Kind::ALL {
        in_child(&format!("log {}", kind.name()), empty().path()).assert_success();
    }
    in_child("off", empty().path()).assert_success();
}

#[test]
fn the_terminal_is_restored_before_the_message() {
    let outcome = in_child("cleanup", empty().path());
    outcome.assert_ended_for("vhangup", "under-test");
    let restored = outcome.output.find("terminal restored").expect("not restored");
    assert!(restored < outcome.output.find("smsvmm: thread").unwrap());
}

#[test]
fn no_privileges_are_kept() {
    in_child("privileges", empty().path()).assert_success();
}

/// A folder with images inside and outside of what the sandbox allows.
fn images() -> tempfile::TempDir {
    let folder = empty();
    fs::create_dir(folder.path().join("inside")).unwrap();
    for name in ["inside/disk.img", "inside/web1.sock", "outside.img", "single.img"] {
        fs::write(folder.path().join(name), "").unwrap();
    }
    folder
}

/// Whether this kernel has Landlock; on one without, there is nothing to be tested.
fn has_landlock() -> bool {
    // SAFETY: a null pointer asks for the version (landlock_create_ruleset(2)).
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<u8>(),
            0_usize,
            1,
        )
    };
    if version < 1 {
        eprintln!("skipped: this kernel's Landlock has version {version}");
    }
    version >= 1
}

#[test]
fn only_configured_files_can_be_opened_later() {
    if has_landlock() {
        in_child("files", images().path()).assert_success();
    }
}

#[test]
fn sockets_can_be_removed_at_the_end() {
    if has_landlock() {
        in_child("remove", images().path()).assert_success();
    }
}

#[test]
fn threads_of_a_program_that_serves_disks_reach_what_their_part_needs() {
    if has_landlock() {
        in_child("server", images().path()).assert_success();
    }
    in_child("server-socket", images().path()).assert_ended_for("socket", "under-test");
}

#[test]
fn a_missing_path_is_named() {
    let config = SandboxConfig {
        paths: vec!["/does/not/exist".into()],
        ..config()
    };
    let error = Sandbox::prepare(&config, Vec::new()).unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("sandbox.paths: /does/not/exist cannot be opened"),
        "{error}"
    );
}
