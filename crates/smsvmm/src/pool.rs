//! Pools whose disks are served: the machine's, opened before the machine and closed after it, and those of `smsvmm share`.

use std::error::Error;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context;
use api::virtual_disk::TransferRequest;
use api::{ByteSize, DiskConfig, EventLog, Problem, StorageAnswer, StorageRequest, Transfer};
use block_io::WorkerOptions;
use storage_manager::{DevicePaths, DiskOptions, HostedPool, VirtualDisk};
use storage_virtualizer::controls::DiskControls;
use storage_virtualizer::virtio_scsi::{AddUnitError, VirtioScsiError, VirtioScsiHandle, VirtioScsiOptions};
use storage_virtualizer::{DiskHandle, Either, PinnedDisk};
use vmm::config::{PoolConfig, VmConfig};
use vmm::machine::{self, AddPoolUnit, GuestDisk, PoolDisk, PoolDisks, PoolUnit, ScsiAdapter, ScsiUnitDisk};
use vmm::sandbox::{Kind, Sandbox};

use crate::exit::UsageError;
use crate::logs;
use crate::storage::{self, Which};

/// Opens a pool on a worker called `name`, and tells what a person should know of its devices.
fn open(name: &str, devices: DevicePaths, options: WorkerOptions) -> anyhow::Result<HostedPool> {
    let pool = HostedPool::open(name, devices, options)?;
    for note in pool.notes() {
        logs::say(&format!("smsvmm: {note}"));
    }
    Ok(pool)
}

/// The threads of a pool whose disks are served.
#[derive(Debug, Clone, Copy, clap::Args)]
pub(crate) struct PoolThreads {
    /// Threads that call the kernel for the pool's own when it has much to do; by default what the file of --config says, else one where the host has
    /// four processors or more, else none.
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u8).range(..=i64::from(PoolConfig::MOST_HELPERS)))]
    io_helpers: Option<u8>,
}

impl PoolThreads {
    /// # Errors
    /// They are wanted, but no disk of a pool is served.
    pub(crate) fn check(self, paths: &[String]) -> Result<(), UsageError> {
        if self.io_helpers.is_some() && paths.is_empty() {
            return Err(UsageError::new(
                "--io-helpers is for disks of a pool, and none is named; leave it out",
            ));
        }
        Ok(())
    }
}

/// Has `serve` serve disks of a pool, and closes the pool when it is done.
pub(crate) fn with_pool(
    which: &Which,
    threads: PoolThreads,
    name: &str,
    serve: impl FnOnce(&Arc<HostedPool>) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut config = storage::pool_config(which)?;
    config.io_helpers = threads.io_helpers.map(usize::from).or(config.io_helpers);
    // A file is not looked at whole.
    config
        .check()
        .map_err(|(key, problem)| UsageError::new(format!("[pool] {key} {problem}")))?;
    let options = config.worker_options();
    let pool = Arc::new(open(name, config.devices, options)?);
    let served = serve(&pool);
    let closed = pool.close();
    served?;
    Ok(closed?)
}

/// How a disk is opened that is served to others.
pub(crate) fn served(path: &str, read_only: bool) -> DiskOptions {
    DiskOptions {
        // Of a snapshot there is nothing else.
        read_only: read_only || path.contains('@'),
        ..DiskOptions::default()
    }
}

/// The machine's SCSI adapter, once there is one.
type Adapter = Arc<Mutex<Option<VirtioScsiHandle<ScsiUnitDisk<PinnedDisk<VirtualDisk>>>>>>;

/// The pool of a machine.
#[derive(Debug)]
pub(crate) struct VmPool {
    pool: HostedPool,
    adapter: Adapter,
}

impl VmPool {
    /// Opens the pool that the configuration names, if it names one, and confines its worker.
    pub(crate) fn open(config: &VmConfig, sandbox: &Sandbox) -> anyhow::Result<Option<Arc<Self>>> {
        let Some(pool) = &config.pool else { return Ok(None) };
        let open = open("io-pool", pool.devices.clone(), pool.worker_options())?;
        open.confine(sandbox.thread(Kind::PoolWorker))
            .context("cannot confine the pool's worker")?;
        Ok(Some(Arc::new(Self {
            pool: open,
            adapter: Adapter::default(),
        })))
    }

    /// The pool, for who does something with it beside serving disks.
    pub(crate) fn hosted(&self) -> &HostedPool {
        &self.pool
    }

    /// What happens to the pool stands in the machine's log from now on, with what has happened since it was opened.
    pub(crate) fn record_events(&self, log: Arc<EventLog>) {
        self.pool.record_events(log);
    }

    /// Ends the use of all disks, as their modes want it, and closes the pool.
    pub(crate) fn close(&self) -> anyhow::Result<()> {
        self.pool.close().context("cannot close the pool")
    }
}

impl PoolDisks for VmPool {
    fn open(
        &self,
        config: &DiskConfig,
        controls: Arc<DiskControls>,
    ) -> Result<PoolDisk, Box<dyn Error + Send + Sync>> {
        let disk = self.pool.configured_disk(config, false)?;
        let worker = self.pool.worker().clone();
        let GuestDisk { device, resized } =
            machine::guest_disk(config, disk.handle().clone(), controls, worker)?;
        disk.on_resize(resized);
        Ok(PoolDisk {
            device,
            size: ByteSize::from_bytes(disk.size()),
            guard: Box::new(disk.into_guard()),
        })
    }

    fn adapter(&self, options: &VirtioScsiOptions) -> Result<ScsiAdapter, VirtioScsiError> {
        let worker = self.pool.worker().clone();
        let (adapter, handle) = machine::scsi_adapter(options, vec![worker])?;
        *self.adapter.lock().unwrap_or_else(PoisonError::into_inner) = Some(handle);
        Ok(adapter)
    }

    fn open_unit(&self, config: &DiskConfig) -> Result<PoolUnit, Box<dyn Error + Send + Sync>> {
        let disk = self.pool.configured_disk(config, false)?;
        let handle = disk.handle().clone();
        let geometry = handle.geometry();
        let adapter = Arc::clone(&self.adapter);
        let add: AddPoolUnit = Box::new(move |place, unit, controls, found| {
            let adapter = adapter.lock().unwrap_or_else(PoisonError::into_inner);
            match &*adapter {
                Some(adapter) => adapter.add(place, unit, Either::Second(handle.clone()), controls, found),
                None => Err(AddUnitError::NoAdapter),
            }
        });
        let told = disk.resize_hook();
        Ok(PoolUnit {
            uuid: disk.uuid(),
            geometry,
            store: disk.reservation_store(),
            reservations: disk.reservations().to_vec(),
            add,
            on_resize: Box::new(move |tell| told.tell(tell)),
            guard: Box::new(disk.into_guard()),
        })
    }

    fn execute(&self, request: StorageRequest) -> Result<StorageAnswer, Problem> {
        self.pool.execute(request)
    }

    fn transfer(&self, request: TransferRequest) -> Result<Transfer, Problem> {
        self.pool.transfer(request)
    }
}
