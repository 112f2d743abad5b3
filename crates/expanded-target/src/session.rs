//! What a guest has sent and what it is answered, by tag, in bounded memory.
//!
//! ```text
//!   fragments ──► partial ──last──► Checking ──► Queued ──► Running ──► Ended (kept until others need the room)
//!                                      └── refused ──────────────────────┘
//! ```
//!
//! The same request under the same tag is the same request: sent again, because an answer was lost, it is not done again.

use std::collections::BTreeMap;
use std::sync::Arc;

use expanded_api::{KEPT, MAX_PAYLOAD, Request, State};
use storage_virtualizer::scsi::Code;

/// Most bytes of requests and answers that are kept.
const MAX_BYTES: usize = 8 << 20;
/// Most requests that have not ended.
const MAX_LIVE: usize = 16;
/// Most requests that have not come as a whole.
const MAX_PARTIAL: usize = 4;

/// Where a request is in its life.
#[derive(Debug)]
enum Phase {
    /// It is not known yet whether the guest may.
    Checking,
    Queued(Box<Request>),
    Running,
    Ended {
        good: bool,
        refusal: Option<Code>,
        body: Arc<[u8]>,
    },
}

#[derive(Debug)]
struct Entry {
    number: u64,
    request: Arc<[u8]>,
    phase: Phase,
}

impl Entry {
    fn bytes(&self) -> usize {
        let body = match &self.phase {
            Phase::Ended { body, .. } => body.len(),
            // So much may come.
            _ => MAX_PAYLOAD / 4,
        };
        self.request.len() + body
    }

    fn has_ended(&self) -> bool {
        matches!(self.phase, Phase::Ended { .. })
    }
}

#[derive(Debug, Default)]
struct Partial {
    number: u64,
    next: u8,
    bytes: Vec<u8>,
}

/// What came of a fragment.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// More are to come.
    More,
    /// The request is whole, and new: it is to be checked.
    New,
    /// It was sent before.
    Known,
}

/// Why a fragment was not taken.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum NotTaken {
    /// It does not follow the one before it.
    OutOfOrder,
    /// The request is too large with it.
    TooLarge,
    /// Another request has the tag.
    OtherRequest,
    /// Too much is waiting.
    Full,
}

/// How it is with a request.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) state: State,
    pub(crate) is_checked: bool,
    pub(crate) refusal: Option<Code>,
    pub(crate) body: Arc<[u8]>,
}

/// What came of the wish to take a request back.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Cancelled {
    /// It ended before it began, or is forgotten.
    Yes,
    /// It is being done.
    Running,
    /// There is none.
    Unknown,
}

/// All requests of a principal.
#[derive(Debug, Default)]
pub(crate) struct Session {
    next: u64,
    entries: BTreeMap<u32, Entry>,
    partial: BTreeMap<u32, Partial>,
}

impl Session {
    /// Takes a fragment.
    pub(crate) fn take(
        &mut self,
        tag: u32,
        fragment: u8,
        last: bool,
        bytes: &[u8],
    ) -> Result<Taken, NotTaken> {
        self.next += 1;
        let mut partial = match fragment {
            0 => Partial {
                number: self.next,
                ..Partial::default()
            },
            // What does not follow ends what it should have followed.
            _ => self.partial.remove(&tag).ok_or(NotTaken::OutOfOrder)?,
        };
        if partial.next != fragment {
            return Err(NotTaken::OutOfOrder);
        }
        if partial.bytes.len() + bytes.len() > MAX_PAYLOAD {
            return Err(NotTaken::TooLarge);
        }
        partial.bytes.extend(bytes);
        if last {
            self.partial.remove(&tag);
            return self.enter(tag, partial.bytes.into());
        }
        partial.next = fragment.checked_add(1).ok_or(NotTaken::OutOfOrder)?;
        self.partial.insert(tag, partial);
        while self.partial.len() > MAX_PARTIAL {
            let oldest = self.partial.iter().min_by_key(|(_, partial)| partial.number);
            let Some(oldest) = oldest.map(|(tag, _)| *tag) else {
                break;
            };
            self.partial.remove(&oldest);
        }
        Ok(Taken::More)
    }

    fn enter(&mut self, tag: u32, request: Arc<[u8]>) -> Result<Taken, NotTaken> {
        if let Some(known) = self.entries.get(&tag) {
            return match known.request == request {
                true => Ok(Taken::Known),
                false => Err(NotTaken::OtherRequest),
            };
        }
        let live = self.entries.values().filter(|entry| !entry.has_ended());
        if live.count() >= MAX_LIVE {
            return Err(NotTaken::Full);
        }
        let entry = Entry {
            number: self.next,
            request,
            phase: Phase::Checking,
        };
        self.make_room(1, entry.bytes());
        self.entries.insert(tag, entry);
        Ok(Taken::New)
    }

    /// Forgets the oldest that have ended, until so many more fit.
    fn make_room(&mut self, entries: usize, bytes: usize) {
        let mut used: usize = self.entries.values().map(Entry::bytes).sum();
        while self.entries.len() + entries > KEPT || used + bytes > MAX_BYTES {
            let ended = self.entries.iter().filter(|(_, entry)| entry.has_ended());
            let Some(tag) = ended.min_by_key(|(_, entry)| entry.number).map(|(tag, _)| *tag) else {
                break;
            };
            used -= self.entries.remove(&tag).map_or(0, |entry| entry.bytes());
        }
    }

    /// The bytes of a request that is to be checked.
    pub(crate) fn unchecked(&self, tag: u32) -> Option<Arc<[u8]>> {
        let entry = self.entries.get(&tag)?;
        matches!(entry.phase, Phase::Checking).then(|| Arc::clone(&entry.request))
    }

    /// It may: it waits for its turn.
    pub(crate) fn queue(&mut self, tag: u32, request: Request) {
        if let Some(entry) = self.entries.get_mut(&tag) {
            entry.phase = Phase::Queued(Box::new(request));
        }
    }

    /// Its turn has come. None if it was taken back.
    pub(crate) fn begin(&mut self, tag: u32) -> Option<Request> {
        let entry = self.entries.get_mut(&tag)?;
        match std::mem::replace(&mut entry.phase, Phase::Running) {
            Phase::Queued(request) => Some(*request),
            other => {
                entry.phase = other;
                None
            }
        }
    }

    /// It has ended; `refusal` says why it was not done.
    pub(crate) fn end(&mut self, tag: u32, good: bool, refusal: Option<Code>, body: Vec<u8>) {
        if let Some(entry) = self.entries.get_mut(&tag) {
            entry.phase = Phase::Ended {
                good,
                refusal,
                body: body.into(),
            };
            self.make_room(0, 0);
        }
    }

    pub(crate) fn look(&self, tag: u32) -> Option<Seen> {
        let entry = self.entries.get(&tag)?;
        let nothing = || Arc::from([].as_slice());
        let seen = |state, is_checked, refusal, body| Seen {
            state,
            is_checked,
            refusal,
            body,
        };
        Some(match &entry.phase {
            Phase::Checking => seen(State::Queued, false, None, nothing()),
            Phase::Queued(_) => seen(State::Queued, true, None, nothing()),
            Phase::Running => seen(State::Running, true, None, nothing()),
            Phase::Ended { good, refusal, body } => {
                let state = if *good { State::Done } else { State::Failed };
                seen(state, true, *refusal, Arc::clone(body))
            }
        })
    }

    /// Takes a request back that has not begun; forgets one that has ended, or has not come as a whole.
    pub(crate) fn cancel(&mut self, tag: u32, body: impl FnOnce() -> Vec<u8>) -> Cancelled {
        if self.partial.remove(&tag).is_some() {
            return Cancelled::Yes;
        }
        let Some(entry) = self.entries.get_mut(&tag) else {
            return Cancelled::Unknown;
        };
        match entry.phase {
            Phase::Running => Cancelled::Running,
            Phase::Ended { .. } => {
                self.entries.remove(&tag);
                Cancelled::Yes
            }
            Phase::Checking | Phase::Queued(_) => {
                entry.phase = Phase::Ended {
                    good: false,
                    refusal: None,
                    body: body().into(),
                };
                Cancelled::Yes
            }
        }
    }

    /// Bytes that are kept, as far as they are bounded by this.
    #[cfg(test)]
    pub(crate) fn kept(&self) -> usize {
        let partial: usize = self.partial.values().map(|partial| partial.bytes.len()).sum();
        self.entries.values().map(Entry::bytes).sum::<usize>() + partial
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn fragments_make_a_request_in_their_order_only() {
        let mut session = Session::default();
        assert_eq!(session.take(1, 0, false, b"ab"), Ok(Taken::More));
        assert_eq!(session.take(1, 1, true, b"c"), Ok(Taken::New));
        assert_eq!(&*session.unchecked(1).unwrap(), b"abc");
        // Again, in another cut.
        assert_eq!(session.take(1, 0, true, b"abc"), Ok(Taken::Known));
        assert_eq!(session.take(1, 0, true, b"abd"), Err(NotTaken::OtherRequest));
        assert_eq!(session.take(2, 1, true, b"x"), Err(NotTaken::OutOfOrder));
        session.take(2, 0, false, b"x").unwrap();
        assert_eq!(session.take(2, 2, false, b"x"), Err(NotTaken::OutOfOrder));
        assert_eq!(
            session.take(2, 1, false, b"x"),
            Err(NotTaken::OutOfOrder),
            "it began anew"
        );
        let much = vec![0; MAX_PAYLOAD];
        session.take(3, 0, false, &much).unwrap();
        assert_eq!(session.take(3, 1, true, b"x"), Err(NotTaken::TooLarge));
    }

    #[test]
    fn a_request_is_taken_back_until_it_has_begun() {
        let mut session = Session::default();
        session.take(1, 0, true, b"{}").unwrap();
        session.queue(1, Request::ListDisks {});
        assert_eq!(session.cancel(1, Vec::new), Cancelled::Yes);
        assert_eq!(session.begin(1), None);
        assert_eq!(session.look(1).unwrap().state, State::Failed);
        session.take(2, 0, true, b"{}").unwrap();
        session.queue(2, Request::ListDisks {});
        assert!(session.begin(2).is_some());
        assert_eq!(session.cancel(2, Vec::new), Cancelled::Running);
        session.end(2, true, None, Vec::new());
        assert_eq!(session.cancel(2, Vec::new), Cancelled::Yes);
        assert_eq!(session.cancel(2, Vec::new), Cancelled::Unknown);
    }

    proptest! {
        #[test]
        fn memory_is_bounded_whatever_comes(
            steps in prop::collection::vec((0_u32..600, 0_u8..4, 0_u8..4, 0_usize..(MAX_PAYLOAD / 2)), 1..400)
        ) {
            let mut session = Session::default();
            let data = vec![7; MAX_PAYLOAD];
            for (tag, what, fragment, length) in steps {
                match what {
                    0 | 1 => drop(session.take(tag, fragment, what == 1, &data[..length])),
                    2 => session.end(tag, true, None, data[..length].to_vec()),
                    _ => drop(session.cancel(tag, Vec::new)),
                }
                let live = session.entries.values().filter(|entry| !entry.has_ended()).count();
                prop_assert!(live <= MAX_LIVE && session.entries.len() <= KEPT);
                prop_assert!(session.partial.len() <= MAX_PARTIAL);
                // What has not ended counts in full, and cannot be forgotten.
                prop_assert!(session.kept() <= MAX_BYTES + (MAX_LIVE + MAX_PARTIAL) * 2 * MAX_PAYLOAD);
            }
        }
    }
}
