//! Units that come and go, and sessions that must, while the target runs.

use std::rc::Rc;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use storage_virtualizer::iscsi::{IscsiManageError, IscsiServerError, IscsiUnit};
use storage_virtualizer::scsi::{Identity, TargetError, Unit, UnitOptions};

use crate::disk::Disk;
use crate::initiator::{Login, WRITE, rw16, tag_of};
use crate::{BLOCKS, Served};

const TEST_UNIT_READY: [u8; 6] = [0; 6];

fn add(served: &Served, target: usize, lun: u16) -> Result<(), IscsiServerError> {
    let script = Arc::clone(&served.script);
    served.control.add(move || {
        let identity = Identity::from_name(&format!("added {lun}"), "serial");
        Ok(IscsiUnit {
            target,
            lun,
            unit: Arc::new(Unit::new(UnitOptions::new(identity))),
            disk: Rc::new(Disk::new(BLOCKS * 512, &script)),
        })
    })
}

#[test]
fn a_removal_waits_for_what_the_disk_has_which_is_answered() {
    let served = Served::start();
    let mut initiator = served.login(&Login::default());
    initiator.settle(1);
    served.script.hold(true);
    let request = initiator.command(1, &rw16(WRITE, 0, 1), 0xa1, 512);
    initiator.send(request, &[1; 512]);
    served.script.wait_for(1);
    let control = served.control.clone();
    let removal = thread::spawn(move || control.remove(0, 1));
    thread::sleep(Duration::from_millis(100));
    assert!(!removal.is_finished());
    // It is not found any more, and its place is free for another.
    assert_eq!(served.control.state().unwrap().0.len(), 1);
    served.script.hold(false);
    assert_eq!(initiator.end(tag_of(&request)).status, 0);
    removal.join().unwrap().unwrap();
    // What was told of the list is told on the other unit.
    assert_eq!(initiator.read(0, &TEST_UNIT_READY, 0).status, 2);
    assert_eq!(initiator.read(0, &TEST_UNIT_READY, 0).status, 0);
    assert_eq!(initiator.read(1, &TEST_UNIT_READY, 0).status, 2);
    let gone = served.control.remove(0, 1);
    assert!(matches!(gone, Err(IscsiManageError::NoUnit { lun: 1 })));
}

#[test]
fn a_command_that_waits_for_its_data_finds_no_unit_when_they_come() {
    let served = Served::start();
    let mut initiator = served.login(&Login::default());
    initiator.settle(1);
    let request = initiator.command(1, &rw16(WRITE, 0, 8), 0xa1, 4096);
    initiator.send(request, &[]);
    let asked = initiator.receive().unwrap();
    served.control.remove(0, 1).unwrap();
    initiator.data_out(tag_of(&request), asked.u32(20), 0, 0, &[1; 4096], true);
    assert_eq!(initiator.end(tag_of(&request)).status, 2);
}

#[test]
fn units_are_added_where_there_is_room_and_counted() {
    let mut served = Served::start();
    let mut initiator = served.login(&Login::default());
    add(&served, 0, 7).unwrap();
    let told = initiator.read(0, &TEST_UNIT_READY, 0).sense;
    assert_eq!(told, Some((6, 0x3f, 0x0e)), "REPORTED LUNS DATA HAS CHANGED");
    initiator.settle(7);
    let request = initiator.command(7, &rw16(WRITE, 0, 1), 0xa1, 512);
    initiator.send(request, &[1; 512]);
    assert_eq!(initiator.end(tag_of(&request)).status, 0);
    let (units, sessions) = served.control.state().unwrap();
    let own = units.iter().find(|unit| unit.lun == 7).unwrap();
    assert_eq!(
        (own.sessions, own.size, own.counters.counts.written_bytes),
        (1, BLOCKS * 512, 512)
    );
    assert_eq!(sessions[0].counters.counts.writes, 1);
    assert_eq!(sessions[0].peers.len(), 1);
    let taken = add(&served, 0, 7);
    assert!(matches!(
        taken,
        Err(IscsiServerError::Unit(TargetError::InUse { lun: 7 }))
    ));
    assert!(matches!(add(&served, 9, 0), Err(IscsiServerError::NoTarget)));
    drop(initiator);
    served.server.take().unwrap().stop();
    assert!(matches!(add(&served, 0, 8), Err(IscsiServerError::Stopping)));
}

#[test]
fn a_session_that_must_go_has_its_answers_and_others_stay() {
    let served = Served::start();
    let mut goes = served.login(&Login::default());
    let mut stays = served.login(&Login {
        isid: [0x80, 0, 0, 0, 0, 2],
        ..Login::default()
    });
    served.script.hold(true);
    let request = goes.command(0, &rw16(WRITE, 0, 1), 0xa1, 512);
    goes.send(request, &[1; 512]);
    served.script.wait_for(1);
    let first = served.control.state().unwrap().1[0].number;
    let control = served.control.clone();
    let leaving = thread::spawn(move || control.close(first));
    // It is asked to log out, does not, and is told that its connections go.
    let asked = goes.receive().unwrap();
    assert_eq!((asked.opcode(), asked.head[36]), (0x32, 1));
    let told = goes.receive().unwrap();
    assert_eq!((told.opcode(), told.head[36]), (0x32, 3));
    served.script.hold(false);
    assert_eq!(goes.end(tag_of(&request)).status, 0);
    assert!(goes.is_gone());
    leaving.join().unwrap().unwrap();
    assert_eq!(stays.read(0, &TEST_UNIT_READY, 0).status, 0);
    let gone = served.control.close(first);
    assert!(matches!(gone, Err(IscsiManageError::NoSession(number)) if number == first));
}
