//! A virtual machine of a story: described, started, talked to, and what became of it.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::chown;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use lab::{Archive, Output};
use rustix::process::{Pid, Signal, kill_process, set_parent_process_death_signal};

use crate::console::Console;
use crate::{Host, Kernel};

/// A disk of a virtual machine.
#[derive(Clone, Debug)]
pub struct Disk {
    image: PathBuf,
    /// By which key vm.toml names it.
    key: &'static str,
    lines: Vec<String>,
    read_only: bool,
    serial: Option<String>,
}

impl Disk {
    /// A raw image or block device.
    #[must_use]
    pub fn new(image: impl Into<PathBuf>) -> Self {
        Self {
            image: image.into(),
            key: "image",
            lines: Vec::new(),
            read_only: false,
            serial: None,
        }
    }

    /// A disk of the pool that vm.toml names: `/vm/root.dsk`.
    #[must_use]
    pub fn in_pool(file: &str) -> Self {
        Self {
            key: "file",
            ..Self::new(file)
        }
    }

    /// A disk that another process serves at this socket.
    #[must_use]
    pub fn served_at(socket: impl Into<PathBuf>) -> Self {
        Self {
            key: "vhost-user",
            ..Self::new(socket)
        }
    }

    /// The guest may not write.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }

    /// The serial number that the guest sees.
    #[must_use]
    pub fn serial(mut self, serial: &str) -> Self {
        self.serial = Some(serial.to_owned());
        self
    }

    /// Any other key of `[[disk]]`, as it is written in vm.toml.
    #[must_use]
    pub fn set(mut self, key: &str, value: &str) -> Self {
        self.lines.push(format!("{key} = {value}"));
        self
    }
}

/// Mounts the disk with tools, and puts libraries and drivers where they are looked for.
pub(crate) const TOOLS_ON: &str = r#"
set -e
for disk in /sys/block/vd*; do
    [ "$(cat $disk/serial)" != tools ] || device=/dev/${disk##*/}
done
mkdir -p /tools
mount -t ext4 -o ro $device /tools
ln -s /tools/lib64 /lib64
ln -s /tools/lib/x86_64-linux-gnu /lib/x86_64-linux-gnu
ln -s /tools/lib/multipath /lib/multipath
cd /tools/modules/$(uname -r)
while read -r module; do insmod $module 2> /dev/null || [ -e /sys/module/${module%.ko} ]; done < order
"#;

/// Describes a virtual machine; made by [`Host::vm`].
///
/// It has one processor, 256 MiB, Debian 12's cloud kernel and the test initrd, whose init runs the script and powers off.
#[derive(Clone)]
pub struct VmBuilder<'a> {
    host: &'a Host,
    name: String,
    cpus: u8,
    memory: String,
    kernel: Kernel,
    elf: bool,
    tools: bool,
    command_line: String,
    script: Option<String>,
    files: Archive,
    disks: Vec<Disk>,
    manager: Option<PathBuf>,
    sections: String,
    arguments: Vec<String>,
    limit: Duration,
    program: Option<PathBuf>,
    user: Option<(u32, u32)>,
}

impl<'a> VmBuilder<'a> {
    pub(crate) fn new(host: &'a Host, name: &str) -> Self {
        Self {
            host,
            name: name.to_owned(),
            cpus: 1,
            memory: "256M".to_owned(),
            kernel: Kernel::Debian12Cloud,
            elf: false,
            tools: false,
            command_line: "console=ttyS0 quiet loglevel=3 panic=-1".to_owned(),
            script: None,
            files: Archive::default(),
            disks: Vec::new(),
            manager: None,
            sections: String::new(),
            arguments: Vec::new(),
            limit: Duration::from_secs(120),
            program: None,
            user: None,
        }
    }

    pub(crate) fn host(&self) -> &'a Host {
        self.host
    }

    /// Number of processors.
    #[must_use]
    pub fn cpus(mut self, cpus: u8) -> Self {
        self.cpus = cpus;
        self
    }

    /// Memory, as in vm.toml: `"512M"`, `"5G"`.
    #[must_use]
    pub fn memory(mut self, memory: &str) -> Self {
        self.memory = memory.to_owned();
        self
    }

    /// Which kernel.
    #[must_use]
    pub fn kernel(mut self, kernel: Kernel) -> Self {
        self.kernel = kernel;
        self
    }

    /// Boot the uncompressed ELF file instead of the bzImage.
    #[must_use]
    pub fn elf(mut self) -> Self {
        self.elf = true;
        self
    }

    /// Use the initrd that has more programs than BusyBox: lspci, setpci.
    #[must_use]
    pub fn tools(mut self) -> Self {
        self.tools = true;
        self
    }

    /// The whole kernel command line.
    #[must_use]
    pub fn command_line(mut self, line: &str) -> Self {
        self.command_line = line.to_owned();
        self
    }

    /// More words on the kernel command line.
    #[must_use]
    pub fn also_on_command_line(mut self, words: &str) -> Self {
        self.command_line = format!("{} {words}", self.command_line);
        self
    }

    /// A BusyBox shell script that the guest runs; its exit status is [`Outcome::script_status`].
    #[must_use]
    pub fn script(mut self, script: &str) -> Self {
        self.script = Some(script.to_owned());
        self
    }

    /// A file in the guest's root.
    #[must_use]
    pub fn file(mut self, path: &str, mode: u32, content: impl Into<Vec<u8>>) -> Self {
        self.files.file(path, mode, content);
        self
    }

    /// The disk with programs for file systems, whose serial number is `tools`, and `fs-load`. In the guest, `sh /tools-on` gives
    /// the programs of `/tools/usr/bin` what they need, and loads the drivers of file systems.
    ///
    /// # Errors
    /// When `fs-load` cannot be read; the story asks for it by [`crate::Story::guest_tools`].
    pub fn with_guest_tools(self) -> Result<Self> {
        let place = self.host.place();
        let program = &place.guest_program;
        let load = fs::read(program).with_context(|| format!("cannot read {}", program.display()))?;
        let disk = Disk::new(&place.guest_tools).serial("tools").read_only();
        Ok(self
            .disk(disk)
            .file("/bin/fs-load", 0o755, load)
            .file("/tools-on", 0o755, TOOLS_ON))
    }

    /// `sms-agent` in the guest.
    ///
    /// # Errors
    /// When it cannot be read; the story asks for it by [`crate::Story::agent`].
    pub fn with_agent(self) -> Result<Self> {
        let program = &self.host.place().agent;
        let agent = fs::read(program).with_context(|| format!("cannot read {}", program.display()))?;
        Ok(self.file("/bin/sms-agent", 0o755, agent))
    }

    /// One more disk.
    #[must_use]
    pub fn disk(mut self, disk: Disk) -> Self {
        self.disks.push(disk);
        self
    }

    /// The socket of the host's manager, which has the pools of its disks.
    #[must_use]
    pub fn manager(mut self, socket: impl Into<PathBuf>) -> Self {
        self.manager = Some(socket.into());
        self
    }

    /// More text for vm.toml, sections included: `[[net]]`, `[console]`, `[management]`.
    #[must_use]
    pub fn toml(mut self, text: &str) -> Self {
        self.sections.push_str(text);
        self.sections.push('\n');
        self
    }

    /// One more argument for `smsvmm run`.
    #[must_use]
    pub fn argument(mut self, argument: &str) -> Self {
        self.arguments.push(argument.to_owned());
        self
    }

    /// Another build of the program under test.
    #[must_use]
    pub fn program(mut self, program: impl Into<PathBuf>) -> Self {
        self.program = Some(program.into());
        self
    }

    /// Run by the user and group with these numbers, and no other groups, without privileges. The machine's folder is theirs.
    #[must_use]
    pub fn run_by(mut self, user: u32, group: u32) -> Self {
        self.user = Some((user, group));
        self
    }

    /// How long it may run altogether; two minutes if not said.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Starts it and waits for its end.
    ///
    /// # Errors
    /// When it cannot be started, or does not end in time.
    pub fn run(self) -> Result<Outcome> {
        let limit = self.limit;
        self.start()?.wait(limit)
    }

    /// Writes what it needs into a folder of its name; where its vm.toml is.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn written(&self) -> Result<PathBuf> {
        let folder = self.host.folder().join(&self.name);
        fs::create_dir_all(&folder)?;
        let initrd = self.initrd(&folder)?;
        let config = folder.join("vm.toml");
        fs::write(&config, self.config(&self.kernel_file(), &initrd)?)?;
        Ok(config)
    }

    fn kernel_file(&self) -> PathBuf {
        self.host
            .kernel_file(self.kernel, if self.elf { "vmlinux" } else { "bzImage" })
    }

    /// Starts it.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(self) -> Result<Vm> {
        let config = self.written()?;
        let folder = self.host.folder().join(&self.name);
        let command = match std::env::var("SMSVMM_VMM").as_deref() {
            Ok("qemu") => self.qemu(&self.kernel_file(), &folder.join("initrd")),
            _ => {
                let program = self.program.as_deref().unwrap_or(self.host.smsvmm());
                ensure!(
                    program.exists(),
                    "there is no {}; `cargo build -p smsvmm` makes it",
                    program.display()
                );
                let mut command = Command::new(program);
                command.arg("run").arg(&config).args(&self.arguments);
                command
            }
        };
        let mut command = command;
        if let Some((user, group)) = self.user {
            chown(&folder, Some(user), Some(group))?;
            command.uid(user).gid(group);
        }
        let mut vm = Vm::launch(command, &folder, self.limit)?;
        vm.program = self.program.unwrap_or_else(|| self.host.smsvmm().to_path_buf());
        Ok(vm)
    }

    /// The initrd with the story's files in a second archive behind it.
    fn initrd(&self, folder: &Path) -> Result<PathBuf> {
        let base = self
            .host
            .kernel_file(self.kernel, if self.tools { "initrd-tools" } else { "initrd" });
        let mut bytes = fs::read(&base).with_context(|| format!("cannot read {}", base.display()))?;
        let mut files = self.files.clone();
        if let Some(script) = &self.script {
            files.file("story", 0o755, script.as_str());
        }
        bytes.extend_from_slice(&files.bytes()?);
        let path = folder.join("initrd");
        fs::write(&path, bytes)?;
        Ok(path)
    }

    /// vm.toml as a user would write it.
    fn config(&self, kernel: &Path, initrd: &Path) -> Result<String> {
        let mut text = String::new();
        writeln!(
            text,
            "name = {:?}\ncpus = {}\nmemory = {:?}",
            self.name, self.cpus, self.memory
        )?;
        writeln!(
            text,
            "[boot]\nkernel = {kernel:?}\ninitrd = {initrd:?}\ncmdline = {:?}",
            self.command_line
        )?;
        if let Some(socket) = &self.manager {
            text = format!("manager = {socket:?}\n{text}");
        }
        for disk in &self.disks {
            writeln!(text, "[[disk]]\n{} = {:?}", disk.key, disk.image)?;
            if disk.read_only {
                writeln!(text, "read-only = true")?;
            }
            if let Some(serial) = &disk.serial {
                writeln!(text, "serial = {serial:?}")?;
            }
            for line in &disk.lines {
                writeln!(text, "{line}")?;
            }
        }
        text.push_str(&self.sections);
        Ok(text)
    }

    /// The same machine with QEMU.
    fn qemu(&self, kernel: &Path, initrd: &Path) -> Command {
        let mut command = Command::new("qemu-system-x86_64");
        command.args([
            "-M",
            "q35",
            "-enable-kvm",
            "-cpu",
            "host",
            "-display",
            "none",
            "-nodefaults",
            "-no-user-config",
        ]);
        command.args([
            "-smp",
            &self.cpus.to_string(),
            "-m",
            &self.memory,
            "-serial",
            "stdio",
        ]);
        command
            .arg("-kernel")
            .arg(kernel)
            .arg("-initrd")
            .arg(initrd)
            .args(["-append", &self.command_line]);
        for (index, disk) in self.disks.iter().enumerate() {
            let read_only = if disk.read_only { "on" } else { "off" };
            command.arg("-drive").arg(format!(
                "file={},format=raw,if=none,id=d{index},readonly={read_only},cache=writeback",
                disk.image.display()
            ));
            let serial = disk
                .serial
                .as_ref()
                .map(|serial| format!(",serial={serial}"))
                .unwrap_or_default();
            command.args(["-device", &format!("virtio-blk-pci,drive=d{index}{serial}")]);
        }
        command
    }
}

/// A running virtual machine. Dropping it kills it.
pub struct Vm {
    child: Child,
    console: Console,
    input: Option<ChildStdin>,
    log: PathBuf,
    folder: PathBuf,
    begin: Instant,
    limit: Duration,
    program: PathBuf,
}

impl Vm {
    /// Starts a VMM whose standard input and output are the guest's console; its errors go to the file `log` in a folder.
    /// It ends with the calling thread.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn launch(mut command: Command, folder: &Path, limit: Duration) -> Result<Self> {
        let log = folder.join("log");
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(&log)?)
            .current_dir(folder);
        // SAFETY: between fork and exec only the prctl system call is made, which is async-signal-safe.
        unsafe {
            command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?));
        }
        let begin = Instant::now();
        let program = PathBuf::from(command.get_program());
        let mut child = command.spawn().context("cannot start the virtual machine")?;
        let console = Console::collect(child.stdout.take().context("no output")?);
        let input = child.stdin.take();
        Ok(Self {
            child,
            console,
            input,
            log,
            folder: folder.to_path_buf(),
            begin,
            limit,
            program,
        })
    }

    /// Shows the console on this process's standard output too, from its beginning.
    pub fn echo(&self) {
        self.console.echo();
    }

    /// All console text until now.
    #[must_use]
    pub fn console(&self) -> String {
        self.console.text()
    }

    /// Waits for text on the console, after what was waited for last.
    ///
    /// # Errors
    /// When it does not come within the machine's limit.
    pub fn wait_for(&self, text: &str) -> Result<()> {
        self.until(text).map(drop)
    }

    /// Like [`Self::wait_for`]; returns what came before that text.
    ///
    /// # Errors
    /// When it does not come within the machine's limit.
    pub fn until(&self, text: &str) -> Result<String> {
        let limit = self.limit.saturating_sub(self.begin.elapsed());
        self.console
            .until(text, limit)
            .with_context(|| format!("smsvmm says:\n{}", self.log()))
    }

    /// Types on the console. A line ends with `\n`.
    ///
    /// # Errors
    /// When the machine has ended.
    pub fn type_text(&mut self, text: &str) -> Result<()> {
        let input = self.input.as_mut().context("the console's input is closed")?;
        input
            .write_all(text.as_bytes())
            .and_then(|()| input.flush())
            .context("the virtual machine takes no input")
    }

    /// Closes the console's input.
    pub fn close_input(&mut self) {
        self.input = None;
    }

    /// Sends a signal to the VMM.
    ///
    /// # Errors
    /// When it has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill_process(self.pid()?, signal)?)
    }

    /// The VMM's process.
    ///
    /// # Errors
    /// Never for a machine that was started.
    pub fn pid(&self) -> Result<Pid> {
        Pid::from_raw(i32::try_from(self.child.id())?).context("no process number")
    }

    /// The folder of the machine's files.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The program that runs it.
    pub(crate) fn program(&self) -> &Path {
        &self.program
    }

    /// Runs `smsvmm ARGUMENTS` beside it, in its folder, where its vm.toml is.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn smsvmm(&self, arguments: &[&str]) -> Result<Output> {
        let output = Command::new(&self.program)
            .args(arguments)
            .current_dir(self.folder())
            .output()?;
        Ok(Output {
            status: output.status.code().unwrap_or(-1),
            bytes: [output.stdout, output.stderr].concat(),
        })
    }

    /// What the VMM wrote to its standard error.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits, a minute at most, until the VMM has said it: it may have done a thing before it says so.
    ///
    /// # Errors
    /// When it does not come.
    pub fn until_logged(&self, text: &str) -> Result<()> {
        let begin = Instant::now();
        while !self.log().contains(text) {
            ensure!(
                begin.elapsed() < Duration::from_secs(60),
                "the log does not say {text:?}:\n{}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Whether it has ended already.
    ///
    /// # Errors
    /// When the kernel does not know.
    pub fn has_ended(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it does not end within the limit; the error has its console and log.
    pub fn wait(mut self, limit: Duration) -> Result<Outcome> {
        let end = Instant::now() + limit;
        let status = loop {
            // The console ends with the VMM, mostly; so this wait is short of a busy loop.
            let _ended = self.console.wait_for_end(Duration::from_millis(200));
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            if Instant::now() > end {
                let (console, log) = (self.console(), self.log());
                bail!(
                    "the virtual machine did not end within {limit:?}. Console:\n{console}\nsmsvmm says:\n{log}"
                );
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let _ended = self.console.wait_for_end(Duration::from_secs(5));
        Ok(Outcome {
            console: self.console(),
            log: self.log(),
            status,
            elapsed: self.begin.elapsed(),
        })
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _already_gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// What became of a virtual machine.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The whole console text.
    pub console: String,
    /// What the VMM wrote to its standard error.
    pub log: String,
    /// How the VMM ended.
    pub status: ExitStatus,
    /// From start to end.
    pub elapsed: Duration,
}

impl Outcome {
    /// The VMM's exit status, if no signal ended it.
    #[must_use]
    pub fn exit_code(&self) -> Option<i32> {
        self.status.code()
    }

    /// The signal that ended the VMM.
    #[must_use]
    pub fn signal(&self) -> Option<i32> {
        self.status.signal()
    }

    /// What the guest's script wrote.
    #[must_use]
    pub fn script_output(&self) -> &str {
        let text = self
            .console
            .split_once("guest: story\n")
            .map_or("", |(_, rest)| rest);
        text.rsplit_once("guest: status ")
            .map_or(text, |(output, _)| output)
    }

    /// The exit status of the guest's script, if it came to its end.
    #[must_use]
    pub fn script_status(&self) -> Option<i32> {
        self.console
            .rsplit_once("guest: status ")?
            .1
            .lines()
            .next()?
            .trim()
            .parse()
            .ok()
    }

    /// The guest's clock when its kernel handed over to init, in seconds.
    #[must_use]
    pub fn init_at(&self) -> Option<f64> {
        self.console
            .split_once("guest: init at ")?
            .1
            .lines()
            .next()?
            .trim()
            .parse()
            .ok()
    }

    /// The outcome, if the script succeeded and the guest powered off.
    ///
    /// # Errors
    /// When not; the error has everything that was said.
    pub fn success(self) -> Result<Self> {
        let fine = self.script_status().unwrap_or(0) == 0 && self.exit_code() == Some(0);
        ensure!(
            fine,
            "script status {:?}, VMM {}. Console:\n{}\nsmsvmm says:\n{}",
            self.script_status(),
            self.status,
            self.console,
            self.log
        );
        Ok(self)
    }
}
