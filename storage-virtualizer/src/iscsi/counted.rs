//! What is asked of disks, counted: for the unit, and for the session that asks. An initiator that goes on when this process has died logs in to its
//! successor, so what it is told is written has to survive that ([`BlockDevice::settle`]).

use std::rc::Rc;

use block_io::{Allocation, BlockDevice, Durability, Geometry, IoBuf, IoError, ZeroMode, list, moment_nanos};

use crate::queue::QueueStatistics;

/// The disk of a logical unit, as the target keeps it.
#[derive(Debug)]
pub(super) struct UnitDisk<D> {
    disk: Rc<D>,
    /// What all initiators have asked of it.
    pub(super) statistics: QueueStatistics,
}

impl<D: BlockDevice> UnitDisk<D> {
    pub(super) fn new(disk: Rc<D>) -> Self {
        Self {
            disk,
            statistics: QueueStatistics::default(),
        }
    }

    pub(super) fn disk(&self) -> &D {
        &self.disk
    }
}

/// The same for one command of a session.
pub(super) struct Counted<'a, D> {
    unit: &'a UnitDisk<D>,
    session: &'a QueueStatistics,
}

impl<'a, D: BlockDevice> Counted<'a, D> {
    pub(super) fn new(unit: &'a UnitDisk<D>, session: &'a QueueStatistics) -> Self {
        Self { unit, session }
    }

    async fn run<T>(
        &self,
        count: impl Fn(&QueueStatistics),
        request: impl Future<Output = Result<T, IoError>>,
    ) -> Result<T, IoError> {
        let both = [&self.unit.statistics, self.session];
        both.iter().for_each(|statistics| count(statistics));
        let begin = moment_nanos();
        let outcome = request.await;
        let nanos = moment_nanos().saturating_sub(begin);
        for statistics in both {
            statistics.count_time(nanos);
            if outcome.is_err() {
                statistics.count_error();
            }
        }
        outcome
    }
}

impl<D: BlockDevice> BlockDevice for Counted<'_, D> {
    fn geometry(&self) -> Geometry {
        self.unit.disk.geometry()
    }

    async fn read(&self, offset: u64, buffers: &[IoBuf]) -> Result<(), IoError> {
        let length = list::total_length(buffers);
        let count = |statistics: &QueueStatistics| statistics.count_read(length);
        self.run(count, self.unit.disk.read(offset, buffers)).await
    }

    async fn write(&self, offset: u64, buffers: &[IoBuf], durability: Durability) -> Result<(), IoError> {
        let length = list::total_length(buffers);
        let count = |statistics: &QueueStatistics| statistics.count_write(length);
        let disk = &self.unit.disk;
        self.run(count, async {
            disk.write(offset, buffers, durability).await?;
            match durability {
                Durability::Volatile => disk.settle().await,
                Durability::Durable => Ok(()),
            }
        })
        .await
    }

    async fn flush(&self) -> Result<(), IoError> {
        self.run(QueueStatistics::count_flush, self.unit.disk.flush())
            .await
    }

    async fn settle(&self) -> Result<(), IoError> {
        self.unit.disk.settle().await
    }

    async fn discard(&self, offset: u64, length: u64) -> Result<(), IoError> {
        self.run(
            QueueStatistics::count_other,
            self.unit.disk.discard(offset, length),
        )
        .await
    }

    async fn write_zeroes(&self, offset: u64, length: u64, mode: ZeroMode) -> Result<(), IoError> {
        let disk = &self.unit.disk;
        self.run(QueueStatistics::count_other, async {
            disk.write_zeroes(offset, length, mode).await?;
            disk.settle().await
        })
        .await
    }

    async fn allocation(&self, offset: u64, length: u64) -> Result<(Allocation, u64), IoError> {
        self.unit.disk.allocation(offset, length).await
    }
}
