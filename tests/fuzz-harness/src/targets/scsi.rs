//! A SCSI disk: commands with decent and with hostile fields, from two initiators, against a model of its blocks.
//!
//! What commands there are, and which bits of them mean something, is what the unit tells (REPORT SUPPORTED OPERATION CODES). A bit that
//! means nothing is refused. What succeeds does what it says; what fails, and what only asks, changes no block.

use std::pin::pin;
use std::task::{Context, Poll, Waker};

use arbitrary::Unstructured;
use block_io::{AlignedBuffer, BlockDevice, Geometry};
use storage_virtualizer::scsi::{
    Command, Identity, Nexus, Outcome, PortGroup, PortState, Provisioning, Reset, Status, TransportId, Unit,
    UnitOptions, execute,
};

use crate::disk::MemoryDisk;

/// Longest data of a command.
/// INQUIRY (SPC-4 §6.6).
const INQUIRY: u8 = 0x12;
const MAX_DATA: usize = 16 << 10;
/// What the unit has not written in a buffer.
const UNTOUCHED: u8 = 0xa7;
/// Operation codes of commands that may change blocks.
const WRITES: [u8; 15] = [
    0x0a, 0x2a, 0x2e, 0x41, 0x42, 0x83, 0x89, 0x8a, 0x8b, 0x8e, 0x93, 0xaa, 0xae, 0x15, 0x55,
];

struct Machine {
    disk: MemoryDisk,
    unit: Unit,
    nexuses: [Nexus; 2],
    /// What the blocks hold.
    content: Vec<u8>,
    block: usize,
}

/// A command that the unit has.
struct Known {
    opcode: u8,
    action: Option<u8>,
}

pub(super) fn run(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let mut machine = machine(input)?;
    let known = machine.known();
    while !input.is_empty() {
        match input.int_in_range(0..=15_u8)? {
            0..=7 => machine.decent(input)?,
            8 => machine.event(input)?,
            9 => machine.reservation(input)?,
            10 => machine.modes(input)?,
            _ => {
                let known = input.choose(&known)?;
                machine.hostile(input, known)?;
            }
        }
        assert!(
            machine.disk.content() == machine.content,
            "a block holds what nobody wrote"
        );
    }
    Ok(())
}

fn machine(input: &mut Unstructured<'_>) -> arbitrary::Result<Machine> {
    let logical_block = *input.choose(&[512, 512, 512, 4096])?;
    let geometry = Geometry {
        size: u64::from(logical_block) * input.int_in_range(1..=24_u64)?,
        logical_block,
        physical_block: 4096,
        optimal_io: 0,
        discard_granularity: 4096,
        read_only: input.ratio(1, 16)?,
    };
    let port_groups = if input.ratio(1, 4)? {
        groups(input)?
    } else {
        Vec::new()
    };
    let options = UnitOptions {
        removable: input.arbitrary()?,
        read_only: input.ratio(1, 16)?,
        provisioning: *input.choose(&[Provisioning::ThinZeroes, Provisioning::Thin, Provisioning::Full])?,
        port_groups,
        ..UnitOptions::new(Identity::from_name("fuzz", "fuzz"))
    };
    let nexus = |number| Nexus::new(TransportId::sas(number), 1);
    Ok(Machine {
        disk: MemoryDisk::without_guest(geometry),
        unit: Unit::new(options),
        nexuses: [nexus(1), nexus(2)],
        content: vec![0; geometry.size as usize],
        block: logical_block as usize,
    })
}

fn groups(input: &mut Unstructured<'_>) -> arbitrary::Result<Vec<PortGroup>> {
    let states = [
        PortState::Optimized,
        PortState::NonOptimized,
        PortState::Optimized,
        PortState::Standby,
        PortState::Unavailable,
        PortState::Transitioning,
    ];
    Ok(vec![PortGroup {
        id: input.arbitrary()?,
        state: *input.choose(&states)?,
        preferred: input.arbitrary()?,
        ports: vec![1, 2],
    }])
}

/// The command's data, and what it wrote.
struct Answer {
    outcome: Outcome,
    data: Vec<u8>,
}

impl Answer {
    fn is_good(&self) -> bool {
        self.outcome.status == Status::Good
    }
}

impl Machine {
    /// Executes a command and checks what holds for all.
    fn execute(&self, nexus: usize, cdb: &[u8], out: &[u8], room: usize) -> Answer {
        let mut from = AlignedBuffer::new(out.len());
        from.as_mut_slice().copy_from_slice(out);
        let mut into = AlignedBuffer::new(room);
        into.as_mut_slice().fill(UNTOUCHED);
        let cut = (out.len() + room) / 3;
        // SAFETY: both buffers outlive the command, and nobody else touches them meanwhile.
        let (from, pieces) = unsafe {
            let two = |buffer: &AlignedBuffer| [buffer.io(0, cut), buffer.io(cut, usize::MAX)];
            (two(&from), two(&into))
        };
        let command = Command {
            cdb,
            data_out: &from,
            data_in: &pieces,
        };
        let future = pin!(execute(&self.disk, &self.unit, &self.nexuses[nexus], &command));
        let outcome = match future.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(outcome) => outcome,
            Poll::Pending => panic!("this disk answers at once: {cdb:02x?}"),
        };
        check_outcome(&outcome, cdb);
        assert!(outcome.moved <= outcome.wanted, "{cdb:02x?}");
        assert!(outcome.moved <= out.len().max(room) as u64, "{cdb:02x?}");
        let mut data = into.as_slice().to_vec();
        let written = if room > 0 { outcome.moved as usize } else { 0 };
        assert!(
            data[written.min(room)..].iter().all(|byte| *byte == UNTOUCHED),
            "more was written than is told: {cdb:02x?}"
        );
        data.truncate(written);
        Answer { outcome, data }
    }

    /// Asks until nothing else is to be told first.
    fn ask(&self, cdb: &[u8]) -> Vec<u8> {
        for _ in 0..16 {
            let answer = self.execute(0, cdb, &[], MAX_DATA);
            if answer.is_good() {
                return answer.data;
            }
        }
        Vec::new()
    }

    /// The commands that the unit tells of; only INQUIRY if its port tells nothing.
    fn known(&self) -> Vec<Known> {
        let all = self.ask(&[0xa3, 0x0c, 0, 0, 0, 0, 0, 0, 0x40, 0, 0, 0]);
        let entry = |entry: &[u8]| Known {
            opcode: entry[0],
            action: (entry[5] & 1 != 0).then_some(entry[3]),
        };
        let inquiry = Known {
            opcode: 0x12,
            action: None,
        };
        let told = all.get(4..).unwrap_or_default().chunks_exact(8);
        told.map(entry).chain([inquiry]).collect()
    }

    /// Which bits of a command mean something, as the unit tells; none if it tells nothing now.
    fn usage(&self, known: &Known) -> Option<Vec<u8>> {
        let option = if known.action.is_some() { 2 } else { 1 };
        let action = known.action.unwrap_or(0);
        let one = self.ask(&[0xa3, 0x0c, option, known.opcode, 0, action, 0, 0, 1, 0, 0, 0]);
        let (head, usage) = one.split_first_chunk::<4>()?;
        assert_eq!((head[1], usize::from(head[3])), (3, usage.len()));
        Some(usage.to_vec())
    }

    fn blocks(&self) -> u64 {
        (self.content.len() / self.block) as u64
    }

    fn nexus(&self, input: &mut Unstructured<'_>) -> arbitrary::Result<usize> {
        Ok(usize::from(input.ratio(1, 4)?))
    }

    /// A command on blocks as it should be. Where it succeeds, the model says with what.
    fn decent(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let nexus = self.nexus(input)?;
        let lba = input.int_in_range(0..=self.blocks())?;
        let count = input.int_in_range(0..=3_u8)?;
        let flags = if input.ratio(1, 4)? { 0x08 } else { 0 };
        let length = usize::from(count) * self.block;
        let start = lba as usize * self.block;
        let end = start + length;
        let inside = end <= self.content.len();
        let seed: u8 = input.arbitrary()?;
        let data: Vec<u8> = (0..2 * length)
            .map(|at| seed.wrapping_add((at / 64 * 3) as u8))
            .collect();
        let ten = |opcode| {
            let [.., high, low] = lba.to_be_bytes();
            vec![opcode, flags, 0, 0, high, low, 0, 0, count, 0]
        };
        let sixteen = |opcode, flags| {
            let mut cdb = vec![opcode, flags];
            cdb.extend(lba.to_be_bytes());
            cdb.extend([0, 0, 0, count, 0, 0]);
            cdb
        };
        // Sometimes the buffers have another size than the command.
        let given = if input.ratio(1, 8)? {
            input.int_in_range(0..=2 * length)?
        } else {
            length
        };
        let whole = length.min(given - given % self.block);
        match input.int_in_range(0..=6_u8)? {
            kind @ 0..=1 => {
                let cdb = if kind == 0 {
                    ten(0x28)
                } else {
                    sixteen(0x88, flags)
                };
                let answer = self.execute(nexus, &cdb, &[], given);
                assert!(inside || !answer.is_good());
                if answer.is_good() {
                    assert!(
                        answer.data == self.content[start..end][..given.min(length)],
                        "{cdb:02x?}"
                    );
                }
            }
            kind @ 2..=4 => {
                let cdb = match kind {
                    2 => ten(0x2a),
                    3 => sixteen(0x8a, flags),
                    _ => sixteen(0x8e, 0x02),
                };
                let answer = self.execute(nexus, &cdb, &data[..given], 0);
                assert!(inside || !answer.is_good());
                if answer.is_good() {
                    assert_eq!(answer.outcome.moved as usize, whole);
                    self.content[start..start + whole].copy_from_slice(&data[..whole]);
                }
            }
            5 => {
                let mut both = data.clone();
                if inside && input.ratio(3, 4)? {
                    both[..length].copy_from_slice(&self.content[start..end]);
                }
                let cdb = sixteen(0x89, flags);
                let answer = self.execute(nexus, &cdb, &both, 0);
                if answer.is_good() {
                    assert!(inside && self.content[start..end] == both[..length]);
                    self.content[start..end].copy_from_slice(&both[length..]);
                }
            }
            _ => {
                let block = if input.arbitrary()? {
                    vec![0; self.block]
                } else {
                    vec![seed; self.block]
                };
                let answer = self.execute(nexus, &sixteen(0x93, flags), &block, 0);
                if answer.is_good() {
                    assert!(inside && count > 0);
                    self.content[start..end].copy_from_slice(&block.repeat(count.into()));
                }
            }
        }
        Ok(())
    }

    /// What does not come from an initiator.
    fn event(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let nexus = self.nexus(input)?;
        match input.int_in_range(0..=5_u8)? {
            0 => self.unit.reset(Reset::LogicalUnit),
            1 => self.unit.reset(Reset::Target),
            2 => self.unit.reset_nexus(&self.nexuses[nexus]),
            3 => self.unit.capacity_changed(),
            4 => self.unit.detach(&self.nexuses[nexus]),
            _ => {
                let groups = groups(input)?;
                self.unit.set_port_groups(groups);
            }
        }
        Ok(())
    }

    /// A persistent reservation, mostly with keys that somebody has.
    fn reservation(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let nexus = self.nexus(input)?;
        let mut list = Vec::new();
        for _ in 0..2 {
            list.extend(input.int_in_range(0..=2_u64)?.to_be_bytes());
        }
        let flags = if input.ratio(1, 4)? { input.arbitrary()? } else { 0 };
        list.extend([0, flags & 3, 0, 1, flags, 0, 0, 0]);
        if input.ratio(1, 3)? {
            let id = TransportId::sas(input.int_in_range(0..=3)?);
            let length = (id.as_bytes().len() as u32).to_be_bytes();
            if input.arbitrary()? {
                list[20..24].copy_from_slice(&length);
            } else {
                list[20] = 0x08;
                list.extend(length);
            }
            list.extend(id.as_bytes());
        }
        let action = input.int_in_range(0..=7_u8)?;
        let kind = if input.ratio(7, 8)? {
            *input.choose(&[1, 3, 5, 6, 7, 8])?
        } else {
            input.arbitrary()?
        };
        let cdb = [0x5f, action, kind, 0, 0, 0, 0, 0, list.len() as u8, 0];
        self.execute(nexus, &cdb, &list, 0);
        for action in 0..4 {
            let answer = self.execute(nexus, &[0x5e, action, 0, 0, 0, 0, 0, 0x40, 0, 0], &[], MAX_DATA);
            if answer.is_good() && action != 2 {
                let length = u32::from_be_bytes(*answer.data[4..].first_chunk().unwrap());
                assert_eq!(length as usize, answer.data.len() - 8);
            }
        }
        Ok(())
    }

    /// What MODE SENSE says, with some bits changed.
    fn modes(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let nexus = self.nexus(input)?;
        let page = *input.choose(&[0x01, 0x08, 0x0a, 0x1c, 0x3f])?;
        let answer = self.execute(
            nexus,
            &[0x1a, input.arbitrary::<u8>()? & 0x08, page, 0, 255, 0],
            &[],
            255,
        );
        let mut list = answer.data;
        if list.len() > 4 {
            (list[0], list[2]) = (0, 0);
            for _ in 0..input.int_in_range(0..=2)? {
                let at = input.choose_index(list.len())?;
                list[at] ^= if input.arbitrary()? {
                    0x04
                } else {
                    1 << input.int_in_range(0..=7)?
                };
            }
            self.execute(nexus, &[0x15, 0x10, 0, 0, list.len() as u8, 0], &list, 0);
        }
        Ok(())
    }

    /// A command that exists, with whatever in its fields.
    fn hostile(&mut self, input: &mut Unstructured<'_>, known: &Known) -> arbitrary::Result<()> {
        let nexus = self.nexus(input)?;
        let Some(usage) = self.usage(known) else {
            return Ok(());
        };
        let mut cdb = vec![0; usage.len()];
        cdb[0] = known.opcode;
        for (byte, used) in cdb.iter_mut().zip(&usage).skip(1) {
            // Mostly zeroes and low numbers, which reach furthest.
            *byte = match input.int_in_range(0..=7_u8)? {
                0 => input.arbitrary::<u8>()? & used,
                1 => input.int_in_range(0..=4_u8)? & used,
                2 => *used,
                _ => 0,
            };
        }
        // Lengths that data may have.
        let last = cdb.len() - 2;
        if input.ratio(1, 2)? && usage[last] == 0xff {
            cdb[last] = input.int_in_range(0..=64)?;
        }
        if let Some(action) = known.action {
            cdb[1] = cdb[1] & !0x1f | action;
        }
        let mut is_allowed = true;
        if input.ratio(1, 16)? {
            let at = input.int_in_range(1..=cdb.len() - 1)?;
            let bit = 1 << input.int_in_range(0..=7_u8)?;
            cdb[at] |= bit;
            let action = if at == 1 && known.action.is_some() {
                0x1f
            } else {
                0
            };
            // Where SCSI-2 has the LUN, which Linux writes: not looked at.
            let old_lun = if at == 1 && known.opcode == INQUIRY {
                0xe0
            } else {
                0
            };
            is_allowed = (usage[at] | action | old_lun) & bit != 0;
        }
        if input.ratio(1, 32)? {
            cdb.truncate(input.int_in_range(0..=cdb.len())?);
            is_allowed &= cdb.len() == usage.len();
        }
        let mut out = vec![0; input.int_in_range(0..=2048_usize)?];
        let given = input.bytes(input.len().min(64).min(out.len()))?;
        out[..given.len()].copy_from_slice(given);
        let room = input.int_in_range(0..=1024)?;
        let answer = self.execute(nexus, &cdb, &out, room);
        assert!(is_allowed || !answer.is_good(), "{cdb:02x?}");
        if WRITES.contains(&known.opcode) {
            // It may be a good command: the model learns from the disk, if it may change anything.
            let found = self.disk.content();
            assert!(found == self.content || !self.disk.geometry().read_only);
            assert!(found == self.content || !self.unit.options().read_only);
            assert!(
                found == self.content || answer.is_good(),
                "{cdb:02x?}: refused, and done"
            );
            self.content = found;
        }
        Ok(())
    }
}

/// Sense data are there if and only if the status says so, and name a place that exists.
fn check_outcome(outcome: &Outcome, cdb: &[u8]) {
    let sense = outcome.sense.as_slice();
    assert_eq!(
        sense.is_empty(),
        outcome.status != Status::CheckCondition,
        "{cdb:02x?}"
    );
    if sense.is_empty() {
        return;
    }
    assert_eq!((outcome.wanted, outcome.moved), (0, 0));
    let field = match sense[0] & 0x7f {
        0x70 => {
            assert_eq!(sense.len(), 18);
            &sense[15..18]
        }
        0x72 => {
            assert_eq!(sense.len(), 8 + usize::from(sense[7]));
            match sense.len() {
                8 | 20 => &[0, 0, 0],
                16 => &sense[12..15],
                _ => &sense[24..27],
            }
        }
        format => panic!("sense data of format {format:#x}"),
    };
    if field[0] & 0xc0 == 0xc0 {
        let byte = usize::from(u16::from_be_bytes([field[1], field[2]]));
        assert!(byte <= cdb.len().max(1), "byte {byte} of {cdb:02x?}");
    }
}
