//! A target managed while it runs: what it does, logical units that come and go, sessions that must go.
//!
//! ```text
//!   IscsiControl::add ────► a unit more: initiators that see it have REPORTED LUNS DATA HAS CHANGED on their others
//!   IscsiControl::remove ─► a unit less, told in the same way: what the disk does for it goes on and is answered,
//!                           what comes later finds no unit; nothing uses the disk any more ─► `remove` returns
//!   IscsiControl::close ──► the initiator is asked to log out, as when the target stops, and cut if it does not
//! ```

use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use block_io::{BlockDevice, Clock, WorkerClock};

use super::counted::UnitDisk;
use super::options::{IscsiServerError, IscsiUnit};
use super::server::{ALL_DROPPED, LOGOUT_WANTED, Server};
use super::session::Session;
use crate::queue::Counters;
use crate::sockets::reach::Reach;

/// How often it is looked whether commands and sessions have ended.
const LOOK: Duration = Duration::from_millis(5);

/// Something cannot be done to a running target.
#[derive(Debug, thiserror::Error)]
pub enum IscsiManageError {
    /// There is no such unit.
    #[error("there is no LUN {lun}")]
    NoUnit {
        /// The LUN.
        lun: u16,
    },
    /// There is no session of this number.
    #[error("there is no session {0}")]
    NoSession(u16),
    /// It has ended.
    #[error("the iSCSI target has ended")]
    Ended,
}

/// A logical unit as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnitState {
    /// Its target's place in [`IscsiOptions::targets`](super::IscsiOptions::targets).
    pub target: usize,
    /// Its number.
    pub lun: u16,
    /// Bytes.
    pub size: u64,
    /// Takes no writes.
    pub read_only: bool,
    /// How many sessions see it.
    pub sessions: usize,
    /// What was asked of its disk.
    pub counters: Counters,
}

/// A session as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionState {
    /// By which the initiator knows it (TSIH), and by which it can be ended.
    pub number: u16,
    /// The initiator's name.
    pub initiator: String,
    /// Its target's place; none if it only looks which there are.
    pub target: Option<usize>,
    /// Where its connections come from.
    pub peers: Vec<String>,
    /// When it was logged in.
    pub since: SystemTime,
    /// What it has asked of disks.
    pub counters: Counters,
}

/// Manages a running target, from any thread but its worker's. It does not keep the target running.
pub struct IscsiControl<D: BlockDevice + 'static>(pub(super) Reach<Server<D>>);

impl<D: BlockDevice + 'static> Clone for IscsiControl<D> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<D: BlockDevice + 'static> std::fmt::Debug for IscsiControl<D> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_tuple("IscsiControl").field(&self.0).finish()
    }
}

impl<D: BlockDevice + 'static> IscsiControl<D> {
    /// The logical units, and the sessions.
    ///
    /// # Errors
    /// The target has ended.
    pub fn state(&self) -> Result<(Vec<UnitState>, Vec<SessionState>), IscsiManageError> {
        let asked = self.0.ask(|server| async move { server.state() });
        asked.ok_or(IscsiManageError::Ended)
    }

    /// Serves the unit that `make` makes on the target's worker. Initiators that see all units of its target see it at once.
    ///
    /// # Errors
    /// It cannot be made or have its place, or the target ends.
    pub fn add(
        &self,
        make: impl FnOnce() -> Result<IscsiUnit<D>, IscsiServerError> + Send + 'static,
    ) -> Result<(), IscsiServerError> {
        let asked = self.0.ask(|server| async move { server.add(make()?) });
        asked.unwrap_or(Err(IscsiServerError::Stopping))
    }

    /// Serves a unit no more, and returns when nothing uses its disk any more.
    ///
    /// # Errors
    /// There is no such unit, or the target has ended.
    pub fn remove(&self, target: usize, lun: u16) -> Result<(), IscsiManageError> {
        let asked = self
            .0
            .ask(move |server| async move { server.remove(target, lun).await });
        asked.unwrap_or(Err(IscsiManageError::Ended))
    }

    /// Ends a session: its initiator is asked to log out, and cut if it takes longer than
    /// [`IscsiOptions::patience`](super::IscsiOptions::patience). It may log in again.
    ///
    /// # Errors
    /// There is no such session, or the target has ended.
    pub fn close(&self, session: u16) -> Result<(), IscsiManageError> {
        let asked = self
            .0
            .ask(move |server| async move { server.end_session(session).await });
        asked.unwrap_or(Err(IscsiManageError::Ended))
    }
}

impl<D: BlockDevice + 'static> Server<D> {
    fn state(&self) -> (Vec<UnitState>, Vec<SessionState>) {
        let sessions = self.sessions();
        let mut units = Vec::new();
        for (target, table) in self.targets.iter().enumerate() {
            let all = self.sessions_with(target);
            for lun in table.luns() {
                let sees = |session: &&Rc<Session<D>>| {
                    let visible: BTreeSet<u16> = session.nexus.visible().iter().copied().collect();
                    visible.contains(&lun.number)
                };
                units.push(UnitState {
                    target,
                    lun: lun.number,
                    size: lun.handle.disk().geometry().size,
                    read_only: lun.unit.options().read_only,
                    sessions: all.iter().filter(sees).count(),
                    counters: lun.handle.statistics.counters(),
                });
            }
        }
        let shown = sessions.iter().map(|session| SessionState {
            number: session.tsih,
            initiator: session.initiator.clone(),
            target: (!session.is_discovery).then_some(session.target),
            peers: {
                let connections = session.connections.borrow();
                connections
                    .iter()
                    .map(|connection| connection.link.peer.clone())
                    .collect()
            },
            since: session.since,
            counters: session.statistics.counters(),
        });
        (units, shown.collect())
    }

    fn add(&self, unit: IscsiUnit<D>) -> Result<(), IscsiServerError> {
        if self.is_stopping() {
            return Err(IscsiServerError::Stopping);
        }
        let target = self.targets.get(unit.target).ok_or(IscsiServerError::NoTarget)?;
        target.add(unit.lun, unit.unit, Rc::new(UnitDisk::new(unit.disk)))?;
        Ok(())
    }

    async fn remove(&self, target: usize, lun: u16) -> Result<(), IscsiManageError> {
        let removed = self.targets.get(target).and_then(|target| target.remove(lun));
        let removed = removed.ok_or(IscsiManageError::NoUnit { lun })?;
        // What the disk does is ended by the disk, however long that takes.
        let clock = WorkerClock::new();
        while Arc::strong_count(&removed) > 1 {
            clock.sleep(LOOK).await;
        }
        Ok(())
    }

    async fn end_session(&self, number: u16) -> Result<(), IscsiManageError> {
        let found = self.sessions().into_iter().find(|session| session.tsih == number);
        let session = found.ok_or(IscsiManageError::NoSession(number))?;
        session.is_leaving.set(true);
        let (logout, commands) = self.settings.patience;
        let seconds = u16::try_from(logout.as_secs()).unwrap_or(u16::MAX);
        let connections = || session.connections.borrow().clone();
        for connection in connections() {
            connection.notify(LOGOUT_WANTED, [0, 0, seconds]);
        }
        let clock = WorkerClock::new();
        let gone = async |time: Duration| {
            let end = clock.now() + time;
            while !session.is_released() && clock.now() < end {
                clock.sleep(LOOK).await;
            }
            session.is_released()
        };
        if gone(logout).await {
            return Ok(());
        }
        for connection in connections() {
            connection.notify(ALL_DROPPED, [0, 2, 0]);
            // What is in flight is answered, and nothing more read.
            connection.link.end();
        }
        if !gone(commands).await {
            connections().iter().for_each(|connection| connection.link.kill());
            session.close();
            session.released().await;
        }
        Ok(())
    }
}
