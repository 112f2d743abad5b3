//! Acting on a running virtual machine: inside, by commands on its console, and outside, by its management socket.
//!
//! ```no_run
//! # stories::story(|host| {
//! let mut vm = host.vm("live").interactive()?;
//! vm.manage(&["attach-disk", "data.img", "--id", "data"])?;
//! assert_eq!(vm.guest("cat /sys/block/vda/serial")?.trim(), "data");
//! vm.finish()?;
//! # Ok(())
//! # });
//! ```

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use crate::console::Console;
use crate::{Outcome, Vm, VmBuilder};

/// The guest's side: it takes one line after the other from its console, and tells how each ended.
pub(crate) const AGENT: &str = r#"
stty -echo
echo "guest: ready"
while read -r line && [ "$line" != "guest: end" ]; do
    eval "$line" < /dev/null
    echo "guest: did $?"
done
"#;

impl VmBuilder<'_> {
    /// Starts it with a management socket, and waits until the guest takes commands for [`Vm::guest`].
    ///
    /// # Errors
    /// When it cannot be started, or its guest does not come up.
    pub fn interactive(self) -> Result<Vm> {
        let vm = self.managed().answering().start()?;
        vm.wait_until_ready()?;
        Ok(vm)
    }

    /// Its guest takes commands on its console, for [`Vm::guest`].
    #[must_use]
    pub fn answering(self) -> Self {
        self.script(AGENT)
    }

    /// A management socket; and disks in the story's folder may be attached while it runs.
    #[must_use]
    pub fn managed(self) -> Self {
        let folder = self.host().folder().display().to_string();
        self.toml(&format!(
            "[management]\nsocket = \"vm.sock\"\n[sandbox]\npaths = [{folder:?}]\n"
        ))
    }
}

impl Vm {
    /// Waits until the guest of an [`VmBuilder::interactive`] machine takes commands, for example after a reboot.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn wait_until_ready(&self) -> Result<()> {
        self.wait_for("guest: ready\r\n")
    }

    /// Runs one line of shell in the guest of an [`VmBuilder::interactive`] machine; returns its output.
    ///
    /// # Errors
    /// When it fails there, or does not end.
    pub fn guest(&mut self, line: &str) -> Result<String> {
        let (status, output) = self.try_guest(line)?;
        ensure!(
            status == 0,
            "in the guest, {line:?} ended with {status}: {output}"
        );
        Ok(output)
    }

    /// Like [`Self::guest`] for a line that may fail: its exit status and output.
    ///
    /// # Errors
    /// When it does not end.
    pub fn try_guest(&mut self, line: &str) -> Result<(i32, String)> {
        self.begin(line)?;
        self.end_of(line)
    }

    /// Waits in the guest until a condition holds, ten seconds at most.
    ///
    /// # Errors
    /// When it does not hold then.
    pub fn guest_until(&mut self, condition: &str) -> Result<()> {
        let line = format!(
            "n=0; until {condition}; do n=$((n+1)); [ $n -lt 500 ] || break; usleep 20000; done; {condition}"
        );
        self.guest(&line).map(drop)
    }

    /// Warnings and worse in the guest's kernel log since it was cleared last (`dmesg -c`), one per line; empty if all is well.
    /// Without the one about an interrupt that took long: that is a busy host's.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub fn kernel_warnings(&mut self) -> Result<String> {
        self.guest("dmesg -r | grep '^<[0-4]>' | grep -v 'hrtimer: interrupt took'; true")
    }

    /// Lets the guest begin with a line; [`Self::end_of`] waits for its end.
    ///
    /// # Errors
    /// When the machine has ended.
    pub fn begin(&mut self, line: &str) -> Result<()> {
        ensure!(
            line.len() < 4000 && !line.contains('\n'),
            "a terminal takes one line of up to 4095 bytes"
        );
        self.type_text(&format!("{line}\n"))
    }

    /// Waits for the end of a line that was begun: exit status and output.
    ///
    /// # Errors
    /// When it does not end.
    pub fn end_of(&self, line: &str) -> Result<(i32, String)> {
        let output = self
            .until("guest: did ")
            .with_context(|| format!("in the guest: {line}"))?;
        let status = self.until("\n")?;
        Ok((status.trim().parse()?, output))
    }

    /// Lets the guest of an interactive machine power off, and waits for the machine's end.
    ///
    /// # Errors
    /// When it does not end well.
    pub fn finish(mut self) -> Result<Outcome> {
        self.type_text("guest: end\n")?;
        self.wait(Duration::from_secs(60))?.success()
    }

    /// `smsvmm vm --config vm.toml ARGUMENTS`, in the machine's folder.
    ///
    /// # Errors
    /// When it fails.
    pub fn manage(&self, arguments: &[&str]) -> Result<String> {
        let output = self.smsvmm(&[&["vm", "--config", "vm.toml"], arguments].concat())?;
        ensure!(
            output.status == 0,
            "smsvmm vm {arguments:?} ended with {}: {}",
            output.status,
            output.text()
        );
        Ok(output.text())
    }

    /// Like [`Self::manage`], of what must fail: what it says.
    ///
    /// # Errors
    /// When it succeeds.
    pub fn refuses(&self, arguments: &[&str]) -> Result<String> {
        let output = self.smsvmm(&[&["vm", "--config", "vm.toml"], arguments].concat())?;
        match output.status {
            0 => bail!("smsvmm vm {arguments:?} succeeds: {}", output.text()),
            _ => Ok(output.text()),
        }
    }

    /// What happens to the machine, from its start on.
    ///
    /// # Errors
    /// When the client cannot be started.
    pub fn events(&self) -> Result<Events> {
        let mut client = Command::new(self.program())
            .args(["vm", "--config", "vm.toml", "events", "--follow"])
            .current_dir(self.folder())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        let lines = Console::collect(client.stdout.take().context("no output")?);
        Ok(Events { client, lines })
    }
}

/// A machine's events as `smsvmm vm events --follow` shows them.
pub struct Events {
    client: Child,
    lines: Console,
}

impl Events {
    /// Waits for an event with this text, after the one waited for last.
    ///
    /// # Errors
    /// When it does not come within half a minute.
    pub fn wait_for(&self, text: &str) -> Result<()> {
        self.lines
            .until(&format!("Z  {text}"), Duration::from_secs(30))
            .map(drop)
            .context("of the machine's events")
    }

    /// All events until now, one per line.
    #[must_use]
    pub fn text(&self) -> String {
        self.lines.text()
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let _already_gone = self.client.kill();
        let _reaped = self.client.wait();
    }
}
