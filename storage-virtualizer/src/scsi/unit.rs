//! A logical unit: everything of it but the disk.
//!
//! A unit is shared by all queues and sessions that show it, on whatever threads. What ordinary reads and writes have to know
//! of all this is one word, [`Unit::word`]: if none of the bits that concern a nexus is set, there is no reservation, no unit
//! attention, no mode that forbids anything, and the command goes straight to the disk. Everything else is behind a lock, and
//! the word is made anew from it at the end of each change.
//!
//! ```text
//!   bits 0 … 47   nexus number n modulo 48: there may be something to tell this nexus
//!   bits 48 …     modes: stopped, write through, write protected, reserved, ranges claimed, not accessible
//! ```

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Poll, Waker};
use std::time::Instant;

use super::copy::Ended;
use super::flight::{Flight, Ranges};
use super::logs::SelfTest;
use super::mode::Parameters;
use super::nexus::{Nexus, TransportId};
use super::reservations::{ReservationStore, Reservations, RestoreError};
use super::sense::Code;
use super::vendor::VendorCommands;

/// Nexuses that have a bit of their own; more of them share bits.
pub(super) const SLOTS: u64 = 48;

/// Bits of the word that are not those of nexuses.
pub(super) mod mode_bit {
    /// The unit was stopped, or its medium is not there.
    pub(crate) const STOPPED: u64 = 1 << 48;
    /// There is no write cache for the initiators: each write is durable.
    pub(crate) const WRITE_THROUGH: u64 = 1 << 49;
    /// Writes are refused.
    pub(crate) const WRITE_PROTECTED: u64 = 1 << 50;
    /// Somebody holds a reservation.
    pub(crate) const RESERVED: u64 = 1 << 51;
    /// Ranges are claimed by commands that read and write as one step: writes look at them.
    pub(crate) const CLAIMED: u64 = 1 << 52;
    /// Some ports do not give access to the disk.
    pub(crate) const PORTS: u64 = 1 << 53;
    /// All of them.
    pub(crate) const ALL: u64 = 0xffff << 48;
}

/// Names of a unit, which stay the same for the life of its disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Product (INQUIRY), printable ASCII, at most 16 bytes are shown.
    pub product: String,
    /// Unit serial number (VPD 80h), printable ASCII, at most 64 bytes are shown.
    pub serial: String,
    /// The disk's identifier: NAA and UUID designators (VPD 83h) come from it.
    pub uuid: [u8; 16],
}

impl Identity {
    /// The identity of a disk that is known by a stable name and has no identifier: one is made of the name.
    pub fn from_name(name: &str, serial: &str) -> Self {
        let sum = |prefix: &[u8]| {
            let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc64Nvme);
            digest.update(prefix);
            digest.update(name.as_bytes());
            digest.finalize().to_be_bytes()
        };
        let mut uuid = [0; 16];
        uuid[..8].copy_from_slice(&sum(b"smsvmm unit, high "));
        uuid[8..].copy_from_slice(&sum(b"smsvmm unit, low "));
        // A UUID of a form of our own (RFC 9562 §5.8).
        uuid[6] = uuid[6] & 0x0f | 0x80;
        uuid[8] = uuid[8] & 0x3f | 0x80;
        Self {
            product: "DISK".to_owned(),
            serial: serial.to_owned(),
            uuid,
        }
    }

    /// A locally assigned NAA identifier (NAA 3h, SPC-4 §7.8.6.6.4): there is no IEEE company identifier for this project.
    pub fn naa(&self) -> [u8; 8] {
        let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc64Nvme);
        digest.update(&self.uuid);
        let mut naa = digest.finalize().to_be_bytes();
        naa[0] = naa[0] & 0x0f | 0x30;
        naa
    }
}

/// What becomes of unmapped blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Provisioning {
    /// Blocks cannot be unmapped.
    Full,
    /// Unmapped blocks read as anything (LBPRZ 0): UNMAP is a discard.
    Thin,
    /// Unmapped blocks read as zeroes (LBPRZ 1): UNMAP writes zeroes that may give space back. For disks that do this fast.
    ThinZeroes,
}

/// How a group of ports gives access to a unit (SPC-4 §5.15.2.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum PortState {
    /// Fully.
    Optimized = 0x0,
    /// Fully, but another group is the better way.
    NonOptimized = 0x1,
    /// Not to the disk; about the unit can be asked.
    Standby = 0x2,
    /// Hardly at all.
    Unavailable = 0x3,
    /// A change of state is going on.
    Transitioning = 0xf,
}

/// A target port group (SPC-4 §5.15).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortGroup {
    /// Its number.
    pub id: u16,
    /// Access through it.
    pub state: PortState,
    /// Whether initiators should prefer it.
    pub preferred: bool,
    /// Relative port identifiers of its ports.
    pub ports: Vec<u16>,
}

/// What a unit is like.
#[derive(Debug, Clone)]
pub struct UnitOptions {
    /// Its names.
    pub identity: Identity,
    /// Whether initiators may take the medium out.
    pub removable: bool,
    /// Whether writes are refused even if the disk takes some.
    pub read_only: bool,
    /// What becomes of unmapped blocks.
    pub provisioning: Provisioning,
    /// Bytes that one command may move at most (VPD B0h); 0: the transport sets no limit.
    pub max_transfer: u64,
    /// Groups of target ports at first ([`Unit::set_port_groups`]); none: the unit says nothing of ALUA.
    pub port_groups: Vec<PortGroup>,
    /// Task management functions that the transport has, as the first two bytes of REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS
    /// (SPC-4 §6.36.2).
    pub task_management: [u8; 2],
    /// Keeps persistent reservations over a loss of power; without it initiators are told that this cannot be.
    pub store: Option<Arc<dyn ReservationStore>>,
    /// Does vendor-specific commands; without it they do not exist.
    pub vendor: Option<Arc<dyn VendorCommands>>,
}

impl UnitOptions {
    /// A fixed disk that takes writes, with these names.
    pub fn new(identity: Identity) -> Self {
        Self {
            identity,
            removable: false,
            read_only: false,
            provisioning: Provisioning::Full,
            max_transfer: 0,
            port_groups: Vec::new(),
            // ABORT TASK, ABORT TASK SET, CLEAR TASK SET, LOGICAL UNIT RESET; I_T NEXUS RESET.
            task_management: [0xd8, 0x01],
            store: None,
            vendor: None,
        }
    }
}

/// What a nexus has of a unit.
#[derive(Debug)]
pub(super) struct NexusState {
    pub(super) initiator: TransportId,
    pub(super) target_port: u16,
    /// What it is to be told, oldest first.
    pub(super) attentions: VecDeque<Code>,
    /// It forbade to take the medium out.
    pub(super) prevents_removal: bool,
}

/// Everything that changes.
#[derive(Debug)]
pub(super) struct State {
    /// By the nexus' number.
    pub(super) nexuses: BTreeMap<u64, NexusState>,
    /// Slots of which no nexus has come yet.
    fresh: u64,
    pub(super) ranges: Ranges,
    pub(super) mode: Parameters,
    pub(super) reservations: Reservations,
    /// A PERSISTENT RESERVE OUT is being done; others wait.
    reserving: bool,
    reserve_waiting: Vec<Waker>,
    pub(super) self_tests: VecDeque<SelfTest>,
    pub(super) copies: VecDeque<Ended>,
    /// Starts after a stop.
    pub(super) cycles: u32,
    /// Power on.
    pub(super) since: Instant,
    pub(super) groups: Vec<PortGroup>,
    pub(super) loaded: bool,
    pub(super) started: bool,
}

impl State {
    /// Has all nexuses told of `code`, but for one.
    pub(super) fn attend(&mut self, code: Code, but: Option<u64>) {
        for (number, nexus) in &mut self.nexuses {
            if Some(*number) != but {
                nexus.attend(code);
            }
        }
    }

    /// What is known of `nexus`. One that is new is told that power came on.
    pub(super) fn nexus(&mut self, nexus: &Nexus) -> &mut NexusState {
        self.fresh &= !nexus.mask();
        self.nexuses.entry(nexus.number()).or_insert_with(|| NexusState {
            initiator: nexus.initiator().clone(),
            target_port: nexus.target_port(),
            attentions: VecDeque::from([Code::POWER_ON_OCCURRED]),
            prevents_removal: false,
        })
    }

    fn word(&self, options: &UnitOptions) -> u64 {
        let bit = |set: bool, bit: u64| if set { bit } else { 0 };
        let mut word = self.fresh;
        for (number, nexus) in &self.nexuses {
            word |= bit(!nexus.attentions.is_empty(), 1 << (number % SLOTS));
        }
        word | bit(!self.started || !self.loaded, mode_bit::STOPPED)
            | bit(
                options.read_only || self.mode.write_protected(),
                mode_bit::WRITE_PROTECTED,
            )
            | bit(!self.mode.write_cache(), mode_bit::WRITE_THROUGH)
            | bit(self.reservations.is_reserved(), mode_bit::RESERVED)
            | bit(self.ranges.is_claimed(), mode_bit::CLAIMED)
            | bit(
                self.groups
                    .iter()
                    .any(|group| !matches!(group.state, PortState::Optimized | PortState::NonOptimized)),
                mode_bit::PORTS,
            )
    }
}

impl NexusState {
    pub(super) fn attend(&mut self, code: Code) {
        if !self.attentions.contains(&code) {
            self.attentions.push_back(code);
        }
    }
}

/// A logical unit without its disk.
pub struct Unit {
    options: UnitOptions,
    word: AtomicU64,
    descriptor_sense: AtomicBool,
    pub(super) flight: Flight,
    pub(super) counters: Counters,
    state: Mutex<State>,
}

/// What is counted beside reads and writes that succeed.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) read_errors: AtomicU64,
    pub(super) write_errors: AtomicU64,
    pub(super) verify_errors: AtomicU64,
    /// Bytes.
    pub(super) verified: AtomicU64,
    /// SYNCHRONIZE CACHE.
    pub(super) synchronizations: AtomicU64,
}

/// It is the turn of one PERSISTENT RESERVE OUT until this is dropped.
#[derive(Debug)]
pub(super) struct ReservationTurn<'a>(&'a Unit);

impl Drop for ReservationTurn<'_> {
    fn drop(&mut self) {
        let waiting = self.0.with(|state| {
            state.reserving = false;
            std::mem::take(&mut state.reserve_waiting)
        });
        waiting.into_iter().for_each(Waker::wake);
    }
}

impl fmt::Debug for Unit {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Unit")
            .field("options", &self.options)
            .field("word", &self.word)
            .finish_non_exhaustive()
    }
}

impl Unit {
    /// A unit as after power on.
    pub fn new(options: UnitOptions) -> Self {
        let state = State {
            nexuses: BTreeMap::new(),
            fresh: (1 << SLOTS) - 1,
            ranges: Ranges::default(),
            mode: Parameters::default(),
            reservations: Reservations::default(),
            reserving: false,
            reserve_waiting: Vec::new(),
            self_tests: VecDeque::new(),
            copies: VecDeque::new(),
            cycles: 0,
            since: Instant::now(),
            groups: options.port_groups.clone(),
            loaded: true,
            started: true,
        };
        Self {
            word: AtomicU64::new(state.word(&options)),
            options,
            descriptor_sense: AtomicBool::new(false),
            flight: Flight::default(),
            counters: Counters::default(),
            state: Mutex::new(state),
        }
    }

    /// What it was made with.
    pub fn options(&self) -> &UnitOptions {
        &self.options
    }

    /// How often an initiator has had the cache written, since the unit was made. A driver does so before it lets go of a disk.
    pub fn synchronizations(&self) -> u64 {
        self.counters.synchronizations.load(Ordering::Relaxed)
    }

    /// What is special now: see the module.
    pub(super) fn word(&self) -> u64 {
        // With the counters of `Flight` this makes the order that they need; on x86-64 it costs what any load costs.
        self.word.load(Ordering::SeqCst)
    }

    /// Whether sense data are in descriptor format.
    pub(super) fn descriptor_sense(&self) -> bool {
        self.descriptor_sense.load(Ordering::Relaxed)
    }

    /// Looks at the state, or changes it.
    pub(super) fn with<R>(&self, change: impl FnOnce(&mut State) -> R) -> R {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let result = change(&mut state);
        let word = state.word(&self.options);
        if word != self.word.load(Ordering::Relaxed) {
            self.word.store(word, Ordering::SeqCst);
        }
        self.descriptor_sense
            .store(state.mode.descriptor_sense(), Ordering::Relaxed);
        result
    }

    /// `nexus` has come: it is told that power came on. Who does not say so is noticed at its first command, if no other
    /// nexus shares its bit; [`super::Target`] says so.
    pub fn attach(&self, nexus: &Nexus) {
        self.with(|state| {
            state.nexus(nexus);
        });
    }

    /// `nexus` has gone: what it reserved without registration is free (SAM-5 §6.3.4, I_T nexus loss).
    pub fn detach(&self, nexus: &Nexus) {
        self.with(|state| {
            state.nexuses.remove(&nexus.number());
            let legacy = &mut state.reservations.legacy;
            legacy.take_if(|holder| *holder == nexus.number());
        });
    }

    /// Takes over what a [`ReservationStore`] had kept, before initiators come.
    ///
    /// # Errors
    /// It is damaged; nothing has changed.
    pub fn restore_reservations(&self, kept: &[u8]) -> Result<(), RestoreError> {
        let reservations = Reservations::decode(kept).ok_or(RestoreError::Damaged)?;
        self.with(|state| state.reservations = reservations);
        Ok(())
    }

    /// Waits until no PERSISTENT RESERVE OUT is being done.
    pub(super) async fn reservation_turn(&self) -> ReservationTurn<'_> {
        std::future::poll_fn(|context| {
            self.with(|state| {
                if !std::mem::replace(&mut state.reserving, true) {
                    return Poll::Ready(());
                }
                state.reserve_waiting.push(context.waker().clone());
                Poll::Pending
            })
        })
        .await;
        ReservationTurn(self)
    }

    /// The disk's size has changed: all initiators are told.
    pub fn capacity_changed(&self) {
        self.with(|state| state.attend(Code::CAPACITY_CHANGED, None));
    }

    /// Changes the groups of target ports, or their states: all initiators are told.
    pub fn set_port_groups(&self, groups: Vec<PortGroup>) {
        self.with(|state| {
            if state.groups != groups {
                state.groups = groups;
                state.attend(Code::ASYMMETRIC_ACCESS_CHANGED, None);
            }
        });
    }

    /// LOGICAL UNIT RESET, or a reset of the target (SAM-5 §6.3.3): the transport has ended the unit's commands before.
    pub fn reset(&self, kind: Reset) {
        let code = match kind {
            Reset::LogicalUnit => Code::LOGICAL_UNIT_RESET,
            Reset::Target => Code::TARGET_RESET,
        };
        self.with(|state| {
            for nexus in state.nexuses.values_mut() {
                // It covers what was to be told before (SAM-5 §5.14.2).
                nexus.attentions.clear();
                nexus.prevents_removal = false;
            }
            state.reservations.legacy = None;
            // Mode pages are as at power on; persistent reservations stay (SAM-5 §6.3.3, SPC-4 §5.13.2).
            state.mode = Parameters::default();
            state.attend(code, None);
        });
    }

    /// I_T NEXUS RESET (SAM-5 §7.7): the transport has ended the nexus' commands before.
    pub fn reset_nexus(&self, nexus: &Nexus) {
        self.with(|state| {
            let legacy = &mut state.reservations.legacy;
            legacy.take_if(|holder| *holder == nexus.number());
            let nexus = state.nexus(nexus);
            nexus.prevents_removal = false;
            // That power came on says more (SAM-5 §5.14.2).
            if !nexus.attentions.contains(&Code::POWER_ON_OCCURRED) {
                nexus.attend(Code::NEXUS_LOSS);
            }
        });
    }
}

/// What is reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reset {
    /// The unit alone (LOGICAL UNIT RESET).
    LogicalUnit,
    /// All units of the target (TARGET RESET, or the transport's hard reset).
    Target,
}
