//! A server beside the machines of a story: `smsvmm share`, or another program.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

/// How long a server that says nothing may take until it serves.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running server. Dropping it kills it, as `kill -9` does.
pub struct Server(Child);

impl Server {
    /// Starts `smsvmm share ARGUMENTS` in `folder`, and waits until it says that something is served.
    ///
    /// # Errors
    /// When it ends before.
    pub fn share(program: &Path, folder: &Path, arguments: &[&str]) -> Result<Self> {
        Self::speaking(program, folder, &[&["share"], arguments].concat(), "is served at")
    }

    /// Starts `program ARGUMENTS` in `folder`, and waits until it says `ready` on its standard error.
    ///
    /// # Errors
    /// When it ends before.
    pub fn speaking(program: &Path, folder: &Path, arguments: &[&str], ready: &str) -> Result<Self> {
        let mut child = Command::new(program)
            .args(arguments)
            .current_dir(folder)
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let output = BufReader::new(child.stderr.take().context("no standard error")?);
        let server = Self(child);
        let mut lines = output.lines();
        let mut said = String::new();
        for line in lines.by_ref() {
            let line = line?;
            if line.contains(ready) {
                thread::spawn(move || {
                    lines
                        .map_while(Result::ok)
                        .for_each(|line| println!("server: {line}"))
                });
                return Ok(server);
            }
            said.push_str(&line);
        }
        bail!("{} ended before it served: {said}", program.display())
    }

    /// Starts a command that serves at `socket`, and waits until that is there.
    ///
    /// # Errors
    /// When it ends before.
    pub fn other(mut command: Command, socket: &Path) -> Result<Self> {
        // What a predecessor left says nothing.
        let _ = std::fs::remove_file(socket);
        let begin = Instant::now();
        let mut server = Self(command.spawn().context("cannot start the server")?);
        while !socket.exists() {
            ensure!(
                server.0.try_wait()?.is_none(),
                "the server ended before it served"
            );
            ensure!(begin.elapsed() < PATIENCE, "the server does not serve");
            thread::sleep(Duration::from_millis(10));
        }
        Ok(server)
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// When it has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.0.id())?).context("no process number")?;
        Ok(kill_process(pid, signal)?)
    }

    /// Has it end in order, and waits for that.
    ///
    /// # Errors
    /// When it does not end well.
    pub fn end(mut self) -> Result<()> {
        self.signal(Signal::TERM)?;
        let status = self.0.wait()?;
        ensure!(status.success(), "the server ended with {status}");
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
