//! All of a host, behind [`api::Host`].

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use api::storage::PoolStatus;
use api::virtual_disk::TransferRequest;
use api::{
    AttachRequest, Attachment, AttachmentMetrics, Condition, DeviceId, DiskChange, DiskConfig, EventKind,
    EventLog, Host, HostStatus, MachineDefinition, MachineStatus, Metrics, PoolEntry, Problem, ProblemKind,
    StorageAnswer, StorageRequest, Transfer, VmName,
};
use storage_manager::HostedPool;

use crate::config::{AtEnd, HostConfig};
use crate::disks::DiskService;
use crate::door::Storage;
use crate::machines::{MachineOptions, Machines};

/// So soon machines that run have found a manager that was started anew.
const RETURN: Duration = Duration::from_secs(3);

struct Pool {
    name: String,
    hosted: Arc<HostedPool>,
}

/// The pools, and the disks in them.
struct Served {
    pools: Vec<Pool>,
    disks: DiskService,
}

impl Served {
    fn pool(&self, name: Option<&str>) -> Result<&Pool, Problem> {
        let names = || {
            let names: Vec<&str> = self.pools.iter().map(|pool| pool.name.as_str()).collect();
            names.join(", ")
        };
        match (name, self.pools.as_slice()) {
            (None, [only]) => Ok(only),
            (None, []) => {
                let problem = Problem::new(ProblemKind::NotFound, "this manager has no pool");
                Err(problem.remedy("name its devices under [[pool]] in host.toml"))
            }
            (None, _) => {
                let problem = Problem::new(ProblemKind::Invalid, "it is not said which pool is meant");
                Err(problem.remedy(format!("say it by --pool; there are {}", names())))
            }
            (Some(name), pools) => pools.iter().find(|pool| pool.name == name).ok_or_else(|| {
                let problem = Problem::new(ProblemKind::NotFound, "there is no such pool").about(name);
                problem.remedy(format!("there are: {}", names()))
            }),
        }
    }
}

impl Storage for Served {
    fn pool_name(&self, pool: Option<&str>) -> Option<String> {
        Some(self.pool(pool).ok()?.name.clone())
    }

    fn storage(&self, pool: Option<&str>, request: StorageRequest) -> Result<StorageAnswer, Problem> {
        self.pool(pool)?.hosted.execute(request)
    }

    fn transfer(&self, pool: Option<&str>, request: TransferRequest) -> Result<Transfer, Problem> {
        self.pool(pool)?.hosted.transfer(request)
    }

    fn attach(&self, request: AttachRequest) -> Result<Transfer, Problem> {
        let pool = self.pool(request.pool.as_deref())?;
        self.disks.attach(&pool.name, &pool.hosted, request)
    }

    fn change(&self, vm: &VmName, device: &DeviceId, change: &DiskChange) -> Result<Attachment, Problem> {
        self.disks.change(vm, device, change)
    }
}

/// The manager of a host.
pub struct Manager {
    name: String,
    started: Instant,
    version: String,
    served: Arc<Served>,
    machines: Machines,
    events: Arc<EventLog>,
}

impl Manager {
    /// Opens the pools, and finds the machines that run. `program` is smsvmm, `version` its version; what happens is told to `events`, and what
    /// machines say to systemd's `journal`, too.
    ///
    /// # Errors
    /// A pool cannot be opened, two have one name, or the folders cannot be used.
    pub fn open(
        config: &HostConfig,
        program: PathBuf,
        version: &str,
        events: Arc<EventLog>,
        journal: bool,
    ) -> Result<Self, Problem> {
        let mut pools: Vec<Pool> = Vec::new();
        for (number, one) in config.pools.all().iter().enumerate() {
            let opened = HostedPool::open(&format!("pool-{number}"), one.devices.clone(), Default::default());
            let named = opened.map(|hosted| {
                for note in hosted.notes() {
                    tracing::warn!("{note}");
                }
                hosted.record_events(Arc::clone(&events));
                (hosted.name().to_owned(), hosted)
            });
            let found = match named {
                Ok((name, hosted)) if pools.iter().any(|pool| pool.name == name) => {
                    let problem = Problem::new(ProblemKind::Conflict, "there are two pools of this name");
                    let _ = hosted.close();
                    Err(problem
                        .about(name)
                        .remedy("have one of them managed by another manager"))
                }
                other => other,
            };
            match found {
                Ok((name, hosted)) => pools.push(Pool {
                    name,
                    hosted: Arc::new(hosted),
                }),
                Err(problem) => {
                    // What matters is why the manager does not start.
                    pools.iter().for_each(|pool| drop(pool.hosted.close()));
                    return Err(problem);
                }
            }
        }
        let options = MachineOptions {
            state: config.state.clone(),
            runtime: config.runtime.clone(),
            program,
            manager: config.management.socket.clone(),
            journal,
            machines: config.machines.clone(),
        };
        let served = Arc::new(Served {
            pools,
            disks: DiskService::new(Arc::clone(&events)),
        });
        let storage = Arc::clone(&served) as Arc<dyn Storage>;
        let machines = match Machines::open(options, storage, Arc::clone(&events)) {
            Ok(machines) => machines,
            Err(problem) => {
                served.pools.iter().for_each(|pool| drop(pool.hosted.close()));
                return Err(problem);
            }
        };
        if machines.list().iter().any(|machine| machine.pid.is_some()) {
            served.disks.expect_machines(RETURN);
        }
        Ok(Self {
            name: config.name(),
            started: Instant::now(),
            version: version.to_owned(),
            served,
            machines,
            events,
        })
    }

    /// The manager can be asked now: machines that are to be started with it are started.
    pub fn ready(&self) {
        self.events.record(EventKind::ManagerStarted {
            version: self.version.clone(),
        });
        self.machines.autostart();
    }

    /// The names of the pools.
    pub fn pool_names(&self) -> Vec<&str> {
        self.served.pools.iter().map(|pool| pool.name.as_str()).collect()
    }

    /// Whether all workers answer: returns when they have.
    pub fn is_alive(&self) {
        for pool in &self.served.pools {
            let (done, seen) = std::sync::mpsc::channel();
            pool.hosted.worker().spawn(move || async move {
                // Who asked has gone.
                let _ = done.send(());
            });
            // Fails when the worker is gone.
            let _ = seen.recv();
        }
    }

    /// Ends: machines as is wanted, then their disks, then the pools. `hurry` is asked whether guests that do not shut down are to be stopped.
    ///
    /// # Errors
    /// A pool could not be closed well. What was acknowledged is not lost by that.
    pub fn close(&self, reason: &str, machines: AtEnd, hurry: impl FnMut() -> bool) -> Result<(), Problem> {
        self.events.record(EventKind::ManagerStopping {
            reason: reason.to_owned(),
        });
        match machines {
            AtEnd::ShutDown => self.machines.close(hurry),
            AtEnd::Leave => self.machines.leave(),
        }
        self.served.disks.close();
        let closed: Vec<_> = self.served.pools.iter().map(|pool| pool.hosted.close()).collect();
        closed.into_iter().collect()
    }

    /// How the pools are that can be looked at.
    fn pool_statuses(&self) -> Vec<PoolStatus> {
        let statuses = self.served.pools.iter().map(|pool| status_of(&pool.hosted));
        statuses.filter_map(Result::ok).collect()
    }

    /// How the host is, whose pools are as was just seen.
    fn status_with(&self, pools: &[PoolStatus]) -> HostStatus {
        HostStatus {
            name: self.name.clone(),
            version: self.version.clone(),
            pid: std::process::id(),
            uptime_seconds: self.started.elapsed().as_secs(),
            pools: pools.iter().map(entry).collect(),
            machines: self.machines.list(),
            attachments: self.served.disks.list(),
            last_event: self.events.last(),
            notes: self.machines.notes().to_vec(),
        }
    }
}

fn status_of(pool: &HostedPool) -> Result<PoolStatus, Problem> {
    match pool.execute(StorageRequest::Status)? {
        StorageAnswer::Status(status) => Ok(*status),
        _ => Err(Problem::new(ProblemKind::Host, "the pool does not say how it is")),
    }
}

fn entry(status: &PoolStatus) -> PoolEntry {
    let jobs = status.jobs.iter().filter(|job| job.is_live()).count();
    PoolEntry {
        name: status.name.clone(),
        state: status.state,
        size: status.size,
        used: status.used,
        jobs: u32::try_from(jobs).unwrap_or(u32::MAX),
    }
}

impl Host for Manager {
    fn status(&self) -> HostStatus {
        self.status_with(&self.pool_statuses())
    }

    fn machines(&self) -> Vec<MachineStatus> {
        self.machines.list()
    }

    fn attachments(&self) -> Vec<Attachment> {
        self.served.disks.list()
    }

    fn storage(&self, pool: Option<&str>, request: StorageRequest) -> Result<StorageAnswer, Problem> {
        self.served.storage(pool, request)
    }

    fn transfer(&self, pool: Option<&str>, request: TransferRequest) -> Result<Transfer, Problem> {
        self.served.transfer(pool, request)
    }

    fn attach(&self, request: AttachRequest) -> Result<Transfer, Problem> {
        self.served.attach(request)
    }

    fn change_attachment(
        &self,
        vm: &VmName,
        device: &DeviceId,
        change: &DiskChange,
    ) -> Result<Attachment, Problem> {
        self.served.change(vm, device, change)
    }

    fn define(
        &self,
        name: &VmName,
        definition: MachineDefinition,
        condition: &Condition,
    ) -> Result<MachineStatus, Problem> {
        self.machines.define(name, definition, condition)
    }

    fn machine(&self, name: &VmName) -> Result<MachineStatus, Problem> {
        self.machines.status(name)
    }

    fn start(&self, name: &VmName) -> Result<MachineStatus, Problem> {
        self.machines.start(name)
    }

    fn shut_down(&self, name: &VmName) -> Result<MachineStatus, Problem> {
        self.machines.shut_down(name)
    }

    fn stop(&self, name: &VmName) -> Result<MachineStatus, Problem> {
        self.machines.stop(name)
    }

    fn delete(&self, name: &VmName, condition: &Condition) -> Result<(), Problem> {
        self.machines.delete(name, condition)
    }

    fn machine_socket(&self, name: &VmName) -> Result<PathBuf, Problem> {
        self.machines.socket(name)
    }

    fn allow_disk(&self, name: &VmName, disk: &DiskConfig) -> Result<(), Problem> {
        self.machines.allow_disk(name, disk)
    }

    fn metrics(&self) -> Metrics {
        let pools = self.pool_statuses();
        let counted = self.served.disks.counters().into_iter();
        Metrics {
            host: Some(self.status_with(&pools)),
            attachments: counted
                .map(|(attachment, counters)| AttachmentMetrics {
                    attachment,
                    reads: counters.reads,
                    read_bytes: counters.read_bytes,
                    writes: counters.writes,
                    written_bytes: counters.written_bytes,
                    flushes: counters.flushes,
                    others: counters.others,
                    errors: counters.errors,
                })
                .collect(),
            pools,
            ..Metrics::default()
        }
    }

    fn events(&self) -> &EventLog {
        &self.events
    }
}
