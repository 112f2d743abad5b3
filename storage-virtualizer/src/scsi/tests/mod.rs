//! Every command as an initiator sends it, on a disk in memory: what is answered, and the place of each wrong field.

#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "tests")]

mod blocks;
mod control;
mod copy;
mod identity;
mod model;
mod modes;
mod reserve;

use std::future::Future;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker};

use block_io::{AlignedBuffer, Geometry, IoBuf};

use super::*;
use crate::memory_disk::MemoryDisk;

/// Blocks of the usual disk.
const BLOCKS: u64 = 256;

/// A unit with its disk and an initiator.
struct Bench {
    disk: MemoryDisk,
    unit: Unit,
    nexus: Nexus,
}

/// What an initiator sees of a command.
#[derive(Debug, Clone)]
struct Answer {
    outcome: Outcome,
    /// What was moved to it.
    data: Vec<u8>,
}

/// A field: byte, and highest bit if it is not whole bytes.
type Place = (u16, Option<u8>);

fn run<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("this disk answers at once"),
    }
}

/// Polls once.
fn poll<T>(future: &mut Pin<&mut impl Future<Output = T>>) -> Option<T> {
    match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => Some(value),
        Poll::Pending => None,
    }
}

/// Data of a command, in pieces of odd lengths.
struct Data(AlignedBuffer);

impl Data {
    fn of(bytes: &[u8]) -> Self {
        let mut buffer = AlignedBuffer::new(bytes.len());
        buffer.as_mut_slice().copy_from_slice(bytes);
        Self(buffer)
    }

    fn pieces(&self) -> Vec<IoBuf> {
        let length = self.0.as_slice().len();
        let cut = length / 3;
        // SAFETY: the buffer outlives the command that is given the pieces, and is not touched meanwhile.
        let pieces = unsafe { [self.0.io(0, cut), self.0.io(cut, length - cut)] };
        pieces.into_iter().filter(|piece| !piece.is_empty()).collect()
    }
}

fn options() -> UnitOptions {
    UnitOptions {
        provisioning: Provisioning::ThinZeroes,
        ..UnitOptions::new(Identity::from_name("pool/disk", "serial-1"))
    }
}

impl Bench {
    fn new() -> Self {
        Self::with(options())
    }

    fn with(options: UnitOptions) -> Self {
        Self::on(MemoryDisk::new(BLOCKS * 512, 512), options)
    }

    fn on(disk: MemoryDisk, options: UnitOptions) -> Self {
        let bench = Self {
            disk,
            unit: Unit::new(options),
            nexus: nexus(1),
        };
        let first = bench.command(&[0; 6]);
        first.assert_sense(Key::UnitAttention, Code::POWER_ON_OCCURRED);
        bench
    }

    fn read_only() -> Self {
        let disk = MemoryDisk::with_geometry(Geometry {
            read_only: true,
            ..block_io::BlockDevice::geometry(&MemoryDisk::new(BLOCKS * 512, 512))
        });
        Self::on(disk, options())
    }

    /// A command without data.
    fn command(&self, cdb: &[u8]) -> Answer {
        self.by(&self.nexus, cdb, &[], 0)
    }

    /// A command that answers with data, for which there is plenty of room.
    fn ask(&self, cdb: &[u8]) -> Answer {
        self.by(&self.nexus, cdb, &[], 1 << 17)
    }

    /// A command with data.
    fn tell(&self, cdb: &[u8], data: &[u8]) -> Answer {
        self.by(&self.nexus, cdb, data, 0)
    }

    fn by(&self, nexus: &Nexus, cdb: &[u8], data: &[u8], room: usize) -> Answer {
        let (out, into) = (Data::of(data), Data::of(&vec![0xee; room]));
        let command = Command {
            cdb,
            data_out: &out.pieces(),
            data_in: &into.pieces(),
        };
        let outcome = run(execute(&self.disk, &self.unit, nexus, &command));
        assert_eq!(
            outcome.status == Status::CheckCondition,
            !outcome.sense.is_empty()
        );
        let moved = usize::try_from(outcome.moved).unwrap();
        let data = if room > 0 {
            let all = into.0.as_slice();
            assert!(
                all[moved..].iter().all(|byte| *byte == 0xee),
                "more was written than is told"
            );
            all[..moved].to_vec()
        } else {
            Vec::new()
        };
        Answer { outcome, data }
    }

    fn content(&self, lba: u64, count: u64) -> Vec<u8> {
        let range = usize::try_from(lba * 512).unwrap()..usize::try_from((lba + count) * 512).unwrap();
        self.disk.content()[range].to_vec()
    }

    /// Each of these commands, with this data, names this wrong field of the CDB.
    fn refuses(&self, what: &[(&[u8], Place)]) {
        for (cdb, place) in what {
            let answer = self.by(&self.nexus, cdb, &[0; 4096], 0);
            answer.assert_field(true, *place);
        }
    }
}

impl Answer {
    fn assert_good(&self) -> &Self {
        assert_eq!(self.outcome.status, Status::Good, "{:02x?}", self.outcome.sense);
        self
    }

    /// Key, code, and the field if one is named, from the bytes in fixed format.
    fn sense(&self) -> (u8, Code, Option<(bool, Place)>) {
        let bytes = self.outcome.sense.as_slice();
        assert_eq!(bytes.len(), 18, "{:?}", self.outcome);
        let specific = bytes[15];
        let field = (specific & 0x80 != 0).then(|| {
            let bit = (specific & 0x08 != 0).then_some(specific & 7);
            (
                specific & 0x40 != 0,
                (u16::from_be_bytes([bytes[16], bytes[17]]), bit),
            )
        });
        (bytes[2] & 0x0f, Code(bytes[12], bytes[13]), field)
    }

    fn information(&self) -> Option<u32> {
        let bytes = self.outcome.sense.as_slice();
        (bytes[0] & 0x80 != 0).then(|| u32::from_be_bytes(bytes[3..7].try_into().unwrap()))
    }

    #[track_caller]
    fn assert_sense(&self, key: Key, code: Code) {
        let (found, found_code, _) = self.sense();
        assert_eq!((found, found_code), (key as u8, code));
        assert_eq!((self.outcome.wanted, self.outcome.moved), (0, 0));
    }

    #[track_caller]
    fn assert_field(&self, in_cdb: bool, place: Place) {
        let code = if in_cdb {
            Code::INVALID_FIELD_IN_CDB
        } else {
            Code::INVALID_FIELD_IN_PARAMETER_LIST
        };
        let found = self.sense();
        assert_eq!(found, (Key::IllegalRequest as u8, code, Some((in_cdb, place))));
    }

    #[track_caller]
    fn assert_conflict(&self) {
        assert_eq!(self.outcome.status, Status::ReservationConflict);
    }
}

fn nexus(number: u64) -> Nexus {
    Nexus::new(TransportId::sas(number), 1)
}

/// A CDB of ten bytes: opcode, byte 1, block, count.
fn ten(opcode: u8, flags: u8, lba: u32, count: u16) -> [u8; 10] {
    let mut cdb = [0; 10];
    (cdb[0], cdb[1]) = (opcode, flags);
    cdb[2..6].copy_from_slice(&lba.to_be_bytes());
    cdb[7..9].copy_from_slice(&count.to_be_bytes());
    cdb
}

/// A CDB of twelve bytes.
fn twelve(opcode: u8, flags: u8, lba: u32, count: u32) -> [u8; 12] {
    let mut cdb = [0; 12];
    (cdb[0], cdb[1]) = (opcode, flags);
    cdb[2..6].copy_from_slice(&lba.to_be_bytes());
    cdb[6..10].copy_from_slice(&count.to_be_bytes());
    cdb
}

/// A CDB of sixteen bytes.
fn sixteen(opcode: u8, flags: u8, lba: u64, count: u32) -> [u8; 16] {
    let mut cdb = [0; 16];
    (cdb[0], cdb[1]) = (opcode, flags);
    cdb[2..10].copy_from_slice(&lba.to_be_bytes());
    cdb[10..14].copy_from_slice(&count.to_be_bytes());
    cdb
}

/// Bytes that differ from block to block.
fn pattern(seed: u8, blocks: usize) -> Vec<u8> {
    (0..blocks * 512)
        .map(|at| seed.wrapping_add(u8::try_from((at / 512 * 7 + at % 251) % 256).unwrap()))
        .collect()
}
