//! The emulated machine: QEMU's command line, its life, and the conversation with process 1 of the host.

use std::fs::File;
use std::io::{ErrorKind, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Signal, set_parent_process_death_signal};
use serde_json::json;

use crate::ports::{Lines, Waiting};
use crate::qmp::Qmp;
use crate::saved::Saved;
use crate::{Builder, Cache, Network, Toolbox, quote};

/// Extra disks that a host can be given: it has that many free hot-plug ports.
pub(crate) const EXTRA_DISKS: usize = 2;

/// An AMD processor with nested paging, as the emulator can offer it.
const PROCESSOR: &str = "EPYC-Rome,+svm,+npt";

/// `tsc=reliable no_timer_check`: the emulator's clocks drift against each other when this machine is busy.
const KERNEL_COMMAND_LINE: &str = "console=ttyS0 panic=-1 quiet mitigations=off nokaslr tsc=reliable no_timer_check \
     random.trust_cpu=on audit=0 nmi_watchdog=0 nowatchdog";

/// A lab did not do in time what it was asked for, and was ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the lab was ended: no result within {limit:?}")]
pub struct Overdue {
    /// The time that it had.
    pub limit: Duration,
}

/// After how much silence a machine is poked.
const SILENCE: Duration = Duration::from_secs(1);

/// Where a host begins.
pub(crate) enum Start<'a> {
    /// At power-on; with its memory in a file if its state is to be saved.
    Boot { memory_file: Option<&'a Path> },
    /// At a saved state.
    Restore(&'a Saved),
}

/// A running QEMU. Dropping it kills it.
pub(crate) struct Machine {
    child: Child,
    qmp: Qmp,
    control: UnixStream,
    lines: Lines,
    data: UnixStream,
    terminal: UnixStream,
    console: File,
    complaints: File,
    deterministic: bool,
}

impl Machine {
    /// Starts the host and returns when it takes commands.
    pub(crate) fn start(cache: &Cache, builder: &Builder, share: &Path, start: Start<'_>) -> Result<Self> {
        // Only needed until QEMU has opened everything; then nothing is left to clean up.
        let folder = tempfile::Builder::new().prefix("lab.").tempdir()?;
        let console_path = folder.path().join("console");
        let console = File::create_new(&console_path).and_then(|_| File::open(&console_path))?;
        let complaints_path = folder.path().join("complaints");
        let complaints_writer = File::create_new(&complaints_path)?;
        let mut complaints = File::open(&complaints_path)?;
        let [control, data, terminal, monitor] =
            ["control", "data", "terminal", "monitor"].map(|name| Waiting::new(folder.path(), name));
        let (control, data, terminal, monitor) = (control?, data?, terminal?, monitor?);

        let emulator = Toolbox::emulator(cache)?;
        let mut command = emulator.command("qemu-system-x86_64");
        for firmware in ["usr/share/qemu", "usr/share/seabios"] {
            command.arg("-L").arg(emulator.tree().join(firmware));
        }
        hardware(&mut command, cache, builder, share)?;
        command.args([
            "-chardev",
            &control.chardev("control"),
            "-chardev",
            &data.chardev("data"),
        ]);
        command.args([
            "-chardev",
            &terminal.chardev("terminal"),
            "-chardev",
            &monitor.chardev("monitor"),
        ]);
        command.args([
            "-device",
            "virtio-serial-pci,max_ports=8",
            "-device",
            "virtconsole,chardev=terminal,nr=0",
        ]);
        command.args(["-device", "virtserialport,chardev=data,nr=1"]);
        command.args(["-device", "virtserialport,chardev=control,nr=2"]);
        command.args(["-mon", "chardev=monitor,mode=control"]);
        command
            .arg("-chardev")
            .arg(format!("file,id=console,path={}", console_path.display()));
        command.args(["-serial", "chardev:console"]);
        let memory = match &start {
            Start::Boot { memory_file } => memory_file.map(|file| (file, "on")),
            Start::Restore(saved) => Some((saved.memory.as_path(), "off")),
        };
        if let Some((file, shared)) = memory {
            let size = builder.memory_mib;
            command
                .args(["-machine", "memory-backend=memory", "-object"])
                .arg(format!(
                    "memory-backend-file,id=memory,size={size}M,mem-path={},share={shared}",
                    file.display()
                ));
        }
        if matches!(start, Start::Restore(_)) {
            command.args(["-incoming", "defer"]);
        }
        command
            .stdout(complaints_writer.try_clone()?)
            .stderr(complaints_writer);
        let mut child = spawn(&mut command)?;
        let connected = (|| {
            let monitor = monitor.connected(&mut child)?;
            Ok((
                monitor,
                control.connected(&mut child)?,
                data.connected(&mut child)?,
                terminal.connected(&mut child)?,
            ))
        })();
        let (monitor, control, data, terminal) = match connected {
            Ok(all) => all,
            Err(error) => {
                end(&mut child);
                return Err::<Self, anyhow::Error>(error).context(tail(&mut complaints));
            }
        };
        for stream in [&control, &data, &terminal] {
            stream.set_nonblocking(true)?;
        }
        let qmp = match Qmp::new(monitor) {
            Ok(qmp) => qmp,
            Err(error) => {
                end(&mut child);
                return Err(error).context(tail(&mut complaints));
            }
        };
        let mut machine = Self {
            child,
            qmp,
            control,
            lines: Lines::default(),
            data,
            terminal,
            console,
            complaints,
            deterministic: builder.deterministic,
        };
        match start {
            Start::Restore(saved) => {
                if let Err(error) = machine.restore(saved) {
                    return Err(error).context(machine.autopsy("the lab host cannot be restored"));
                }
            }
            Start::Boot { .. } => {
                let line = machine.control_line(builder.start_timeout)?;
                if !line.starts_with("ready") {
                    bail!(machine.autopsy(&format!("the lab host says: {line}")));
                }
            }
        }
        Ok(machine)
    }

    fn restore(&mut self, saved: &Saved) -> Result<()> {
        self.ignore_shared_memory()?;
        let uri = format!("exec:cat {}", quote(&saved.state));
        self.qmp.execute("migrate-incoming", &json!({ "uri": uri }))?;
        self.qmp.wait_for_migration(Duration::from_secs(60))?;
        self.qmp.execute("cont", &json!({}))?;
        Ok(())
    }

    /// Writes the machine's state, without its memory, which lies in its file already. The machine stays stopped.
    pub(crate) fn save(&mut self, state: &Path) -> Result<()> {
        self.qmp.execute("stop", &json!({}))?;
        self.ignore_shared_memory()?;
        let uri = format!("exec:cat > {}", quote(state));
        self.qmp.execute("migrate", &json!({ "uri": uri }))?;
        self.qmp.wait_for_migration(Duration::from_secs(120))?;
        self.qmp.execute("quit", &json!({}))?;
        self.child.wait()?;
        Ok(())
    }

    fn ignore_shared_memory(&mut self) -> Result<()> {
        let capabilities = json!({ "capabilities": [{ "capability": "x-ignore-shared", "state": true }] });
        self.qmp.execute("migrate-set-capabilities", &capabilities)?;
        Ok(())
    }

    /// Plugs a raw image as a disk; what is written to it goes to a temporary file.
    pub(crate) fn plug_disk(&mut self, index: usize, image: &Path) -> Result<()> {
        let image = std::path::absolute(image)?;
        let drive = format!(
            "if=none,id=extra-drive{index},format=raw,file.locking=off,snapshot=on,file={}",
            image.display()
        );
        let said = self.qmp.execute(
            "human-monitor-command",
            &json!({ "command-line": format!("drive_add 0 {drive}") }),
        )?;
        if said.as_str().map(str::trim) != Some("OK") {
            bail!("QEMU cannot open {}: {said}", image.display());
        }
        let device = json!({
            "driver": "virtio-blk-pci", "drive": format!("extra-drive{index}"), "id": format!("extra-disk{index}"),
            "bus": format!("extra{index}"),
        });
        self.qmp.execute("device_add", &device)?;
        Ok(())
    }

    /// Sends one line to the host.
    pub(crate) fn request(&mut self, line: &str) -> Result<()> {
        let end = Instant::now() + Duration::from_secs(60);
        let mut rest = format!("{line}\n").into_bytes();
        while !rest.is_empty() {
            match self.control.write(&rest) {
                Ok(count) => drop(rest.drain(..count)),
                Err(error) if error.kind() == ErrorKind::WouldBlock && Instant::now() < end => {
                    std::thread::sleep(Duration::from_millis(2));
                }
                Err(error) => return Err(error).context(self.autopsy("the lab host takes no command")),
            }
        }
        Ok(())
    }

    /// The host's next line.
    pub(crate) fn control_line(&mut self, limit: Duration) -> Result<String> {
        let end = Instant::now() + limit;
        loop {
            if let Some(line) = self.lines.next() {
                return Ok(line);
            }
            let until = self.next_poke(end);
            if !ready(&[(&self.control, PollFlags::IN)], until)? {
                if Instant::now() >= end {
                    return Err(self.overdue(limit));
                }
                self.poke()?;
                continue;
            }
            if !self.lines.fill(&self.control)? {
                bail!(self.autopsy("the lab host ended"));
            }
        }
    }

    /// Sends a request, feeds input, hands over output, and returns the exit status that the host tells.
    pub(crate) fn converse(
        &mut self,
        request: &str,
        input: &[u8],
        limit: Duration,
        mut sink: impl FnMut(&[u8]),
    ) -> Result<i32> {
        let end = Instant::now() + limit;
        self.request(request)?;
        let mut rest = input;
        let mut chunk = vec![0; 256 << 10];
        loop {
            let wanted = if rest.is_empty() {
                PollFlags::IN
            } else {
                PollFlags::IN | PollFlags::OUT
            };
            let until = self.next_poke(end);
            if !ready(&[(&self.control, PollFlags::IN), (&self.data, wanted)], until)? {
                if Instant::now() >= end {
                    return Err(self.overdue(limit));
                }
                self.poke()?;
                continue;
            }
            if !rest.is_empty() {
                let count = ignore_would_block(self.data.write(rest))?;
                rest = rest.get(count..).unwrap_or_default();
            }
            drain(&mut self.data, &mut chunk, &mut sink)?;
            if !self.lines.fill(&self.control)? {
                bail!(self.autopsy("the lab host ended"));
            }
            while let Some(line) = self.lines.next() {
                if let Some(status) = line.strip_prefix("exit ") {
                    // A write of the host is done when QEMU has put it into the socket: all output is here now.
                    drain(&mut self.data, &mut chunk, &mut sink)?;
                    return status.trim().parse().context("the lab host told no exit status");
                }
            }
        }
    }

    /// Runs a script on the host's terminal with this process's terminal connected to it.
    pub(crate) fn terminal(&mut self, script: &str) -> Result<i32> {
        let stdin = std::io::stdin();
        let size = rustix::termios::tcgetwinsize(&stdin).map_or((24, 80), |size| (size.ws_row, size.ws_col));
        let before = rustix::termios::tcgetattr(&stdin).context("the standard input is no terminal")?;
        let mut raw = before.clone();
        raw.make_raw();
        rustix::termios::tcsetattr(&stdin, rustix::termios::OptionalActions::Now, &raw)?;
        let result = self.relay_terminal(&format!(
            "tty {} {} {}",
            crate::ports::base64(script.as_bytes()),
            size.0,
            size.1
        ));
        rustix::termios::tcsetattr(&stdin, rustix::termios::OptionalActions::Now, &before)?;
        result
    }

    fn relay_terminal(&mut self, request: &str) -> Result<i32> {
        self.request(request)?;
        let stdin = std::io::stdin();
        let mut chunk = vec![0; 64 << 10];
        let mut show = |bytes: &[u8]| {
            let mut out = std::io::stdout();
            drop(out.write_all(bytes).and_then(|()| out.flush()));
        };
        loop {
            let mut fds = [
                PollFd::new(&self.control, PollFlags::IN),
                PollFd::new(&self.terminal, PollFlags::IN),
                PollFd::from_borrowed_fd(stdin.as_fd(), PollFlags::IN),
            ];
            let silent = poll(&mut fds, Timespec::try_from(SILENCE).ok().as_ref())? == 0;
            let typed = !fds[2].revents().is_empty();
            if silent {
                self.poke()?;
            }
            if typed {
                let count = rustix::io::read(&stdin, &mut chunk)?;
                self.terminal.set_nonblocking(false)?;
                self.terminal.write_all(chunk.get(..count).unwrap_or_default())?;
                self.terminal.set_nonblocking(true)?;
            }
            drain(&mut self.terminal, &mut chunk, &mut show)?;
            if !self.lines.fill(&self.control)? {
                bail!(self.autopsy("the lab host ended"));
            }
            while let Some(line) = self.lines.next() {
                if let Some(status) = line.strip_prefix("exit ") {
                    drain(&mut self.terminal, &mut chunk, &mut show)?;
                    return status.trim().parse().context("the lab host told no exit status");
                }
            }
        }
    }

    /// When a machine that says nothing is to be poked, or has had its time.
    fn next_poke(&self, end: Instant) -> Instant {
        if self.deterministic {
            return end;
        }
        end.min(Instant::now() + SILENCE)
    }

    /// Sends a machine that says nothing an interrupt.
    ///
    /// QEMU can forget that an interrupt is pending: where VMRUN and #VMEXIT of the emulated processor change the set of pending
    /// kinds (`target/i386/tcg/system/svm_helper.c` of QEMU 10.0, `interrupt_request`), they do so without the lock and not
    /// atomically, and what a device adds at that moment is gone. If it was the timer's, and the guest spins, the machine stands
    /// still for good, with the vector in the APIC's IRR. Any further interrupt has the APIC look again.
    fn poke(&mut self) -> Result<()> {
        let key = json!({ "keys": [{ "type": "qcode", "data": "shift" }], "hold-time": 1 });
        self.qmp.execute("send-key", &key).map(drop)
    }

    /// Kills a machine that took too long; the error has what its processor and its timer were doing.
    fn overdue(&mut self, limit: Duration) -> anyhow::Error {
        let state: String = ["info status", "info registers", "info lapic"]
            .map(|question| {
                let answer = self
                    .qmp
                    .execute("human-monitor-command", &json!({ "command-line": question }));
                match answer {
                    Ok(said) => format!("{question}:\n{}\n", said.as_str().unwrap_or_default()),
                    Err(error) => format!("{question}: {error:#}\n"),
                }
            })
            .concat();
        end(&mut self.child);
        anyhow::Error::new(Overdue { limit }).context(format!(
            "{state}The end of the lab's console:\n{}",
            tail(&mut self.console)
        ))
    }

    /// What happened, with what QEMU and the host's kernel said last.
    fn autopsy(&mut self, what: &str) -> String {
        let state = match self.child.try_wait() {
            Ok(Some(status)) => format!("QEMU ended: {status}"),
            _ => "QEMU still runs".to_owned(),
        };
        format!(
            "{what} ({state})\n{}\n{}",
            tail(&mut self.complaints),
            tail(&mut self.console)
        )
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// What a saved state depends on besides the images.
pub(crate) fn description(builder: &Builder) -> String {
    let Builder {
        cpus,
        deterministic,
        memory_mib,
        ..
    } = builder;
    format!("2 {PROCESSOR} {KERNEL_COMMAND_LINE} {cpus} {deterministic} {memory_mib} {EXTRA_DISKS}")
}

fn hardware(command: &mut Command, cache: &Cache, builder: &Builder, share: &Path) -> Result<()> {
    let image = cache.image("lab")?;
    // One thread for all processors: with one each, QEMU 7.2 can hang where a kernel patches its own code.
    let thread = if builder.deterministic || builder.cpus > 1 {
        "single"
    } else {
        "multi"
    };
    command.args([
        "-M",
        "q35",
        "-cpu",
        PROCESSOR,
        "-accel",
        &format!("tcg,thread={thread},tb-size=512"),
    ]);
    command.args([
        "-smp",
        &builder.cpus.to_string(),
        "-m",
        &builder.memory_mib.to_string(),
    ]);
    command.args(["-display", "none", "-nodefaults", "-no-user-config", "-no-reboot"]);
    if builder.deterministic {
        command.args(["-icount", "shift=0,sleep=off"]);
    }
    command
        .arg("-kernel")
        .arg(image.join("vmlinux"))
        .arg("-initrd")
        .arg(image.join("initrd"));
    command.args(["-append", KERNEL_COMMAND_LINE]);
    disk(command, "root", &image.join("root.ext4"), "readonly=on");
    disk(command, "share", share, "cache=unsafe");
    disk(
        command,
        "images",
        &cache.image("lab-images")?.join("images.ext4"),
        "readonly=on",
    );
    for port in 0..EXTRA_DISKS {
        command.args([
            "-device",
            &format!("pcie-root-port,id=extra{port},chassis={}", port + 1),
        ]);
    }
    let net = match &builder.network {
        Network::Isolated => "hubport,id=net,hubid=0".to_owned(),
        Network::Segment(name) => {
            let key = crate::Key::new().with(name).number();
            let (group, port) = ((key >> 8) & 0xff, 20_000 + ((key >> 16) & 0x7fff));
            format!("socket,id=net,mcast=239.255.83.{group}:{port},localaddr=127.0.0.1")
        }
    };
    command.args([
        "-netdev",
        &net,
        "-device",
        "virtio-net-pci,netdev=net,romfile=,rombar=0",
    ]);
    Ok(())
}

fn disk(command: &mut Command, id: &str, image: &Path, options: &str) {
    let drive = format!(
        "file={},format=raw,if=none,id={id},file.locking=off,{options}",
        image.display()
    );
    command.args(["-drive", &drive, "-device", &format!("virtio-blk-pci,drive={id}")]);
}

/// Starts a child that ends with this thread.
fn spawn(command: &mut Command) -> Result<Child> {
    // SAFETY: between fork and exec only the prctl system call is made, which is async-signal-safe and allocates nothing.
    unsafe {
        command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?));
    }
    command
        .spawn()
        .with_context(|| format!("cannot start {}", command.get_program().display()))
}

/// Waits until one of the sockets is ready, or the time is over.
fn ready(sockets: &[(&UnixStream, PollFlags)], end: Instant) -> Result<bool> {
    let left = end.saturating_duration_since(Instant::now());
    let mut fds: Vec<PollFd<'_>> = sockets
        .iter()
        .map(|(socket, flags)| PollFd::new(*socket, *flags))
        .collect();
    match poll(&mut fds, Timespec::try_from(left).ok().as_ref()) {
        Ok(count) => Ok(count != 0),
        Err(rustix::io::Errno::INTR) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

fn end(child: &mut Child) {
    let _already_gone = child.kill();
    let _reaped = child.wait();
}

fn drain(stream: &mut UnixStream, chunk: &mut [u8], sink: &mut impl FnMut(&[u8])) -> Result<()> {
    loop {
        match ignore_would_block(stream.read(chunk))? {
            0 => return Ok(()),
            count => sink(chunk.get(..count).unwrap_or_default()),
        }
    }
}

fn ignore_would_block(result: std::io::Result<usize>) -> std::io::Result<usize> {
    match result {
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(0),
        other => other,
    }
}

/// The last 3000 bytes of a file.
fn tail(file: &mut File) -> String {
    let mut bytes = Vec::new();
    let length = file.metadata().map_or(0, |data| data.len());
    let read = file
        .seek(SeekFrom::Start(length.saturating_sub(3000)))
        .and_then(|_| file.read_to_end(&mut bytes));
    match read {
        Ok(_) => String::from_utf8_lossy(&bytes).trim_end().to_owned(),
        Err(error) => format!("(unreadable: {error})"),
    }
}
