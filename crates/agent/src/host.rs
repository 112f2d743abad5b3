//! The conversation with storage management on the host, through a disk.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use api::{Problem, ProblemKind};
use expanded_api::{
    Action, Answer, Cdb, GuestDisk, GuestEvents, Header, MAJOR, MAX_WAIT_MS, Outcome, PAGE, Page, Request,
    State,
};

use crate::sg::{CommandError, Data, Refusal, ScsiDisk};

/// Bytes of a fragment.
const FRAGMENT: usize = 64 << 10;
/// For so long it is tried again when the host has too much to do.
const PATIENCE: Duration = Duration::from_secs(20);

/// Why nothing came of it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AgentError {
    /// No disk.
    #[error(
        "this machine has no disk of smsvmm that takes commands{}; its administrator gives a disk \
         bus = \"virtio-scsi\" in vm.toml", unreadable(*.0)
    )]
    NoDisk(usize),
    /// Not this one.
    #[error("{} is no disk of smsvmm, or its [expanded-api] is disabled in vm.toml", .0.display())]
    NotSms(PathBuf),
    /// Another language.
    #[error(
        "the host speaks version {host} of the expanded API, this program version {MAJOR}; use the sms-agent that came with the host"
    )]
    Version { host: u8 },
    /// Not root.
    #[error("{}: only root may send commands to a disk", .0.display())]
    NotRoot(PathBuf),
    /// The disk.
    #[error("{}: {source}", path.display())]
    Command { path: PathBuf, source: CommandError },
    /// The host refuses or fails.
    #[error("{}", in_the_guest(.0))]
    Problem(Problem),
    /// What it says makes no sense.
    #[error("the host answered what this program does not understand: {0}")]
    Answer(String),
    /// The host has too much to do.
    #[error("the host has too much to do for this machine; try again later")]
    Busy,
    /// Something here.
    #[error("{what}: {source}")]
    Here { what: String, source: io::Error },
    /// In words.
    #[error("{0}")]
    Text(String),
}

/// What is wrong, with the commands that there are here instead of the host's.
fn in_the_guest(problem: &Problem) -> String {
    let mut text = problem.to_string();
    for command in ["disk list", "disk status", "job list", "volume list"] {
        text = text.replace(&format!("`smsvmm {command}"), &format!("`sms-agent {command}"));
    }
    text
}

fn unreadable(count: usize) -> String {
    match count {
        0 => String::new(),
        count => format!(" ({count} could not be asked: run it as root)"),
    }
}

/// A disk through which the host is spoken to.
#[derive(Debug)]
pub(crate) struct Host {
    disk: ScsiDisk,
    /// The minor version that it speaks.
    pub(crate) minor: u8,
}

/// What the kernel calls a SCSI disk, and its serial number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    /// `/dev/sdb`.
    pub(crate) path: PathBuf,
    /// As the page 80h has it.
    pub(crate) serial: String,
}

/// Disks of the SCSI disk driver.
fn scsi_disks() -> Vec<PathBuf> {
    let entries = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> = names
        .filter(|name| name.starts_with("sd") || name.starts_with("sr"))
        .collect();
    // sdb before sdaa.
    names.sort_by_key(|name| (name.len(), name.clone()));
    names.iter().map(|name| Path::new("/dev").join(name)).collect()
}

/// The SMS disks of this machine, and their serial numbers.
pub(crate) fn sms_disks() -> Vec<Found> {
    let mut found = Vec::new();
    for path in scsi_disks() {
        let Ok(disk) = ScsiDisk::open(&path) else { continue };
        let is_ours = disk
            .vital_page(PAGE)
            .is_ok_and(|page| Page::decode(&page).is_some());
        if is_ours && let Ok(serial) = disk.vital_page(0x80) {
            let serial = String::from_utf8_lossy(&serial).trim().to_owned();
            found.push(Found { path, serial });
        }
    }
    found
}

impl Host {
    /// Through this disk, or through the first that is found.
    pub(crate) fn find(path: Option<&Path>) -> Result<Self, AgentError> {
        if let Some(path) = path {
            let here = |source| AgentError::Here {
                what: path.display().to_string(),
                source,
            };
            let disk = ScsiDisk::open(path).map_err(here)?;
            return Self::at(disk)?.ok_or_else(|| AgentError::NotSms(path.to_owned()));
        }
        let mut unreadable = 0;
        for path in scsi_disks() {
            match ScsiDisk::open(&path) {
                Ok(disk) => {
                    if let Some(host) = Self::at(disk)? {
                        return Ok(host);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => unreadable += 1,
                Err(_) => {}
            }
        }
        Err(AgentError::NoDisk(unreadable))
    }

    /// None if it is no SMS disk.
    fn at(disk: ScsiDisk) -> Result<Option<Self>, AgentError> {
        let mut asked = disk.vital_page(PAGE);
        if matches!(asked, Err(CommandError::Disk(Refusal { key: 6, .. }))) {
            asked = disk.vital_page(PAGE);
        }
        // Whatever there is against it: it is none.
        let Some(page) = asked.ok().and_then(|page| Page::decode(&page)) else {
            return Ok(None);
        };
        if page.major != MAJOR {
            return Err(AgentError::Version { host: page.major });
        }
        Ok(Some(Self {
            disk,
            minor: page.minor,
        }))
    }

    /// The disk.
    pub(crate) fn path(&self) -> &Path {
        &self.disk.path
    }

    /// Sends a command as it is, with `count` zeroes to the disk if any: for those who try what the host refuses.
    pub(crate) fn forge(&self, cdb: &[u8], count: usize) -> Result<(), AgentError> {
        let mut bytes = vec![0; count];
        let data = if count > 0 {
            Data::Out(&mut bytes)
        } else {
            Data::None
        };
        // What the disk had to tell before comes first.
        let _ = self.disk.command(&[0; 6], Data::None);
        let done = self.disk.command(cdb, data);
        done.map(drop).map_err(|error| self.failed(error))
    }

    /// A command; again if the disk had something else to tell first, or the host is about to be ready.
    fn command(&self, cdb: &Cdb, bytes: &mut [u8]) -> Result<usize, CommandError> {
        let begin = Instant::now();
        loop {
            let data = match cdb.action {
                Action::Send => Data::Out(bytes),
                Action::Cancel => Data::None,
                Action::Capabilities | Action::Receive | Action::Events => Data::In(bytes),
            };
            let again = match self.disk.command(&cdb.encode(), data) {
                // UNIT ATTENTION.
                Err(CommandError::Disk(Refusal { key: 6, .. })) => Duration::ZERO,
                // NOT READY, or INSUFFICIENT RESOURCES.
                Err(CommandError::Disk(Refusal { key: 2, .. } | Refusal { code: (0x55, 3), .. })) => {
                    Duration::from_millis(200)
                }
                other => return other,
            };
            if begin.elapsed() > PATIENCE {
                return Err(CommandError::Disk(Refusal {
                    key: 5,
                    code: (0x55, 3),
                }));
            }
            std::thread::sleep(again);
        }
    }

    fn failed(&self, source: CommandError) -> AgentError {
        let path = self.path().to_owned();
        match source {
            CommandError::Kernel(error)
                if matches!(error.raw_os_error(), Some(libc::EPERM | libc::EACCES)) =>
            {
                AgentError::NotRoot(path)
            }
            CommandError::Disk(Refusal { code: (0x55, 3), .. }) => AgentError::Busy,
            source => AgentError::Command { path, source },
        }
    }

    /// All pieces of what an IN command answers; the state with them.
    fn pieces(&self, mut cdb: Cdb) -> Result<(State, Vec<u8>), AgentError> {
        let strange = |what: &str| AgentError::Answer(what.to_owned());
        let mut whole = Vec::new();
        let mut buffer = vec![0; FRAGMENT];
        loop {
            cdb.length = u32::try_from(buffer.len()).unwrap_or(u32::MAX);
            let moved = self
                .command(&cdb, &mut buffer)
                .map_err(|error| self.failed(error))?;
            let header = Header::decode(&buffer[..moved]).ok_or_else(|| strange("no header"))?;
            let end = Header::LENGTH + header.length as usize;
            let piece = buffer.get(Header::LENGTH..end.min(moved)).unwrap_or_default();
            if header.offset as usize != whole.len() {
                return Err(strange("pieces that do not fit"));
            }
            whole.extend_from_slice(piece);
            if whole.len() >= header.total as usize {
                return Ok((header.state, whole));
            }
            if piece.is_empty() {
                return Err(strange("less than it said"));
            }
            cdb.fragment = cdb
                .fragment
                .checked_add(1)
                .ok_or_else(|| strange("more than there can be"))?;
            // All is there.
            cdb.wait_ms = 0;
        }
    }

    /// Has the host do something, and waits until it is done.
    pub(crate) fn ask(&self, request: &Request) -> Result<Answer, AgentError> {
        let tag = random();
        let answer = self.ask_and_keep(tag, request);
        self.forget(tag);
        answer
    }

    /// The same under a tag that nobody else uses, of which [`Self::forget`] is to be told later: as little as can be while file systems
    /// stand still.
    pub(crate) fn ask_and_keep(&self, tag: u32, request: &Request) -> Result<Answer, AgentError> {
        let text = serde_json::to_vec(request).map_err(|error| AgentError::Answer(error.to_string()))?;
        self.send(tag, text)?;
        let mut cdb = Cdb::new(Action::Receive, tag, 0);
        let outcome = loop {
            cdb.wait_ms = MAX_WAIT_MS;
            let (state, body) = self.pieces(cdb)?;
            if state.has_ended() {
                break body;
            }
        };
        let outcome =
            serde_json::from_slice(&outcome).map_err(|error| AgentError::Answer(error.to_string()))?;
        match outcome {
            Outcome::Answer(answer) => Ok(*answer),
            Outcome::Problem(problem) => Err(AgentError::Problem(problem)),
        }
    }

    /// What the host keeps for us is not needed any more. Who comes later does not need this to succeed.
    pub(crate) fn forget(&self, tag: u32) {
        let _ = self.command(&Cdb::new(Action::Cancel, tag, 0), &mut []);
    }

    /// Has something given back that may still be in use for a moment: the host closes what was detached in the background.
    ///
    /// # Errors
    /// It is in use for longer, or cannot be given back.
    pub(crate) fn ask_until_free(&self, request: &Request) -> Result<(), AgentError> {
        let begin = Instant::now();
        loop {
            match self.ask(request) {
                Ok(_) => return Ok(()),
                Err(AgentError::Problem(problem))
                    if problem.kind == ProblemKind::Conflict && begin.elapsed() < PATIENCE => {}
                Err(AgentError::Busy) if begin.elapsed() < PATIENCE => {}
                Err(error) => return Err(error),
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Has a disk detached, and waits until the host has it back.
    ///
    /// # Errors
    /// The host refuses, or the driver here does not let the disk go.
    pub(crate) fn detach(&self, disk: &str) -> Result<(), AgentError> {
        let request = Request::DetachDisk {
            disk: disk.to_owned(),
        };
        self.ask_until_free(&request)?;
        let begin = Instant::now();
        let is_here = |known: &GuestDisk| known.id.is_some() && known.path.as_deref() == Some(disk);
        while self.disks()?.iter().any(is_here) {
            if begin.elapsed() > PATIENCE {
                return Err(AgentError::Text(format!(
                    "{disk} was to be detached, and this machine's driver does not let it go"
                )));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    fn send(&self, tag: u32, mut text: Vec<u8>) -> Result<(), AgentError> {
        let count = text.len().div_ceil(FRAGMENT);
        for (number, piece) in text.chunks_mut(FRAGMENT).enumerate() {
            let too_long = || AgentError::Text("the request is too long".to_owned());
            let fragment = u8::try_from(number).map_err(|_| too_long())?;
            let length = u32::try_from(piece.len()).map_err(|_| too_long())?;
            let cdb = Cdb::send(tag, length, fragment, number + 1 == count);
            match self.command(&cdb, piece) {
                Ok(_) => {}
                // No rights, or not understood: the reason is in the outcome.
                Err(CommandError::Disk(Refusal {
                    key: 5,
                    code: (0x20, 2) | (0x26, 0),
                })) if cdb.last => return Ok(()),
                Err(error) => return Err(self.failed(error)),
            }
        }
        Ok(())
    }

    /// The disks that this machine has or may have.
    pub(crate) fn disks(&self) -> Result<Vec<GuestDisk>, AgentError> {
        match self.ask(&Request::ListDisks {})? {
            Answer::Disks(disks) => Ok(disks),
            other => Err(AgentError::Answer(format!("{other:?}"))),
        }
    }

    /// The path in the pool of the disk behind a device.
    pub(crate) fn path_of_device(&self, device: &Path) -> Result<String, AgentError> {
        let real = std::fs::canonicalize(device).unwrap_or_else(|_| device.to_owned());
        let found = sms_disks().into_iter().find(|found| found.path == real);
        let found = found.ok_or_else(|| AgentError::NotSms(device.to_owned()))?;
        let disks = self.disks()?;
        let disk = with_serial(&disks, &found.serial, device)?;
        disk.and_then(|disk| disk.path.clone()).ok_or_else(|| {
            AgentError::Text(format!(
                "{} is no disk of a pool: the host cannot manage it",
                device.display()
            ))
        })
    }

    /// What happened after `after`; waits a little for the first if there is none.
    pub(crate) fn events(&self, after: u32, wait: bool) -> Result<GuestEvents, AgentError> {
        let mut cdb = Cdb::new(Action::Events, after, 0);
        cdb.wait_ms = if wait { MAX_WAIT_MS } else { 0 };
        let (_, body) = self.pieces(cdb)?;
        serde_json::from_slice(&body).map_err(|error| AgentError::Answer(error.to_string()))
    }

    /// Who this machine is, and what it may do.
    pub(crate) fn description(&self) -> Result<Answer, AgentError> {
        let (_, body) = self.pieces(Cdb::new(Action::Capabilities, 0, 0))?;
        let outcome = serde_json::from_slice(&body).map_err(|error| AgentError::Answer(error.to_string()))?;
        match outcome {
            Outcome::Answer(answer) => Ok(*answer),
            Outcome::Problem(problem) => Err(AgentError::Problem(problem)),
        }
    }
}

/// The disk of that serial number, which a device has. Of two it must be no guess.
fn with_serial<'a>(
    disks: &'a [GuestDisk],
    serial: &str,
    device: &Path,
) -> Result<Option<&'a GuestDisk>, AgentError> {
    let mut named = disks.iter().filter(|disk| disk.serial.as_deref() == Some(serial));
    let disk = named.next();
    let Some(other) = named.next() else {
        return Ok(disk);
    };
    let paths = disk.into_iter().chain([other]);
    let paths: Vec<&str> = paths
        .map(|disk| disk.path.as_deref().unwrap_or("another disk"))
        .collect();
    Err(AgentError::Text(format!(
        "{} has the serial number {serial}, and so have {}: name the disk by its path in the pool",
        device.display(),
        paths.join(" and ")
    )))
}

/// A number that nobody else uses: the standard library's hash keys are random.
pub(crate) fn random() -> u32 {
    use std::hash::{BuildHasher, Hasher};
    let mut hasher = std::hash::RandomState::new().build_hasher();
    hasher.write_u32(std::process::id());
    let number = hasher.finish();
    u32::try_from(number >> 32).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_names_commands_that_there_are_here() {
        let problem = Problem::new(ProblemKind::NotFound, "there is no disk /a.dsk")
            .remedy("`smsvmm disk list` shows what there is");
        let text = AgentError::Problem(problem).to_string();
        assert_eq!(
            text,
            "there is no disk /a.dsk; `sms-agent disk list` shows what there is"
        );
    }
    #[test]
    fn of_two_disks_with_one_serial_number_none_is_taken() {
        let disk = |path: &str, serial: &str| GuestDisk {
            path: Some(path.to_owned()),
            id: None,
            serial: Some(serial.to_owned()),
            size: 0,
            allocated: 0,
            read_only: false,
            volumes: Vec::new(),
            snapshots: Vec::new(),
        };
        let disks = [
            disk("/a/x.dsk", "x.dsk"),
            disk("/y.dsk", "y.dsk"),
            disk("/b/x.dsk", "x.dsk"),
        ];
        let device = Path::new("/dev/sdb");
        let found = with_serial(&disks, "y.dsk", device).unwrap().unwrap();
        assert_eq!(found.path.as_deref(), Some("/y.dsk"));
        assert!(with_serial(&disks, "z.dsk", device).unwrap().is_none());
        let refused = with_serial(&disks, "x.dsk", device).unwrap_err().to_string();
        assert!(
            refused.contains("/dev/sdb") && refused.contains("/a/x.dsk and /b/x.dsk"),
            "{refused}"
        );
    }
}
