//! Persistent reservations of disks that are shown as SCSI disks, kept in the pool (APTPL).

use std::pin::Pin;

use storage_virtualizer::scsi::{ReservationStore, StoreError};

use crate::hosted::open_pool;
use crate::problem::of_disks;
use crate::storage::now;

/// Keeps the reservations of one disk. Used on the pool's worker only.
#[derive(Debug)]
pub(crate) struct PoolReservations {
    pub(crate) path: String,
}

impl ReservationStore for PoolReservations {
    fn save<'a>(&'a self, state: &'a [u8]) -> Pin<Box<dyn Future<Output = Result<(), StoreError>> + 'a>> {
        Box::pin(async move {
            let open = open_pool()?;
            let disks = open.storage.disks()?;
            let kept = Box::pin(disks.keep_reservations(&self.path, state, now())).await;
            kept.map_err(|error| StoreError::from(of_disks(&error)))
        })
    }
}
