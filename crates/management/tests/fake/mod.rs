//! A machine that only remembers.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::sync::{Arc, Mutex};

use api::storage::PoolStatus;
use api::virtual_disk::TransferRequest;
use api::{
    ByteSize, DeviceId, DeviceState, DiskChange, DiskConfig, DiskLimits, DiskStatus, EventLog, Latencies,
    Metrics, NetConfig, NetMetrics, NetStatus, Problem, ProblemKind, QueueMetrics, RequestCounts,
    StorageAnswer, StorageRequest, TraceEnd, TraceOperation, TracePage, TraceRecord, Transfer, Vm, VmState,
    VmStatus,
};

/// A machine that does what it is told, at once or (removals) when the test says so.
pub(crate) struct FakeVm {
    pub(crate) status: Mutex<VmStatus>,
    pub(crate) calls: Mutex<Vec<String>>,
    pub(crate) events: EventLog,
    /// The requests of each of its disks.
    pub(crate) trace: Mutex<Vec<TraceRecord>>,
    /// What it tells of its pool.
    pub(crate) pool: Mutex<Option<PoolStatus>>,
}

impl FakeVm {
    pub(crate) fn new() -> Arc<Self> {
        let status = VmStatus {
            name: "fake".parse().unwrap(),
            state: VmState::Running,
            pid: 1,
            uptime_seconds: 2,
            resets: 0,
            cpus: 1,
            memory: ByteSize::from_mib(64),
            disks: Vec::new(),
            nets: Vec::new(),
            limit_groups: BTreeMap::new(),
            last_event: 0,
        };
        Arc::new(Self {
            status: Mutex::new(status),
            calls: Mutex::default(),
            events: EventLog::new(),
            trace: Mutex::new(vec![TraceRecord {
                time_ns: 1_700_000_000_123_456_789,
                queue: 1,
                operation: TraceOperation::WriteZeroes,
                offset: 4096,
                length: 8192,
                latency_ns: 1_234_567,
                end: TraceEnd::Failed,
            }]),
            pool: Mutex::default(),
        })
    }

    pub(crate) fn note(&self, call: &str) -> Result<(), Problem> {
        self.calls.lock().unwrap().push(call.to_owned());
        Ok(())
    }
}

impl Vm for FakeVm {
    fn status(&self) -> VmStatus {
        self.status.lock().unwrap().clone()
    }

    fn power_button(&self) -> Result<(), Problem> {
        self.note("power-button")
    }

    fn stop(&self, cause: &str) -> Result<(), Problem> {
        self.note(&format!("stop: {cause}"))
    }

    fn reset(&self) -> Result<(), Problem> {
        self.note("reset")
    }

    fn pause(&self) -> Result<(), Problem> {
        self.note("pause")
    }

    fn resume(&self) -> Result<(), Problem> {
        Err(Problem::new(ProblemKind::Conflict, "not now").remedy("later"))
    }

    fn attach_disk(&self, disk: DiskConfig) -> Result<DiskStatus, Problem> {
        let mut status = self.status.lock().unwrap();
        let disk = DiskStatus {
            config: DiskConfig {
                id: DeviceId::first_free("disk", |id| status.disks.iter().any(|d| d.config.id == *id)),
                ..disk
            },
            state: DeviceState::Attached,
            size: ByteSize::from_mib(1),
            stopped: None,
        };
        status.disks.push(disk.clone());
        Ok(disk)
    }

    fn attach_net(&self, net: NetConfig) -> Result<NetStatus, Problem> {
        let net = NetStatus {
            config: NetConfig {
                id: "net0".parse().unwrap(),
                ..net
            },
            state: DeviceState::Attached,
        };
        self.status.lock().unwrap().nets.push(net.clone());
        Ok(net)
    }

    fn detach(&self, id: &DeviceId) -> Result<(), Problem> {
        self.note(&format!("detach {id}"))
    }

    fn change_disk(&self, id: &DeviceId, change: &DiskChange) -> Result<DiskStatus, Problem> {
        let mut status = self.status.lock().unwrap();
        let disk = status.disks.iter_mut().find(|disk| disk.config.id == *id);
        let disk = disk.ok_or_else(|| Problem::new(ProblemKind::NotFound, "no such disk"))?;
        disk.config = disk
            .config
            .changed(change)
            .map_err(|(key, error)| Problem::new(ProblemKind::Invalid, error.to_string()).about(key))?;
        Ok(disk.clone())
    }

    fn change_limits(&self, group: &DeviceId, change: &DiskLimits) -> Result<DiskLimits, Problem> {
        self.note(&format!("limits of {group}"))?;
        Ok(*change)
    }

    fn storage(&self, request: StorageRequest) -> Result<StorageAnswer, Problem> {
        if let (StorageRequest::Status, Some(pool)) = (&request, &*self.pool.lock().unwrap()) {
            return Ok(StorageAnswer::Status(Box::new(pool.clone())));
        }
        self.note(&format!("storage: {request:?}"))?;
        Err(Problem::new(ProblemKind::Conflict, "this machine has no pool"))
    }

    fn transfer(&self, request: TransferRequest) -> Result<Transfer, Problem> {
        let TransferRequest::Copy(copy) = request else {
            return Err(Problem::new(ProblemKind::Conflict, "this machine has no pool"));
        };
        Ok(Box::new(move |mut line| {
            // It speaks first, and then says everything again.
            line.write_all(copy.path.as_bytes()).unwrap();
            let mut said = Vec::new();
            line.read_to_end(&mut said).unwrap();
            line.write_all(&said).unwrap();
        }))
    }

    fn metrics(&self) -> Metrics {
        let vm = self.status();
        let mut latencies = Latencies::default();
        (latencies.classes[3], latencies.classes[23], latencies.sum_us) = (2, 1, 10_500_012);
        let queues = vm.disks.iter().map(|disk| QueueMetrics {
            device: disk.config.id.clone(),
            queue: 0,
            counts: RequestCounts {
                reads: 3,
                read_bytes: 12_288,
                errors: 1,
                ..RequestCounts::default()
            },
            interrupts: 2,
            latencies,
        });
        let nets = vm.nets.iter().map(|net| NetMetrics {
            device: net.config.id.clone(),
            received_packets: 1,
            received_bytes: 64,
            received_dropped: 0,
            receive_waits: 0,
            sent_packets: u64::MAX,
            sent_bytes: 2,
            sent_dropped: 0,
            send_waits: 0,
        });
        Metrics {
            queues: queues.collect(),
            nets: nets.collect(),
            pools: self.pool.lock().unwrap().clone().into_iter().collect(),
            vm: Some(vm),
            ..Metrics::default()
        }
    }

    fn trace(&self, id: &DeviceId, after: &str) -> Result<TracePage, Problem> {
        self.note(&format!("trace {id} after {after:?}"))?;
        let status = self.status();
        if !status.disks.iter().any(|disk| disk.config.id == *id) {
            return Err(Problem::new(ProblemKind::NotFound, "no such disk"));
        }
        let trace = self.trace.lock().unwrap();
        let seen = match after.split_once(',') {
            Some((seen, _)) => seen.parse().unwrap(),
            None => 0,
        };
        Ok(TracePage {
            records: trace[seen..].to_vec(),
            next: format!("{},0", trace.len()),
            missed: 0,
        })
    }

    fn events(&self) -> &EventLog {
        &self.events
    }
}
