//! A connection of an agent, from its first message to its last.

use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use api::{Problem, ProblemKind};

use super::config::{MoverConfig, Principal, random};
use super::devices::{Device, Devices};
use super::image::{Image, Pool};
use super::parent::InParent;
use super::work::{Work, of_store};
use crate::archive::{ChainError, Header, Parent, Sink, VERSION as FORMAT};
use crate::check::{self, PlanChecker};
use crate::frame::{FrameError, FrameReader, FrameWriter};
use crate::message::{
    Begun, CONTENT, Hello, JSON, MAX_CONTENT, Progress, Reply, Request, Selection, VERSION, Welcome, content,
};
use crate::plan::{Entry, Plan};
use crate::restore::is_selected;
use crate::store::{Draft, Seen, Store, StoreError};

/// So often it is said that it takes longer.
const WORKING: Duration = Duration::from_secs(5);
/// Whoever goes on with a backup waits so long for a connection that has it still: that of an agent that is gone ends with the batch.
const HANDOVER: Duration = Duration::from_secs(30);

/// How a mover reaches the storage manager of a principal.
pub type Reach = Arc<dyn Fn(&Principal) -> Result<Box<dyn Pool>, Problem> + Send + Sync>;

/// What a session is served with.
#[derive(Clone)]
pub(super) struct Served {
    pub(super) config: Arc<MoverConfig>,
    pub(super) reach: Reach,
    pub(super) stopping: Arc<AtomicBool>,
}

/// How a session ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum End {
    /// The connection broke, or what came is no frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// It was refused.
    #[error("{0}")]
    Refused(Box<Problem>),
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> Self {
        Self::Frame(error.into())
    }
}

impl From<Problem> for End {
    fn from(problem: Problem) -> Self {
        Self::Refused(Box::new(problem))
    }
}

/// A stream whose frames must come in time.
pub(super) trait Patient: Read + Write {
    /// The next request must have come whole in the time that is usual.
    fn begin_waiting(&mut self);

    /// Whether it is known that nobody is at the other side any more.
    fn is_gone(&self) -> bool;
}

struct Line<S> {
    reader: FrameReader<S>,
    sent: u64,
    told: Instant,
    stopping: Arc<AtomicBool>,
}

impl<S: Patient> Line<S> {
    fn send(&mut self, reply: &Reply) -> io::Result<()> {
        let json = serde_json::to_vec(reply).map_err(io::Error::other)?;
        self.write(JSON, &[&json])
    }

    fn write(&mut self, kind: u16, parts: &[&[u8]]) -> io::Result<()> {
        let mut writer = FrameWriter::new(Vec::new(), 0, self.sent);
        writer.write(kind, parts)?;
        self.sent = writer.number();
        let frame = writer.into_inner();
        let stream = self.reader.get_mut();
        stream.begin_waiting();
        stream.write_all(&frame)?;
        stream.flush()?;
        self.told = Instant::now();
        Ok(())
    }

    /// The kind of the next frame; none at the end.
    fn next(&mut self) -> Result<Option<u16>, FrameError> {
        self.reader.get_mut().begin_waiting();
        Ok(self.reader.read()?.map(|head| head.kind))
    }

    /// Says that it takes longer, if it is time for that.
    fn tick(&mut self, progress: &Progress) -> Result<(), Problem> {
        if self.stopping.load(Ordering::Relaxed) {
            return Err(stopping());
        }
        if self.reader.get_ref().is_gone() {
            return Err(Problem::new(ProblemKind::Host, "the agent is gone"));
        }
        if self.told.elapsed() < WORKING {
            return Ok(());
        }
        self.send(&Reply::Working(*progress))
            .map_err(|error| Problem::new(ProblemKind::Host, format!("the agent is gone: {error}")))
    }
}

fn stopping() -> Problem {
    Problem::new(ProblemKind::Stopping, "the mover is being ended").remedy("go on when it is there again")
}

fn decode(kind: u16, payload: &[u8]) -> Result<Request, Problem> {
    let invalid = |text: String| Problem::new(ProblemKind::Invalid, text);
    if kind != JSON {
        return Err(invalid(format!("a frame of kind {kind} has no place here")));
    }
    serde_json::from_slice(payload)
        .map_err(|error| invalid(format!("the message is not understood: {error}")))
}

/// Serves a connection. The name of the principal, if it is known; what a person should know; how it ended.
pub(super) fn serve<S: Patient>(
    stream: S,
    served: &Served,
) -> (Option<String>, Vec<String>, Result<(), End>) {
    let mut line = Line {
        reader: FrameReader::new(stream, Some(0), Some(0)),
        sent: 0,
        told: Instant::now(),
        stopping: Arc::clone(&served.stopping),
    };
    let (mut name, mut notes) = (None, BTreeSet::new());
    let end = converse(&mut line, served, &mut name, &mut notes);
    if let Err(End::Refused(problem)) = &end {
        // It may be gone.
        let _ = line.send(&Reply::Refused(problem.clone()));
    }
    (name, notes.into_iter().collect(), end)
}

fn converse<S: Patient>(
    line: &mut Line<S>,
    served: &Served,
    name: &mut Option<String>,
    notes: &mut BTreeSet<String>,
) -> Result<(), End> {
    let Some(kind) = line.next()? else { return Ok(()) };
    let Request::Hello(hello) = decode(kind, line.reader.payload())? else {
        return Err(Problem::new(ProblemKind::Invalid, "the first message is no hello").into());
    };
    let principal = greet(&hello, &served.config)?.clone();
    *name = Some(principal.name.clone());
    let welcome = Welcome {
        version: VERSION,
        mover: concat!("smsvmm ", env!("CARGO_PKG_VERSION")).into(),
        principal: principal.name.clone(),
    };
    line.send(&Reply::Welcome(welcome))?;
    let mut session = Session {
        store: Store::new(served.config.store.join(&principal.name)),
        principal,
        served: served.clone(),
        work: None,
        notes: BTreeSet::new(),
    };
    loop {
        if served.stopping.load(Ordering::Relaxed) {
            return Err(stopping().into());
        }
        let Some(kind) = line.next()? else { return Ok(()) };
        let done = session.frame(kind, line);
        notes.append(&mut session.notes);
        if let Some(work) = &mut session.work {
            notes.append(&mut work.image.notes);
        }
        done?;
    }
}

fn greet<'a>(hello: &Hello, config: &'a MoverConfig) -> Result<&'a Principal, Problem> {
    if hello.version != VERSION {
        let detail = format!(
            "the agent speaks version {}; this mover speaks {VERSION}",
            hello.version
        );
        return Err(Problem::new(ProblemKind::Invalid, detail).remedy("use an agent of the mover's version"));
    }
    config.principal(&hello.token).ok_or_else(|| {
        Problem::new(ProblemKind::Forbidden, "this token belongs to nobody")
            .remedy("`smsvmm mover token` makes one; its SHA-256 goes into mover.toml")
    })
}

struct Session {
    principal: Principal,
    store: Store,
    served: Served,
    work: Option<Work>,
    notes: BTreeSet<String>,
}

impl Session {
    fn frame<S: Patient>(&mut self, kind: u16, line: &mut Line<S>) -> Result<(), End> {
        if kind == CONTENT {
            let (offset, bytes) = content(line.reader.payload())
                .ok_or_else(|| Problem::new(ProblemKind::Invalid, "a piece of content makes no sense"))?;
            let bytes = bytes.to_vec();
            let work = self.work()?;
            return Ok(work.bytes(offset, bytes, &mut |progress| line.tick(progress))?);
        }
        let request = decode(kind, line.reader.payload())?;
        match self.request(request, line) {
            Ok(Some(reply)) => Ok(line.send(&reply)?),
            Ok(None) => Ok(()),
            // Nothing was begun: the agent may ask for something else.
            Err(End::Refused(problem)) if self.work.is_none() && problem.kind != ProblemKind::Stopping => {
                Ok(line.send(&Reply::Refused(problem))?)
            }
            Err(end) => Err(end),
        }
    }

    fn work(&mut self) -> Result<&mut Work, Problem> {
        self.work
            .as_mut()
            .ok_or_else(|| Problem::new(ProblemKind::Conflict, "no backup was begun"))
    }

    fn request<S: Patient>(&mut self, request: Request, line: &mut Line<S>) -> Result<Option<Reply>, End> {
        match request {
            Request::Hello(_) => Err(Problem::new(ProblemKind::Conflict, "there was a hello already").into()),
            Request::List => {
                let list = self.store.list().map_err(|error| of_store(&error))?;
                Ok(Some(Reply::Backups(list)))
            }
            Request::Begin(plan) => Ok(Some(Reply::Begun(self.begin(*plan, line)?))),
            Request::Entries(entries) => {
                let work = self.work()?;
                work.entries(entries, &mut |progress| line.tick(progress))?;
                Ok(taken(work))
            }
            Request::Extents { extents, more } => {
                let work = self.work()?;
                work.extents(extents, more, &mut |progress| line.tick(progress))?;
                Ok(taken(work))
            }
            Request::ContentEnd { problem } => {
                let work = self.work()?;
                work.end_content(problem, &mut |progress| line.tick(progress))?;
                Ok(taken(work))
            }
            Request::Finish { entries } => Ok(Some(self.finish(entries, line)?)),
            Request::Abandon => {
                let mut work = self
                    .work
                    .take()
                    .ok_or_else(|| Problem::new(ProblemKind::Conflict, "no backup was begun"))?;
                work.image.release()?;
                let name = work.name().to_owned();
                drop(work);
                self.store.abandon(&name).map_err(|error| of_store(&error))?;
                Ok(Some(Reply::Done))
            }
            Request::Restore(selection) => {
                self.restore(&selection, line)?;
                Ok(None)
            }
            Request::Verify { name } => {
                let mut stopped = None;
                let verified = self.store.verify(&name, &mut |progress| {
                    if stopped.is_none() {
                        stopped = line.tick(progress).err();
                    }
                });
                match stopped {
                    Some(problem) => Err(problem.into()),
                    None => Ok(Some(Reply::Verified(verified.map_err(|error| of_store(&error))?))),
                }
            }
        }
    }

    fn begin<S: Patient>(&mut self, plan: Plan, line: &mut Line<S>) -> Result<Begun, Problem> {
        if self.work.is_some() {
            return Err(Problem::new(ProblemKind::Conflict, "a backup was begun already"));
        }
        check::plan(&plan).map_err(|error| Problem::new(ProblemKind::Invalid, error.to_string()))?;
        let mut notes = Vec::new();
        let image = self.image(&plan, &mut notes)?;
        let mut header = Header {
            version: FORMAT,
            incompatible: 0,
            compatible: 0,
            writer: concat!("smsvmm ", env!("CARGO_PKG_VERSION")).into(),
            principal: self.principal.name.clone(),
            image: image.identities(),
            parent: None,
            plan,
        };
        let resume = std::mem::take(&mut header.plan.resume);
        let mut parent = InParent::default();
        if let Some(name) = header.plan.parent.clone() {
            let mut chain = self.store.open(&name).map_err(|error| of_store(&error))?;
            header.parent = Some(Parent {
                name: name.clone(),
                digest: chain.commit().digest.clone(),
            });
            let mut tick = || line.tick(&Progress::default()).map_err(io::Error::other);
            let found = InParent::of(&mut chain, &header.plan, &image, &mut notes, &mut tick);
            parent = found.map_err(|error| Problem::new(ProblemKind::Host, crate::chain_of(&error)))?;
        }
        let sizes = header.image.iter().map(|image| image.size).collect();
        let mut checker = PlanChecker::new(sizes, self.served.config.limits.entries);
        let draft = self.draft(&header, resume, &mut checker, line)?;
        let (entries, last) = draft.whole_entries();
        let mut begun = Begun {
            entries,
            last,
            reads: if image.reads_devices() {
                "devices"
            } else {
                "export"
            }
            .into(),
            notes,
        };
        let mut work = Work::new(draft, image, checker, parent)?;
        if let Some((entry, done)) = work.goes_on_in() {
            begun
                .notes
                .push(format!("{}: gone on with at byte {done}", entry.path));
        }
        work.most_bytes = self.served.config.limits.bytes.map(|most| most.bytes());
        work.rate = self.served.config.limits.rate.map(|rate| rate.bytes());
        self.work = Some(work);
        Ok(begun)
    }

    fn draft<S: Patient>(
        &self,
        header: &Header,
        resume: bool,
        checker: &mut PlanChecker,
        line: &mut Line<S>,
    ) -> Result<Draft, Problem> {
        if resume {
            let mut seen = |seen: Seen<'_>, line: &mut Line<S>| {
                line.tick(&Progress::default())
                    .map_err(|problem| problem.detail)?;
                match seen {
                    Seen::Entry(entry) => checker.entry(entry),
                    Seen::Extents(extents, more) => checker.extents(extents, more),
                }
                .map_err(|error| error.to_string())
            };
            let end = Instant::now() + HANDOVER;
            loop {
                match self.store.resume_within(header, &mut |found| seen(found, line)) {
                    Ok(Some(draft)) => return Ok(draft),
                    Ok(None) => break,
                    Err(StoreError::Busy(_)) if Instant::now() < end => {
                        line.tick(&Progress::default())?;
                        std::thread::sleep(Duration::from_millis(100));
                    }
                    Err(error) => return Err(of_store(&error)),
                }
            }
        }
        let mut stream = [0; 8];
        let random = random(&mut stream);
        random.map_err(|error| Problem::new(ProblemKind::Host, error.to_string()))?;
        let made = self.store.create(u64::from_le_bytes(stream), header);
        made.map_err(|error| of_store(&error))
    }

    /// The frozen image, if the principal may have it.
    fn image(&self, plan: &Plan, notes: &mut Vec<String>) -> Result<Image, Problem> {
        if self.principal.socket.is_none() {
            let mut disks = Vec::new();
            for disk in &plan.disks {
                let name = format!("{}@{}", disk.disk, disk.snapshot);
                let path = self
                    .principal
                    .images
                    .get(&name)
                    .ok_or_else(|| not_yours(&disk.disk))?;
                let opened = Device::open(path);
                let device = opened.map_err(|error| {
                    Problem::new(
                        ProblemKind::Host,
                        format!("the image of {name} cannot be read: {error}"),
                    )
                })?;
                disks.push((name, device));
            }
            return Ok(Image::of_images(disks));
        }
        let pool = (self.served.reach)(&self.principal)?;
        let own = pool.own_disks()?;
        for disk in &plan.disks {
            if !own.contains(&disk.disk) && !self.principal.has(&disk.disk) {
                return Err(not_yours(&disk.disk));
            }
        }
        let (devices, unreadable) = Devices::open(&self.principal.devices);
        notes.extend(unreadable);
        Image::of_pool(pool, devices, &plan.disks)
    }

    fn finish<S: Patient>(&mut self, entries: u64, line: &mut Line<S>) -> Result<Reply, Problem> {
        let work = self.work()?;
        if work.is_open() {
            return Err(Problem::new(
                ProblemKind::Invalid,
                "the last entry is not complete",
            ));
        }
        let have = work.progress().entries;
        if have != entries {
            let detail = format!("the agent counts {entries} entries, and the archive has {have}");
            return Err(Problem::new(ProblemKind::Invalid, detail));
        }
        let Some(work) = self.work.take() else {
            return Err(Problem::new(ProblemKind::Conflict, "no backup was begun"));
        };
        let (mut image, draft) = work.end(&mut |progress| line.tick(progress))?;
        // The archive has all of it. If this fails the pins end by themselves.
        let released = image.release();
        self.notes.append(&mut image.notes);
        let info = draft.finish().map_err(|error| of_store(&error))?;
        drop(released);
        Ok(Reply::Finished(Box::new(info)))
    }

    fn restore<S: Patient>(&mut self, selection: &Selection, line: &mut Line<S>) -> Result<(), End> {
        if self.work.is_some() {
            return Err(Problem::new(ProblemKind::Conflict, "a backup is being made").into());
        }
        let mut chain = self
            .store
            .open(&selection.name)
            .map_err(|error| of_store(&error))?;
        let mut sending = Sending {
            line,
            selection,
            progress: Progress::default(),
        };
        match chain.read(&mut sending) {
            Ok(()) => {}
            Err(ChainError::Sink(error)) => return Err(error.into()),
            Err(error) => {
                return Err(Problem::new(ProblemKind::Host, crate::chain_of(&error)).into());
            }
        }
        let progress = sending.progress;
        Ok(line.send(&Reply::Restored(progress))?)
    }
}

fn taken(work: &Work) -> Option<Reply> {
    (!work.is_open()).then(|| Reply::Taken(work.progress()))
}

fn not_yours(disk: &str) -> Problem {
    Problem::new(
        ProblemKind::Forbidden,
        "this is no disk of yours, or there is no such image",
    )
    .about(disk)
    .remedy("name disks that the machine has attached for writing, or have them added in mover.toml")
}

/// Sends what is read.
struct Sending<'a, S> {
    line: &'a mut Line<S>,
    selection: &'a Selection,
    progress: Progress,
}

impl<S: Patient> Sending<'_, S> {
    fn alive(&mut self) -> io::Result<()> {
        let progress = self.progress;
        self.line.tick(&progress).map_err(io::Error::other)
    }
}

impl<S: Patient> Sink for Sending<'_, S> {
    fn entry(&mut self, _number: u64, entry: &Entry) -> io::Result<bool> {
        self.alive()?;
        if !is_selected(&self.selection.paths, &entry.path) {
            return Ok(false);
        }
        self.progress.entries += 1;
        self.line.send(&Reply::Entry(Box::new(entry.clone())))?;
        if self.selection.only_list {
            self.line.send(&Reply::EntryEnd { problem: None })?;
        }
        Ok(!self.selection.only_list)
    }

    fn data(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.progress.bytes += bytes.len() as u64;
        self.line.write(CONTENT, &[&offset.to_le_bytes(), bytes])
    }

    fn zeroes(&mut self, _offset: u64, _length: u64) -> io::Result<()> {
        // A hole.
        self.alive()
    }

    fn end(&mut self, problem: Option<&str>) -> io::Result<()> {
        let problem = problem.map(str::to_owned);
        self.line.send(&Reply::EntryEnd { problem })
    }
}

const _: () = assert!(MAX_CONTENT + 8 <= crate::frame::MAX_PAYLOAD);
