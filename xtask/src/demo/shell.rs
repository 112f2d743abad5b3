//! The terminal beside the guest's: commands as a user types them, shown with what they answer.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use lab::{Cache, Toolbox};

/// A shell in the demo's folder, where `smsvmm` is on the search path.
pub(super) struct Shell {
    folder: PathBuf,
    path: OsString,
}

impl Shell {
    pub(super) fn new(folder: &Path) -> Result<Self> {
        // passt, where it is not installed; e2fsck and debugfs, which are no programs of ordinary users.
        let path = match Toolbox::open(&Cache::locate()) {
            Ok(toolbox) => toolbox.search_path(),
            Err(_) => std::env::var_os("PATH").unwrap_or_default(),
        };
        let mut folders = vec![folder.to_path_buf()];
        folders.extend(["/usr/sbin", "/sbin"].map(PathBuf::from));
        folders.extend(std::env::split_paths(&path));
        Ok(Self {
            folder: folder.to_path_buf(),
            path: std::env::join_paths(folders)?,
        })
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// The command that starts the virtual machine, which is typed too, but not waited for here.
    pub(super) fn run_machine(&self) -> Command {
        announce("smsvmm run vm.toml");
        let mut command = Command::new(self.folder.join("smsvmm"));
        command
            .args(["run", "vm.toml"])
            .current_dir(&self.folder)
            .env("PATH", &self.path);
        command
    }

    /// Types a line of one command with `&` behind it.
    ///
    /// # Errors
    /// When it cannot be started.
    pub(super) fn start(&self, line: &str) -> Result<Job> {
        announce(&format!("{line} &"));
        let child = Command::new("bash")
            .args(["-c", &format!("exec {line}")])
            .current_dir(&self.folder)
            .env("PATH", &self.path)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .context("cannot start bash")?;
        Ok(Job(child))
    }

    /// Types a line; returns what it answers on its standard output. Both outputs are shown.
    ///
    /// # Errors
    /// When it fails.
    pub(super) fn run(&self, line: &str) -> Result<String> {
        announce(line);
        let output = Command::new("bash")
            .args(["-c", line])
            .current_dir(&self.folder)
            .env("PATH", &self.path)
            .stdin(Stdio::null())
            .output()
            .context("cannot start bash")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let complaints = String::from_utf8_lossy(&output.stderr).into_owned();
        for line in text.lines().chain(complaints.lines()) {
            println!("      {line}");
        }
        ensure!(
            output.status.success(),
            "`{line}` ended with {}: {}",
            output.status,
            complaints.trim()
        );
        Ok(text)
    }
}

/// What was started with `&`; it does not outlive this.
pub(super) struct Job(Child);

impl Job {
    /// Kills it, as a user would.
    ///
    /// # Errors
    /// When it has ended already.
    pub(super) fn kill(&mut self) -> Result<()> {
        announce("kill -9 %1");
        ensure!(self.0.try_wait()?.is_none(), "it has ended already");
        self.0.kill()?;
        self.0.wait()?;
        Ok(())
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        let _already_gone = self.0.kill();
        let _reaped = self.0.wait();
    }
}

/// Shows what is typed, on a line of its own: the guest's console goes to the same place.
fn announce(line: &str) {
    println!("\n  host$ {line}");
}
