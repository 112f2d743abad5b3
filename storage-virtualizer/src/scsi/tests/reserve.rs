//! Reservations of both kinds: what is answered, who is told, who may do what.

use std::sync::{Arc, Mutex};

use super::*;

/// A unit with three initiators.
struct Three {
    bench: Bench,
    other: Nexus,
    third: Nexus,
}

const KINDS: [u8; 6] = [1, 3, 5, 6, 7, 8];

/// The parameter list of PERSISTENT RESERVE OUT.
fn list(key: u64, action_key: u64, flags: u8) -> Vec<u8> {
    let mut list = key.to_be_bytes().to_vec();
    list.extend(action_key.to_be_bytes());
    list.extend([0, 0, 0, 0, flags, 0, 0, 0]);
    list
}

impl Three {
    fn new() -> Self {
        Self::with(options())
    }

    fn with(options: UnitOptions) -> Self {
        let three = Self {
            bench: Bench::with(options),
            other: nexus(2),
            third: nexus(3),
        };
        for nexus in [&three.other, &three.third] {
            three.bench.by(nexus, &[0; 6], &[], 0);
        }
        three
    }

    fn own(&self) -> &Nexus {
        &self.bench.nexus
    }

    fn out_list(&self, nexus: &Nexus, action: u8, kind: u8, list: &[u8]) -> Answer {
        let mut cdb = [0x5f, action, kind, 0, 0, 0, 0, 0, 0, 0];
        cdb[5..9].copy_from_slice(&u32::try_from(list.len()).unwrap().to_be_bytes());
        self.bench.by(nexus, &cdb, list, 0)
    }

    fn out(&self, nexus: &Nexus, action: u8, kind: u8, key: u64, action_key: u64) -> Answer {
        self.out_list(nexus, action, kind, &list(key, action_key, 0))
    }

    fn register(&self, nexus: &Nexus, key: u64) {
        self.out(nexus, 0, 0, 0, key).assert_good();
    }

    /// Both register, the first reserves.
    fn reserve(&self, kind: u8) {
        self.register(self.own(), 1);
        self.register(&self.other, 2);
        self.out(self.own(), 1, kind, 1, 0).assert_good();
    }

    fn report(&self, action: u8) -> Vec<u8> {
        let cdb = [0x5e, action, 0, 0, 0, 0, 0, 0x10, 0, 0];
        let data = self
            .bench
            .by(self.own(), &cdb, &[], 4096)
            .assert_good()
            .data
            .clone();
        assert_eq!(usize::try_from(number(&data[4..8])).unwrap(), data.len() - 8);
        data
    }

    fn keys(&self) -> Vec<u64> {
        self.report(0)[8..].chunks_exact(8).map(number).collect()
    }

    /// Key and type of the reservation.
    fn reservation(&self) -> Option<(u64, u8)> {
        let data = self.report(1);
        (data.len() > 8).then(|| (number(&data[8..16]), data[21]))
    }

    fn generation(&self) -> u64 {
        number(&self.report(0)[..4])
    }

    fn may_read(&self, nexus: &Nexus) -> bool {
        self.may(nexus, &ten(0x28, 0, 0, 1))
    }

    fn may_write(&self, nexus: &Nexus) -> bool {
        self.may(nexus, &ten(0x2a, 0, 0, 1))
    }

    fn may(&self, nexus: &Nexus, cdb: &[u8]) -> bool {
        let answer = self.bench.by(nexus, cdb, &[0; 512], 512);
        assert!(answer.outcome.status != Status::CheckCondition, "{answer:?}");
        answer.outcome.status == Status::Good
    }

    fn told(&self, nexus: &Nexus) -> Option<Code> {
        let answer = self.bench.by(nexus, &[0; 6], &[], 0);
        (answer.outcome.status == Status::CheckCondition).then(|| answer.sense().1)
    }
}

fn number(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0, |number, byte| number << 8 | u64::from(*byte))
}

#[test]
fn keys_are_registered_changed_and_taken_back() {
    let three = Three::new();
    three.out(three.own(), 0, 0, 5, 1).assert_conflict();
    three.register(three.own(), 1);
    assert_eq!((three.keys(), three.generation()), (vec![1], 1));
    three.out(three.own(), 0, 0, 9, 2).assert_conflict();
    three.out(three.own(), 0, 0, 1, 2).assert_good();
    three.out(three.own(), 6, 0, 99, 3).assert_good();
    three.out(&three.other, 6, 0, 99, 3).assert_good();
    assert_eq!((three.keys(), three.generation()), (vec![3, 3], 4));
    three.out(three.own(), 0, 0, 3, 0).assert_good();
    three.out(&three.other, 6, 0, 0, 0).assert_good();
    assert_eq!((three.keys(), three.generation()), (vec![], 6));
    // Nothing is registered with the key 0.
    three.out(three.own(), 0, 0, 0, 0).assert_good();
    assert_eq!((three.keys(), three.generation()), (vec![], 6));
}

#[test]
fn each_type_lets_those_in_that_it_should() {
    for kind in KINDS {
        let three = Three::new();
        three.reserve(kind);
        let reads_for_all = matches!(kind, 1 | 5 | 7);
        let registrants = kind >= 5;
        assert!(three.may_read(three.own()) && three.may_write(three.own()));
        assert_eq!(
            three.may_read(&three.other),
            registrants || reads_for_all,
            "{kind}"
        );
        assert_eq!(three.may_write(&three.other), registrants, "{kind}");
        assert_eq!(three.may_read(&three.third), reads_for_all, "{kind}");
        assert!(!three.may_write(&three.third), "{kind}");
        assert_eq!(three.reservation(), Some((if kind >= 7 { 0 } else { 1 }, kind)));
        // Commands of all classes, by somebody who is not registered.
        let changing: [&[u8]; 10] = [
            &ten(0x2e, 0, 0, 1),
            &ten(0x35, 0, 0, 0),
            &ten(0x41, 0, 0, 1),
            &sixteen(0x89, 0, 0, 0),
            &sixteen(0x8b, 0, 0, 0),
            &[0x42, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            &[0x15, 0x10, 0, 0, 0, 0],
            &[0x1d, 4, 0, 0, 0, 0],
            &[0x1b, 0, 0, 0, 0, 0],
            &[0x83, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ];
        for cdb in changing {
            assert!(!three.may(&three.third, cdb), "{kind} {cdb:02x?}");
        }
        let reading: [&[u8]; 5] = [
            &ten(0x2f, 0, 0, 1),
            &ten(0x34, 0, 0, 1),
            &[0x1a, 0, 8, 0, 255, 0],
            &[0x37, 0, 0, 0, 0, 0, 0, 0, 4, 0],
            &[0x9e, 0x12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0],
        ];
        for cdb in reading {
            assert_eq!(three.may(&three.third, cdb), reads_for_all, "{kind} {cdb:02x?}");
        }
        let harmless: [&[u8]; 9] = [
            &[0; 6],
            &[0x03, 0, 0, 0, 18, 0],
            &[0x12, 0, 0, 0, 36, 0],
            &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            &[0x4d, 0, 0x40, 0, 0, 0, 0, 0, 64, 0],
            &[0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0],
            &[0xa3, 0x0c, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0],
            &[0x5e, 0, 0, 0, 0, 0, 0, 0, 64, 0],
            &[0x1b, 0, 0, 0, 1, 0],
        ];
        for cdb in harmless {
            assert!(three.may(&three.third, cdb), "{kind} {cdb:02x?}");
        }
    }
}

#[test]
fn a_reservation_is_made_and_released_by_registrants() {
    let three = Three::new();
    three.out(three.own(), 1, 1, 0, 0).assert_conflict();
    three.reserve(1);
    let generation = three.generation();
    three.out(three.own(), 1, 1, 7, 0).assert_conflict();
    // Again the same is good; another type, or another one, is not.
    three.out(three.own(), 1, 1, 1, 0).assert_good();
    three.out(three.own(), 1, 3, 1, 0).assert_conflict();
    three.out(&three.other, 1, 1, 2, 0).assert_conflict();
    // Who does not hold it releases nothing.
    three.out(&three.other, 2, 1, 2, 0).assert_good();
    three.out(three.own(), 2, 3, 1, 0).assert_sense(
        Key::IllegalRequest,
        Code::INVALID_RELEASE_OF_PERSISTENT_RESERVATION,
    );
    assert_eq!(three.reservation(), Some((1, 1)));
    three.out(three.own(), 2, 1, 1, 0).assert_good();
    three.out(three.own(), 2, 1, 1, 0).assert_good();
    assert_eq!((three.reservation(), three.generation()), (None, generation));
    assert_eq!(three.told(&three.other), None);
    for kind in [5, 8] {
        three.out(three.own(), 1, kind, 1, 0).assert_good();
        three.out(three.own(), 2, kind, 1, 0).assert_good();
        assert_eq!(three.told(&three.other), Some(Code::RESERVATIONS_RELEASED));
        assert_eq!(three.told(three.own()), None);
        assert_eq!(three.told(&three.third), None);
    }
    // Of all registrants' reservation each is the holder.
    three.out(three.own(), 1, 7, 1, 0).assert_good();
    three.out(&three.other, 1, 7, 2, 0).assert_good();
    three.out(&three.other, 2, 7, 2, 0).assert_good();
    assert_eq!(three.told(three.own()), Some(Code::RESERVATIONS_RELEASED));
    assert_eq!(three.reservation(), None);
}

#[test]
fn who_unregisters_gives_up_what_it_holds() {
    for kind in KINDS {
        let three = Three::new();
        three.reserve(kind);
        three.out(three.own(), 0, 0, 1, 0).assert_good();
        if kind >= 7 {
            assert_eq!(three.reservation(), Some((0, kind)));
            three.out(&three.other, 0, 0, 2, 0).assert_good();
        } else {
            let told = (kind >= 5).then_some(Code::RESERVATIONS_RELEASED);
            assert_eq!(three.told(&three.other), told);
        }
        assert_eq!(three.reservation(), None);
    }
}

#[test]
fn clear_and_preempt_take_from_others_and_tell_them() {
    let three = Three::new();
    three.reserve(3);
    three.register(&three.third, 3);
    let generation = three.generation();
    three.out(&three.other, 3, 0, 9, 0).assert_conflict();
    three.out(&three.other, 3, 0, 2, 0).assert_good();
    for nexus in [three.own(), &three.third] {
        assert_eq!(three.told(nexus), Some(Code::RESERVATIONS_PREEMPTED));
    }
    assert_eq!((three.keys(), three.reservation()), (vec![], None));
    assert_eq!(three.generation(), generation + 1);
    assert_eq!(three.told(&three.other), None);

    for action in [4, 5] {
        let three = Three::new();
        three.reserve(1);
        three.register(&three.third, 3);
        // A registration that holds nothing.
        three.out(&three.other, action, 1, 2, 77).assert_conflict();
        three
            .out(&three.other, action, 1, 2, 0)
            .assert_field(false, (8, None));
        three.out(&three.other, action, 1, 2, 3).assert_good();
        assert_eq!(three.told(&three.third), Some(Code::REGISTRATIONS_PREEMPTED));
        assert_eq!((three.keys(), three.reservation()), (vec![1, 2], Some((1, 1))));
        // The holder, with another type.
        three.register(&three.third, 3);
        three.out(&three.other, action, 6, 2, 1).assert_good();
        assert_eq!(three.told(three.own()), Some(Code::REGISTRATIONS_PREEMPTED));
        assert_eq!((three.keys(), three.reservation()), (vec![2, 3], Some((2, 6))));
        assert_eq!(three.told(&three.third), Some(Code::RESERVATIONS_RELEASED));
        assert!(!three.may_write(three.own()));
        // Oneself: another type.
        three.out(&three.other, action, 1, 2, 2).assert_good();
        assert_eq!((three.keys(), three.reservation()), (vec![2, 3], Some((2, 1))));
    }

    // A reservation of all: the key 0 means all others.
    let three = Three::new();
    three.reserve(8);
    three.register(&three.third, 3);
    three.out(&three.other, 4, 8, 2, 3).assert_good();
    assert_eq!((three.keys(), three.reservation()), (vec![1, 2], Some((0, 8))));
    three.out(&three.other, 4, 3, 2, 0).assert_good();
    assert_eq!(three.told(three.own()), Some(Code::REGISTRATIONS_PREEMPTED));
    assert_eq!((three.keys(), three.reservation()), (vec![2], Some((2, 3))));
}

#[test]
fn preempt_and_abort_waits_for_writes_under_way() {
    let three = Three::new();
    three.reserve(1);
    let data = Data::of(&[1; 512]);
    let pieces = data.pieces();
    let write = ten(0x2a, 0, 0, 1);
    let command = Command {
        cdb: &write,
        data_out: &pieces,
        data_in: &[],
    };
    let parameters = Data::of(&list(2, 1, 0));
    let parameter_pieces = parameters.pieces();
    let preempt = Command {
        cdb: &[0x5f, 5, 1, 0, 0, 0, 0, 0, 24, 0],
        data_out: &parameter_pieces,
        data_in: &[],
    };
    let Bench { disk, unit, .. } = &three.bench;
    disk.hold(Some(block_io::Operation::Write));
    let mut writing = pin!(execute(disk, unit, three.own(), &command));
    assert!(poll(&mut writing).is_none());
    let mut preempting = pin!(execute(disk, unit, &three.other, &preempt));
    assert!(poll(&mut preempting).is_none());
    disk.hold(None);
    assert_eq!(poll(&mut writing).unwrap().status, Status::Good);
    assert_eq!(poll(&mut preempting).unwrap().status, Status::Good);
    assert_eq!(three.told(three.own()), Some(Code::REGISTRATIONS_PREEMPTED));
    assert!(!three.may_write(three.own()));
}

/// The list of REGISTER AND MOVE.
fn move_list(key: u64, new_key: u64, unregister: bool, port: u16, to: &TransportId) -> Vec<u8> {
    let mut list = list(key, new_key, 0);
    list[17] = if unregister { 2 } else { 0 };
    list[18..20].copy_from_slice(&port.to_be_bytes());
    list[20..24].copy_from_slice(&u32::try_from(to.as_bytes().len()).unwrap().to_be_bytes());
    list.extend(to.as_bytes());
    list
}

#[test]
fn a_reservation_moves_with_its_registration() {
    let three = Three::new();
    let to = three.third.initiator().clone();
    let go = |nexus, list: &[u8]| three.out_list(nexus, 7, 0, list);
    three.register(three.own(), 1);
    go(three.own(), &move_list(1, 9, false, 1, &to)).assert_conflict();
    three.reserve_again(5);
    go(&three.other, &move_list(2, 9, false, 1, &to)).assert_conflict();
    go(three.own(), &move_list(4, 9, false, 1, &to)).assert_conflict();
    go(three.own(), &move_list(1, 0, false, 1, &to)).assert_field(false, (8, None));
    go(three.own(), &move_list(1, 9, false, 0, &to)).assert_field(false, (18, None));
    let own = three.own().initiator().clone();
    go(three.own(), &move_list(1, 9, false, 1, &own)).assert_field(false, (24, None));
    let short = move_list(1, 9, false, 1, &to);
    go(three.own(), &short[..47]).assert_sense(Key::IllegalRequest, Code::PARAMETER_LIST_LENGTH_ERROR);
    let mut unknown = short.clone();
    unknown[24] = 0x0f;
    go(three.own(), &unknown).assert_field(false, (24, None));
    go(three.own(), &move_list(1, 9, false, 1, &to)).assert_good();
    assert_eq!((three.keys(), three.reservation()), (vec![1, 2, 9], Some((9, 5))));
    go(&three.third, &move_list(9, 1, true, 1, &own)).assert_good();
    assert_eq!((three.keys(), three.reservation()), (vec![1, 2], Some((1, 5))));
    assert!(!three.may_write(&three.third));
}

impl Three {
    /// As `reserve`, where the first is registered.
    fn reserve_again(&self, kind: u8) {
        self.register(&self.other, 2);
        self.out(self.own(), 1, kind, 1, 0).assert_good();
    }
}

#[test]
fn others_and_all_ports_are_registered_at_once() {
    let three = Three::new();
    let ids = [
        three.other.initiator().as_bytes(),
        three.third.initiator().as_bytes(),
    ]
    .concat();
    let spec = |flags: u8, ids: &[u8]| {
        let mut list = list(0, 5, 0x08 | flags);
        list.extend(u32::try_from(ids.len()).unwrap().to_be_bytes());
        list.extend(ids);
        list
    };
    // Flawed lists register nobody.
    let mut bad = ids.clone();
    bad[24] = 0x0e;
    three
        .out_list(three.own(), 0, 0, &spec(0, &bad))
        .assert_field(false, (28 + 24, None));
    three
        .out_list(three.own(), 0, 0, &spec(0, &ids)[..30])
        .assert_sense(Key::IllegalRequest, Code::PARAMETER_LIST_LENGTH_ERROR);
    three
        .out_list(three.own(), 6, 0, &spec(0, &ids))
        .assert_field(false, (20, Some(3)));
    assert_eq!((three.keys(), three.generation()), (vec![], 0));
    three.out_list(three.own(), 0, 0, &spec(4, &ids)).assert_good();
    assert_eq!((three.keys(), three.generation()), (vec![5, 5, 5], 1));
    // On whatever port they come.
    let elsewhere = Nexus::new(three.third.initiator().clone(), 4);
    three.bench.by(&elsewhere, &[0; 6], &[], 0);
    three.out(&elsewhere, 1, 5, 5, 0).assert_good();
    let status = three.report(3);
    assert_eq!(status.len(), 8 + 3 * (24 + 24));
    let last = &status[8 + 2 * 48..];
    assert_eq!(number(&last[..8]), 5);
    assert_eq!(last[12..14], [3, 5]);
    assert_eq!(number(&last[20..24]), 24);
    assert_eq!(last[24..], *three.third.initiator().as_bytes());
    assert_eq!(status[8 + 12..8 + 14], [2, 0]);
    // Of those that are registered it cannot be said again.
    three
        .out_list(three.own(), 0, 0, &spec(0, &ids))
        .assert_conflict();
    let mut again = spec(0, &ids);
    again[7] = 5;
    three
        .out_list(three.own(), 0, 0, &again)
        .assert_field(false, (20, Some(3)));
}

#[test]
fn flaws_of_commands_on_reservations_are_named() {
    let three = Three::new();
    three.register(three.own(), 1);
    three
        .out(three.own(), 1, 0x11, 1, 0)
        .assert_field(true, (2, Some(7)));
    for kind in [0, 2, 4, 9] {
        three
            .out(three.own(), 1, kind, 1, 0)
            .assert_field(true, (2, Some(3)));
    }
    three
        .out_list(three.own(), 1, 1, &list(1, 0, 0)[..23])
        .assert_sense(Key::IllegalRequest, Code::PARAMETER_LIST_LENGTH_ERROR);
    three
        .out_list(three.own(), 1, 1, &[&list(1, 0, 0)[..], &[0]].concat())
        .assert_sense(Key::IllegalRequest, Code::PARAMETER_LIST_LENGTH_ERROR);
    three
        .out_list(three.own(), 1, 1, &list(1, 0, 8))
        .assert_field(false, (20, Some(3)));
    // There is no store.
    three
        .out_list(three.own(), 0, 0, &list(1, 2, 1))
        .assert_field(false, (20, Some(0)));
    three.bench.refuses(&[
        (&[0x5f, 8, 0, 0, 0, 0, 0, 0, 24, 0], (1, Some(4))),
        (&[0x5e, 4, 0, 0, 0, 0, 0, 0, 24, 0], (1, Some(4))),
    ]);
    let capabilities = three.bench.ask(&[0x5e, 2, 0, 0, 0, 0, 0, 0, 24, 0]);
    assert_eq!(capabilities.assert_good().data, [0, 8, 0x0c, 0x90, 0xea, 1, 0, 0]);
    assert_eq!((three.keys(), three.reservation()), (vec![1], None));
}

#[test]
fn old_reservations_keep_all_others_out_and_end_with_their_nexus() {
    let three = Three::new();
    let (reserve, release) = ([0x16, 0, 0, 0, 0, 0], [0x17, 0, 0, 0, 0, 0]);
    let by = |nexus, cdb: &[u8]| three.bench.by(nexus, cdb, &[0; 512], 512);
    by(three.own(), &reserve).assert_good();
    by(three.own(), &reserve).assert_good();
    by(&three.other, &reserve).assert_conflict();
    assert!(three.may_write(three.own()));
    for cdb in [
        &[0; 6][..],
        &ten(0x28, 0, 0, 1),
        &[0x1a, 0, 8, 0, 255, 0],
        &[0x5e, 0, 0, 0, 0, 0, 0, 0, 64, 0],
    ] {
        by(&three.other, cdb).assert_conflict();
    }
    for cdb in [
        &[0x12, 0, 0, 0, 36, 0][..],
        &[3, 0, 0, 0, 18, 0],
        &[0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0],
        &release,
    ] {
        by(&three.other, cdb).assert_good();
    }
    // Both kinds do not go together.
    three.out(three.own(), 0, 0, 0, 1).assert_conflict();
    by(&three.other, &[0; 6]).assert_conflict();
    by(three.own(), &release).assert_good();
    by(&three.other, &[0; 6]).assert_good();
    // It ends with a reset of the nexus, of the unit, and with the nexus.
    let ends: [&dyn Fn(); 3] = [
        &|| three.bench.unit.reset_nexus(three.own()),
        &|| three.bench.unit.reset(Reset::LogicalUnit),
        &|| three.bench.unit.detach(three.own()),
    ];
    for end in ends {
        by(three.own(), &reserve).assert_good();
        end();
        three.told(three.own());
        three.told(&three.other);
        three.told(&three.other);
        assert!(three.may_write(&three.other));
    }
    three.told(three.own());
    three.register(three.own(), 1);
    by(&three.other, &reserve).assert_conflict();
    by(&three.other, &release).assert_conflict();
}

#[test]
fn persistent_reservations_outlive_resets_and_nexuses() {
    let three = Three::new();
    three.reserve(3);
    three.bench.unit.reset(Reset::Target);
    three.bench.unit.detach(three.own());
    let again = nexus(1);
    for nexus in [&again, &three.other] {
        three.told(nexus);
    }
    assert!(three.may_write(&again));
    assert!(!three.may_write(&three.other));
}

/// Keeps in memory, or fails.
#[derive(Debug, Default)]
struct Store {
    kept: Mutex<Vec<u8>>,
    saves: Mutex<u32>,
    fails: Mutex<bool>,
}

impl ReservationStore for Store {
    fn save<'a>(&'a self, state: &'a [u8]) -> Pin<Box<dyn Future<Output = Result<(), StoreError>> + 'a>> {
        Box::pin(async move {
            if *self.fails.lock().unwrap() {
                return Err("no space".into());
            }
            *self.saves.lock().unwrap() += 1;
            *self.kept.lock().unwrap() = state.to_vec();
            Ok(())
        })
    }
}

#[test]
fn reservations_are_kept_over_a_loss_of_power_if_asked() {
    let store = Arc::new(Store::default());
    let with_store = || UnitOptions {
        store: Some(store.clone()),
        ..options()
    };
    let three = Three::with(with_store());
    three.reserve(6);
    assert_eq!(*store.saves.lock().unwrap(), 0, "nobody asked");
    three.out_list(three.own(), 0, 0, &list(1, 1, 1)).assert_good();
    let capabilities = three.bench.ask(&[0x5e, 2, 0, 0, 0, 0, 0, 0, 24, 0]);
    assert_eq!(capabilities.assert_good().data[2..4], [0x0d, 0x91]);
    let kept = store.kept.lock().unwrap().clone();

    let later = Three::with(with_store());
    later.bench.unit.restore_reservations(&kept).unwrap();
    assert_eq!(
        (later.keys(), later.reservation(), later.generation()),
        (vec![1, 2], Some((1, 6)), 0)
    );
    assert!(later.may_write(&later.other) && !later.may_read(&later.third));
    // What is damaged is not taken.
    for at in 0..kept.len() {
        let mut damaged = kept.clone();
        damaged[at] ^= 0x10;
        assert_eq!(
            later.bench.unit.restore_reservations(&damaged),
            Err(RestoreError::Damaged)
        );
    }
    // What cannot be kept does not happen.
    *store.fails.lock().unwrap() = true;
    let answer = later.out(&later.other, 4, 6, 2, 1);
    answer.assert_sense(Key::HardwareError, Code::INTERNAL_TARGET_FAILURE);
    assert_eq!((later.keys(), later.reservation()), (vec![1, 2], Some((1, 6))));
    assert_eq!(later.told(later.own()), None);
    *store.fails.lock().unwrap() = false;
    // No longer, if the last who registers does not want it.
    later.out(&later.third, 0, 0, 0, 3).assert_good();
    assert!(store.kept.lock().unwrap().is_empty());
    later.bench.unit.restore_reservations(&[]).unwrap();
    assert!(later.keys().is_empty());
}
