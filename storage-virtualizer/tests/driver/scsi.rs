//! The guest's side of a virtio-scsi adapter with one request queue.

use std::sync::Arc;

use virtio_core::GuestMemory;
use virtio_core::vm_memory::{Bytes, GuestAddress};

use super::{Descriptor, Driver, readable, writable};

/// Every chain has its place here: request, response, data.
pub const REQUEST: u64 = 0x10_0000;
pub const RESPONSE: u64 = 0x20_0000;
pub const DATA: u64 = 0x30_0000;
/// Bytes of a place.
pub const PLACE: u64 = 0x1_0000;
pub const COMMAND: usize = 51;
pub const ANSWER: usize = 108;

pub const GOOD: u8 = 0;
pub const CHECK_CONDITION: u8 = 2;
pub const OK: u8 = 0;
pub const OVERRUN: u8 = 1;
pub const ABORTED: u8 = 2;
pub const BAD_TARGET: u8 = 3;
pub const FUNCTION_SUCCEEDED: u8 = 10;
pub const FUNCTION_REJECTED: u8 = 11;
pub const INCORRECT_LUN: u8 = 12;

pub const INQUIRY: [u8; 6] = [0x12, 0, 0, 0, 96, 0];
pub const REPORT_LUNS: [u8; 12] = [0xa0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0];
pub const TEST_UNIT_READY: [u8; 6] = [0; 6];

pub fn lun(target: u8, number: u16) -> [u8; 8] {
    let [high, low] = number.to_be_bytes();
    [1, target, high | 0x40, low, 0, 0, 0, 0]
}

/// As [`lun`], in an event: as REPORT LUNS has it.
pub fn told(target: u8, number: u16) -> [u8; 8] {
    let mut address = lun(target, number);
    if number < 256 {
        address[2] = 0;
    }
    address
}

pub fn read(lba: u32, blocks: u8) -> [u8; 10] {
    let [a, b, c, d] = lba.to_be_bytes();
    [0x28, 0, a, b, c, d, 0, 0, blocks, 0]
}

pub fn write(lba: u32, blocks: u8) -> [u8; 10] {
    let mut cdb = read(lba, blocks);
    cdb[0] = 0x2a;
    cdb
}

/// What a driver reads of a response.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    pub response: u8,
    pub status: u8,
    pub residual: u32,
    /// Sense key, additional sense code and its qualifier, of sense data in fixed format.
    pub sense: Option<(u8, u8, u8)>,
}

impl Answer {
    pub const fn good() -> Self {
        Self::refused(OK)
    }

    pub const fn refused(response: u8) -> Self {
        Self {
            response,
            status: GOOD,
            residual: 0,
            sense: None,
        }
    }
}

/// The driver's queues, and what it does with them.
pub struct Initiator {
    pub control: Driver,
    pub event: Driver,
    pub requests: Driver,
    memory: GuestMemory,
    next_tag: u64,
}

impl Initiator {
    /// The driver's side in memory of 16 MiB at least.
    pub fn new(memory: &GuestMemory) -> Self {
        let [control, event, requests] =
            [0x1000, 0x4000, 0x8000].map(|base| Driver::new(memory, base, 64, true));
        Self {
            control,
            event,
            requests,
            memory: Arc::clone(memory),
            next_tag: 1,
        }
    }

    /// Begins anew, as after a reset.
    pub fn forget(&mut self) {
        let tag = self.next_tag;
        *self = Self::new(&self.memory.clone());
        self.next_tag = tag;
    }

    /// Puts a command into the queue; returns its tag. `place` is also its first descriptor.
    pub fn begin(&mut self, place: u16, lun: [u8; 8], cdb: &[u8], data: Option<Descriptor>) -> u64 {
        let tag = self.next_tag;
        self.next_tag += 1;
        let mut request = [0; COMMAND];
        request[..8].copy_from_slice(&lun);
        request[8..16].copy_from_slice(&tag.to_le_bytes());
        request[19..19 + cdb.len()].copy_from_slice(cdb);
        let at = u64::from(place) * PLACE;
        self.put(REQUEST + at, &request);
        self.put(RESPONSE + at, &[0xee; ANSWER]);
        let mut chain = vec![readable(REQUEST + at, COMMAND), writable(RESPONSE + at, ANSWER)];
        if let Some(data) = data {
            let place = if data.flags == 0 { 1 } else { 2 };
            chain.insert(place, data);
        }
        self.requests.submit(place, &chain);
        tag
    }

    /// Waits for the answer to any command.
    pub fn end(&mut self) -> (u16, Answer) {
        let (place, length) = self.requests.wait_used();
        assert!(length >= ANSWER as u32);
        let mut bytes = [0; ANSWER];
        self.get(RESPONSE + u64::from(place) * PLACE, &mut bytes);
        let number = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let sense = (number(0) >= 14).then(|| (bytes[12 + 2] & 15, bytes[12 + 12], bytes[12 + 13]));
        let answer = Answer {
            response: bytes[11],
            status: bytes[10],
            residual: number(4),
            sense,
        };
        (place, answer)
    }

    pub fn command(&mut self, lun: [u8; 8], cdb: &[u8], data: Option<Descriptor>) -> Answer {
        self.begin(0, lun, cdb, data);
        self.end().1
    }

    /// As a driver does with a new unit: takes the unit attention away.
    pub fn greet(&mut self, lun: [u8; 8]) {
        let answer = self.command(lun, &TEST_UNIT_READY, None);
        assert_eq!(answer.sense.unwrap().0, 6, "{answer:?}");
        assert_eq!(self.command(lun, &TEST_UNIT_READY, None), Answer::good());
    }

    pub fn begin_function(&mut self, function: u32, lun: [u8; 8], tag: u64) {
        let mut request = [0; 24];
        request[4..8].copy_from_slice(&function.to_le_bytes());
        request[8..16].copy_from_slice(&lun);
        request[16..].copy_from_slice(&tag.to_le_bytes());
        let at = 60 * PLACE;
        self.put(REQUEST + at, &request);
        let chain = [readable(REQUEST + at, 24), writable(RESPONSE + at, 1)];
        self.control.submit(0, &chain);
    }

    pub fn function(&mut self, function: u32, lun: [u8; 8], tag: u64) -> u8 {
        self.begin_function(function, lun, tag);
        self.end_of_function()
    }

    pub fn end_of_function(&mut self) -> u8 {
        self.control.wait_used();
        let mut response = [0];
        self.get(RESPONSE + 60 * PLACE, &mut response);
        response[0]
    }

    /// Gives the device a buffer for an event.
    pub fn offer_event(&mut self, place: u16) {
        let at = RESPONSE + (61 + u64::from(place)) * PLACE;
        self.event.submit(place, &[writable(at, 16)]);
    }

    pub fn event(&mut self) -> (u32, [u8; 8], u32) {
        let (place, length) = self.event.wait_used();
        assert_eq!(length, 16);
        let mut bytes = [0; 16];
        self.get(RESPONSE + (61 + u64::from(place)) * PLACE, &mut bytes);
        let number = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        (number(0), bytes[4..12].try_into().unwrap(), number(12))
    }

    pub fn put(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub fn get(&self, address: u64, bytes: &mut [u8]) {
        self.memory.read_slice(bytes, GuestAddress(address)).unwrap();
    }
}
