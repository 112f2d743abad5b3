//! The management of `smsvmm share` while it serves: what all kinds of sharing have in common.
//!
//! ```text
//!   smsvmm share status|add|remove|disconnect|stop ─► --management SOCKET ─► management::Server ─► api::Share
//!                                                                                                    │
//!        NbdShare ─► NbdControl      IscsiShare ─► IscsiControl      ScsiShare, BlkShare ─► servers ◄┘
//!                    exports, links              units, sessions                 adapters, front-ends
//! ```
//!
//! The process's first thread still waits for a signal, and closes everything when one comes; `stop` is such a signal. The helpers of the
//! management server do what is asked: they wait for the worker that serves, which goes on serving meanwhile.
//!
//! - *Adding* opens the disk as at the beginning, with the locks that it then has, and gives it to the server; if the server refuses, it is
//!   closed again. A process serves disks of one pool or images, never both: what a server of the one has, the other cannot show.
//! - *Removing* takes a disk from the server first, so that nobody finds it any more, waits until what is in flight is answered and
//!   nothing uses it, and closes it then. So when it returns, somebody else can open the disk.
//! - *The end* may come in the middle of either: what was opened is in one list, which the first thread empties.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::fmt::Display;
use std::io;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, anyhow};
use api::{
    EventLog, Latencies, Problem, ProblemKind, RequestCounts, Share, ShareClient, ShareDisk, ShareKind,
    ShareStatus, ShareTarget, SharedDisk, StorageAnswer, StorageRequest,
};
use clap::Args;
use management::{Server, ServerHandle, SocketError};
use storage_manager::{DiskGuard, HostedPool};
use storage_virtualizer::Counters;
use storage_virtualizer::scsi::MAX_LUNS;

use crate::share_nbd::named;
use crate::share_sandbox::Confined;

#[derive(Debug, Args)]
pub(crate) struct Management {
    /// Listen on this Unix socket for `smsvmm share status`, `add`, `remove`, `disconnect` and `stop`; only this user and root may ask.
    #[arg(long, value_name = "SOCKET")]
    management: Option<PathBuf>,
}

impl Management {
    /// Where it listens, if it does.
    pub(crate) fn socket(&self) -> Option<&PathBuf> {
        self.management.as_ref()
    }

    /// Listens, if that is wanted; before anything is opened, so that a second process with this socket ends here.
    pub(crate) fn bind(&self) -> anyhow::Result<Option<Server>> {
        let Some(path) = &self.management else {
            return Ok(None);
        };
        match Server::bind(path) {
            Ok(server) => Ok(Some(server)),
            Err(SocketError::Busy(path)) => Err(anyhow!(
                "somebody listens on {} already; stop it, or choose another --management",
                path.display()
            )),
            Err(SocketError::NotASocket(path)) => Err(anyhow!(
                "{} exists and is not a socket; remove it, or choose another --management",
                path.display()
            )),
            Err(error) => Err(error.into()),
        }
    }
}

/// Confines this thread, as everything is open, and answers at a socket, until what is returned is dropped.
pub(crate) fn answer(
    server: Option<Server>,
    share: Arc<dyn Share>,
    confined: &Confined,
) -> anyhow::Result<Option<ServerHandle>> {
    confined.enter();
    server
        .map(|server| server.start_share(share))
        .transpose()
        .context("cannot start the management server")
}

/// A disk that was opened to be served.
pub(crate) struct Opened {
    /// The path in the pool, or the image.
    pub(crate) source: String,
    /// Closes a disk of a pool.
    pub(crate) guard: Option<DiskGuard>,
}

/// What is the same for all kinds of sharing.
pub(crate) struct Base {
    kind: ShareKind,
    started: Instant,
    /// The pool whose disks are served; none if they are images.
    pub(crate) pool: Option<Arc<HostedPool>>,
    /// Where it listens.
    pub(crate) addresses: Vec<String>,
    /// What happened to the pool.
    pub(crate) events: Arc<EventLog>,
    opened: Mutex<BTreeMap<String, Opened>>,
    /// Names of disks that are being added or removed.
    changing: Mutex<BTreeSet<String>>,
}

/// The right to add or remove the disk of a name, as long as it lives.
pub(crate) struct Claim<'a> {
    base: &'a Base,
    name: String,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.base.changing().remove(&self.name);
    }
}

/// Which disk is to be served.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Meant {
    pub(crate) name: String,
    /// The path in the pool, or the image.
    pub(crate) source: String,
    pub(crate) read_only: bool,
}

impl Base {
    /// `opened` are the disks that are served from the beginning, by name.
    pub(crate) fn new(
        kind: ShareKind,
        pool: Option<Arc<HostedPool>>,
        addresses: Vec<String>,
        opened: impl IntoIterator<Item = (String, Opened)>,
    ) -> Self {
        let events = Arc::new(EventLog::new());
        if let Some(pool) = &pool {
            pool.record_events(Arc::clone(&events));
        }
        Self {
            kind,
            started: Instant::now(),
            pool,
            addresses,
            events,
            opened: Mutex::new(opened.into_iter().collect()),
            changing: Mutex::default(),
        }
    }

    fn changing(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets nobody else add or remove a disk of this name meanwhile.
    pub(crate) fn claim(&self, name: &str) -> Result<Claim<'_>, Problem> {
        if !self.changing().insert(name.to_owned()) {
            let detail = format!("{name} is being added or removed");
            return Err(Problem::new(ProblemKind::Conflict, detail)
                .about(name)
                .remedy("try again when that is done"));
        }
        Ok(Claim {
            base: self,
            name: name.to_owned(),
        })
    }

    fn opened(&self) -> MutexGuard<'_, BTreeMap<String, Opened>> {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The path in the pool or the image that is served under a name.
    pub(crate) fn source(&self, name: &str) -> String {
        let opened = self.opened();
        opened
            .get(name)
            .map_or_else(|| name.to_owned(), |opened| opened.source.clone())
    }

    /// A disk is served from now on.
    pub(crate) fn keep(&self, name: &str, opened: Opened) {
        self.opened().insert(name.to_owned(), opened);
    }

    /// A disk is served no more, and not used: closes it. Returns when others can use it.
    pub(crate) fn close(&self, name: &str) {
        let opened = self.opened().remove(name);
        if let Some(guard) = opened.and_then(|opened| opened.guard) {
            guard.close();
        }
    }

    /// Nothing is served any more: what is open is closed.
    pub(crate) fn close_all(&self) {
        let opened = std::mem::take(&mut *self.opened());
        drop(opened);
    }

    /// Which disk a request means, if it is one that this process can serve. `in_pool` is what a disk of the pool is called here.
    pub(crate) fn meant(&self, disk: &ShareDisk, in_pool: impl Fn(&str) -> String) -> Result<Meant, Problem> {
        let invalid = |detail: String, key: &str, remedy: &str| {
            Err(Problem::new(ProblemKind::Invalid, detail)
                .about(key)
                .remedy(remedy))
        };
        let read_only = disk.read_only;
        match (&self.pool, &disk.file, &disk.image) {
            (Some(_), Some(_), None) if disk.name.is_some() => invalid(
                "a disk of a pool is called as its path".to_owned(),
                "name",
                "leave `name` out",
            ),
            (Some(_), Some(file), None) => Ok(Meant {
                name: in_pool(file),
                source: file.clone(),
                read_only,
            }),
            (None, None, Some(image)) => {
                let is_elsewhere = image.contains("://") || image.starts_with("multipath:");
                if !is_elsewhere && !image.starts_with('/') {
                    let detail = format!("{image} is a relative path; this process has a folder of its own");
                    return invalid(detail, "image", "give an absolute path");
                }
                let name = match &disk.name {
                    Some(name) => name.clone(),
                    None => match named(image) {
                        Ok((name, _)) => name,
                        Err(error) => return invalid(error.to_string(), "image", "give `name`"),
                    },
                };
                Ok(Meant {
                    name,
                    source: image.clone(),
                    read_only,
                })
            }
            (Some(pool), ..) => {
                let detail = format!("this process serves disks of the pool {}", pool.name());
                invalid(
                    detail,
                    "file",
                    "name one by its path; images are served by another `smsvmm share`",
                )
            }
            (None, ..) => invalid(
                "this process serves images".to_owned(),
                "image",
                "name one; disks of a pool are served by another `smsvmm share`",
            ),
        }
    }

    pub(crate) fn status(
        &self,
        targets: Vec<ShareTarget>,
        disks: Vec<SharedDisk>,
        clients: Vec<ShareClient>,
    ) -> ShareStatus {
        ShareStatus {
            kind: self.kind,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime_seconds: self.started.elapsed().as_secs(),
            pool: self.pool.as_ref().map(|pool| pool.name().to_owned()),
            addresses: self.addresses.clone(),
            tls: None,
            targets,
            disks,
            clients,
        }
    }

    pub(crate) fn storage(&self, request: StorageRequest) -> Result<StorageAnswer, Problem> {
        match &self.pool {
            Some(pool) => pool.execute(request),
            None => Err(Problem::new(
                ProblemKind::Conflict,
                "this process serves images, and has no pool open",
            )),
        }
    }
}

/// Begins the end, as a signal does: the first thread waits for one.
pub(crate) fn stop() -> Result<(), Problem> {
    let told = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::TERM);
    told.map_err(|error| Problem::new(ProblemKind::Host, format!("it cannot be told to stop: {error}")))
}

/// A field of a request that this kind of sharing has no use for.
pub(crate) fn has_no(kind: ShareKind, fields: &[(&'static str, bool)]) -> Result<(), Problem> {
    match fields.iter().find(|(_, given)| *given) {
        Some((field, _)) => {
            let detail = format!("disks that are shared by {kind} have no `{field}`");
            Err(Problem::new(ProblemKind::Invalid, detail)
                .about(field)
                .remedy("leave it out"))
        }
        None => Ok(()),
    }
}

pub(crate) fn name_taken(name: &str) -> Problem {
    Problem::new(ProblemKind::Conflict, format!("{name} is served already"))
        .about(name)
        .remedy("choose another name, or remove that one first")
}

pub(crate) fn no_disk(name: &str) -> Problem {
    Problem::new(ProblemKind::NotFound, "no such disk is served")
        .about(name)
        .remedy("`smsvmm share status` lists the disks")
}

pub(crate) fn no_client(id: &str) -> Problem {
    Problem::new(ProblemKind::NotFound, "no such client is connected")
        .about(id)
        .remedy("`smsvmm share status` lists the clients")
}

/// What a front-end is called that is the one of this number at a server of several.
pub(crate) fn id_of_front_end(server: impl Display, number: u64) -> String {
    format!("{server}-{number}")
}

/// The server and the number of a front-end that is called so.
pub(crate) fn front_end<S: FromStr>(id: &str) -> Result<(S, u64), Problem> {
    let parts = id.split_once('-');
    let parts = parts.and_then(|(server, number)| Some((server.parse().ok()?, number.parse().ok()?)));
    parts.ok_or_else(|| no_client(id))
}

/// Where a front-end is, in words.
pub(crate) fn process(id: Option<i32>) -> Option<String> {
    id.map(|id| format!("process {id}"))
}

pub(crate) fn lun_beyond(lun: u16) -> Problem {
    let detail = format!("LUN {lun} is not below {MAX_LUNS}");
    Problem::new(ProblemKind::Invalid, detail).about("lun")
}

/// A disk cannot have the LUN that is wanted, for this reason.
pub(crate) fn lun_taken(detail: String) -> Problem {
    Problem::new(ProblemKind::Conflict, detail)
        .about("lun")
        .remedy("choose another one, or none")
}

pub(crate) fn is_stopping() -> Problem {
    Problem::new(ProblemKind::Stopping, "it is about to end")
}

/// An error as what is told of `object`.
pub(crate) fn problem(kind: ProblemKind, object: &str, error: &dyn Error) -> Problem {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        text = format!("{text}: {next}");
        cause = next.source();
    }
    Problem::new(kind, text).about(object)
}

/// The same of an image that cannot be opened.
pub(crate) fn not_opened(image: &str, error: &(dyn Error + 'static)) -> Problem {
    let mut next = Some(error);
    let mut kind = ProblemKind::Conflict;
    while let Some(cause) = next {
        if let Some(cause) = cause.downcast_ref::<io::Error>()
            && cause.kind() == io::ErrorKind::NotFound
        {
            kind = ProblemKind::NotFound;
        }
        next = cause.source();
    }
    problem(kind, image, error)
}

/// Counters as they are told.
pub(crate) fn counts(counters: &Counters) -> RequestCounts {
    let counts = &counters.counts;
    RequestCounts {
        reads: counts.reads,
        read_bytes: counts.read_bytes,
        writes: counts.writes,
        written_bytes: counts.written_bytes,
        flushes: counts.flushes,
        others: counts.others,
        errors: counts.errors,
    }
}

pub(crate) fn latencies(counters: &Counters) -> Latencies {
    Latencies {
        classes: counters.latencies,
        sum_us: counters.time_us,
    }
}

/// Milliseconds since 1970.
pub(crate) fn since(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// How many, as it is told.
pub(crate) fn number(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_images() -> Base {
        let opened = Opened {
            source: "/a.img".to_owned(),
            guard: None,
        };
        Base::new(ShareKind::Nbd, None, Vec::new(), [("a".to_owned(), opened)])
    }

    fn image(image: &str, name: Option<&str>) -> ShareDisk {
        ShareDisk {
            image: Some(image.to_owned()),
            name: name.map(str::to_owned),
            ..ShareDisk::default()
        }
    }

    #[test]
    fn an_image_is_meant_by_its_place_and_called_by_its_name() {
        let base = of_images();
        let meant = |disk: &ShareDisk| base.meant(disk, str::to_owned);
        let found = meant(&image("/vm/root.img", None)).unwrap();
        assert_eq!(
            (found.name.as_str(), found.source.as_str()),
            ("root.img", "/vm/root.img")
        );
        assert_eq!(meant(&image("/vm/root.img", Some("r"))).unwrap().name, "r");
        assert!(meant(&image("nbd://host/x", Some("x"))).is_ok());
        for (disk, said) in [
            (image("root.img", None), "give an absolute path"),
            (image("/", None), "give `name`"),
            (ShareDisk::default(), "serves images"),
            (
                ShareDisk {
                    file: Some("/a.dsk".to_owned()),
                    ..ShareDisk::default()
                },
                "another `smsvmm share`",
            ),
        ] {
            let problem = meant(&disk).unwrap_err();
            assert_eq!(problem.kind, ProblemKind::Invalid);
            assert!(problem.to_string().contains(said), "{problem}");
        }
    }

    #[test]
    fn what_is_open_is_known_by_name_until_it_is_closed() {
        let base = of_images();
        assert_eq!(base.source("a"), "/a.img");
        base.close("a");
        assert_eq!(base.source("a"), "a");
        let problem = base.storage(StorageRequest::Status).unwrap_err();
        assert_eq!(problem.kind, ProblemKind::Conflict);
    }

    #[test]
    fn a_name_is_changed_by_one_at_a_time() {
        let base = of_images();
        let claim = base.claim("a").unwrap();
        assert!(base.claim("b").is_ok());
        let refused = base.claim("a").err().unwrap();
        assert!(
            refused
                .to_string()
                .contains("a is being added or removed; try again"),
            "{refused}"
        );
        drop(claim);
        assert!(base.claim("a").is_ok());
    }

    #[test]
    fn an_image_that_is_not_there_is_told_from_one_that_is_in_use() {
        let missing = io::Error::from(io::ErrorKind::NotFound);
        assert_eq!(not_opened("/a", &missing).kind, ProblemKind::NotFound);
        let busy = io::Error::from(io::ErrorKind::ResourceBusy);
        assert_eq!(not_opened("/a", &busy).kind, ProblemKind::Conflict);
    }
}
