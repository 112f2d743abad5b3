//! Who may use a unit: reservations of both kinds, and how they are kept over a loss of power.
//!
//! Persistent reservations (SPC-4 §5.13) belong to an initiator port on a target port, which may be gone for a while: they
//! know it by its TransportID. RESERVE(6) (SPC-2) belongs to a nexus and ends with it.

use std::fmt;
use std::future::Future;
use std::pin::Pin;

use super::nexus::{Nexus, TransportId};
use super::sense::Code;
use super::table::{Access, Op};
use super::transfer::number;
use super::unit::State;

/// The most registrations of a unit.
pub(super) const MAX_REGISTRATIONS: usize = 512;

/// Keeps persistent reservations over a loss of power (APTPL). Whoever owns the disk supplies one and gives what it has kept
/// to [`super::Unit::restore_reservations`].
pub trait ReservationStore: Send + Sync + fmt::Debug {
    /// Keeps `state` instead of what was kept before; empty: nothing is kept any more. Durable when it returns. Called by one
    /// command at a time, on the thread that executes it.
    fn save<'a>(&'a self, state: &'a [u8]) -> Pin<Box<dyn Future<Output = Result<(), StoreError>> + 'a>>;
}

/// Why reservations could not be kept.
pub type StoreError = Box<dyn std::error::Error + Send + Sync>;

/// Reservations that were kept cannot be taken over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// Nothing of ours, or damaged.
    #[error("the kept reservations are damaged: have the initiators register again")]
    Damaged,
}

/// Types of persistent reservations (SPC-4 §6.15.3.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    WriteExclusive = 1,
    ExclusiveAccess = 3,
    WriteExclusiveRegistrants = 5,
    ExclusiveAccessRegistrants = 6,
    WriteExclusiveAll = 7,
    ExclusiveAccessAll = 8,
}

impl Kind {
    pub(super) fn of(value: u8) -> Option<Self> {
        Some(match value {
            1 => Self::WriteExclusive,
            3 => Self::ExclusiveAccess,
            5 => Self::WriteExclusiveRegistrants,
            6 => Self::ExclusiveAccessRegistrants,
            7 => Self::WriteExclusiveAll,
            8 => Self::ExclusiveAccessAll,
            _ => return None,
        })
    }

    /// All registrants hold it.
    pub(super) fn is_of_all(self) -> bool {
        matches!(self, Self::WriteExclusiveAll | Self::ExclusiveAccessAll)
    }

    /// Registrants may use the unit as the holder does.
    pub(super) fn includes_registrants(self) -> bool {
        !matches!(self, Self::WriteExclusive | Self::ExclusiveAccess)
    }

    fn forbids_reads(self) -> bool {
        matches!(
            self,
            Self::ExclusiveAccess | Self::ExclusiveAccessRegistrants | Self::ExclusiveAccessAll
        )
    }
}

/// An initiator port on a target port, or on all of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Port {
    pub(super) initiator: TransportId,
    /// None: all.
    pub(super) target: Option<u16>,
}

impl Port {
    pub(super) fn of(nexus: &Nexus) -> Self {
        Self {
            initiator: nexus.initiator().clone(),
            target: Some(nexus.target_port()),
        }
    }

    pub(super) fn is(&self, nexus: &Nexus) -> bool {
        self.covers(nexus.initiator(), nexus.target_port())
    }

    pub(super) fn covers(&self, initiator: &TransportId, target: u16) -> bool {
        self.initiator == *initiator && self.target.is_none_or(|own| own == target)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Registration {
    pub(super) port: Port,
    pub(super) key: u64,
}

/// A persistent reservation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Held {
    pub(super) kind: Kind,
    /// Who made it; of no meaning where all registrants hold it.
    pub(super) port: Port,
}

/// All reservations of a unit.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Reservations {
    pub(super) generation: u32,
    pub(super) registrations: Vec<Registration>,
    pub(super) held: Option<Held>,
    /// Registrations are kept over a loss of power.
    pub(super) kept: bool,
    /// The nexus that sent RESERVE(6).
    pub(super) legacy: Option<u64>,
}

impl Reservations {
    /// The registration of `nexus`.
    pub(super) fn own(&self, nexus: &Nexus) -> Option<&Registration> {
        self.registrations.iter().find(|other| other.port.is(nexus))
    }

    /// Whether `port`, which is registered, holds the reservation.
    pub(super) fn holds(&self, port: &Port) -> bool {
        self.held
            .as_ref()
            .is_some_and(|held| held.kind.is_of_all() || held.port == *port)
    }

    /// Whether anything is reserved.
    pub(super) fn is_reserved(&self) -> bool {
        self.held.is_some() || self.legacy.is_some()
    }

    /// Whether a command of `nexus` may run.
    pub(super) fn allows(&self, nexus: &Nexus, op: Op, access: Access) -> bool {
        if let Some(holder) = self.legacy
            && holder != nexus.number()
        {
            return access == Access::Always || matches!(op, Op::Release | Op::PreventAllow);
        }
        let Some(held) = &self.held else { return true };
        let own = self.own(nexus);
        if own.is_some_and(|own| self.holds(&own.port) || held.kind.includes_registrants()) {
            return true;
        }
        match access {
            Access::Always | Access::Inform | Access::Own => true,
            Access::Read => !held.kind.forbids_reads(),
            Access::Write => false,
        }
    }

    /// Takes a registration away, and the reservation that it held. Whether registrants have to be told that the reservation
    /// is released.
    pub(super) fn unregister(&mut self, port: &Port) -> bool {
        let held = self.holds(port);
        self.registrations.retain(|other| other.port != *port);
        let Some(kind) = self.held.as_ref().map(|held| held.kind).filter(|_| held) else {
            return false;
        };
        if kind.is_of_all() {
            if self.registrations.is_empty() {
                self.held = None;
            }
            return false;
        }
        self.held = None;
        kind.includes_registrants()
    }

    /// For a [`ReservationStore`].
    pub(super) fn encode(&self) -> Vec<u8> {
        if !self.kept || self.registrations.is_empty() {
            return Vec::new();
        }
        let mut bytes = MAGIC.to_vec();
        let held = self.held.as_ref();
        bytes.push(held.map_or(0, |held| held.kind as u8));
        let holder = held.and_then(|held| {
            self.registrations
                .iter()
                .position(|other| other.port == held.port)
        });
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX).to_be_bytes();
        bytes.extend(count(holder.unwrap_or(0)));
        bytes.extend(count(self.registrations.len()));
        for Registration { port, key } in &self.registrations {
            bytes.extend(key.to_be_bytes());
            bytes.extend(port.target.map_or(ALL_PORTS, u32::from).to_be_bytes());
            let id = port.initiator.as_bytes();
            bytes.extend(count(id.len()));
            bytes.extend(id);
        }
        bytes.extend(crc_fast::crc32_iscsi(&bytes).to_be_bytes());
        bytes
    }

    /// The reverse of [`Self::encode`].
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        if bytes.is_empty() {
            return Some(Self::default());
        }
        let (content, sum) = bytes.split_last_chunk::<4>()?;
        if crc_fast::crc32_iscsi(content) != u32::from_be_bytes(*sum) {
            return None;
        }
        let content = content.strip_prefix(MAGIC)?;
        let kind = *content.first()?;
        let holder = usize::try_from(number::u32(content, 1)).ok()?;
        let count = usize::try_from(number::u32(content, 5)).ok()?;
        let mut rest = content.get(9..)?;
        let mut registrations = Vec::new();
        for _ in 0..count {
            let length = usize::try_from(number::u32(rest, 12)).ok()?;
            let id = rest.get(16..16_usize.checked_add(length)?)?;
            let target = match number::u32(rest, 8) {
                ALL_PORTS => None,
                target => Some(u16::try_from(target).ok()?),
            };
            registrations.push(Registration {
                port: Port {
                    initiator: TransportId::parse(id).filter(|parsed| parsed.as_bytes() == id)?,
                    target,
                },
                key: number::u64(rest, 0),
            });
            rest = rest.get(16 + length..)?;
        }
        let held = match kind {
            0 => None,
            kind => Some(Held {
                kind: Kind::of(kind)?,
                port: registrations.get(holder)?.port.clone(),
            }),
        };
        Some(Self {
            registrations,
            held,
            kept: true,
            ..Self::default()
        })
    }
}

/// Begins what is kept.
const MAGIC: &[u8] = b"smsvmm PR 1\n";
const ALL_PORTS: u32 = u32::MAX;

impl State {
    /// Tells the nexuses of `port` of `code`, but for `but`.
    pub(super) fn attend_port(&mut self, port: &Port, code: Code, but: Option<u64>) {
        for (number, nexus) in &mut self.nexuses {
            if Some(*number) != but && port.covers(&nexus.initiator, nexus.target_port) {
                nexus.attend(code);
            }
        }
    }

    /// Tells all registrants of `code`, but for `but`.
    pub(super) fn attend_registrants(&mut self, code: Code, but: Option<u64>) {
        let ports: Vec<Port> = self
            .reservations
            .registrations
            .iter()
            .map(|registration| registration.port.clone())
            .collect();
        ports.iter().for_each(|port| self.attend_port(port, code, but));
    }
}
