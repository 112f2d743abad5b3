//! Task management: what ends, what is answered, who is told.

use crate::Served;
use crate::initiator::{Initiator, Login, READ, WRITE, put, rw16, tag_of};

const ABORT_TASK: u8 = 1;
const ABORT_TASK_SET: u8 = 2;
const CLEAR_ACA: u8 = 3;
const CLEAR_TASK_SET: u8 = 4;
const UNIT_RESET: u8 = 5;
const WARM_RESET: u8 = 6;
const COLD_RESET: u8 = 7;
const REASSIGN: u8 = 8;

fn second() -> Login {
    Login {
        isid: [0x80, 0, 0, 0, 0, 2],
        ..Login::default()
    }
}

/// Begins a write of block 0, which the disk holds.
fn held_write(served: &Served, initiator: &mut Initiator, lun: u8, count: usize) -> [u8; 48] {
    let request = initiator.command(lun, &rw16(WRITE, 0, 1), 0xa1, 512);
    initiator.send(request, &[1; 512]);
    served.script.wait_for(count);
    request
}

#[test]
fn a_task_that_is_aborted_has_no_answer_and_the_function_waits_for_the_disk() {
    let served = Served::start();
    let mut initiator = served.login(&Login::default());
    served.script.hold(true);
    let request = held_write(&served, &mut initiator, 0, 1);
    let number = u32::from_be_bytes(request[24..28].try_into().unwrap());
    let function = initiator.send_manage(ABORT_TASK, 0, tag_of(&request), number);
    // It is not answered before the disk is done; a ping is.
    assert_eq!(initiator.ping(b"x").opcode(), 0x20);
    served.script.hold(false);
    let answer = initiator.receive().unwrap();
    assert_eq!(
        (answer.opcode(), answer.tag(), answer.head[2]),
        (0x22, function, 0)
    );
    // It is over: the next one is answered, and nothing else.
    assert_eq!(initiator.read(0, &[0; 6], 0).status, 0);
    assert_eq!(initiator.manage(ABORT_TASK, 0, tag_of(&request), number), 1);
}

#[test]
fn a_command_that_waits_for_data_ends_at_once() {
    let served = Served::start();
    let mut initiator = served.login(&Login::default());
    let request = initiator.command(0, &rw16(WRITE, 0, 8), 0xa1, 4096);
    initiator.send(request, &[]);
    let asked = initiator.receive().unwrap();
    let number = initiator.command_number - 1;
    assert_eq!(initiator.manage(ABORT_TASK, 0, tag_of(&request), number), 0);
    initiator.data_out(tag_of(&request), asked.u32(20), 0, 0, &[1; 4096], true);
    assert_eq!(initiator.read(0, &rw16(READ, 0, 1), 512).data, [0; 512]);
}

#[test]
fn a_task_that_has_not_come_yet_is_not_done_when_it_comes() {
    let served = Served::start();
    let mut initiator = served.login(&Login::default());
    let number = initiator.command_number;
    let mut late = initiator.command(0, &rw16(WRITE, 0, 1), 0xa1, 512);
    put(&mut late, 24, number);
    assert_eq!(initiator.manage(ABORT_TASK, 0, tag_of(&late), number), 0);
    initiator.send(late, &[1; 512]);
    assert_eq!(initiator.read(0, &rw16(READ, 0, 1), 512).data, [0; 512]);
}

#[test]
fn functions_concern_the_tasks_that_they_should() {
    for (function, ends_second, ends_other_unit) in [
        (ABORT_TASK_SET, false, false),
        (CLEAR_TASK_SET, true, false),
        (UNIT_RESET, true, false),
        (WARM_RESET, true, true),
    ] {
        let served = Served::start();
        let mut one = served.login(&Login::default());
        let mut two = served.login(&second());
        two.settle(1);
        served.script.hold(true);
        held_write(&served, &mut one, 0, 1);
        let others = held_write(&served, &mut two, 0, 2);
        let elsewhere = held_write(&served, &mut two, 1, 3);
        let tag = one.send_manage(function, 0, u32::MAX, 0);
        assert_eq!(one.ping(b"x").opcode(), 0x20);
        served.script.hold(false);
        let answer = one.receive().unwrap();
        assert_eq!(
            (answer.opcode(), answer.tag(), answer.head[2]),
            (0x22, tag, 0),
            "{function}"
        );
        let mut answered = Vec::new();
        while answered.len() < usize::from(!ends_second) + usize::from(!ends_other_unit) {
            answered.push(two.receive().unwrap().tag());
        }
        assert_eq!(answered.contains(&tag_of(&others)), !ends_second, "{function}");
        assert_eq!(
            answered.contains(&tag_of(&elsewhere)),
            !ends_other_unit,
            "{function}"
        );
        // Resets are told of.
        let told = two.read(0, &[0; 6], 0).sense;
        let expected = match function {
            UNIT_RESET => Some((6, 0x29, 3)),
            WARM_RESET => Some((6, 0x29, 2)),
            _ => None,
        };
        assert_eq!(told, expected, "{function}");
    }
}

#[test]
fn what_is_not_there_is_said_so_and_a_cold_reset_ends_all_sessions() {
    let served = Served::start();
    let mut one = served.login(&Login::default());
    let mut two = served.login(&second());
    for (function, lun, expected) in [
        (UNIT_RESET, 9, 2),
        (CLEAR_ACA, 0, 5),
        (REASSIGN, 0, 4),
        (99, 0, 5),
    ] {
        assert_eq!(one.manage(function, lun, u32::MAX, 0), expected, "{function}");
    }
    assert_eq!(one.manage(COLD_RESET, 0, u32::MAX, 0), 0);
    assert!(one.is_gone() && two.is_gone());
    let mut again = Initiator::login(served.address(), &Login::default());
    assert_eq!(again.read(0, &[0; 6], 0).sense.map(|sense| sense.0), Some(6));
}
