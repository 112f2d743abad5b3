//! Who uses SCSI disks that are shared, and looks after them itself: the expanded API, for each iSCSI initiator that the access file or
//! command line names, and for the machine at each socket of vhost-user-scsi.
//!
//! ```text
//!   session of iqn…:a ──┐                                   ┌─► ExpandedTarget of a ─► what a sees of the target, the pool
//!   session of iqn…:a ──┼─► unit's VendorCommands: who is it?┤
//!   session of iqn…:b ──┘                                   └─► ExpandedTarget of b ─► …
//! ```
//!
//! Of a socket, the principal is who connects there: only the user who shares the disks may. Over iSCSI it is the name with which an initiator has logged in. A name alone is only a claim: without CHAP it may look at the disks that it
//! sees anyway, and nothing else. Initiators that are not named (`*`) share one entry, and must not see each other's requests: they have no
//! expanded API.

use std::collections::{BTreeMap, BTreeSet};
use std::future::ready;
use std::pin::Pin;
use std::sync::{Arc, PoisonError, RwLock};

use anyhow::Context;
use api::storage::JobStatus;
use api::{
    ByteSize, DeviceId, DeviceState, DiskBus, DiskConfig, DiskStatus, EventLog, ExpandedPolicy, Problem,
    ProblemKind, StorageAnswer, StorageRequest, VmName,
};
use expanded_target::{ExpandedTarget, Hook, JobListener, Owner, Running};
use storage_manager::{HostedDisk, HostedPool, VirtualDisk, owner_of_initiator, owner_of_machine};
use storage_virtualizer::iscsi::Access;
use storage_virtualizer::scsi::{Code, Command, Nexus, Outcome, Sense, TransportId, Unit, VendorCommands};
use storage_virtualizer::virtio_blk::fitting_serial;
use storage_virtualizer::{DiskHandle, PinnedDisk};

use crate::share_sandbox::Confined;

/// What an initiator may, by its target's place and its name.
pub(crate) type Policies = BTreeMap<(usize, String), ExpandedPolicy>;

/// The expanded API of one target: its units have it. By the name of an iSCSI initiator, or the TransportID of another one.
#[derive(Debug, Default)]
pub(crate) struct Principals(BTreeMap<Vec<u8>, Principal>);

/// One who looks after its disks.
#[derive(Debug)]
struct Principal {
    target: ExpandedTarget,
    /// Whose its jobs are.
    owner: String,
}

impl Principals {
    /// For those that may log in to the target at place `target`.
    pub(crate) fn of_initiators(
        target: usize,
        access: &[Access],
        policies: &Policies,
    ) -> anyhow::Result<Arc<Self>> {
        let mut principals = Self::default();
        for initiator in access.iter().filter_map(|access| access.initiator.as_ref()) {
            let policy = policies.get(&(target, initiator.clone())).cloned();
            let policy = policy.unwrap_or_default();
            let owner = owner_of_initiator(initiator);
            principals.add(initiator.clone().into_bytes(), name_of(initiator)?, owner, policy);
        }
        Ok(Arc::new(principals))
    }

    /// For machines that are known by the TransportIDs of their adapters.
    pub(crate) fn of_machines(
        machines: impl IntoIterator<Item = (TransportId, VmName, ExpandedPolicy)>,
    ) -> Arc<Self> {
        let mut principals = Self::default();
        for (initiator, name, policy) in machines {
            let owner = owner_of_machine(&name);
            principals.add(initiator.as_bytes().to_vec(), name, owner, policy);
        }
        Arc::new(principals)
    }

    fn add(&mut self, key: Vec<u8>, name: VmName, owner: String, policy: ExpandedPolicy) {
        if policy.enabled {
            let target = ExpandedTarget::new(name, policy);
            self.0.insert(key, Principal { target, owner });
        }
    }

    /// Answers, on threads that are confined, until what is returned is dropped. Of initiators that `access` does not name, each sees all disks of the shelf.
    pub(crate) fn start(
        &self,
        access: &[Access],
        pool: &Arc<HostedPool>,
        shelf: &Arc<Shelf>,
        confined: &Confined,
    ) -> anyhow::Result<Vec<Running>> {
        let luns_of = |key: &[u8]| {
            let of = |access: &&Access| {
                access
                    .initiator
                    .as_ref()
                    .is_some_and(|name| name.as_bytes() == key)
            };
            access.iter().find(of).and_then(|access| access.luns.as_ref())
        };
        let mut running = Vec::new();
        for (key, principal) in &self.0 {
            let view = View {
                pool: Arc::clone(pool),
                luns: luns_of(key).cloned(),
                shelf: Arc::clone(shelf),
                owner: principal.owner.clone(),
                events: EventLog::new(),
            };
            let hook = || Box::new(confined.serving()) as Hook;
            let started = principal.target.start(Arc::new(view), hook);
            running.push(started.context("cannot start what serves the expanded API")?);
        }
        Ok(running)
    }

    fn of(&self, nexus: &Nexus) -> Option<&ExpandedTarget> {
        let initiator = nexus.initiator();
        let key = initiator.iscsi_name().map_or(initiator.as_bytes(), str::as_bytes);
        self.0.get(key).map(|principal| &principal.target)
    }
}

impl VendorCommands for Principals {
    fn execute<'a>(
        &'a self,
        unit: &'a Unit,
        nexus: &'a Nexus,
        command: &'a Command<'a>,
    ) -> Pin<Box<dyn Future<Output = Outcome> + 'a>> {
        match self.of(nexus) {
            Some(principal) => principal.execute(unit, nexus, command),
            None => {
                let sense = Sense::illegal(Code::INVALID_OPERATION_CODE);
                Box::pin(ready(Outcome::failed(unit, sense)))
            }
        }
    }

    fn page(&self, unit: &Unit, nexus: &Nexus) -> Vec<u8> {
        self.of(nexus)
            .map_or_else(Vec::new, |principal| principal.page(unit, nexus))
    }
}

/// An initiator's name, or that of a socket, as the name of a machine, which has fewer characters.
pub(crate) fn name_of(initiator: &str) -> anyhow::Result<VmName> {
    let plain = |letter: char| match letter {
        '.' | '-' | '_' => letter,
        letter if letter.is_ascii_alphanumeric() => letter,
        _ => '_',
    };
    // What distinguishes it is at its end.
    let skip = initiator.chars().count().saturating_sub(VmName::MAX_LENGTH);
    let text: String = initiator.chars().skip(skip).map(plain).collect();
    text.parse()
        .with_context(|| format!("{initiator} cannot be the name of a principal"))
}

/// The serial number of a shared disk: what is behind the last slash of its path, as far as it fits.
pub(crate) fn serial_of(path: &str) -> String {
    fitting_serial(path.rsplit('/').next().unwrap_or_default())
}

/// A disk that an initiator sees.
struct Seen {
    config: DiskConfig,
    handle: PinnedDisk<VirtualDisk>,
}

/// The disks of a pool that a target shows now, by LUN.
#[derive(Default)]
pub(crate) struct Shelf(RwLock<BTreeMap<u16, Seen>>);

impl Shelf {
    /// # Errors
    /// The LUN cannot be that of a device.
    pub(crate) fn put(&self, lun: u16, path: &str, disk: &HostedDisk) -> anyhow::Result<()> {
        let config = DiskConfig {
            image: None,
            file: Some(path.to_owned()),
            bus: DiskBus::VirtioScsi,
            serial: serial_of(path).parse().ok(),
            read_only: disk.handle().geometry().read_only,
            ..DiskConfig::new("")
        };
        let id: DeviceId = format!("lun{lun}").parse()?;
        let seen = Seen {
            config: DiskConfig { id, ..config },
            handle: disk.handle().clone(),
        };
        let mut all = self.0.write().unwrap_or_else(PoisonError::into_inner);
        all.insert(lun, seen);
        Ok(())
    }

    /// It is shown no more.
    pub(crate) fn take(&self, lun: u16) {
        let taken = self
            .0
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&lun);
        drop(taken);
    }

    /// Nothing is shown any more.
    pub(crate) fn clear(&self) {
        let taken = std::mem::take(&mut *self.0.write().unwrap_or_else(PoisonError::into_inner));
        drop(taken);
    }
}

/// What an initiator sees: the machine of its [`ExpandedTarget`].
struct View {
    pool: Arc<HostedPool>,
    /// These only.
    luns: Option<BTreeSet<u16>>,
    shelf: Arc<Shelf>,
    owner: String,
    events: EventLog,
}

fn not_here(what: &str) -> Problem {
    Problem::new(
        ProblemKind::Conflict,
        format!("{what} cannot be had of shared disks"),
    )
    .remedy("ask the administrator of the storage: `smsvmm share` is started with its disks")
}

impl Owner for View {
    fn disks(&self) -> Vec<DiskStatus> {
        let all = self.shelf.0.read().unwrap_or_else(PoisonError::into_inner);
        let sees = |lun: &u16| self.luns.as_ref().is_none_or(|luns| luns.contains(lun));
        let seen = all.iter().filter(|(lun, _)| sees(lun));
        let disks = seen.map(|(_, seen)| DiskStatus {
            config: seen.config.clone(),
            state: DeviceState::Active,
            size: ByteSize::from_bytes(seen.handle.geometry().size),
            stopped: None,
        });
        disks.collect()
    }

    fn attach_disk(&self, _: DiskConfig) -> Result<DiskStatus, Problem> {
        Err(not_here("another disk"))
    }

    fn detach(&self, _: &DeviceId) -> Result<(), Problem> {
        Err(not_here("a disk's end"))
    }

    fn storage(&self, request: StorageRequest) -> Result<StorageAnswer, Problem> {
        self.pool.execute_for(&self.owner, request)
    }

    fn jobs(&self) -> Result<Vec<JobStatus>, Problem> {
        self.pool.jobs_of(&self.owner)
    }

    fn on_job_end(&self, listener: JobListener) {
        self.pool.on_job_end(&self.owner, listener);
    }

    fn events(&self) -> &EventLog {
        &self.events
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn initiators_have_names_as_machines_have() {
        let name = |text: &str| name_of(text).unwrap().to_string();
        assert_eq!(
            name("iqn.1993-08.org.debian:01:abc"),
            "iqn.1993-08.org.debian_01_abc"
        );
        let long = format!("iqn.2026-11.org.example:{}z", "a".repeat(190));
        assert_eq!(name(&long).len(), VmName::MAX_LENGTH);
        assert!(name(&long).ends_with("az"));
    }
}
