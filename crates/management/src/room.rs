//! Room for connections: a fixed number of places, which those that do nothing do not keep.
//!
//! A connection waits until its request is complete, head and body, and is served from then on. If a new one comes and all places are taken, the
//! one that has waited longest loses its own, of the peer that has most of them; one that is served never does. A peer has a number of places of
//! its own, within which the same holds. So whoever says at once what he wants is heard, whatever others leave open; and only where all places
//! are at work is somebody turned away.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::task::{AbortHandle, JoinSet};
use tokio::task_local;

task_local! {
    /// The place of the connection whose task this is.
    static PLACE: Place;
}

/// Who is at the other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Peer {
    /// A user of this host.
    User(Option<u32>),
    /// Somebody in the network.
    Address(IpAddr),
}

/// What has a connection.
struct Taken {
    peer: Peer,
    /// What ends it, while it waits.
    waiting: Option<AbortHandle>,
    served: bool,
}

struct Table {
    next: u64,
    /// In the order in which they came.
    taken: BTreeMap<u64, Taken>,
}

impl Table {
    /// Those that may lose their places, the longest waiting first.
    fn waiting(&self) -> impl Iterator<Item = (u64, Peer)> {
        let waiting = self.taken.iter().filter(|(_, taken)| !taken.served);
        waiting.map(|(number, taken)| (*number, taken.peer))
    }

    fn count(&self, peer: Peer) -> usize {
        self.taken.values().filter(|taken| taken.peer == peer).count()
    }

    fn drop_oldest_of(&mut self, peer: Peer) -> bool {
        let Some((oldest, _)) = self.waiting().find(|(_, of)| *of == peer) else {
            return false;
        };
        if let Some(handle) = self.taken.remove(&oldest).and_then(|taken| taken.waiting) {
            handle.abort();
        }
        true
    }

    /// The peer with the most that wait; of several, the one that has waited longest.
    fn idlest(&self) -> Option<Peer> {
        let mut counts: BTreeMap<Peer, usize> = BTreeMap::new();
        for (_, peer) in self.waiting() {
            *counts.entry(peer).or_default() += 1;
        }
        let most = *counts.values().max()?;
        self.waiting()
            .map(|(_, peer)| peer)
            .find(|peer| counts.get(peer) == Some(&most))
    }
}

/// The places of a server.
#[derive(Clone)]
pub(crate) struct Room {
    most: usize,
    table: Arc<Mutex<Table>>,
}

fn lock(table: &Mutex<Table>) -> MutexGuard<'_, Table> {
    table.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Room {
    /// `most` places.
    pub(crate) fn new(most: usize) -> Self {
        let (next, taken) = (0, BTreeMap::new());
        Self {
            most,
            table: Arc::new(Mutex::new(Table { next, taken })),
        }
    }

    /// Whether a place for `peer` can be had only if another one loses it. Who reads first what has come already does not take it from somebody
    /// who has said what he wants.
    pub(crate) fn is_full(&self, peer: Peer, most_of_one: usize) -> bool {
        let table = lock(&self.table);
        table.taken.len() >= self.most || table.count(peer) >= most_of_one
    }

    /// A place for a connection of `peer`, which has at most `most_of_one`; none if all that it could have are at work.
    pub(crate) fn enter(&self, peer: Peer, most_of_one: usize) -> Option<Place> {
        let mut table = lock(&self.table);
        if table.count(peer) >= most_of_one && !table.drop_oldest_of(peer) {
            return None;
        }
        if table.taken.len() >= self.most {
            let idlest = table.idlest()?;
            table.drop_oldest_of(idlest);
        }
        let number = table.next;
        table.next += 1;
        let taken = Taken {
            peer,
            waiting: None,
            served: false,
        };
        table.taken.insert(number, taken);
        Some(Place {
            number,
            table: Arc::clone(&self.table),
        })
    }

    /// Has `connection` done in a task of `tasks`, which has `place` until it ends.
    pub(crate) fn spawn(
        &self,
        tasks: &mut JoinSet<()>,
        place: Place,
        connection: impl Future<Output = ()> + Send + 'static,
    ) {
        let number = place.number;
        let handle = tasks.spawn(PLACE.scope(place, connection));
        if let Some(taken) = lock(&self.table).taken.get_mut(&number) {
            taken.waiting = Some(handle);
        }
    }
}

/// The request of the connection whose task this is has come as a whole: its place is kept until the answer has been sent.
pub(crate) fn request_is_complete() {
    // Tests serve connections without places.
    let _ = PLACE.try_with(|place| {
        if let Some(taken) = lock(&place.table).taken.get_mut(&place.number) {
            taken.served = true;
        }
    });
}

/// A place, until it is dropped.
pub(crate) struct Place {
    number: u64,
    table: Arc<Mutex<Table>>,
}

impl Drop for Place {
    fn drop(&mut self) {
        lock(&self.table).taken.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use super::*;

    const ANNA: Peer = Peer::User(Some(1));
    const BEN: Peer = Peer::User(Some(2));

    /// Places that are taken: (peer, whether it is served), in the order in which they came.
    fn taken(room: &Room) -> Vec<(Peer, bool)> {
        let table = lock(&room.table);
        table
            .taken
            .values()
            .map(|taken| (taken.peer, taken.served))
            .collect()
    }

    struct Setup {
        room: Room,
        tasks: JoinSet<()>,
    }

    impl Setup {
        /// A connection that waits, or is served, for ever.
        async fn come(&mut self, peer: Peer, most_of_one: usize, served: bool) -> bool {
            let Some(place) = self.room.enter(peer, most_of_one) else {
                return false;
            };
            self.room.spawn(&mut self.tasks, place, async move {
                if served {
                    request_is_complete();
                }
                pending().await
            });
            tokio::task::yield_now().await;
            true
        }
    }

    #[tokio::test]
    async fn who_waits_makes_room_and_who_is_served_does_not() {
        let mut setup = Setup {
            room: Room::new(3),
            tasks: JoinSet::new(),
        };
        for (peer, served) in [(ANNA, false), (BEN, true), (ANNA, false)] {
            assert!(setup.come(peer, 3, served).await);
        }
        // The oldest of Anna's goes, then the other one; then Ben's own, for Anna has no more.
        assert!(setup.come(BEN, 3, true).await);
        assert_eq!(taken(&setup.room), [(BEN, true), (ANNA, false), (BEN, true)]);
        assert!(setup.tasks.join_next().await.unwrap().unwrap_err().is_cancelled());
        assert!(setup.come(BEN, 3, false).await);
        assert!(setup.come(ANNA, 3, true).await);
        assert_eq!(taken(&setup.room), [(BEN, true), (BEN, true), (ANNA, true)]);
        assert!(!setup.come(ANNA, 3, false).await, "all are at work");
        setup.tasks.shutdown().await;
        assert_eq!(taken(&setup.room), []);
    }

    #[tokio::test]
    async fn a_peer_has_places_of_its_own() {
        let mut setup = Setup {
            room: Room::new(8),
            tasks: JoinSet::new(),
        };
        assert!(setup.come(BEN, 2, false).await);
        for _ in 0..5 {
            assert!(setup.come(ANNA, 2, false).await);
        }
        assert!(setup.come(ANNA, 2, true).await && setup.come(ANNA, 2, true).await);
        assert_eq!(taken(&setup.room), [(BEN, false), (ANNA, true), (ANNA, true)]);
        assert!(!setup.come(ANNA, 2, false).await);
        assert!(setup.come(BEN, 2, false).await);
    }
}
