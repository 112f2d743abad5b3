//! PERSISTENT RESERVE IN and OUT (SPC-4 §6.15, §6.16), RESERVE(6) and RELEASE(6) (SPC-2 §7.21, §7.16).
//!
//! What a PERSISTENT RESERVE OUT makes of the reservations is computed on a copy ([`Change`]). The copy is kept in the store
//! if initiators want that, and only then becomes what is true.

use super::dispatch::Call;
use super::nexus::TransportId;
use super::reservations::{Held, Kind, MAX_REGISTRATIONS, Port, Registration, Reservations};
use super::sense::{Code, Key, Sense};
use super::transfer::{Moved, length32, number, put, take};
use super::unit::State;
use super::{Check, Fail, Nexus};

const REGISTER: u8 = 0;
const RESERVE: u8 = 1;
const RELEASE: u8 = 2;
const CLEAR: u8 = 3;
const PREEMPT: u8 = 4;
const PREEMPT_AND_ABORT: u8 = 5;
const REGISTER_AND_IGNORE: u8 = 6;
const REGISTER_AND_MOVE: u8 = 7;

/// RESERVE(6): not where there are persistent registrations, or somebody else's reservation.
pub(super) fn reserve<D>(call: &Call<'_, D>) -> Check<Moved> {
    call.unit.with(|state| {
        let number = call.nexus.number();
        let reservations = &mut state.reservations;
        let other = reservations.legacy.is_some_and(|holder| holder != number);
        if other || !reservations.registrations.is_empty() {
            return Err(Fail::Conflict);
        }
        reservations.legacy = Some(number);
        Ok(Moved::NOTHING)
    })
}

/// RELEASE(6): of what is not one's own it does nothing.
pub(super) fn release<D>(call: &Call<'_, D>) -> Check<Moved> {
    call.unit.with(|state| {
        let reservations = &mut state.reservations;
        if !reservations.registrations.is_empty() {
            return Err(Fail::Conflict);
        }
        reservations
            .legacy
            .take_if(|holder| *holder == call.nexus.number());
        Ok(Moved::NOTHING)
    })
}

/// PERSISTENT RESERVE IN.
pub(super) fn report<D>(call: &Call<'_, D>) -> Check<Moved> {
    let reservations = call.unit.with(|state| state.reservations.clone());
    if reservations.legacy.is_some() {
        return Err(Fail::Conflict);
    }
    let mut data = reservations.generation.to_be_bytes().to_vec();
    data.extend([0; 4]);
    match call.cdb[1] & 0x1f {
        0 => {
            for registration in &reservations.registrations {
                data.extend(registration.key.to_be_bytes());
            }
        }
        1 => {
            if let Some(held) = &reservations.held {
                let key = match reservations
                    .registrations
                    .iter()
                    .find(|one| one.port == held.port)
                {
                    Some(registration) if !held.kind.is_of_all() => registration.key,
                    _ => 0,
                };
                data.extend(key.to_be_bytes());
                data.extend([0, 0, 0, 0, 0, held.kind as u8, 0, 0]);
            }
        }
        2 => return capabilities(call),
        _ => {
            for registration in &reservations.registrations {
                full_status(&mut data, &reservations, registration);
            }
        }
    }
    let length = length32(data.len() - 8);
    data[4..8].copy_from_slice(&length);
    Ok(put(call.command, &data, number::u16(call.cdb, 7).into()))
}

fn capabilities<D>(call: &Call<'_, D>) -> Check<Moved> {
    let can_keep = u8::from(call.unit.options().store.is_some());
    let kept = u8::from(call.unit.with(|state| state.reservations.kept));
    // SIP_C, ATP_C, PTPL_C; TMV, ALLOW COMMANDS 1, PTPL_A; all types.
    let data = [0, 8, 0x0c | can_keep, 0x90 | kept, 0xea, 0x01, 0, 0];
    Ok(put(call.command, &data, number::u16(call.cdb, 7).into()))
}

fn full_status(data: &mut Vec<u8>, reservations: &Reservations, registration: &Registration) {
    let Registration { port, key } = registration;
    let held = reservations.held.as_ref().filter(|_| reservations.holds(port));
    data.extend(key.to_be_bytes());
    data.extend([0; 4]);
    let all_ports = if port.target.is_none() { 2 } else { 0 };
    data.extend([
        all_ports | u8::from(held.is_some()),
        held.map_or(0, |held| held.kind as u8),
    ]);
    data.extend([0; 4]);
    data.extend(port.target.unwrap_or(0).to_be_bytes());
    let id = port.initiator.as_bytes();
    data.extend(length32(id.len()));
    data.extend(id);
}

/// The parameter list of PERSISTENT RESERVE OUT.
#[derive(Debug, Default)]
struct Parameters {
    key: u64,
    action_key: u64,
    /// SPEC_I_PT: these are registered as well.
    others: Vec<TransportId>,
    all_ports: bool,
    keep: bool,
    /// REGISTER AND MOVE: where to.
    destination: Option<Port>,
    unregister: bool,
}

fn wrong(byte: u16, bit: Option<u8>) -> Fail {
    Sense::in_parameters(byte, bit).into()
}

fn length_error() -> Fail {
    Sense::illegal(Code::PARAMETER_LIST_LENGTH_ERROR).into()
}

/// The TransportID at byte `at`, and where it ends.
fn transport_id(list: &[u8], at: usize) -> Check<(TransportId, usize)> {
    let id = TransportId::parse(list.get(at..).unwrap_or_default());
    let id = id.ok_or_else(|| wrong(u16::try_from(at).unwrap_or(u16::MAX), None))?;
    let end = at + id.as_bytes().len();
    Ok((id, end))
}

fn parse<D>(call: &Call<'_, D>, action: u8) -> Check<Parameters> {
    let length = number::u32(call.cdb, 5);
    if length < 24 {
        return Err(length_error());
    }
    let list = take(call.command, length.into())?;
    let mut parameters = Parameters {
        key: number::u64(&list, 0),
        action_key: number::u64(&list, 8),
        ..Parameters::default()
    };
    let told = usize::try_from(number::u32(&list, 20)).unwrap_or(usize::MAX);
    if action == REGISTER_AND_MOVE {
        parameters.unregister = list[17] & 2 != 0;
        parameters.keep = list[17] & 1 != 0;
        if list.len() - 24 != told {
            return Err(length_error());
        }
        let (initiator, end) = transport_id(&list, 24)?;
        if end != list.len() {
            return Err(length_error());
        }
        let target = match number::u16(&list, 18) {
            0 => return Err(wrong(18, None)),
            target => Some(target),
        };
        parameters.destination = Some(Port { initiator, target });
        return check_keep(call, parameters, 17);
    }
    let registers = matches!(action, REGISTER | REGISTER_AND_IGNORE);
    let flags = list[20];
    if flags & 0x08 != 0 {
        if action != REGISTER {
            return Err(wrong(20, Some(3)));
        }
        let told = usize::try_from(number::u32(&list, 24)).unwrap_or(usize::MAX);
        if list.len() < 28 || list.len() - 28 != told {
            return Err(length_error());
        }
        let mut at = 28;
        while at < list.len() {
            let (id, end) = transport_id(&list, at)?;
            parameters.others.push(id);
            at = end;
        }
    } else if list.len() != 24 {
        return Err(length_error());
    }
    parameters.all_ports = registers && flags & 0x04 != 0;
    parameters.keep = registers && flags & 0x01 != 0;
    check_keep(call, parameters, 20)
}

/// APTPL needs a store.
fn check_keep<D>(call: &Call<'_, D>, parameters: Parameters, byte: u16) -> Check<Parameters> {
    if parameters.keep && call.unit.options().store.is_none() {
        return Err(wrong(byte, Some(0)));
    }
    Ok(parameters)
}

/// What a command makes of the reservations, and who is told.
struct Change<'a> {
    now: Reservations,
    nexus: &'a Nexus,
    told: Vec<(Whom, Code)>,
}

enum Whom {
    /// The nexuses of a port.
    Port(Port),
    /// All that are registered afterwards.
    Registrants,
}

/// PERSISTENT RESERVE OUT.
pub(super) async fn change<D>(call: &Call<'_, D>) -> Check<Moved> {
    let action = call.cdb[1] & 0x1f;
    let legacy = call.unit.with(|state| state.reservations.legacy.is_some());
    if legacy {
        return Err(Fail::Conflict);
    }
    let parameters = parse(call, action)?;
    // One at a time, as the store is written between look and change.
    let turn = call.unit.reservation_turn().await;
    let before = call.unit.with(|state| state.reservations.clone());
    let mut change = Change {
        now: before.clone(),
        nexus: call.nexus,
        told: Vec::new(),
    };
    change.perform(call.cdb, action, &parameters)?;
    let (old, new) = (before.encode(), change.now.encode());
    if let Some(store) = &call.unit.options().store
        && old != new
        && let Err(error) = store.save(&new).await
    {
        tracing::error!(
            unit = call.unit.options().identity.serial,
            error = block_io::error_chain(error.as_ref()),
            "reservations cannot be kept and stay as they were"
        );
        return Err(Sense::new(Key::HardwareError, Code::INTERNAL_TARGET_FAILURE).into());
    }
    call.unit.with(|state| change.commit(state));
    drop(turn);
    if action == PREEMPT_AND_ABORT {
        // Writes of those that were preempted are over when this is answered; new ones conflict.
        drop(call.unit.claim(0..u64::MAX).await);
    }
    Ok(Moved::all(number::u32(call.cdb, 5).into()))
}

impl Change<'_> {
    fn commit(self, state: &mut State) {
        // RESERVE(6) may have come in between; registrations end it no more than it ends them.
        let legacy = state.reservations.legacy;
        state.reservations = Reservations { legacy, ..self.now };
        let own = Some(self.nexus.number());
        for (whom, code) in self.told {
            match whom {
                Whom::Port(port) => state.attend_port(&port, code, own),
                Whom::Registrants => state.attend_registrants(code, own),
            }
        }
    }

    fn perform(&mut self, cdb: &[u8], action: u8, parameters: &Parameters) -> Check<()> {
        match action {
            REGISTER | REGISTER_AND_IGNORE => {
                return self.register(parameters, action == REGISTER_AND_IGNORE);
            }
            _ => {}
        }
        let own = self.now.own(self.nexus).cloned().ok_or(Fail::Conflict)?;
        if own.key != parameters.key {
            return Err(Fail::Conflict);
        }
        match action {
            RESERVE => self.reserve(&own, kind(cdb)?),
            RELEASE => self.release(&own, kind(cdb)?),
            CLEAR => {
                self.clear();
                Ok(())
            }
            PREEMPT | PREEMPT_AND_ABORT => self.preempt(&own, kind(cdb)?, parameters.action_key),
            _ => self.register_and_move(&own, parameters),
        }
    }

    fn register(&mut self, parameters: &Parameters, ignore: bool) -> Check<()> {
        let key = parameters.action_key;
        match self.now.own(self.nexus).cloned() {
            Some(own) => {
                if !ignore && own.key != parameters.key {
                    return Err(Fail::Conflict);
                }
                if !parameters.others.is_empty() {
                    // Only with a first registration (SPC-4 §6.16.3).
                    return Err(wrong(20, Some(3)));
                }
                if key == 0 {
                    self.unregister(&own.port);
                } else {
                    let port = own.port;
                    let mut list = self.now.registrations.iter_mut();
                    list.find(|one| one.port == port)
                        .into_iter()
                        .for_each(|one| one.key = key);
                }
            }
            None => {
                if !ignore && parameters.key != 0 {
                    return Err(Fail::Conflict);
                }
                if key == 0 {
                    return Ok(());
                }
                self.add(parameters)?;
            }
        }
        self.now.kept = parameters.keep;
        self.count();
        Ok(())
    }

    /// Registers the nexus and those that it named.
    fn add(&mut self, parameters: &Parameters) -> Check<()> {
        let port = Port::of(self.nexus);
        let target = if parameters.all_ports { None } else { port.target };
        for initiator in [&port.initiator].into_iter().chain(&parameters.others) {
            let port = Port {
                initiator: initiator.clone(),
                target,
            };
            if self.now.registrations.iter().any(|one| one.port == port) {
                return Err(Fail::Conflict);
            }
            if self.now.registrations.len() == MAX_REGISTRATIONS {
                return Err(Sense::illegal(Code::INSUFFICIENT_REGISTRATION_RESOURCES).into());
            }
            self.now.registrations.push(Registration {
                port,
                key: parameters.action_key,
            });
        }
        Ok(())
    }

    fn unregister(&mut self, port: &Port) {
        if self.now.unregister(port) {
            self.told.push((Whom::Registrants, Code::RESERVATIONS_RELEASED));
        }
    }

    fn reserve(&mut self, own: &Registration, kind: Kind) -> Check<()> {
        match &self.now.held {
            Some(held) if held.kind == kind && self.now.holds(&own.port) => Ok(()),
            Some(_) => Err(Fail::Conflict),
            None => {
                self.hold(own, kind);
                Ok(())
            }
        }
    }

    fn hold(&mut self, own: &Registration, kind: Kind) {
        self.now.held = Some(Held {
            kind,
            port: own.port.clone(),
        });
    }

    fn release(&mut self, own: &Registration, kind: Kind) -> Check<()> {
        let Some(held) = &self.now.held else { return Ok(()) };
        if !self.now.holds(&own.port) {
            return Ok(());
        }
        if held.kind != kind {
            return Err(Sense::illegal(Code::INVALID_RELEASE_OF_PERSISTENT_RESERVATION).into());
        }
        self.now.held = None;
        if kind.includes_registrants() {
            self.told.push((Whom::Registrants, Code::RESERVATIONS_RELEASED));
        }
        Ok(())
    }

    fn clear(&mut self) {
        for registration in std::mem::take(&mut self.now.registrations) {
            self.told
                .push((Whom::Port(registration.port), Code::RESERVATIONS_PREEMPTED));
        }
        self.now.held = None;
        self.count();
    }

    fn preempt(&mut self, own: &Registration, kind: Kind, key: u64) -> Check<()> {
        let held = self.now.held.clone();
        let holder_key = held.as_ref().and_then(|held| {
            let mut list = self.now.registrations.iter();
            list.find(|one| one.port == held.port).map(|one| one.key)
        });
        let takes_over = match &held {
            Some(held) if held.kind.is_of_all() => key == 0,
            Some(_) => holder_key == Some(key),
            None => false,
        };
        if key == 0 && !takes_over {
            return Err(wrong(8, None));
        }
        let of_all = takes_over && key == 0;
        let goes = |one: &Registration| one.port != own.port && (of_all || one.key == key);
        if !takes_over && !self.now.registrations.iter().any(|one| one.key == key) {
            return Err(Fail::Conflict);
        }
        let (gone, stay): (Vec<_>, Vec<_>) = self.now.registrations.drain(..).partition(goes);
        self.now.registrations = stay;
        for one in gone {
            self.told
                .push((Whom::Port(one.port), Code::REGISTRATIONS_PREEMPTED));
        }
        if takes_over {
            if held.is_some_and(|held| held.kind != kind) {
                // Those that stay, under another type.
                self.told.push((Whom::Registrants, Code::RESERVATIONS_RELEASED));
            }
            self.hold(own, kind);
        }
        self.count();
        Ok(())
    }

    fn register_and_move(&mut self, own: &Registration, parameters: &Parameters) -> Check<()> {
        let Some(held) = self.now.held.clone() else {
            return Err(Fail::Conflict);
        };
        if held.kind.is_of_all() || !self.now.holds(&own.port) {
            return Err(Fail::Conflict);
        }
        if parameters.action_key == 0 {
            return Err(wrong(8, None));
        }
        let Some(destination) = parameters.destination.clone() else {
            return Err(length_error());
        };
        if destination
            .target
            .is_some_and(|target| own.port.covers(&destination.initiator, target))
        {
            return Err(wrong(24, None));
        }
        let full = self.now.registrations.len() == MAX_REGISTRATIONS;
        let known = self.now.registrations.iter_mut().find(|one| {
            let target = destination.target.unwrap_or(0);
            one.port.covers(&destination.initiator, target)
        });
        let port = match known {
            Some(registration) => {
                registration.key = parameters.action_key;
                registration.port.clone()
            }
            None if full => {
                return Err(Sense::illegal(Code::INSUFFICIENT_REGISTRATION_RESOURCES).into());
            }
            None => {
                self.now.registrations.push(Registration {
                    port: destination.clone(),
                    key: parameters.action_key,
                });
                destination
            }
        };
        self.now.held = Some(Held {
            kind: held.kind,
            port,
        });
        if parameters.unregister {
            self.now.registrations.retain(|one| one.port != own.port);
        }
        self.now.kept = parameters.keep;
        self.count();
        Ok(())
    }

    fn count(&mut self) {
        self.now.generation = self.now.generation.wrapping_add(1);
    }
}

/// Scope and type in the CDB.
fn kind(cdb: &[u8]) -> Check<Kind> {
    if cdb[2] >> 4 != 0 {
        // Only whole units are reserved.
        return Err(Sense::in_cdb(2, Some(7)).into());
    }
    Kind::of(cdb[2] & 0x0f).ok_or_else(|| Sense::in_cdb(2, Some(3)).into())
}
