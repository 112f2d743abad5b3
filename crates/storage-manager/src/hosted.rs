//! A pool that is open as long as a process serves its disks: to a guest (`smsvmm run` with `[pool]`), or to other programs.
//!
//! ```text
//!   any thread                               the pool's worker
//!   HostedPool::disk ───── waits ──────────► Open { storage, disks } ─► VirtualDisk ◄── queue servers: HostedDisk::handle
//!   HostedPool::execute ── waits ──────────►   the same Storage: snapshots of disks that are being written, status, jobs
//!   HostedPool::transfer ── waits ─────────►   the same Storage: images that come and go
//!   DiskGuard is dropped ──────────────────►   waits for the last request, then power-off as the disk's mode wants it
//!   HostedPool::close ──── waits ──────────►   waits for all disks and for merges, closes the file system, then the pool
//! ```
//!
//! # Hazards
//! - *A disk that is still used when its guard goes.* A queue server may not have ended. The disk is closed when nobody has it any
//!   more; if that does not come, it stays as after a power failure: nothing that was flushed is lost.
//! - *The process ends without `close`.* As after a crash: the next opening replays the journals.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use api::file::{FileOperation, FileOutcome};
use api::storage::{FIRST_VOLATILE_JOB, JobStatus, Operation, Outcome, PoolEvent, PoolLoad, PoolStatus};
use api::virtual_disk::{DiskAnswer, DiskOperation, TransferRequest, Transferred};
use api::{
    EventKind, EventLog, MAX_LOAD_WINDOW_MS, Problem, ProblemKind, StorageAnswer, StorageRequest, Transfer,
};
use block_io::{BlockDevice, Clock, Worker, WorkerClock, WorkerHandle, WorkerOptions, spawn_local};
use storage_virtualizer::PinnedDisk;
use storage_virtualizer::disk::DiskOptions;
use storage_virtualizer::iscsi::{IscsiControl, IscsiOptions, IscsiServer, IscsiServerError, IscsiUnit};
use storage_virtualizer::nbd::{NbdControl, NbdOptions, NbdServer, NbdServerError};
use storage_virtualizer::scsi::{Identity, ReservationStore, Unit};

use volume_manager::Sample;

use crate::conversation::{Reporter, TICK, Work};
use crate::device::{self, Device, DevicePaths};
use crate::disks::{self, VirtualDisk};
use crate::disks_image::{self, Message};
use crate::disks_transfer::{self, Piece};
use crate::export::DiskExport;
use crate::live::{self, Transfers};
use crate::load::pool_load;
use crate::owners::{self, Owners};
use crate::pipe::Pipe;
use crate::reservations::PoolReservations;
use crate::storage::Storage;
use crate::told::Bell;
use crate::works::{Doing, Works};
use crate::{files, move_disk, offline, operation, places, random, ranges, volumes};

/// Between two looks whether a disk is still used.
const LOOK: Duration = Duration::from_millis(2);
/// Between two looks whether the time of a pin is over.
const PIN_LOOK: Duration = Duration::from_secs(1);
/// For so long it is waited until nobody uses a disk that is to be closed.
const PATIENCE: Duration = Duration::from_secs(30);

thread_local! {
    /// The pool of this worker.
    static OPEN: RefCell<Option<Rc<Open>>> = const { RefCell::new(None) };
}

pub(crate) struct Open {
    pub(crate) storage: Storage,
    disks: RefCell<BTreeMap<u64, Hosted>>,
    /// Disks that are being closed.
    closing: Cell<usize>,
    /// Disks whose chains are being made shorter.
    merging: Cell<usize>,
    /// The pool is to be closed: what takes long and can go on later ends.
    pub(crate) stopping: Arc<AtomicBool>,
    /// What went wrong with disks that were closed.
    problems: RefCell<Vec<Problem>>,
    /// Somebody sees that pins end.
    expiring: Cell<bool>,
    /// What takes long and is no job of the pool.
    pub(crate) works: Works,
    /// Whose jobs are whose.
    pub(crate) owners: Owners,
    /// What everything had done when the pool was opened.
    first: Sample,
}

/// What a pin kept of snapshots that were deleted meanwhile goes.
fn shorten_all(open: &Rc<Open>) {
    let disks = open.disks.borrow();
    let written = disks.values().filter(|hosted| !hosted.disk.is_read_only());
    let paths: Vec<String> = written.map(|hosted| hosted.disk.path().to_string()).collect();
    drop(disks);
    for path in paths {
        shorten(open, path, None);
    }
}

/// Ends pins when their time is over, as long as there are any.
fn expire_pins() {
    let Ok(open) = open_pool() else { return };
    if open.expiring.replace(true) {
        return;
    }
    drop(open);
    let spawned = spawn_local(async {
        let clock = WorkerClock::new();
        // The pool may be closed meanwhile, which waits for nobody who has it.
        while let Ok(open) = open_pool() {
            match places::expire(&open.storage).await {
                Ok((ended, left)) => {
                    if ended > 0 {
                        shorten_all(&open);
                    }
                    if left == 0 {
                        open.expiring.set(false);
                        return;
                    }
                }
                Err(problem) => tracing::warn!(%problem, "pins whose time is over could not be ended"),
            }
            drop(open);
            clock.sleep(PIN_LOOK).await;
        }
    });
    // This is a worker.
    drop(spawned);
}

/// Told of a new size.
type Resized = Rc<RefCell<Option<Box<dyn Fn()>>>>;

struct Hosted {
    disk: Rc<VirtualDisk>,
    resized: Resized,
}

/// Makes the chain of a disk as short as its snapshots allow, in the background. A crash loses nothing of it: it is begun again when the
/// disk is opened.
fn shorten(open: &Rc<Open>, path: String, owner: Option<String>) {
    let open = Rc::clone(open);
    open.merging.set(open.merging.get() + 1);
    let spawned = spawn_local(async move {
        let mut merged = merge(&open, &path, owner.as_deref()).await;
        if let (Ok(false), Ok(files)) = (&merged, open.storage.files()) {
            // What the file system merges by itself may have been in the way.
            files.settled().await;
            merged = merge(&open, &path, owner.as_deref()).await;
        }
        match merged {
            Ok(_) => {}
            // It was deleted.
            Err(problem) if problem.kind == ProblemKind::NotFound => {}
            Err(problem) => {
                tracing::warn!(disk = path, %problem, "layers that nobody needs could not be merged")
            }
        }
        open.merging.set(open.merging.get() - 1);
    });
    // This is a worker.
    drop(spawned);
}

/// Merges what a disk does not need apart, and lists that as a job if it takes long: of `owner`, if somebody is the cause. Cancelled, it goes
/// on when the disk is opened next.
async fn merge(open: &Open, path: &str, owner: Option<&str>) -> Result<bool, Problem> {
    let mut doing = None;
    let merged = open.storage.merge_disk_while(path, |done, total| {
        if done < total {
            let begin = || {
                let doing = open.works.begin("merge", format!("merge layers of {path}"));
                if let Some(owner) = owner {
                    // It is durable when its owner sees it.
                    open.owners.note(owner, &doing.status(), None);
                }
                doing
            };
            let what = String::new();
            doing.get_or_insert_with(begin).note(&Work { what, done, total });
        }
        !doing.as_ref().is_some_and(Doing::cancelled)
    });
    let merged = merged.await;
    if let Some(doing) = doing {
        let whole = merged.as_ref().is_ok_and(|whole| *whole);
        let job = doing.status().id;
        doing.end(&merged, whole);
        if let Ok(status) = open.works.status(job) {
            open.owners.ended(&status).await;
        }
    }
    merged
}

/// The pool of the worker that asks.
pub(crate) fn open_pool() -> Result<Rc<Open>, Problem> {
    let open = OPEN.with_borrow(Clone::clone);
    open.ok_or_else(|| Problem::new(ProblemKind::Stopping, "the pool is being closed"))
}

/// An open pool with a worker of its own.
#[derive(Debug)]
pub struct HostedPool {
    worker: Worker,
    transfers: Transfers,
    stopping: Arc<AtomicBool>,
    /// There is a sandbox around the process.
    confined: AtomicBool,
    name: String,
    notes: Vec<String>,
}

impl HostedPool {
    /// Opens the pool and its file system, on a worker that is called `name`.
    ///
    /// # Errors
    /// The devices do not make a pool, one is in use, or there is no file system.
    pub fn open(name: &str, devices: DevicePaths, options: WorkerOptions) -> Result<Self, Problem> {
        let worker = Worker::start(name, options)
            .map_err(|error| Problem::new(ProblemKind::Host, crate::problem::chain(&error)))?;
        let stopping = Arc::<AtomicBool>::default();
        let seen = Arc::clone(&stopping);
        let (name, notes) = worker.run(move || async move {
            let storage = Box::pin(Storage::serve(&devices)).await?;
            if let Err(problem) = storage.files().map(drop) {
                // What matters is why there are no disks.
                let _ = storage.close().await;
                return Err(problem);
            }
            let owners = match storage.files() {
                Ok(files) => Owners::load(files).await,
                Err(_) => Owners::default(),
            };
            let (notes, first) = (storage.notes.clone(), storage.pool.sample());
            let name = storage.pool.configuration().name.clone();
            let open = Rc::new(Open {
                storage,
                disks: RefCell::default(),
                closing: Cell::new(0),
                merging: Cell::new(0),
                stopping: seen,
                problems: RefCell::default(),
                expiring: Cell::new(false),
                works: Works::default(),
                owners,
                first,
            });
            OPEN.set(Some(Rc::clone(&open)));
            owners::go_on(&open).await;
            // What a process had pinned that did not end well.
            expire_pins();
            Ok((name, notes))
        })?;
        Ok(Self {
            worker,
            transfers: Transfers::default(),
            stopping,
            confined: AtomicBool::new(false),
            name,
            notes,
        })
    }

    /// The pool's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What a person should know of the devices.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The worker on which everything happens.
    pub fn worker(&self) -> &WorkerHandle {
        self.worker.handle()
    }

    /// Runs `hook` on the threads of the worker: the place for a seccomp filter, now that everything is open.
    ///
    /// # Errors
    /// The hook's.
    pub fn confine(&self, hook: impl Fn() -> io::Result<()> + Clone + Send + 'static) -> io::Result<()> {
        self.confined.store(true, Ordering::Relaxed);
        self.confine_worker(hook)
    }

    /// As [`Self::confine`], where who asks for a device to be added ([`Self::execute`]) is not confined to places that somebody has configured.
    ///
    /// # Errors
    /// The hook's.
    pub fn confine_worker(
        &self,
        hook: impl Fn() -> io::Result<()> + Clone + Send + 'static,
    ) -> io::Result<()> {
        self.worker.confine(hook)
    }

    /// `listener` is told of everything that happens to the pool, on the pool's worker: it must not block, nor use the pool. What has
    /// happened since the opening is told at once; who asks for something ([`Self::execute`], [`Self::take_events`]) is told nevertheless.
    pub fn on_event(&self, listener: impl Fn(PoolEvent) + Send + 'static) {
        self.worker.spawn(move || async move {
            let Ok(open) = open_pool() else { return };
            open.storage.told.listen(listener);
            let bell = Rc::<Bell>::default();
            open.storage.pool.on_event(bell.ringer());
            if let Ok(files) = open.storage.files() {
                files.on_event(bell.ringer());
            }
            open.storage.gather_events();
            drop(open);
            loop {
                bell.rung().await;
                // Closing it tells the rest.
                let Ok(open) = open_pool() else { return };
                open.storage.gather_events();
            }
        });
    }

    /// What happens to the pool stands in `log` from now on, with what has happened since it was opened.
    pub fn record_events(&self, log: Arc<EventLog>) {
        let pool = self.name.clone();
        self.on_event(move |event| {
            log.record(EventKind::Pool {
                pool: pool.clone(),
                kind: event.kind,
                text: event.text,
            });
        });
    }

    /// Opens a disk, or a snapshot of one (`/vm/root.dsk@monday`). It is closed when the guard is dropped.
    ///
    /// # Errors
    /// There is none, or it cannot be used in this way now.
    pub fn disk(&self, path: &str, options: DiskOptions) -> Result<HostedDisk, Problem> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let (path, handle) = (path.to_owned(), self.worker().clone());
        let opened = self.worker.run(move || async move {
            let open = open_pool()?;
            let options = DiskOptions {
                identity: Some(random::uuid()?.0.to_be_bytes()),
                ..options
            };
            let disk = open.storage.disk(&path, options).await?;
            if !options.read_only {
                open.storage.forget_moments(disk.path().as_str()).await?;
            }
            let resized = Resized::default();
            let tell = Rc::clone(&resized);
            disk.on_resize(move |_| {
                if let Some(tell) = &*tell.borrow() {
                    tell();
                }
            });
            let continuity = open.storage.files()?.continuity();
            let opened = OpenedDisk {
                handle: PinnedDisk::with_continuity(Rc::clone(&disk), &handle, continuity)
                    .map_err(|error| Problem::new(ProblemKind::Host, error.to_string()))?,
                size: disk.geometry().size,
                path: disk.path().to_string(),
                uuid: uuid_of(&open.storage, &disk),
                reservations: disk.reservations().to_vec(),
            };
            open.disks.borrow_mut().insert(number, Hosted { disk, resized });
            if !options.read_only {
                // What was not done when the process ended.
                shorten(&open, opened.path.clone(), None);
            }
            Ok::<_, Problem>(opened)
        })?;
        Ok(HostedDisk {
            opened,
            is_writable: !options.read_only,
            guard: DiskGuard {
                number,
                worker: self.worker().clone(),
            },
        })
    }

    /// Serves disks by NBD, each under a name, on the pool's worker, until the server is stopped. The disks stay open as long as their
    /// guards. Further ones: [`Self::export`]. `confine` runs on the threads of the worker, as for [`Self::confine_worker`], when everything that the
    /// server needs is open and before it has clients.
    ///
    /// # Errors
    /// The server cannot listen, or those of `confine`.
    pub fn serve_nbd(
        &self,
        disks: &[(String, HostedDisk)],
        options: NbdOptions,
        confine: impl Fn() -> io::Result<()> + Clone + Send + 'static,
    ) -> Result<(NbdServer, NbdControl<DiskExport>), NbdServerError> {
        self.worker.confine_helpers(confine.clone())?;
        let worker = self.worker().clone();
        let numbers: Vec<_> = disks
            .iter()
            .map(|(name, disk)| (name.clone(), disk.guard.number))
            .collect();
        let (started, confined) = self.worker.run(move || async move {
            let mut exports = Vec::new();
            for (name, number) in numbers {
                exports.extend(export_of(name, number).await);
            }
            let started = NbdServer::start_here(&worker, &options, exports);
            // Its tasks begin when this one has ended.
            (started, confine())
        });
        let started = started?;
        confined?;
        Ok(started)
    }

    /// Serves one more disk by a server of [`Self::serve_nbd`], until it is removed there.
    ///
    /// # Errors
    /// The name is taken, or the server ends.
    pub fn export(
        &self,
        control: &NbdControl<DiskExport>,
        name: &str,
        disk: &HostedDisk,
    ) -> Result<(), NbdServerError> {
        let (name, number) = (name.to_owned(), disk.guard.number);
        control.add(move || async move { export_of(name, number).await.ok_or(NbdServerError::NoWorker) })
    }

    /// Serves disks by iSCSI, each as a logical unit of a target (its place in the options, and the LUN), on the pool's worker, until the server is stopped. The disks stay open as long as
    /// their guards. Further ones: [`Self::show`]. `confine` is as for [`Self::serve_nbd`].
    ///
    /// # Errors
    /// The server cannot listen, the options are impossible, or those of `confine`.
    pub fn serve_iscsi(
        &self,
        disks: &[((usize, u16), Arc<Unit>, HostedDisk)],
        options: IscsiOptions,
        confine: impl Fn() -> io::Result<()> + Clone + Send + 'static,
    ) -> Result<(IscsiServer, IscsiControl<VirtualDisk>), IscsiServerError> {
        self.worker.confine_helpers(confine.clone())?;
        let worker = self.worker().clone();
        let units: Vec<_> = disks
            .iter()
            .map(|(place, unit, disk)| unit_of(*place, unit, disk))
            .collect();
        let (started, confined) = self.worker.run(move || async move {
            let units = units.into_iter().filter_map(|make| make()).collect();
            let started = IscsiServer::start_here(&worker, &options, units);
            // Its tasks begin when this one has ended.
            (started, confine())
        });
        let started = started?;
        confined?;
        Ok(started)
    }

    /// Serves one more disk by a target of [`Self::serve_iscsi`], until it is removed there.
    ///
    /// # Errors
    /// The place is taken, or the target ends.
    pub fn show(
        &self,
        control: &IscsiControl<VirtualDisk>,
        place: (usize, u16),
        unit: &Arc<Unit>,
        disk: &HostedDisk,
    ) -> Result<(), IscsiServerError> {
        let make = unit_of(place, unit, disk);
        control.add(move || make().ok_or(IscsiServerError::NoWorker))
    }

    /// Does what people ask for while disks are in use. Blocks; not to be called from the pool's worker.
    ///
    /// # Errors
    /// The request is refused or fails.
    pub fn execute(&self, request: StorageRequest) -> Result<StorageAnswer, Problem> {
        self.execute_of(None, request)
    }

    /// As [`Self::execute`], but jobs that begin are those of `owner`, which is any text: who asks for them by it ([`Self::jobs_of`]) is told of
    /// them, in later processes too, until so many others of it have ended that they are forgotten.
    ///
    /// # Errors
    /// As there.
    pub fn execute_for(&self, owner: &str, request: StorageRequest) -> Result<StorageAnswer, Problem> {
        self.execute_of(Some(owner.to_owned()), request)
    }

    /// The jobs that `owner` has begun in this pool, also in processes before this one, and how they are: all that go on, and the last 32 that
    /// have ended. Blocks; not to be called from the pool's worker.
    ///
    /// # Errors
    /// The pool is being closed.
    pub fn jobs_of(&self, owner: &str) -> Result<Vec<JobStatus>, Problem> {
        let owner = owner.to_owned();
        self.worker.run(move || async move {
            let open = open_pool()?;
            Ok(owners::jobs_of(&open, &owner).await)
        })
    }

    /// `listener` is told of each job of `owner` that ends, on the pool's worker, until it answers that it does not want to be told any more: it
    /// must not block, nor use the pool.
    pub fn on_job_end(&self, owner: &str, listener: impl Fn(&JobStatus) -> bool + Send + 'static) {
        let owner = owner.to_owned();
        self.worker.spawn(move || async move {
            if let Ok(open) = open_pool() {
                open.owners.listen(owner, Box::new(listener));
            }
        });
    }

    fn execute_of(&self, owner: Option<String>, request: StorageRequest) -> Result<StorageAnswer, Problem> {
        // By this thread: the worker may be confined more than who asks.
        let opened = self.open_new(&request)?;
        self.worker.run(move || async move {
            let open = open_pool()?;
            let pins = matches!(&request, StorageRequest::Disk(DiskOperation::Pin { .. }));
            let unpins = matches!(&request, StorageRequest::Disk(DiskOperation::Unpin { .. }));
            let shorter = match &request {
                StorageRequest::Disk(operation) => disks::shortens(operation),
                _ => None,
            };
            let opened = opened.into_iter().map(Rc::new).collect();
            let answer = Box::pin(answer(&open, owner.as_deref(), request, opened)).await?;
            if let Some(path) = shorter {
                shorten(&open, path, owner);
            }
            if pins {
                expire_pins();
            }
            if unpins {
                shorten_all(&open);
            }
            Ok(answer)
        })
    }

    /// Opens the devices that a request adds.
    fn open_new(&self, request: &StorageRequest) -> Result<Vec<Device>, Problem> {
        let (StorageRequest::Pool(operation) | StorageRequest::Begin(operation)) = request else {
            return Ok(Vec::new());
        };
        let opened = device::open_new_here(&operation::new_devices(operation));
        match self.confined.load(Ordering::Relaxed) {
            true => opened.map_err(|problem| match problem.kind {
                ProblemKind::Conflict | ProblemKind::Invalid | ProblemKind::NotFound => problem,
                _ => problem.remedy(
                    "this process runs in a sandbox, and opens only what is below sandbox.paths of its vm.toml: add the device's folder \
                     there and start the machine again, or give this command while the machine is off",
                ),
            }),
            false => opened,
        }
    }

    /// What moves data between the pool and who is at the other end of a connection, while disks are in use.
    ///
    /// # Errors
    /// The request is impossible.
    pub fn transfer(&self, request: TransferRequest) -> Result<Transfer, Problem> {
        live::transfer(self.worker().clone(), self.transfers.clone(), request)
    }

    /// What happened since this was asked last.
    pub fn take_events(&self) -> Vec<PoolEvent> {
        self.worker
            .run(|| async { open_pool().map_or_else(|_| Vec::new(), |open| open.storage.take_events()) })
    }

    /// Breaks off what moves data (relocations, and waiting for jobs, go on when they are asked for again), waits until all disks are closed, then closes the file system and the pool. Who asks for something afterwards is refused.
    ///
    /// # Errors
    /// Something could not be written, or a disk's mode could not be obeyed. What was acknowledged is not lost by that.
    pub fn close(&self) -> Result<(), Problem> {
        self.transfers.close();
        self.stopping.store(true, Ordering::Relaxed);
        self.worker.run(|| async {
            let Some(mut open) = OPEN.take() else {
                return Ok(());
            };
            let clock = WorkerClock::new();
            let end = clock.now() + PATIENCE;
            let open = loop {
                let quiet = open.closing.get() == 0 && open.disks.borrow().is_empty();
                let merges = open.merging.get() > 0;
                let late = clock.now() >= end && !merges;
                if late {
                    open.disks.take();
                }
                match Rc::try_unwrap(open) {
                    Ok(open) if quiet || late => break open,
                    Ok(still) => open = Rc::new(still),
                    Err(shared) if late => {
                        drop(shared);
                        let text = "the pool is still in use; it is left as after a power failure";
                        return Err(Problem::new(ProblemKind::Host, text));
                    }
                    Err(shared) => open = shared,
                }
                clock.sleep(LOOK).await;
            };
            // It has a file system, too.
            drop(open.owners);
            let closed = open.storage.close().await;
            let first = open.problems.into_inner().into_iter().next();
            first.map_or(closed, Err)
        })
    }
}

/// A disk as the NBD server has it; on the pool's worker.
async fn export_of(name: String, number: u64) -> Option<DiskExport> {
    let open = open_pool().ok()?;
    let disk = open
        .disks
        .borrow()
        .get(&number)
        .map(|hosted| Rc::clone(&hosted.disk))?;
    let disks = open.storage.disks().ok()?.clone();
    Some(DiskExport::new(name, disk, disks).await)
}

/// What makes a logical unit of a disk, on the pool's worker; who uses it is told of new sizes.
fn unit_of(
    (target, lun): (usize, u16),
    unit: &Arc<Unit>,
    disk: &HostedDisk,
) -> impl FnOnce() -> Option<IscsiUnit<VirtualDisk>> + Send + 'static {
    let (unit, resized) = (Arc::clone(unit), Arc::clone(unit));
    disk.on_resize(move || resized.capacity_changed());
    let number = disk.guard.number;
    move || {
        let open = open_pool().ok()?;
        let disk = Rc::clone(&open.disks.borrow().get(&number)?.disk);
        Some(IscsiUnit {
            target,
            lun,
            unit,
            disk,
        })
    }
}

/// By which initiators know a disk, or a snapshot of one.
fn uuid_of(storage: &Storage, disk: &VirtualDisk) -> [u8; 16] {
    let from_name = |name: String| Identity::from_name(&name, "").uuid;
    // It was never opened for writing since disks have identifiers.
    let of_path = || from_name(format!("{}{}", storage.pool.configuration().pool, disk.path()));
    let own = disk.identity().unwrap_or_else(of_path);
    match disk.snapshot() {
        None => own,
        Some(snapshot) => from_name(format!("{:032x}@{snapshot}", u128::from_be_bytes(own))),
    }
}

/// A disk as the pool's worker has opened it.
struct OpenedDisk {
    handle: PinnedDisk<VirtualDisk>,
    size: u64,
    path: String,
    uuid: [u8; 16],
    reservations: Vec<u8>,
}

/// An open disk of a [`HostedPool`].
pub struct HostedDisk {
    opened: OpenedDisk,
    is_writable: bool,
    guard: DiskGuard,
}

impl HostedDisk {
    /// For those who serve the disk.
    pub fn handle(&self) -> &PinnedDisk<VirtualDisk> {
        &self.opened.handle
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.opened.size
    }

    /// By which initiators know the disk again, whatever shows it and wherever it is moved. That of a snapshot follows from the
    /// disk's and from the snapshot's name.
    pub fn uuid(&self) -> [u8; 16] {
        self.opened.uuid
    }

    /// The persistent reservations that are kept in the pool.
    pub fn reservations(&self) -> &[u8] {
        &self.opened.reservations
    }

    /// Keeps persistent reservations in the pool. None if the disk is read-only.
    pub fn reservation_store(&self) -> Option<Arc<dyn ReservationStore>> {
        let path = self.opened.path.clone();
        self.is_writable
            .then(|| Arc::new(PoolReservations { path }) as Arc<dyn ReservationStore>)
    }

    /// `tell` is called on the pool's worker whenever the size has changed; the handle knows the new one then.
    pub fn on_resize(&self, tell: impl Fn() + Send + 'static) {
        self.resize_hook().tell(tell);
    }

    /// For who is to be told of a new size later, but before the disk is closed.
    pub fn resize_hook(&self) -> ResizeHook {
        ResizeHook {
            handle: self.opened.handle.clone(),
            number: self.guard.number,
        }
    }

    /// What closes the disk, to be dropped after all who use it.
    pub fn into_guard(self) -> DiskGuard {
        self.guard
    }
}

/// Where one says who is to be told of a disk's new size.
#[derive(Debug)]
pub struct ResizeHook {
    handle: PinnedDisk<VirtualDisk>,
    number: u64,
}

impl ResizeHook {
    /// As [`HostedDisk::on_resize`].
    pub fn tell(self, tell: impl Fn() + Send + 'static) {
        let Self { handle, number } = self;
        handle.worker().clone().spawn(move || async move {
            let Ok(open) = open_pool() else { return };
            if let Some(hosted) = open.disks.borrow().get(&number) {
                *hosted.resized.borrow_mut() = Some(Box::new(move || {
                    // This is the disk's worker.
                    let _ = handle.refresh();
                    tell();
                }));
            }
        });
    }
}

/// Closes a disk when it is dropped.
#[derive(Debug)]
pub struct DiskGuard {
    number: u64,
    worker: WorkerHandle,
}

impl DiskGuard {
    /// As dropping it, but returns when the disk is closed, or could not be, and others can use it. Not to be called from the pool's worker,
    /// nor while the caller has handles on the disk.
    pub fn close(self) {
        self.end(Closing::PowerOff);
    }

    /// As [`Self::close`], but of a disk with which somebody goes on later ([`DiskOptions::goes_on`]): nothing is done that its mode wants
    /// done at power-off.
    pub fn leave(self) {
        self.end(Closing::Leave);
    }

    fn end(&self, closing: Closing) {
        let number = self.number;
        let (told, closed) = mpsc::channel();
        self.worker.spawn(move || async move {
            close_disk(number, closing).await;
            // Somebody waits for it below.
            let _ = told.send(());
        });
        // A worker that has ended has closed everything.
        let _ = closed.recv();
    }
}

impl Drop for DiskGuard {
    fn drop(&mut self) {
        let number = self.number;
        self.worker.spawn(move || close_disk(number, Closing::PowerOff));
    }
}

/// What becomes of a disk that is closed.
#[derive(Clone, Copy)]
enum Closing {
    /// What its mode wants.
    PowerOff,
    /// Somebody goes on with it.
    Leave,
}

/// Closes a disk, unless that was done.
async fn close_disk(number: u64, closing: Closing) {
    let Ok(open) = open_pool() else { return };
    let hosted = open.disks.borrow_mut().remove(&number);
    if let Some(Hosted { disk, resized }) = hosted {
        // It has a handle on the disk.
        drop(resized.take());
        open.closing.set(open.closing.get() + 1);
        let path = disk.path().to_string();
        if let Err(problem) = close_when_unused(&open.storage, disk, closing).await {
            tracing::error!(disk = path, %problem, "a disk could not be closed");
            open.problems.borrow_mut().push(problem);
        }
        open.closing.set(open.closing.get() - 1);
    }
}

async fn close_when_unused(
    storage: &Storage,
    disk: Rc<VirtualDisk>,
    closing: Closing,
) -> Result<(), Problem> {
    let clock = WorkerClock::new();
    let end = clock.now() + PATIENCE;
    while Rc::strong_count(&disk) > 1 && clock.now() < end {
        clock.sleep(LOOK).await;
    }
    match closing {
        Closing::PowerOff => storage.close_disk(disk).await,
        Closing::Leave => storage.leave_disk(disk).await,
    }
}

/// What a transfer reads and writes instead of an image.
pub(crate) struct Ends {
    /// Of the image that comes in.
    pub(crate) size: u64,
    pub(crate) up: Pipe<Result<Option<Piece>, Problem>>,
    pub(crate) data: Pipe<Message>,
    pub(crate) checks: Pipe<Piece>,
}

/// Does a transfer, on the pool's worker.
pub(crate) async fn move_data(
    request: TransferRequest,
    ends: Ends,
    reporter: Reporter<Transferred>,
) -> Result<Transferred, Problem> {
    let Ends {
        size,
        up,
        data,
        checks,
    } = ends;
    let open = open_pool()?;
    let storage = &open.storage;
    let listed = match &request {
        TransferRequest::Import(request) => Some(("import", format!("import {}", request.path))),
        TransferRequest::Export(request) => Some(("export", format!("export {}", request.path))),
        TransferRequest::Copy(request) => Some(("copy", format!("copy {} to {}", request.path, request.to))),
        // A backup asks for one piece after the other.
        TransferRequest::Read(_) => None,
    };
    let reporter = reporter.listed(listed.map(|(kind, what)| open.works.begin(kind, what)));
    let (done, longer) = match &request {
        TransferRequest::Import(request) => {
            drop(data);
            let done = disks_transfer::import(storage, request, size, &up, checks, &reporter);
            (Box::pin(done).await, None)
        }
        TransferRequest::Export(request) => {
            Box::pin(disks_image::export(storage, request, data, checks, &reporter)).await
        }
        TransferRequest::Copy(request) => {
            drop((data, checks));
            Box::pin(disks_transfer::copy(storage, request, &reporter)).await
        }
        TransferRequest::Read(request) => {
            drop(checks);
            Box::pin(ranges::read(storage, request, data, &reporter)).await
        }
    };
    reporter.ended(&done);
    if let Some(path) = longer {
        shorten(&open, path, None);
    }
    let mut done = done?;
    done.events = storage.take_events();
    Ok(done)
}

async fn answer(
    open: &Rc<Open>,
    owner: Option<&str>,
    request: StorageRequest,
    opened: Vec<Rc<Device>>,
) -> Result<StorageAnswer, Problem> {
    let (storage, stopping) = (&open.storage, &open.stopping);
    Ok(match request {
        StorageRequest::Status => StorageAnswer::Status(Box::new(status_of(open))),
        StorageRequest::Load { window_ms } => StorageAnswer::Load(Box::new(load(open, window_ms).await?)),
        StorageRequest::Disk(operation) => {
            let limit = operation.limit();
            let answer = match &operation {
                // As all merges: listed while it goes on.
                DiskOperation::Merge { path } => {
                    open.merging.set(open.merging.get() + 1);
                    let merged = merge(open, path, owner).await;
                    open.merging.set(open.merging.get() - 1);
                    merged.map(|_| DiskAnswer::Done)?
                }
                DiskOperation::Move { path, to } => {
                    let job = Box::pin(move_disk::begin(open, owner.unwrap_or_default(), path, to));
                    DiskAnswer::Job(Box::new(job.await?))
                }
                _ => storage.perform_disk(operation).await?,
            };
            let events = storage.take_events();
            StorageAnswer::Disk(Box::new(api::virtual_disk::DiskOutcome {
                next: answer.next(limit),
                answer,
                events,
            }))
        }
        StorageRequest::File(operation) => {
            StorageAnswer::File(Box::new(Box::pin(file(open, operation)).await?))
        }
        StorageRequest::Begin(operation) => {
            let begins = matches!(
                operation,
                Operation::SetLayout { .. } | Operation::MoveVolume { .. }
            );
            let outcome = operate(open, operation, opened, &Reporter::impatient()).await?;
            if let (true, Some(owner)) = (begins, owner) {
                owners::begun(open, owner, &outcome.jobs).await;
            }
            StorageAnswer::Pool(Box::new(outcome))
        }
        StorageRequest::Pool(operation) => {
            let outcome = operate(open, operation, opened, &Reporter::until(stopping)).await?;
            StorageAnswer::Pool(Box::new(outcome))
        }
    })
}

/// How the pool is, with everything that is being done.
fn status_of(open: &Open) -> PoolStatus {
    let mut status = offline::status_of(&open.storage);
    status.jobs.extend(open.works.list());
    status
}

/// What the pool has to do, for so many milliseconds from now.
async fn load(open: &Open, window_ms: u32) -> Result<PoolLoad, Problem> {
    if window_ms > MAX_LOAD_WINDOW_MS {
        let detail = format!("a window of {window_ms} ms is too long");
        return Err(Problem::new(ProblemKind::Invalid, detail)
            .remedy(format!("look for at most {MAX_LOAD_WINDOW_MS} ms at a time")));
    }
    let pool = &open.storage.pool;
    let first = match window_ms {
        0 => open.first.clone(),
        _ => pool.sample(),
    };
    let clock = WorkerClock::new();
    let end = clock.now() + Duration::from_millis(window_ms.into());
    // A pool that is to be closed does not wait for who looks.
    while clock.now() < end && !open.stopping.load(Ordering::Relaxed) {
        clock.sleep(TICK.min(end.saturating_sub(clock.now()))).await;
    }
    Ok(pool_load(&pool.configuration(), &first, &pool.sample()))
}

async fn file(open: &Open, operation: FileOperation) -> Result<FileOutcome, Problem> {
    let storage = &open.storage;
    let listed = match &operation {
        FileOperation::Defragment { path } => Some(("defragment", format!("put {path} in order"))),
        FileOperation::Relocate { path, .. } => Some(("relocate", format!("move {path}"))),
        FileOperation::Drain { volume, end: false } => Some(("drain", format!("empty volume {volume}"))),
        FileOperation::Merge { layer, .. } => Some(("merge", format!("merge {layer}"))),
        FileOperation::Check { .. } => Some(("check-files", "check the file system".to_owned())),
        FileOperation::Scrub => Some(("scrub-files", "scrub files".to_owned())),
        _ => None,
    };
    let listed = listed.map(|(kind, what)| open.works.begin(kind, what));
    let reporter = Reporter::until(&open.stopping).listed(listed);
    let operation = files::meant(storage, operation).await?;
    let limit = operation.limit();
    let answer = files::perform(storage.files()?, operation, &reporter).await;
    let interrupted = reporter.stopped();
    reporter.ended(&answer);
    let answer = answer?;
    Ok(FileOutcome {
        next: answer.next(limit),
        answer,
        events: storage.take_events(),
        interrupted,
    })
}

async fn operate(
    open: &Open,
    mut operation: Operation,
    opened: Vec<Rc<Device>>,
    reporter: &Reporter<Outcome>,
) -> Result<Outcome, Problem> {
    let storage = &open.storage;
    let (jobs, interrupted) = match steer(open, &operation, reporter).await? {
        Some(done) => done,
        None => {
            volumes::before_in_use(storage, &operation).await?;
            if let Operation::ResizeVolume { shrink, .. } = &mut operation {
                // What files have of it may have grown when its turn comes.
                *shrink = false;
            }
            let done = offline::perform(&storage.pool, operation.clone(), opened, reporter).await?;
            volumes::tell(storage, &operation).await?;
            done
        }
    };
    Ok(Outcome {
        jobs,
        events: storage.take_events(),
        interrupted,
        pool: status_of(open),
    })
}

/// Does what is wanted with jobs that end with this process; none if it is about others.
async fn steer(
    open: &Open,
    operation: &Operation,
    reporter: &Reporter<Outcome>,
) -> Result<Option<(Vec<JobStatus>, bool)>, Problem> {
    let (job, refused) = match operation {
        Operation::WaitJob { job: Some(job) } => (*job, None),
        Operation::CancelJob { job } => (*job, None),
        Operation::PauseJob { job } => (*job, Some("paused")),
        Operation::ResumeJob { job } => (*job, Some("resumed")),
        Operation::ThrottleJob { job, .. } => (*job, Some("made slower or faster")),
        Operation::SetJobPriority { job, .. } => (*job, Some("given a priority")),
        _ => return Ok(None),
    };
    if job < FIRST_VOLATILE_JOB {
        return Ok(None);
    }
    if let Some(refused) = refused {
        return Err(open.works.refuse(job, refused));
    }
    if let Operation::CancelJob { .. } = operation {
        open.works.cancel(job)?;
        open.owners.cancelled(job).await;
    }
    let clock = WorkerClock::new();
    loop {
        let status = open.works.status(job)?;
        if !status.is_live() || reporter.stopped() {
            let interrupted = status.is_live();
            return Ok(Some((vec![status], interrupted)));
        }
        clock.sleep(TICK).await;
    }
}
