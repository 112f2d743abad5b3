//! The commands, and the threads that do what they ask for.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use api::storage::JobStatus;
use api::{EventKind, ExpandedPolicy, Problem, ProblemKind, VmName};
use block_io::list;
use expanded_api::{
    Action, Answer, Cdb, Description, Header, MAJOR, MAX_PAYLOAD, MAX_WAIT_MS, MINOR, Outcome, Page, Quota,
    Request, State,
};
use serde::Serialize;
use storage_virtualizer::scsi::{self, Code, Command, Key, Nexus, Sense, Unit, VendorCommands};

use crate::allow::{allow, shown};
use crate::audit::{Audit, Bucket};
use crate::events;
use crate::owner::Owner;
use crate::perform::Doer;
use crate::session::{Cancelled, NotTaken, Seen, Session, Taken};
use crate::waits::Waits;

/// Of each thread, in bytes.
const STACK_SIZE: usize = 512 << 10;
/// Most jobs that have ended and of which the log was not told yet.
const MAX_ENDED: usize = 64;
/// Longest time that SEND waits to learn whether the guest may.
const PATIENCE: Duration = Duration::from_millis(MAX_WAIT_MS as u64);

/// The threads, by what they do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lane {
    /// Sees whether requests are allowed; does what only reads.
    Look,
    /// Changes something, in a short time.
    Change,
    /// Waits until a disk was moved.
    Move,
}

impl Lane {
    const ALL: [Self; 3] = [Self::Look, Self::Change, Self::Move];

    fn of(request: &Request) -> Self {
        match request {
            Request::MoveDisk {
                background: false, ..
            } => Self::Move,
            Request::CancelJob { .. } => Self::Look,
            request if request.only_reads() => Self::Look,
            _ => Self::Change,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Look => "expanded-look",
            Self::Change => "expanded-change",
            Self::Move => "expanded-move",
        }
    }
}

struct Inner {
    session: Session,
    /// Tags, for each lane.
    lanes: [VecDeque<u32>; 3],
    requests: Bucket,
    done: Bucket,
    audit: Audit,
    vm: Option<Arc<dyn Owner>>,
    /// Jobs that have ended, of which the log is to be told.
    ended: VecDeque<JobStatus>,
    stopping: bool,
}

struct Shared {
    name: VmName,
    policy: ExpandedPolicy,
    inner: Mutex<Inner>,
    /// Rung when there is something to do.
    bell: Condvar,
    waits: Waits,
    /// Who has it may begin a job: quotas hold.
    begins: Mutex<()>,
    /// It ends: nobody waits for a job any more.
    gives_up: AtomicBool,
}

/// Does the expanded API for one machine, on all its disks.
#[derive(Clone)]
pub struct ExpandedTarget(Arc<Shared>);

impl fmt::Debug for ExpandedTarget {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("ExpandedTarget")
            .field("policy", &self.0.policy)
            .finish_non_exhaustive()
    }
}

/// The threads run until this is dropped; commands are answered with NOT READY then. What they do at that moment they do to its end.
#[derive(Debug)]
pub struct Running(ExpandedTarget);

impl Drop for Running {
    fn drop(&mut self) {
        let shared = &self.0.0;
        shared.gives_up.store(true, Ordering::Relaxed);
        let mut inner = shared.lock();
        inner.stopping = true;
        inner.vm = None;
        drop(inner);
        shared.bell.notify_all();
        shared.waits.close();
    }
}

/// A hook that a thread runs first of all.
pub type Hook = Box<dyn FnOnce() -> io::Result<()> + Send>;

impl ExpandedTarget {
    /// For the machine `name`. It answers when it [runs](Self::start).
    pub fn new(name: VmName, policy: ExpandedPolicy) -> Self {
        let now = Instant::now();
        let inner = Inner {
            session: Session::default(),
            lanes: Default::default(),
            requests: Bucket::new(policy.rate, now),
            done: Bucket::new(2, now),
            audit: Audit::new(now),
            vm: None,
            ended: VecDeque::new(),
            stopping: false,
        };
        Self(Arc::new(Shared {
            name,
            policy,
            inner: Mutex::new(inner),
            bell: Condvar::new(),
            waits: Waits::default(),
            begins: Mutex::default(),
            gives_up: AtomicBool::new(false),
        }))
    }

    /// Has `vm` do what is asked for, on threads each of which runs a `hook` first: the place for a filter of system calls.
    ///
    /// # Errors
    /// A thread cannot be started.
    pub fn start(&self, vm: Arc<dyn Owner>, mut hook: impl FnMut() -> Hook) -> io::Result<Running> {
        let running = Running(self.clone());
        let heard = Arc::downgrade(&self.0);
        vm.events().listen(move |_| {
            if let Some(shared) = heard.upgrade() {
                shared.waits.wake();
            }
        });
        let heard = Arc::downgrade(&self.0);
        vm.on_job_end(Box::new(move |job| {
            heard.upgrade().is_some_and(|shared| shared.job_ended(job))
        }));
        self.0.lock().vm = Some(vm);
        let mut thread = |name: &str, body: Box<dyn FnOnce() + Send>| {
            let hook = hook();
            let confined = move || match hook() {
                Ok(()) => body(),
                Err(error) => {
                    tracing::error!(%error, "a thread of the expanded API cannot be confined, and ends")
                }
            };
            let builder = std::thread::Builder::new().name(name.to_owned());
            builder.stack_size(STACK_SIZE).spawn(confined).map(drop)
        };
        for lane in Lane::ALL {
            let shared = Arc::clone(&self.0);
            thread(lane.name(), Box::new(move || shared.work(lane)))?;
        }
        let shared = Arc::clone(&self.0);
        thread("expanded-clock", Box::new(move || shared.waits.keep_time()))?;
        Ok(running)
    }
}

impl VendorCommands for ExpandedTarget {
    fn execute<'a>(
        &'a self,
        unit: &'a Unit,
        _: &'a Nexus,
        command: &'a Command<'a>,
    ) -> Pin<Box<dyn Future<Output = scsi::Outcome> + 'a>> {
        Box::pin(async move {
            match self.0.execute(command).await {
                Ok((wanted, moved)) => scsi::Outcome::done(wanted, moved),
                Err(sense) => scsi::Outcome::failed(unit, sense),
            }
        })
    }

    fn page(&self, unit: &Unit, _: &Nexus) -> Vec<u8> {
        let page = Page::new(self.0.policy.rights(), unit.options().identity.uuid);
        page.encode().to_vec()
    }
}

/// An outcome as it is sent.
fn encode(outcome: &Outcome) -> Vec<u8> {
    let bytes = to_json(outcome);
    if bytes.len() <= MAX_PAYLOAD {
        return bytes;
    }
    let text = format!("the answer has {} bytes, more than can be sent", bytes.len());
    to_json(&Outcome::Problem(Problem::new(ProblemKind::TooLarge, text)))
}

fn to_json(value: &impl Serialize) -> Vec<u8> {
    // The types have string keys only and no fallible serializers: nothing can fail.
    serde_json::to_vec(value).unwrap_or_default()
}

fn full() -> Sense {
    Sense::illegal(Code::INSUFFICIENT_RESOURCES)
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Each change is complete wherever something could panic.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a refusal, if there are not too many.
    fn refused(&self, command: &str, reason: String) {
        let (event, vm) = {
            let mut inner = self.lock();
            (
                inner.audit.refused(Instant::now(), command, reason),
                inner.vm.clone(),
            )
        };
        if let (Some(event), Some(vm)) = (event, vm) {
            if let EventKind::GuestCommandRefused { command, reason, .. } = &event {
                tracing::warn!(vm = %self.name, command, reason, "a command of the guest was refused");
            }
            // Not under the lock: listeners take others.
            vm.record(event);
        }
    }

    /// Does a command: bytes that it wanted to move, and has moved.
    async fn execute(&self, command: &Command<'_>) -> Result<(u64, u64), Sense> {
        let cdb = match Cdb::decode(command.cdb) {
            Ok(cdb) => cdb,
            Err(fault) => {
                self.refused("EXPANDED API", fault.to_string());
                return Err(Sense::in_cdb(fault.byte, fault.bit));
            }
        };
        if self.lock().vm.is_none() {
            return Err(Sense::new(Key::NotReady, Code::NOT_READY_BECOMING_READY));
        }
        match cdb.action {
            Action::Capabilities => {
                let answer = Answer::Description(Box::new(self.description()));
                Ok(put(
                    command,
                    &cdb,
                    State::Done,
                    &encode(&Outcome::Answer(Box::new(answer))),
                ))
            }
            Action::Send => self.send(command, &cdb).await,
            Action::Receive => self.receive(command, &cdb).await,
            Action::Cancel => self.cancel(&cdb),
            Action::Events => self.events(command, &cdb).await,
        }
    }

    fn description(&self) -> Description {
        let policy = &self.policy;
        Description {
            vm: self.name.clone(),
            version: format!("{MAJOR}.{MINOR}"),
            product: env!("CARGO_PKG_VERSION").to_owned(),
            rights: policy.rights(),
            objects: policy.objects.clone(),
            volumes: policy.volumes.clone(),
            devices: policy.devices.clone(),
            quota: Quota {
                snapshots: policy.max_snapshots,
                disks: policy.max_disks,
                bytes: policy.max_bytes.map(api::ByteSize::bytes),
                jobs: policy.max_jobs,
                rate: policy.rate,
            },
        }
    }

    async fn send(&self, command: &Command<'_>, cdb: &Cdb) -> Result<(u64, u64), Sense> {
        let refuse = |reason: &str, sense: Sense| {
            self.refused("SEND", reason.to_owned());
            Err(sense)
        };
        if !self.lock().requests.take(Instant::now()) {
            return refuse("too many requests in a short time", full());
        }
        let length = u64::from(cdb.length);
        if list::total_length(command.data_out) < length {
            let sense = Sense::illegal(Code::PARAMETER_LIST_LENGTH_ERROR);
            return refuse("fewer bytes came than the command says", sense);
        }
        // The command's length is bounded.
        let mut bytes = vec![0; cdb.length as usize];
        list::gather(command.data_out, 0, &mut bytes);
        let taken = self.lock().session.take(cdb.tag, cdb.fragment, cdb.last, &bytes);
        let in_list = Sense::illegal(Code::INVALID_FIELD_IN_PARAMETER_LIST);
        match taken {
            Ok(Taken::More) => return Ok((length, length)),
            Ok(Taken::Known) => {}
            Ok(Taken::New) => {
                self.lock().lanes[Lane::Look as usize].push_back(cdb.tag);
                self.bell.notify_all();
            }
            Err(NotTaken::OutOfOrder) => {
                let sense = Sense::in_cdb(14, None);
                return refuse("a fragment does not follow the one before", sense);
            }
            Err(NotTaken::TooLarge) => return refuse("the request has more than 1 MiB", in_list),
            Err(NotTaken::OtherRequest) => return refuse("another request has this tag", in_list),
            Err(NotTaken::Full) => return refuse("too many requests have not ended", full()),
        }
        let checked = |seen: Option<Seen>| seen.filter(|seen| seen.is_checked);
        let found = self
            .waits
            .until(PATIENCE, || checked(self.lock().session.look(cdb.tag)));
        match found.await.and_then(|seen| seen.refusal) {
            Some(code) => Err(Sense::illegal(code)),
            None => Ok((length, length)),
        }
    }

    async fn receive(&self, command: &Command<'_>, cdb: &Cdb) -> Result<(u64, u64), Sense> {
        let unknown = Sense::in_cdb(6, None);
        let patience = Duration::from_millis(cdb.wait_ms.into());
        let ended = || {
            let seen = self.lock().session.look(cdb.tag);
            // What is not there does not come.
            seen.is_none_or(|seen| seen.state.has_ended()).then_some(())
        };
        self.waits.until(patience, ended).await;
        let seen = self.lock().session.look(cdb.tag).ok_or(unknown)?;
        Ok(put(command, cdb, seen.state, &seen.body))
    }

    fn cancel(&self, cdb: &Cdb) -> Result<(u64, u64), Sense> {
        let taken_back = || {
            let problem = Problem::new(
                ProblemKind::Conflict,
                "the request was taken back before it had begun",
            );
            encode(&Outcome::Problem(problem))
        };
        let cancelled = self.lock().session.cancel(cdb.tag, taken_back);
        self.waits.wake();
        match cancelled {
            Cancelled::Yes => Ok((0, 0)),
            Cancelled::Running => Err(Sense::illegal(Code::COMMAND_SEQUENCE_ERROR)),
            Cancelled::Unknown => Err(Sense::in_cdb(6, None)),
        }
    }

    async fn events(&self, command: &Command<'_>, cdb: &Cdb) -> Result<(u64, u64), Sense> {
        let Some(vm) = self.lock().vm.clone() else {
            return Err(Sense::new(Key::NotReady, Code::NOT_READY_BECOMING_READY));
        };
        let after = u64::from(cdb.tag);
        let patience = Duration::from_millis(cdb.wait_ms.into());
        let look = || Some(events::page(vm.events(), after)).filter(|page| !page.events.is_empty());
        let page = self.waits.until(patience, look).await;
        let page = page.unwrap_or_else(|| events::page(vm.events(), after));
        Ok(put(command, cdb, State::Done, &to_json(&page)))
    }

    /// A job of the guest has ended; whether there is still somebody to be told. Called by who must not be kept waiting.
    fn job_ended(&self, job: &JobStatus) -> bool {
        let mut inner = self.lock();
        if inner.ended.len() < MAX_ENDED {
            inner.ended.push_back(job.clone());
        }
        let goes_on = !inner.stopping;
        drop(inner);
        self.bell.notify_all();
        goes_on
    }

    /// The body of a lane's thread.
    fn work(&self, lane: Lane) {
        let mut inner = self.lock();
        while !inner.stopping {
            if lane == Lane::Look
                && let Some(vm) = inner.vm.clone()
                && let Some(job) = inner.ended.pop_front()
            {
                drop(inner);
                vm.record(EventKind::GuestJobEnded {
                    vm: None,
                    job: job.id,
                    what: job.what,
                    state: job.state,
                    reason: job.reason,
                });
                inner = self.lock();
                continue;
            }
            let Some(tag) = inner.lanes[lane as usize].pop_front() else {
                inner = self.bell.wait(inner).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let Some(vm) = inner.vm.clone() else { break };
            let unchecked = inner.session.unchecked(tag);
            drop(inner);
            match unchecked {
                Some(bytes) => self.check(&*vm, tag, &bytes),
                None => self.perform(&*vm, tag),
            }
            self.waits.wake();
            inner = self.lock();
        }
    }

    /// Sees whether a request is one, and whether the guest may.
    fn check(&self, vm: &dyn Owner, tag: u32, bytes: &[u8]) {
        let request = match serde_json::from_slice::<Request>(bytes) {
            Ok(request) => request,
            Err(error) => {
                let text = format!("this is no request: {}", shown(&error.to_string()));
                let problem = Problem::new(ProblemKind::Invalid, text);
                return self.refuse(tag, "SEND", problem);
            }
        };
        let doer = self.doer(vm);
        match allow(&self.policy, &doer.own(), &request) {
            Err(problem) => self.refuse(tag, request.name(), problem),
            Ok(()) => {
                let mut inner = self.lock();
                let lane = Lane::of(&request);
                inner.session.queue(tag, request);
                inner.lanes[lane as usize].push_back(tag);
                drop(inner);
                self.bell.notify_all();
            }
        }
    }

    fn refuse(&self, tag: u32, command: &str, problem: Problem) {
        self.refused(command, problem.detail.clone());
        let code = match problem.kind {
            ProblemKind::Forbidden => Code::ACCESS_DENIED_NO_RIGHTS,
            _ => Code::INVALID_FIELD_IN_PARAMETER_LIST,
        };
        let body = encode(&Outcome::Problem(problem));
        self.lock().session.end(tag, false, Some(code), body);
    }

    fn doer<'a>(&'a self, vm: &'a dyn Owner) -> Doer<'a> {
        Doer {
            vm,
            policy: &self.policy,
            begins: &self.begins,
            gives_up: &self.gives_up,
        }
    }

    fn perform(&self, vm: &dyn Owner, tag: u32) {
        // None: it was taken back.
        let Some(request) = self.lock().session.begin(tag) else {
            return;
        };
        let begin = Instant::now();
        let (name, object, reads) = (request.name(), shown(&request.object()), request.only_reads());
        let done = match request {
            Request::Describe {} => Ok(Answer::Description(Box::new(self.description()))),
            request => self.doer(vm).perform(request),
        };
        let failure = done.as_ref().err().map(|problem| problem.detail.clone());
        let body = encode(&match done {
            Ok(answer) => Outcome::Answer(Box::new(answer)),
            Err(problem) => Outcome::Problem(problem),
        });
        let took = begin.elapsed();
        let listed = {
            let mut inner = self.lock();
            inner.session.end(tag, failure.is_none(), None, body);
            !reads && inner.done.take(Instant::now())
        };
        if reads {
            return;
        }
        tracing::info!(vm = %self.name, command = name, object, failure, ?took, "a command of the guest was done");
        if listed {
            vm.record(EventKind::GuestCommand {
                vm: None,
                command: name.to_owned(),
                object,
                failure,
            });
        }
    }
}

/// Gives the guest a piece of an outcome: bytes that there are, and that there was room for.
fn put(command: &Command<'_>, cdb: &Cdb, state: State, body: &[u8]) -> (u64, u64) {
    let data = Header::with_piece(state, body, cdb.fragment, cdb.length as usize);
    list::scatter(command.data_in, 0, &data);
    let wanted = data.len() as u64;
    (wanted, wanted.min(list::total_length(command.data_in)))
}
