//! What a guest does with a SCSI disk beside reading and writing: takes unit attentions away, and asks by the expanded API.
#![allow(dead_code, reason = "not every test needs everything")]

use api::Problem;
use expanded_api::{Action, Answer as Answered, Cdb, GuestEvents, Header, Outcome, Request, State};

use crate::driver::scsi::{Answer, DATA, GOOD, Initiator, TEST_UNIT_READY, lun};
use crate::driver::{readable, writable};

/// Bytes of an answer that fit.
const ROOM: u32 = 16 << 10;

/// Takes unit attentions of LUN `number` away.
pub(crate) fn settle(driver: &mut Initiator, number: u16) {
    while driver.command(lun(0, number), &TEST_UNIT_READY, None) != Answer::good() {}
}

/// A command that gives bytes; units that come and go leave unit attentions, after which it is sent again.
fn input(driver: &mut Initiator, number: u16, cdb: &Cdb) -> Result<Vec<u8>, Answer> {
    loop {
        let room = Some(writable(DATA, ROOM as usize));
        let answer = driver.command(lun(0, number), &cdb.encode(), room);
        match answer.sense {
            Some((6, ..)) => {}
            None if answer.status == GOOD => {
                let mut bytes = vec![0; ROOM as usize - answer.residual as usize];
                driver.get(DATA, &mut bytes);
                return Ok(bytes);
            }
            _ => return Err(answer),
        }
    }
}

/// Sends a request by LUN `number`, and waits for its outcome.
pub(crate) fn ask(
    driver: &mut Initiator,
    number: u16,
    tag: u32,
    request: &Request,
) -> Result<Answered, Problem> {
    let text = serde_json::to_vec(request).unwrap();
    let send = Cdb::send(tag, u32::try_from(text.len()).unwrap(), 0, true).encode();
    let sent = loop {
        driver.put(DATA, &text);
        let sent = driver.command(lun(0, number), &send, Some(readable(DATA, text.len())));
        if sent.sense.is_none_or(|sense| sense.0 != 6) {
            break sent;
        }
    };
    let receive = Cdb {
        wait_ms: 4000,
        ..Cdb::new(Action::Receive, tag, ROOM)
    };
    loop {
        let bytes = input(driver, number, &receive).unwrap();
        let header = Header::decode(&bytes).unwrap();
        if matches!(header.state, State::Done | State::Failed) {
            return match serde_json::from_slice(&bytes[Header::LENGTH..]).unwrap() {
                Outcome::Answer(answer) => {
                    assert_eq!(sent, Answer::good());
                    Ok(*answer)
                }
                Outcome::Problem(problem) => Err(problem),
            };
        }
    }
}

/// The events that the guest can see: names and objects.
pub(crate) fn events(driver: &mut Initiator, number: u16) -> Vec<(String, Option<String>)> {
    let bytes = input(driver, number, &Cdb::new(Action::Events, 0, ROOM)).unwrap();
    let page: GuestEvents = serde_json::from_slice(&bytes[Header::LENGTH..]).unwrap();
    let events = page.events.into_iter();
    events.map(|event| (event.event, event.object)).collect()
}
