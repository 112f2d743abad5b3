//! The commands of one request queue, as [`Service`] wants them.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use block_io::{
    Allocation, BlockDevice, Durability, Geometry, IoBuf, IoCause, IoError, Operation, ZeroMode, list,
};

use super::adapter::{Adapter, UnitDisk};
use super::request::{Attribute, Request, Response};
use super::tasks::{Sweep, Tasks};
use crate::chain::Buffers;
use crate::disk_handle::DiskHandle;
use crate::queue::recorder::{Asked, Ended, Ring};
use crate::queue::{Admission, Gate, QueueStatistics, ServerLink, Service};
use crate::scsi::{self, Code, Command, Found, Nexus, Outcome, Sense};

/// INVALID MESSAGE ERROR: a task attribute that is not supported (SAM-5 §8.6.1, SPC-4 annex F.2).
const INVALID_MESSAGE: Code = Code(0x49, 0x00);

/// A logical unit as one queue has it.
struct LocalUnit<H: DiskHandle> {
    lun: Arc<scsi::Lun<UnitDisk<H>>>,
    nexus: Arc<Nexus>,
    disk: H::Local,
    gate: Gate,
    ring: Arc<Ring>,
    /// It was removed: what waits for it ends.
    is_gone: Cell<bool>,
}

/// The units that a queue has met, until the adapter's [generation](Adapter::generation) changes.
struct Units<H: DiskHandle> {
    generation: u64,
    /// By address, ascending.
    known: Vec<(u64, Rc<LocalUnit<H>>)>,
    /// Units of earlier generations that still have commands.
    leaving: Vec<Rc<LocalUnit<H>>>,
}

/// What a command is addressed to.
enum Addressee<H: DiskHandle> {
    Unit(Rc<LocalUnit<H>>),
    Absent { nexus: Arc<Nexus>, well_known: bool },
    NoTarget,
}

pub(super) struct CommandService<H: DiskHandle> {
    adapter: Arc<Adapter<H>>,
    /// Number of the request queue.
    queue: usize,
    statistics: Arc<QueueStatistics>,
    /// Whoever keeps the record of what is in flight gives it to our successor: a driver that goes on then must not miss what it was told is
    /// written ([`BlockDevice::settle`]).
    outlived: bool,
    units: RefCell<Units<H>>,
    tasks: Tasks,
    /// Functions one of whose commands has its answer, but not in the used ring yet.
    answered: RefCell<Vec<Arc<Sweep>>>,
    /// Commands of units that were removed may wait.
    some_are_gone: Cell<bool>,
}

impl<H: DiskHandle> CommandService<H> {
    pub(super) fn new(
        adapter: Arc<Adapter<H>>,
        queue: usize,
        statistics: Arc<QueueStatistics>,
        outlived: bool,
    ) -> Self {
        Self {
            units: RefCell::new(Units {
                generation: adapter.generation(),
                known: Vec::new(),
                leaving: Vec::new(),
            }),
            adapter,
            queue,
            statistics,
            outlived,
            tasks: Tasks::default(),
            answered: RefCell::default(),
            some_are_gone: Cell::new(false),
        }
    }

    /// What `address` means now.
    fn find(&self, server: &ServerLink, address: [u8; 8]) -> Result<Addressee<H>, String> {
        if self.has_old_units() {
            self.forget_old_units();
            server.wake();
        }
        let mut units = self.units.borrow_mut();
        let key = u64::from_be_bytes(address);
        let place = match units.known.binary_search_by_key(&key, |(key, _)| *key) {
            Ok(place) => return Ok(Addressee::Unit(Rc::clone(&units.known[place].1))),
            Err(place) => place,
        };
        let Some(port) = self.adapter.port_of(address) else {
            return Ok(Addressee::NoTarget);
        };
        Ok(match port.find(address) {
            Found::Lun(lun) => {
                lun.handle.is_addressed();
                let unit = Rc::new(LocalUnit {
                    disk: lun.handle.disk().local().map_err(|error| error.to_string())?,
                    gate: Gate::new(Arc::clone(lun.handle.controls())),
                    ring: lun.handle.controls().recorder().ring(),
                    nexus: Arc::clone(port.nexus()),
                    lun,
                    is_gone: Cell::new(false),
                });
                units.known.insert(place, (key, Rc::clone(&unit)));
                Addressee::Unit(unit)
            }
            Found::Absent { well_known } => Addressee::Absent {
                nexus: Arc::clone(port.nexus()),
                well_known,
            },
        })
    }

    fn has_old_units(&self) -> bool {
        self.units.borrow().generation != self.adapter.generation()
    }

    /// Lets go of units that may have been removed.
    fn forget_old_units(&self) {
        let mut units = self.units.borrow_mut();
        units.generation = self.adapter.generation();
        let known = std::mem::take(&mut units.known);
        for (_, unit) in known {
            unit.is_gone.set(!self.adapter.has(&unit.lun));
            units.leaving.push(unit);
        }
        units.leaving.retain(|unit| Rc::strong_count(unit) > 1);
        self.some_are_gone.set(!units.leaving.is_empty());
    }

    /// Has the unit do the command. None if the server ends before.
    async fn have_done(
        &self,
        server: &ServerLink,
        unit: &LocalUnit<H>,
        request: &Request<'_>,
    ) -> Option<Result<Outcome, Response>> {
        if request.attribute == Attribute::Other {
            let sense = Sense::illegal(INVALID_MESSAGE);
            return Some(Ok(Outcome::failed(&unit.lun.unit, sense)));
        }
        let place = self.tasks.begin(request.address, request.tag);
        let disk = Gated {
            unit,
            server,
            tasks: &self.tasks,
            place,
            statistics: &self.statistics,
            queue: u16::try_from(self.queue).unwrap_or(u16::MAX),
            outlived: self.outlived,
            is_abandoned: Cell::new(false),
        };
        let command = Command {
            cdb: request.cdb(),
            data_out: request.data_out,
            data_in: request.data_in,
        };
        let outcome = scsi::execute(&disk, &unit.lun.unit, &unit.nexus, &command).await;
        let is_abandoned = disk.is_abandoned.get();
        let is_ended = self.tasks.is_ended(place);
        let sweeps = self.tasks.end(place);
        if !sweeps.is_empty() {
            self.answered.borrow_mut().extend(sweeps);
            server.wake();
        }
        if is_abandoned {
            return None;
        }
        let is_good = outcome.status == scsi::Status::Good;
        Some(if is_ended && !is_good {
            Err(Response::Aborted)
        } else {
            Ok(outcome)
        })
    }
}

impl<H: DiskHandle> Service for CommandService<H> {
    async fn serve(&self, server: &ServerLink, buffers: &mut Buffers, _: u64) -> Result<Option<u32>, String> {
        let request = Request::decode(buffers, &self.adapter.sizes)
            .ok_or("a request is shorter than its header, or has no room for a response")?;
        let outcome = match self.find(server, request.address)? {
            Addressee::Unit(unit) => match self.have_done(server, &unit, &request).await {
                Some(outcome) => outcome,
                None => return Ok(None),
            },
            Addressee::Absent { nexus, well_known } => {
                self.statistics.count_other();
                let command = Command {
                    cdb: request.cdb(),
                    data_out: request.data_out,
                    data_in: request.data_in,
                };
                Ok(scsi::execute_without_unit(&nexus, &command, well_known))
            }
            Addressee::NoTarget => Err(Response::BadTarget),
        };
        Ok(Some(match outcome {
            Ok(outcome) => request.answer(&outcome),
            Err(response) => request.refuse(response),
        }))
    }

    fn can_release(&self, _: &ServerLink) -> bool {
        self.adapter.inbox(self.queue).is_full()
            || !self.answered.borrow().is_empty()
            || self.has_old_units()
            || self.some_are_gone.get()
            || {
                let units = self.units.borrow();
                let known = units.known.iter().map(|(_, unit)| unit);
                known.chain(&units.leaving).any(|unit| unit.gate.can_release())
                    || units.leaving.iter().any(|unit| Rc::strong_count(unit) == 1)
            }
    }

    fn release(&self, server: &ServerLink) {
        for sweep in self.answered.take() {
            sweep.done();
        }
        if self.has_old_units() {
            self.forget_old_units();
        }
        self.some_are_gone.set(false);
        let sweeps = self.adapter.inbox(self.queue).take();
        for sweep in &sweeps {
            self.tasks.sweep(sweep);
        }
        let mut units = self.units.borrow_mut();
        units.leaving.retain(|unit| Rc::strong_count(unit) > 1);
        for (_, unit) in &units.known {
            // Those that a function ends have to look.
            unit.gate.release(server, !sweeps.is_empty());
        }
        for unit in &units.leaving {
            unit.gate.release(server, true);
        }
    }

    fn longest_spin(&self) -> Duration {
        let units = self.units.borrow();
        let spins = units.known.iter().map(|(_, unit)| unit.gate.longest_spin());
        spins.max().unwrap_or_default()
    }
}

/// The disk of a unit for one command: what goes to it waits where the disk's controls want it, is counted, and is tried again
/// if they say so.
struct Gated<'a, H: DiskHandle> {
    unit: &'a LocalUnit<H>,
    server: &'a ServerLink,
    tasks: &'a Tasks,
    place: usize,
    statistics: &'a QueueStatistics,
    queue: u16,
    outlived: bool,
    /// The command is not to be answered.
    is_abandoned: Cell<bool>,
}

impl<H: DiskHandle> Gated<'_, H> {
    async fn run(
        &self,
        (operation, offset, length): (Operation, u64, u64),
        limited: Option<u64>,
        request: impl AsyncFn(&H::Disk) -> Result<(), IoError>,
    ) -> Result<(), IoError> {
        let is_ended = || self.tasks.is_ended(self.place) || self.unit.is_gone.get();
        let begin = block_io::moment_nanos();
        let record = |ended| {
            let asked = Asked {
                operation: Some(operation),
                offset,
                length,
            };
            self.unit
                .ring
                .record(self.queue, asked, ended, begin, block_io::moment_nanos());
        };
        loop {
            if self.unit.gate.is_closed() {
                // Not on the usual way: memory for it only where it is needed.
                let admission = Box::pin(self.unit.gate.admit(self.server, limited, is_ended)).await;
                if admission != Admission::Go {
                    self.is_abandoned.set(admission == Admission::Abandon);
                    let cause = IoCause::Os(std::io::Error::from_raw_os_error(libc::ECANCELED));
                    let name = &self.unit.lun.unit.options().identity.serial;
                    return Err(IoError::new(
                        &Arc::from(name.as_str()),
                        operation,
                        offset,
                        length,
                        cause,
                    ));
                }
            }
            let outcome = request(&self.unit.disk).await;
            record(match outcome {
                Ok(()) => Ended::Done,
                Err(_) => Ended::Failed,
            });
            if let Err(error) = &outcome {
                self.statistics.count_error();
                self.server.log(error);
                if self.unit.gate.stops_on(error) {
                    continue;
                }
            }
            return outcome;
        }
    }
}

impl<H: DiskHandle> BlockDevice for Gated<'_, H> {
    fn geometry(&self) -> Geometry {
        self.unit.disk.geometry()
    }

    async fn read(&self, offset: u64, buffers: &[IoBuf]) -> Result<(), IoError> {
        let length = list::total_length(buffers);
        self.statistics.count_read(length);
        self.run((Operation::Read, offset, length), Some(length), async |disk| {
            disk.read(offset, buffers).await
        })
        .await
    }

    async fn write(&self, offset: u64, buffers: &[IoBuf], durability: Durability) -> Result<(), IoError> {
        let length = list::total_length(buffers);
        self.statistics.count_write(length);
        self.run((Operation::Write, offset, length), Some(length), async |disk| {
            disk.write(offset, buffers, durability).await?;
            match durability {
                Durability::Volatile if self.outlived => disk.settle().await,
                _ => Ok(()),
            }
        })
        .await
    }

    async fn flush(&self) -> Result<(), IoError> {
        self.statistics.count_flush();
        self.run((Operation::Flush, 0, 0), None, async |disk| disk.flush().await)
            .await
    }

    async fn settle(&self) -> Result<(), IoError> {
        self.unit.disk.settle().await
    }

    async fn discard(&self, offset: u64, length: u64) -> Result<(), IoError> {
        self.statistics.count_other();
        self.run((Operation::Discard, offset, length), Some(0), async |disk| {
            disk.discard(offset, length).await
        })
        .await
    }

    async fn write_zeroes(&self, offset: u64, length: u64, mode: ZeroMode) -> Result<(), IoError> {
        self.statistics.count_other();
        self.run((Operation::WriteZeroes, offset, length), Some(0), async |disk| {
            disk.write_zeroes(offset, length, mode).await?;
            if self.outlived {
                disk.settle().await
            } else {
                Ok(())
            }
        })
        .await
    }

    async fn allocation(&self, offset: u64, length: u64) -> Result<(Allocation, u64), IoError> {
        self.unit.disk.allocation(offset, length).await
    }
}
