//! A server managed while it runs: what it does, exports that come and go, clients that must go.
//!
//! ```text
//!   NbdControl::add ────► checked as at the beginning ─► in the list: clients find it from now on
//!   NbdControl::remove ─► out of the list: nobody finds it any more
//!                         its clients: what is in flight is answered, the rest is refused, the connection ends
//!                         nobody has it any more ─► the disk is let go of, and `remove` returns
//! ```
//!
//! Clients of other exports notice nothing of it. One that is in the middle of its handshake with an export that goes is closed.

use std::rc::Rc;
use std::time::{Duration, SystemTime};

use block_io::{BlockDevice, Clock, WorkerClock};

use super::export::Export;
use super::link::Link;
use super::server::{NbdServerError, Served, Server, check};
use crate::queue::Counters;
use crate::sockets::reach::Reach;

/// How often it is looked whether clients have gone.
const LOOK: Duration = Duration::from_millis(5);

/// Something cannot be done to a running server.
#[derive(Debug, thiserror::Error)]
pub enum NbdManageError {
    /// There is no export of this name.
    #[error("there is no export {0:?}")]
    NoExport(String),
    /// There is no client of this number.
    #[error("there is no client {0}")]
    NoClient(u64),
    /// It has ended.
    #[error("the NBD server has ended")]
    Ended,
}

/// An export as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportState {
    /// What clients ask for.
    pub name: String,
    /// A line for people; may be empty.
    pub description: String,
    /// Bytes.
    pub size: u64,
    /// Takes no writes.
    pub read_only: bool,
    /// How many connections use it.
    pub clients: usize,
    /// What was asked of it since it is there.
    pub counters: Counters,
}

/// A connection as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientState {
    /// By which it can be ended; never another one's.
    pub number: u64,
    /// Where it comes from.
    pub peer: String,
    /// When it came.
    pub since: SystemTime,
    /// The export that it has chosen; none in its handshake.
    pub export: Option<String>,
    /// What it has asked for.
    pub counters: Counters,
}

/// Manages a running server, from any thread but its worker's. It does not keep the server running.
pub struct NbdControl<E>(pub(super) Reach<Server<E>>);

impl<E> Clone for NbdControl<E> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<E> std::fmt::Debug for NbdControl<E> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_tuple("NbdControl").field(&self.0).finish()
    }
}

impl<E: Export> NbdControl<E> {
    /// The exports, in the order in which they came, and the connections.
    ///
    /// # Errors
    /// The server has ended.
    pub fn state(&self) -> Result<(Vec<ExportState>, Vec<ClientState>), NbdManageError> {
        let asked = self.0.ask(|server| async move { server.state() });
        asked.ok_or(NbdManageError::Ended)
    }

    /// Serves what `make` makes on the server's worker, beside what is there.
    ///
    /// # Errors
    /// It cannot be made or served, or the server ends.
    pub fn add<F>(&self, make: impl FnOnce() -> F + Send + 'static) -> Result<(), NbdServerError>
    where
        F: Future<Output = Result<E, NbdServerError>> + 'static,
    {
        let asked = self.0.ask(|server| async move {
            let export = make().await?;
            server.add(export)
        });
        asked.unwrap_or(Err(NbdServerError::Stopping))
    }

    /// Serves an export no more: answers what its clients have asked for, as far as they take the answers within
    /// [`NbdOptions::patience`](super::NbdOptions::patience), ends their connections, and returns when the disk is not used any more.
    ///
    /// # Errors
    /// There is no such export, or the server has ended.
    pub fn remove(&self, name: &str) -> Result<(), NbdManageError> {
        let name = name.to_owned();
        let asked = self.0.ask(|server| async move { server.remove(name).await });
        asked.unwrap_or(Err(NbdManageError::Ended))
    }

    /// Ends a connection, as [`Self::remove`] does. The client may come again.
    ///
    /// # Errors
    /// There is no such client, or the server has ended.
    pub fn disconnect(&self, client: u64) -> Result<(), NbdManageError> {
        let asked = self.0.ask(move |server| async move {
            let link = server.find_link(|link| link.number == client);
            let link = link.ok_or(NbdManageError::NoClient(client))?;
            server.let_go(|other| Rc::ptr_eq(other, &link)).await;
            Ok(())
        });
        asked.unwrap_or(Err(NbdManageError::Ended))
    }
}

impl<E: Export> Server<E> {
    fn state(&self) -> (Vec<ExportState>, Vec<ClientState>) {
        let (exports, links) = (self.exports.borrow(), self.links.borrow());
        let shown = exports.values().map(|served| {
            let export = &served.export;
            ExportState {
                name: export.name().to_owned(),
                description: export.description().to_owned(),
                size: export.disk().geometry().size,
                read_only: export.read_only(),
                clients: links.iter().filter(|link| link.uses(served.number)).count(),
                counters: served.statistics.counters(),
            }
        });
        let name = |number: usize| exports.get(&number).map(|served| served.export.name().to_owned());
        let clients = links.iter().map(|link| ClientState {
            number: link.number,
            peer: link.peer.clone(),
            since: link.since,
            export: link.export.get().and_then(name),
            counters: link.statistics.counters(),
        });
        (shown.collect(), clients.collect())
    }

    fn add(&self, export: E) -> Result<(), NbdServerError> {
        if self.ending.has_begun() {
            return Err(NbdServerError::Stopping);
        }
        let mut exports = self.exports.borrow_mut();
        check(&export, exports.values())?;
        let number = self.next_export.get();
        self.next_export.set(number + 1);
        exports.insert(number, Rc::new(Served::new(number, export)));
        Ok(())
    }

    async fn remove(&self, name: String) -> Result<(), NbdManageError> {
        let removed = {
            let mut exports = self.exports.borrow_mut();
            let found = exports.values().find(|served| served.export.name() == name);
            let number = found.map(|served| served.number);
            number.and_then(|number| exports.remove(&number))
        };
        let removed = removed.ok_or(NbdManageError::NoExport(name))?;
        self.let_go(|link| link.uses(removed.number)).await;
        // What the disk has is ended by the disk, however long that takes.
        let clock = WorkerClock::new();
        while Rc::strong_count(&removed) > 1 {
            clock.sleep(LOOK).await;
        }
        Ok(())
    }

    fn find_link(&self, is_meant: impl Fn(&Rc<Link>) -> bool) -> Option<Rc<Link>> {
        let links = self.links.borrow();
        links.iter().find(|link| is_meant(link)).cloned()
    }

    /// Ends connections when what is in flight there is answered, or when clients take too long to take the answers.
    async fn let_go(&self, is_meant: impl Fn(&Rc<Link>) -> bool) {
        let meant = || {
            let links = self.links.borrow();
            links
                .iter()
                .filter(|link| is_meant(link))
                .cloned()
                .collect::<Vec<_>>()
        };
        // One that has not chosen an export has nothing in flight.
        for link in meant() {
            match link.export.get() {
                Some(_) => link.stop(),
                None => link.kill(),
            }
        }
        let clock = WorkerClock::new();
        let end = clock.now() + self.settings.patience;
        while !meant().is_empty() {
            if clock.now() >= end {
                meant().iter().for_each(|link| link.kill());
            }
            clock.sleep(LOOK).await;
        }
    }
}
