//! A console on standard input and output, in a process of its own whose terminal is a pseudo-terminal.

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};

use super::testing::PATIENCE;
use super::{Console, ConsoleCommand, ConsoleHandle, ConsoleInput, ConsoleOptions};
use crate::config::ConsoleSpec;

/// Tells the child that it is one.
const CHILD: &str = "SMSVMM_TEST_STDIO_CHILD";

/// A guest that echoes what is typed, control characters in a readable form.
struct Echo(ConsoleHandle);

impl ConsoleInput for Echo {
    fn push(&self, bytes: &[u8]) -> usize {
        for byte in bytes {
            match *byte {
                control @ 0..0x20 => self.0.write(format!("<{control}>").as_bytes()),
                byte => self.0.write(&[byte]),
            };
        }
        bytes.len()
    }
}

/// Writes where nothing may be written.
fn wild_access() {
    // SAFETY: a new mapping harms nobody, and the access to it ends the process, as wanted.
    unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let page = libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_NONE, flags, -1, 0);
        assert_ne!(page, libc::MAP_FAILED);
        page.cast::<u8>().write_volatile(1);
    }
}

/// The process under test: Stop ends it, the power button panics, reset is a wild access.
#[test]
#[ignore = "the tests below run it, in a terminal"]
fn child() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let stop = Arc::<AtomicBool>::default();
    let stopping = stop.clone();
    let options = ConsoleOptions {
        name: "test".to_owned(),
        escape: Some(0x1d),
        commands: Arc::new(move |command| match command {
            ConsoleCommand::Stop => stopping.store(true, Ordering::SeqCst),
            ConsoleCommand::PowerButton => panic!("as ordered"),
            ConsoleCommand::Reset => wild_access(),
            ConsoleCommand::Detach => {}
        }),
    };
    let mut console = Console::open(&ConsoleSpec::Stdio, options).unwrap();
    let mut main_loop = EventManager::<Box<dyn MutEventSubscriber + Send>>::new().unwrap();
    main_loop.add_subscriber(console.take_subscriber().unwrap());
    console.handle().set_input(Some(Arc::new(Echo(console.handle()))));
    console.handle().write(b"ready\r\n");
    while !stop.load(Ordering::SeqCst) {
        main_loop.run().unwrap();
    }
    console.handle().write(b"the end");
}

/// The child and its terminal.
struct Terminal {
    master: OwnedFd,
    /// Keeps the settings alive after the child's end.
    user_end: OwnedFd,
    cooked: LocalModes,
    child: Mutex<Child>,
}

impl Terminal {
    fn start() -> Self {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let user_end = ioctl_tiocgptpeer(&master, flags).unwrap();
        let cooked = tcgetattr(&user_end).unwrap().local_modes;
        assert!(cooked.contains(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG));

        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args([
                "console::stdio_tests::child",
                "--exact",
                "--ignored",
                "--nocapture",
            ])
            .env(CHILD, "1")
            .stdin(user_end.try_clone().unwrap())
            .stdout(user_end.try_clone().unwrap())
            .stderr(Stdio::null());
        // SAFETY: between fork and exec only system calls are made.
        unsafe {
            command.pre_exec(|| {
                rustix::process::setsid()?;
                rustix::process::ioctl_tiocsctty(std::io::stdin())?;
                // Who runs the tests under nohup, or in the background of a script, has them ignored, and that is inherited.
                for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT] {
                    libc::signal(signal, libc::SIG_DFL);
                }
                Ok(())
            });
        }
        let child = Mutex::new(command.spawn().unwrap());
        let terminal = Self {
            master,
            user_end,
            cooked,
            child,
        };
        terminal.expect("ready\r\n");
        assert!(
            !terminal
                .modes()
                .intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
        );
        terminal
    }

    fn modes(&self) -> LocalModes {
        tcgetattr(&self.user_end).unwrap().local_modes
    }

    fn type_keys(&self, keys: &[u8]) {
        std::fs::File::from(self.master.try_clone().unwrap())
            .write_all(keys)
            .unwrap();
    }

    /// Reads the screen until `text` appears.
    fn expect(&self, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        let mut screen = Vec::new();
        while !String::from_utf8_lossy(&screen).contains(text) {
            let mut fds = [PollFd::new(&self.master, PollFlags::IN)];
            poll(
                &mut fds,
                Some(&Timespec {
                    tv_sec: 1,
                    tv_nsec: 0,
                }),
            )
            .unwrap();
            if fds[0].revents().contains(PollFlags::IN) {
                let mut part = [0; 1024];
                let count = rustix::io::read(self.master.as_fd(), &mut part).unwrap();
                screen.extend(&part[..count]);
            }
            let shown = String::from_utf8_lossy(&screen);
            assert!(Instant::now() < deadline, "no {text:?} on the screen: {shown:?}");
        }
    }

    fn kill(&self, signal: libc::c_int) {
        let id = libc::pid_t::try_from(self.child.lock().unwrap().id()).unwrap();
        // SAFETY: the process is our child, and has not been waited for.
        assert_eq!(unsafe { libc::kill(id, signal) }, 0);
    }

    /// Waits for the end of the child, and insists that the terminal is as it was.
    fn finish(self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.lock().unwrap().try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "the child goes on");
            std::thread::sleep(Duration::from_millis(5));
        };
        assert_eq!(self.modes(), self.cooked);
        status
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let mut child = self.child.lock().unwrap();
        if child.try_wait().is_ok_and(|status| status.is_none()) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[test]
fn every_key_goes_to_the_guest_until_the_escape_key() {
    let terminal = Terminal::start();
    terminal.type_keys(b"ls\x03\x1a\r");
    terminal.expect("ls<3><26><13>");
    terminal.type_keys(b"\x1d\x1d");
    terminal.expect("<29>");
    terminal.type_keys(b"\x1d?");
    terminal.expect("Ctrl-] then: q or x");
    terminal.type_keys(b"\x1dq");
    terminal.expect("the end");
    assert!(terminal.finish().success());
}

#[test]
fn pasted_text_comes_back_whole() {
    let terminal = Terminal::start();
    let text: String = (0..2000).map(|line| format!("{line:06} ")).collect();
    std::thread::scope(|scope| {
        scope.spawn(|| terminal.type_keys(text.as_bytes()));
        terminal.expect(&text);
    });
    terminal.type_keys(b"\x1dx");
    assert!(terminal.finish().success());
}

#[test]
fn the_terminal_is_given_back_when_a_signal_ends_the_process() {
    for signal in [libc::SIGTERM, libc::SIGHUP, libc::SIGINT, libc::SIGABRT] {
        let terminal = Terminal::start();
        terminal.kill(signal);
        assert_eq!(terminal.finish().signal(), Some(signal));
    }
}

#[test]
fn the_terminal_is_given_back_after_a_panic() {
    let terminal = Terminal::start();
    terminal.type_keys(b"\x1dp");
    assert_eq!(terminal.finish().code(), Some(101));
}

#[test]
fn the_terminal_is_given_back_after_a_wild_access() {
    let terminal = Terminal::start();
    terminal.type_keys(b"\x1dr");
    assert_eq!(terminal.finish().signal(), Some(libc::SIGSEGV));
}

#[test]
fn detaching_gives_the_terminal_back_and_the_vm_goes_on() {
    let terminal = Terminal::start();
    terminal.type_keys(b"\x1dd");
    let deadline = Instant::now() + PATIENCE;
    while terminal.modes() != terminal.cooked {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(
        terminal.child.lock().unwrap().try_wait().unwrap().is_none(),
        "it still runs"
    );
    terminal.kill(libc::SIGTERM);
    assert_eq!(terminal.finish().signal(), Some(libc::SIGTERM));
}
