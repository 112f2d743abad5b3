//! The lab: a Linux host with AMD virtualisation, emulated in software, whose own KVM runs `smsvmm`.
//!
//! Many machines (this project's CI among them) have no `/dev/kvm`, or one that cannot run a stock kernel. QEMU's
//! emulator can: it offers an AMD processor with nested paging, on which a stock Debian kernel brings up its own KVM.
//!
//! ```text
//! this machine ── qemu-system-x86_64 (TCG) ── lab host: Debian kernel, kvm-amd ── smsvmm ── guest
//!      │            QMP: start, restore            │ process 1 is images/lab-init
//!      ├── control port: "start", "run", "exit N" ─┤
//!      ├── data port: the input and output of a command
//!      └── share: a folder of this machine, seen at the same path
//! ```
//!
//! Booting the host takes seconds, so it is done once: the machine's state is saved when it is ready, and each
//! [`Lab`] starts from it in a fraction of a second, with the saved memory mapped privately (nothing is copied).
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! let mut lab = lab::Lab::builder().share("/home/me/smsvmm/target/debug").start()?;
//! let output = lab.run("./smsvmm host check")?;
//! assert!(output.success(), "{}", output.text());
//! # Ok(())
//! # }
//! ```
//!
//! The images come from `cargo xtask setup`. A lab belongs to the thread that started it: it ends when that thread ends.

mod cache;
mod cpio;
mod machine;
mod ports;
mod qmp;
mod saved;
mod share;
mod toolbox;

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};

pub use cache::{Cache, Key, Pruned, repository};
pub use cpio::Archive;
pub use share::Share;
pub use toolbox::{Toolbox, finish};

pub use machine::Overdue;

use machine::{Machine, Start};

/// The network card of a lab host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Network {
    /// A card that is connected to nothing.
    #[default]
    Isolated,
    /// One Ethernet segment of all labs on this machine that name it; host `n` is 10.9.0.`n`. Packets stay on loopback.
    Segment(String),
}

/// Describes a lab host before it starts; made by [`Lab::builder`].
#[derive(Clone, Debug)]
pub struct Builder {
    pub(crate) host_id: u8,
    pub(crate) cpus: u8,
    pub(crate) deterministic: bool,
    pub(crate) memory_mib: u32,
    pub(crate) network: Network,
    pub(crate) share: Option<PathBuf>,
    pub(crate) disks: Vec<PathBuf>,
    pub(crate) start_timeout: Duration,
    pub(crate) fresh: bool,
}

impl Builder {
    /// Number of the host on its network: 1 to 254. 0, the default, has no address.
    #[must_use]
    pub fn host_id(mut self, id: u8) -> Self {
        self.host_id = id;
        self
    }

    /// Processors of the host; 1 if not said. One thread of this machine emulates them all.
    #[must_use]
    pub fn cpus(mut self, cpus: u8) -> Self {
        self.cpus = cpus;
        self
    }

    /// Let time pass with the instructions that were executed (1 ns each), so that times and exit counts repeat.
    #[must_use]
    pub fn deterministic(mut self, yes: bool) -> Self {
        self.deterministic = yes;
        self
    }

    /// Memory of the host in MiB; 3072 if not said.
    #[must_use]
    pub fn memory_mib(mut self, mib: u32) -> Self {
        self.memory_mib = mib;
        self
    }

    /// What its network card `eth0` is connected to.
    #[must_use]
    pub fn network(mut self, network: Network) -> Self {
        self.network = network;
        self
    }

    /// A folder whose content the host sees at the same absolute path. It is a copy: what the host changes there is
    /// fetched with [`Lab::fetch`].
    #[must_use]
    pub fn share(mut self, folder: impl Into<PathBuf>) -> Self {
        self.share = Some(folder.into());
        self
    }

    /// A raw image that the host sees as one more block device: `/dev/vdd`, then `/dev/vde`. What the host writes there
    /// is thrown away with the lab.
    #[must_use]
    pub fn disk(mut self, image: impl Into<PathBuf>) -> Self {
        self.disks.push(image.into());
        self
    }

    /// Boot the host instead of starting it from its saved state.
    #[must_use]
    pub fn fresh(mut self, yes: bool) -> Self {
        self.fresh = yes;
        self
    }

    /// Starts the host and waits until it takes commands.
    ///
    /// # Errors
    /// When the images are not there (`cargo xtask setup` makes them), or when the host does not come up.
    pub fn start(self) -> Result<Lab> {
        ensure!(
            (1..=16).contains(&self.cpus),
            "a lab host has 1 to 16 processors, not {}",
            self.cpus
        );
        ensure!(
            self.disks.len() <= machine::EXTRA_DISKS,
            "a lab host takes {} extra disks",
            machine::EXTRA_DISKS
        );
        let cache = Cache::locate();
        let share = Share::new(&cache, self.share.as_deref())?;
        let machine = if self.fresh {
            Machine::start(&cache, &self, share.image(), Start::Boot { memory_file: None })?
        } else {
            let saved = saved::ensure(&cache, &self)?;
            Machine::start(&cache, &self, share.image(), Start::Restore(&saved))?
        };
        let mut lab = Lab {
            machine,
            folder: PathBuf::new(),
        };
        lab.hello(&self)?;
        Ok(lab)
    }
}

/// How a command in the lab ended, and what it said.
#[derive(Clone, Debug)]
pub struct Output {
    /// Exit status as a shell tells it: 128 + signal when a signal ended it.
    pub status: i32,
    /// Standard output and error, as they came.
    pub bytes: Vec<u8>,
}

impl Output {
    /// Whether the exit status was 0.
    #[must_use]
    pub fn success(&self) -> bool {
        self.status == 0
    }

    /// The output as text, what is not UTF-8 replaced.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes).into_owned()
    }
}

/// A running lab host. Dropping it ends it at once; nothing of it remains.
pub struct Lab {
    machine: Machine,
    folder: PathBuf,
}

impl Lab {
    /// A description with the defaults: one processor, 3 GiB, no network, no share.
    #[must_use]
    pub fn builder() -> Builder {
        Builder {
            host_id: 0,
            cpus: 1,
            deterministic: false,
            memory_mib: 3072,
            network: Network::Isolated,
            share: None,
            disks: Vec::new(),
            start_timeout: Duration::from_secs(240),
            fresh: false,
        }
    }

    /// The folder of the share in the host, where commands start.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Runs a bash script and returns its output. Ten minutes at most.
    ///
    /// # Errors
    /// When the lab itself fails or the time is over (an [`Overdue`]; then the host is gone, and the error shows what it did
    /// last); a script that fails is not an error.
    pub fn run(&mut self, script: &str) -> Result<Output> {
        let mut bytes = Vec::new();
        let status = self.run_streaming(script, Duration::from_secs(600), |chunk| {
            bytes.extend_from_slice(chunk)
        })?;
        Ok(Output { status, bytes })
    }

    /// Like [`Lab::run`], handing over the output as it comes, with a time limit of the caller's.
    ///
    /// # Errors
    /// As [`Lab::run`].
    pub fn run_streaming(&mut self, script: &str, limit: Duration, sink: impl FnMut(&[u8])) -> Result<i32> {
        self.run_with_input(script, &[], limit, sink)
    }

    /// Like [`Lab::run_streaming`], with bytes for the script's standard input. The script must read all of them.
    ///
    /// # Errors
    /// As [`Lab::run`].
    pub fn run_with_input(
        &mut self,
        script: &str,
        input: &[u8],
        limit: Duration,
        sink: impl FnMut(&[u8]),
    ) -> Result<i32> {
        let request = format!("run {}", ports::base64(script.as_bytes()));
        self.machine.converse(&request, input, limit, sink)
    }

    /// Runs a script on a terminal of its own in the host, and connects this process's terminal to it until it ends.
    ///
    /// # Errors
    /// When the lab fails. A script that fails is not an error.
    pub fn run_on_terminal(&mut self, script: &str) -> Result<i32> {
        self.machine.terminal(script)
    }

    /// Copies a file or folder of the host to a folder of this machine.
    ///
    /// # Errors
    /// When the path is not there, or nothing can be written.
    pub fn fetch(&mut self, path: impl AsRef<Path>, to: impl AsRef<Path>) -> Result<()> {
        let path = self.folder.join(path);
        let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
            bail!("{} names no file", path.display());
        };
        let script = format!("tar -C {} -cf - {}", quote(folder), quote(Path::new(name)));
        let mut archive = Vec::new();
        let status = self.run_streaming(&script, Duration::from_secs(600), |chunk| {
            archive.extend_from_slice(chunk)
        })?;
        ensure!(status == 0, "{} could not be read in the lab", path.display());
        share::unpack(&archive, to.as_ref()).with_context(|| format!("cannot fetch {}", path.display()))
    }

    /// Copies a file or folder of this machine into a folder of the host.
    ///
    /// # Errors
    /// When the path is not there, or the host cannot take it.
    pub fn send(&mut self, path: impl AsRef<Path>, to: impl AsRef<Path>) -> Result<()> {
        let archive = share::pack(path.as_ref())?;
        let to = quote(&self.folder.join(to));
        let script = format!("mkdir -p {to} && head -c {} | tar -C {to} -xf -", archive.len());
        let mut said = Vec::new();
        let limit = Duration::from_secs(600);
        let status = self.run_with_input(&script, &archive, limit, |chunk| said.extend_from_slice(chunk))?;
        ensure!(
            status == 0,
            "{} could not be sent: {}",
            path.as_ref().display(),
            String::from_utf8_lossy(&said)
        );
        Ok(())
    }

    /// Tells a restored host what no saved state can know: the time, who it is, where the share goes; plugs extra disks.
    fn hello(&mut self, builder: &Builder) -> Result<()> {
        for (index, image) in builder.disks.iter().enumerate() {
            self.machine.plug_disk(index, image)?;
        }
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .context("the clock is before 1970")?
            .as_secs();
        let folder = match &builder.share {
            Some(folder) => std::path::absolute(folder)?,
            None => PathBuf::from("/srv/share"),
        };
        ensure!(
            !folder.to_string_lossy().contains(char::is_whitespace),
            "the lab cannot share {}: white space",
            folder.display()
        );
        self.machine
            .request(&format!("start {now} {} {}", builder.host_id, folder.display()))?;
        let answer = self.machine.control_line(Duration::from_secs(60))?;
        let Some(folder) = answer.strip_prefix("started ") else {
            bail!("the lab host says: {answer}")
        };
        self.folder = PathBuf::from(folder);
        Ok(())
    }
}

/// A path as one word of a shell command.
#[must_use]
pub fn quote(path: &Path) -> String {
    format!("'{}'", path.to_string_lossy().replace('\'', r"'\''"))
}
