//! A guest that sends commands, and a machine that does what a test says.
#![allow(dead_code, reason = "each test uses a part")]

use std::fs::File;
use std::future::Future;
use std::path::Path;
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;

use api::file::FileOperation;
use api::storage::{JobStatus, LayoutKind, NewDevice, Operation, ReadPolicy, Shape};
use api::{
    ByteSize, DeviceId, DeviceState, DiskConfig, DiskStatus, EventLog, ExpandedPolicy, Problem,
    StorageAnswer, StorageRequest,
};
use block_io::AlignedBuffer;
use expanded_api::{Action, Answer, Cdb, Header, Outcome, Request, State};
use expanded_target::{ExpandedTarget, JobListener, Owner, Running};
use storage_manager::{Flow, Force, HostedPool, Notice};
use storage_virtualizer::scsi::{
    self, Command, Identity, Nexus, Status, TransportId, Unit, UnitOptions, VendorCommands,
};

pub(crate) fn go_on(_: Notice<'_>) -> Flow {
    Flow::GoOn
}

fn shape(layout: LayoutKind) -> Shape {
    Shape {
        layout,
        columns: 0,
        copies: 0,
        stripe_unit: 0,
        class: String::new(),
        devices: Vec::new(),
    }
}

/// The devices of a pool on three files of `size` bytes, with these volumes: names, layouts, sizes.
pub(crate) fn make_pool(folder: &Path, size: u64, volumes: &[(&str, LayoutKind, u64)]) -> Vec<String> {
    let paths: Vec<String> = (0..3)
        .map(|number| {
            let path = folder.join(format!("d{number}"));
            File::create(&path).unwrap().set_len(size).unwrap();
            path.to_str().unwrap().to_owned()
        })
        .collect();
    let devices = paths.iter().map(|path| NewDevice {
        path: path.clone(),
        spare: false,
        class: String::new(),
        enclosure: String::new(),
        force: false,
    });
    storage_manager::create("tank", devices.collect(), &mut go_on).unwrap();
    let format = FileOperation::Format {
        meta_size: None,
        meta_copies: None,
        force: false,
    };
    storage_manager::execute_file(paths.clone(), format, &mut go_on).unwrap();
    for (name, layout, size) in volumes {
        let volume = Operation::CreateVolume {
            name: (*name).into(),
            size: *size,
            block: 4096,
            shape: shape(*layout),
            read_policy: ReadPolicy::default(),
            raw: false,
        };
        storage_manager::execute(paths.clone(), Force::No, volume, &mut go_on).unwrap();
    }
    paths
}

type Pool = Box<dyn Fn(StorageRequest) -> Result<StorageAnswer, Problem> + Send + Sync>;

/// A machine whose pool is a function.
pub(crate) struct FakeVm {
    pub(crate) disks: Mutex<Vec<DiskStatus>>,
    pub(crate) asked: Mutex<Vec<StorageRequest>>,
    pool: Pool,
    hosted: Option<Arc<HostedPool>>,
    events: EventLog,
}

/// Whose the jobs of the fake machine are.
pub(crate) const OWNER: &str = "vm:fake";

impl FakeVm {
    pub(crate) fn new(
        pool: impl Fn(StorageRequest) -> Result<StorageAnswer, Problem> + Send + Sync + 'static,
    ) -> Arc<Self> {
        Arc::new(Self {
            disks: Mutex::default(),
            asked: Mutex::default(),
            pool: Box::new(pool),
            hosted: None,
            events: EventLog::new(),
        })
    }

    /// On a real pool.
    pub(crate) fn on(hosted: &Arc<HostedPool>) -> Arc<Self> {
        let pool = Arc::clone(hosted);
        Arc::new(Self {
            disks: Mutex::default(),
            asked: Mutex::default(),
            pool: Box::new(move |request| pool.execute_for(OWNER, request)),
            hosted: Some(Arc::clone(hosted)),
            events: EventLog::new(),
        })
    }

    /// With a disk of the pool attached.
    pub(crate) fn has(&self, path: &str, read_only: bool) {
        let config = DiskConfig {
            image: None,
            file: Some(path.into()),
            read_only,
            ..DiskConfig::new("")
        };
        self.attach_disk(config).unwrap();
    }
}

impl Owner for FakeVm {
    fn disks(&self) -> Vec<DiskStatus> {
        self.disks.lock().unwrap().clone()
    }

    fn attach_disk(&self, disk: DiskConfig) -> Result<DiskStatus, Problem> {
        let mut disks = self.disks.lock().unwrap();
        let id = DeviceId::first_free("disk", |id| disks.iter().any(|disk| disk.config.id == *id));
        let status = DiskStatus {
            config: DiskConfig { id, ..disk },
            state: DeviceState::Attached,
            size: ByteSize::from_mib(1),
            stopped: None,
        };
        disks.push(status.clone());
        Ok(status)
    }

    fn detach(&self, id: &DeviceId) -> Result<(), Problem> {
        self.disks.lock().unwrap().retain(|disk| disk.config.id != *id);
        Ok(())
    }

    fn storage(&self, request: StorageRequest) -> Result<StorageAnswer, Problem> {
        self.asked.lock().unwrap().push(request.clone());
        (self.pool)(request)
    }

    fn jobs(&self) -> Result<Vec<JobStatus>, Problem> {
        self.hosted
            .as_ref()
            .map_or_else(|| Ok(Vec::new()), |pool| pool.jobs_of(OWNER))
    }

    fn on_job_end(&self, listener: JobListener) {
        if let Some(pool) = &self.hosted {
            pool.on_job_end(OWNER, listener);
        }
    }

    fn events(&self) -> &EventLog {
        &self.events
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Waits for a future on this thread.
pub(crate) fn wait_for<T>(future: impl Future<Output = T>) -> T {
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(value) => return value,
            Poll::Pending => std::thread::park(),
        }
    }
}

/// What came of a command.
#[derive(Debug)]
pub(crate) struct Answered {
    pub(crate) outcome: scsi::Outcome,
    pub(crate) data: Vec<u8>,
}

impl Answered {
    /// Additional sense code and qualifier; none if it succeeded.
    pub(crate) fn sense(&self) -> Option<(u8, u8)> {
        let sense = self.outcome.sense.as_slice();
        (self.outcome.status == Status::CheckCondition).then(|| (sense[12], sense[13]))
    }

    pub(crate) fn good(self) -> Self {
        assert_eq!(self.sense(), None, "{self:?}");
        self
    }

    pub(crate) fn header(&self) -> Header {
        Header::decode(&self.data).unwrap()
    }
}

/// A guest with one disk.
pub(crate) struct Guest {
    pub(crate) target: ExpandedTarget,
    pub(crate) running: Option<Running>,
    unit: Unit,
    nexus: Nexus,
}

impl Guest {
    pub(crate) fn new(vm: Arc<dyn Owner>, policy: ExpandedPolicy) -> Self {
        let target = ExpandedTarget::new("fake".parse().unwrap(), policy);
        let running = target.start(vm, || Box::new(|| Ok(()))).unwrap();
        Self {
            target,
            running: Some(running),
            unit: Unit::new(UnitOptions::new(Identity::from_name("disk", "serial"))),
            nexus: Nexus::new(TransportId::sas(1), 1),
        }
    }

    pub(crate) fn page(&self) -> Vec<u8> {
        self.target.page(&self.unit, &self.nexus)
    }

    /// A command with data from the guest, or room for data to it.
    pub(crate) fn raw(&self, cdb: &[u8], out: &[u8], room: usize) -> Answered {
        let mut from = AlignedBuffer::new(out.len().max(1));
        from.as_mut_slice()[..out.len()].copy_from_slice(out);
        let to = AlignedBuffer::new(room.max(1));
        // SAFETY: the buffers outlive the command, and are not touched meanwhile.
        let (data_out, data_in) = unsafe { ([from.io(0, out.len())], [to.io(0, room)]) };
        let command = Command {
            cdb,
            data_out: if out.is_empty() { &[] } else { &data_out },
            data_in: if room == 0 { &[] } else { &data_in },
        };
        let outcome = wait_for(self.target.execute(&self.unit, &self.nexus, &command));
        let moved = if room == 0 {
            0
        } else {
            usize::try_from(outcome.moved).unwrap()
        };
        Answered {
            outcome,
            data: to.as_slice()[..moved].to_vec(),
        }
    }

    pub(crate) fn input(&self, cdb: Cdb) -> Answered {
        self.raw(&cdb.encode(), &[], cdb.length as usize)
    }

    pub(crate) fn send(&self, tag: u32, text: &str) -> Answered {
        let length = u32::try_from(text.len()).unwrap();
        self.raw(&Cdb::send(tag, length, 0, true).encode(), text.as_bytes(), 0)
    }

    pub(crate) fn receive(&self, tag: u32, wait_ms: u16) -> Answered {
        self.input(Cdb {
            wait_ms,
            ..Cdb::new(Action::Receive, tag, 1 << 16)
        })
    }

    pub(crate) fn cancel(&self, tag: u32) -> Answered {
        self.raw(&Cdb::new(Action::Cancel, tag, 0).encode(), &[], 0)
    }

    /// What came of a request, when it has ended; it must fit one piece.
    pub(crate) fn outcome(&self, tag: u32) -> Outcome {
        loop {
            let answered = self.receive(tag, 4000).good();
            let header = answered.header();
            if matches!(header.state, State::Done | State::Failed) {
                assert_eq!(header.total, header.length);
                return serde_json::from_slice(&answered.data[Header::LENGTH..]).unwrap();
            }
        }
    }

    /// Has a request done.
    pub(crate) fn ask(&self, request: &Request) -> Result<Answer, Problem> {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(1000);
        let tag = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let sent = self.send(tag, &serde_json::to_string(request).unwrap());
        let outcome = self.outcome(tag);
        match outcome {
            Outcome::Answer(answer) => {
                assert_eq!(sent.sense(), None);
                Ok(*answer)
            }
            Outcome::Problem(problem) => Err(problem),
        }
    }
}
