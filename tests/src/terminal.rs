//! A program on a terminal of its own, as a person would use it.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Signal, ioctl_tiocsctty, set_parent_process_death_signal, setsid};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};

use crate::Vm;
use crate::console::Console;

/// How long a person waits for an answer; a lab on a busy machine is slow.
const PATIENCE: Duration = Duration::from_secs(60);

/// A pseudo-terminal with a program on it. Dropping it kills the program.
pub struct Terminal {
    child: Child,
    keyboard: File,
    screen: Console,
    /// Keeps the terminal as it was left, after the program has ended.
    other_end: OwnedFd,
}

/// What a terminal does by itself with what is typed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Lines can be edited, keys are echoed, Ctrl-C is a signal.
    Cooked,
    /// Nothing: the program gets every key.
    Raw,
}

impl Vm {
    /// Runs `smsvmm ARGUMENTS` beside the machine, in its folder, on a terminal.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn on_a_terminal(&self, arguments: &[&str]) -> Result<Terminal> {
        let mut command = Command::new(self.program());
        command.args(arguments).current_dir(self.folder());
        Terminal::start(command)
    }
}

impl Terminal {
    fn start(mut command: Command) -> Result<Self> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let other_end = ioctl_tiocgptpeer(&master, flags)?;
        command
            .stdin(other_end.try_clone()?)
            .stdout(other_end.try_clone()?)
            .stderr(other_end.try_clone()?);
        // SAFETY: between fork and exec only system calls are made, which are async-signal-safe.
        unsafe {
            command.pre_exec(|| {
                set_parent_process_death_signal(Some(Signal::KILL))?;
                setsid()?;
                // Standard input is the terminal by now.
                Ok(ioctl_tiocsctty(rustix::stdio::stdin())?)
            });
        }
        let child = command.spawn().context("cannot start a program on a terminal")?;
        let keyboard = File::from(master);
        Ok(Self {
            child,
            screen: Console::collect(keyboard.try_clone()?),
            keyboard,
            other_end,
        })
    }

    /// Presses keys.
    ///
    /// # Errors
    /// When the terminal is gone.
    pub fn type_text(&mut self, keys: &str) -> Result<()> {
        Ok(self.keyboard.write_all(keys.as_bytes())?)
    }

    /// Waits for text on the screen, after what was waited for last; returns what came before it.
    ///
    /// # Errors
    /// When it does not come within a minute.
    pub fn until(&self, text: &str) -> Result<String> {
        self.screen.until(text, PATIENCE)
    }

    /// What the terminal does with what is typed.
    ///
    /// # Errors
    /// When it is between the two.
    pub fn mode(&self) -> Result<Mode> {
        let modes = tcgetattr(&self.other_end)?.local_modes;
        let all = LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG;
        ensure!(
            modes.contains(all) || !modes.intersects(all),
            "the terminal is half raw: {modes:?}"
        );
        Ok(if modes.contains(all) {
            Mode::Cooked
        } else {
            Mode::Raw
        })
    }

    /// Sends the program a signal.
    ///
    /// # Errors
    /// When it has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = rustix::process::Pid::from_child(&self.child);
        Ok(rustix::process::kill_process(pid, signal)?)
    }

    /// Whether the program has ended.
    ///
    /// # Errors
    /// When the kernel does not know.
    pub fn has_ended(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// Waits for the program's end; returns its exit status, or `None` if a signal ended it.
    ///
    /// # Errors
    /// When it does not end within a minute.
    pub fn wait(&mut self) -> Result<Option<i32>> {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status.code());
            }
            ensure!(
                Instant::now() < end,
                "the program on the terminal does not end; it says:\n{}",
                self.screen.text()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _already_gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}
