//! The whole virtio-scsi adapter: its three queues, served by an I/O worker's thread, over several lives, while units come and go.
//!
//! What commands do to a disk is another target's affair; here it is that every request is answered once, within its memory, or
//! refused with the queue, whatever the driver does.

use std::sync::Arc;

use arbitrary::Unstructured;
use block_io::{Worker, WorkerHandle, WorkerOptions};
use storage_virtualizer::scsi::{Identity, Provisioning, TransportId, Unit, UnitOptions};
use storage_virtualizer::virtio_scsi::{VirtioScsi, VirtioScsiHandle, VirtioScsiOptions, scsi_feature};
use virtio_core::{GuestMemory, VirtioDevice, feature};

use crate::blk;
use crate::device::{Account, Events, activate, reset};
use crate::disk::MemoryDisk;
use crate::memory::{Watch, guest_memory};
use crate::patience::wait_until;
use crate::ring::{Arena, MAX_SIZE, Piece, Ring};

const CONTROL: usize = 0;
const EVENT: usize = 1;
const COMMANDS: usize = 2;
const LAST_TARGET: u8 = 2;
/// Operation codes that a disk knows, and some that it does not.
const OPCODES: [u8; 24] = [
    0x00, 0x03, 0x08, 0x0a, 0x12, 0x15, 0x1a, 0x25, 0x28, 0x2a, 0x2f, 0x35, 0x41, 0x42, 0x5e, 0x5f, 0x88,
    0x89, 0x8a, 0x93, 0x9e, 0xa0, 0xa3, 0xc1,
];

struct Bench {
    memory: GuestMemory,
    device: VirtioScsi<Arc<MemoryDisk>>,
    handle: VirtioScsiHandle<Arc<MemoryDisk>>,
    /// What the driver has set of the configuration: room for CDB and sense data.
    sizes: (usize, usize),
}

struct Queue {
    ring: Ring,
    account: Account,
    /// All that the device has of it.
    pieces: Vec<Piece>,
}

pub(super) fn run(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let memory = guest_memory();
    let options = VirtioScsiOptions {
        initiator: TransportId::sas(7),
        queues: 1,
        queue_size: MAX_SIZE,
        last_target: LAST_TARGET,
    };
    let device = VirtioScsi::new(&options, vec![worker()]).expect("an adapter");
    let mut bench = Bench {
        memory,
        handle: device.handle(),
        device,
        sizes: (32, 96),
    };
    bench.change_units(input)?;
    while !input.is_empty() {
        bench.live(input)?;
    }
    Ok(())
}

/// The I/O worker of this process.
fn worker() -> WorkerHandle {
    static WORKER: std::sync::OnceLock<Worker> = std::sync::OnceLock::new();
    let start = || Worker::start("fuzz", WorkerOptions::default()).expect("an I/O worker");
    WORKER.get_or_init(start).handle().clone()
}

impl Bench {
    /// One life of the device, from activation to reset.
    fn live(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let mut features = feature::RING_INDIRECT_DESC;
        for bit in [
            feature::RING_EVENT_IDX,
            scsi_feature::HOTPLUG,
            scsi_feature::CHANGE,
        ] {
            features |= if input.arbitrary()? { bit } else { 0 };
        }
        let size = 1 << input.int_in_range(2..=MAX_SIZE.ilog2())?;
        let mut queues: Vec<Queue> = (0..3)
            .map(|index| Queue {
                ring: Ring::new(&self.memory, index, size, features & feature::RING_EVENT_IDX != 0),
                account: Account::default(),
                pieces: Vec::new(),
            })
            .collect();
        let active = (0..)
            .zip(&queues)
            .map(|(index, queue)| queue.ring.active(index))
            .collect();
        let (events, active) = activate(&mut self.device, &self.memory, features, active);
        assert!(active);
        let mut spoilt = false;
        let mut arena = Arena::new();
        for _ in 0..input.int_in_range(1..=4)? {
            self.config_access(input)?;
            spoilt |= self.batch(input, &mut queues, &mut arena, &events, spoilt)?;
            if input.ratio(1, 8)? {
                break;
            }
        }
        reset(&mut self.device, || {});
        self.sizes = (32, 96);
        let watch = Watch::new(&self.memory);
        queues.iter().for_each(|queue| queue.ring.ring_doorbell());
        watch.assert_unchanged();
        Ok(())
    }

    fn change_units(&self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        for _ in 0..input.int_in_range(0..=2)? {
            let target = input.int_in_range(0..=LAST_TARGET + 1)?;
            let lun = *input.choose(&[0, 0, 1, 255, 256, 0x3fff, 0x4000])?;
            match input.int_in_range(0..=3_u8)? {
                0 => drop(self.handle.remove(target, lun)),
                1 => self.handle.size_changed(target, lun),
                _ => {
                    let geometry = blk::geometry(input)?;
                    let disk = Arc::new(MemoryDisk::new(&self.memory, geometry, true));
                    let unit = Unit::new(UnitOptions {
                        removable: input.arbitrary()?,
                        read_only: geometry.read_only,
                        provisioning: *input.choose(&[
                            Provisioning::Full,
                            Provisioning::Thin,
                            Provisioning::ThinZeroes,
                        ])?,
                        ..UnitOptions::new(Identity::from_name("fuzz", "fuzz"))
                    });
                    // The place may be taken, or be none.
                    let _ = self
                        .handle
                        .add((target, lun), Arc::new(unit), disk, Arc::default(), None);
                }
            }
        }
        Ok(())
    }

    fn config_access(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let offset = if input.ratio(1, 4)? {
            *input.choose(&[20, 24])?
        } else {
            input.int_in_range(0..=40)?
        };
        let value: u32 = if input.ratio(1, 4)? {
            input.arbitrary()?
        } else {
            input.int_in_range(0..=64)?
        };
        self.device.write_config(offset, &value.to_le_bytes());
        let word = |device: &VirtioScsi<_>, offset| {
            let mut word = [0; 4];
            device.read_config(offset, &mut word);
            u32::from_le_bytes(word) as usize
        };
        self.sizes = (word(&self.device, 24), word(&self.device, 20));
        assert!((1..=260).contains(&self.sizes.0) && self.sizes.1 <= 252);
        Ok(())
    }

    /// Some requests at once, waited for. Whether there was anything wrong with them; `spoilt`: so it was before.
    fn batch(
        &self,
        input: &mut Unstructured<'_>,
        queues: &mut [Queue],
        arena: &mut Arena,
        events: &Events,
        mut spoilt: bool,
    ) -> arbitrary::Result<bool> {
        for (index, queue) in queues.iter_mut().enumerate() {
            for _ in 0..input.int_in_range(0..=3)? {
                let (readable, room, is_whole) = match index {
                    CONTROL => function(input)?,
                    EVENT => (Vec::new(), 16, true),
                    _ => command(input, self.sizes)?,
                };
                let mut pieces = Vec::new();
                arena.cut(input, readable.len(), false, &mut pieces)?;
                queue.ring.fill(&pieces, &readable);
                arena.cut(input, room, true, &mut pieces)?;
                let length: usize = pieces.iter().map(|piece| piece.length as usize).sum();
                let indirect = input.ratio(1, 4)?;
                let Some(head) = queue.ring.store_chain(arena, &pieces, indirect) else {
                    continue;
                };
                queue.ring.make_available(head);
                if !spoilt {
                    queue.account.lend(head, pieces.clone());
                }
                spoilt |= !is_whole || length != readable.len() + room;
                queue.pieces.extend(pieces);
            }
            if input.ratio(1, 16)? {
                queue.ring.spoil(input)?;
                spoilt = true;
            }
            queue
                .ring
                .ask_for_interrupt(input.int_in_range(0..=1)?, input.arbitrary()?);
        }
        let mut watch = Watch::new(&self.memory);
        for queue in queues.iter() {
            queue.ring.publish();
            queue.ring.ring_doorbell();
        }
        self.change_units(input)?;
        if spoilt {
            // Buffers for events stay with the device.
            let asked = [CONTROL, COMMANDS];
            let over =
                || events.reason().is_some() || asked.iter().all(|index| queues[*index].ring.is_used_up());
            wait_until("the device to use or refuse the chains", over);
        } else {
            wait_until("the answers of the device", || {
                for queue in queues.iter_mut() {
                    queue.account.settle(&mut queue.ring);
                }
                queues[CONTROL].account.is_settled() && queues[COMMANDS].account.is_settled()
            });
            assert_eq!(events.reason(), None);
            for queue in queues.iter() {
                watch.allow_device(&[], &queue.ring);
                watch.allow_device(&queue.pieces, &queue.ring);
            }
            watch.assert_unchanged();
        }
        Ok(spoilt)
    }
}

/// An address of a unit, mostly a possible one.
fn address(input: &mut Unstructured<'_>) -> arbitrary::Result<[u8; 8]> {
    if input.ratio(1, 16)? {
        return input.arbitrary();
    }
    let lun = *input.choose(&[0_u16, 0, 0, 1, 255, 256, 0x3fff])?;
    let [high, low] = lun.to_be_bytes();
    Ok([
        1,
        input.int_in_range(0..=LAST_TARGET)?,
        0x40 | high,
        low,
        0,
        0,
        0,
        0,
    ])
}

/// A request of the control queue: its bytes, the room for its answer, and whether nothing of it is missing.
fn function(input: &mut Unstructured<'_>) -> arbitrary::Result<(Vec<u8>, usize, bool)> {
    let kind = input.int_in_range(0..=3_u32)?;
    let mut bytes = kind.to_le_bytes().to_vec();
    let room = if kind == 0 {
        bytes.extend(input.int_in_range(0..=9_u32)?.to_le_bytes());
        bytes.extend(address(input)?);
        bytes.extend(input.int_in_range(0..=8_u64)?.to_le_bytes());
        1
    } else {
        bytes.extend(address(input)?);
        bytes.extend(input.arbitrary::<u32>()?.to_le_bytes());
        5
    };
    let cut = input.ratio(1, 32)?;
    if cut {
        bytes.truncate(input.int_in_range(0..=bytes.len())?);
    }
    Ok((bytes, room, kind < 3 && !cut))
}

/// A command, as [`function`].
fn command(
    input: &mut Unstructured<'_>,
    (cdb_size, sense_size): (usize, usize),
) -> arbitrary::Result<(Vec<u8>, usize, bool)> {
    let mut bytes = address(input)?.to_vec();
    bytes.extend(input.int_in_range(0..=8_u64)?.to_le_bytes());
    // Attribute, priority, number.
    bytes.extend([
        if input.ratio(1, 16)? {
            input.arbitrary()?
        } else {
            0
        },
        0,
        0,
    ]);
    let mut cdb = vec![0; cdb_size];
    for byte in cdb.iter_mut().take(16) {
        // Sparse, else nothing is ever right.
        *byte = if input.ratio(1, 4)? {
            input.int_in_range(0..=9)?
        } else {
            0
        };
    }
    cdb[0] = if input.ratio(1, 16)? {
        input.arbitrary()?
    } else {
        *input.choose(&OPCODES)?
    };
    bytes.extend(cdb);
    let mut room = 12 + sense_size;
    let data = 512 * input.int_in_range(0..=2_usize)? + if input.ratio(1, 8)? { 17 } else { 0 };
    if input.arbitrary()? {
        bytes.extend(vec![input.arbitrary::<u8>()?; data]);
    } else {
        room += data;
    }
    let cut = input.ratio(1, 32)?;
    if cut {
        bytes.truncate(input.int_in_range(0..=bytes.len())?);
    }
    Ok((bytes, room, !cut))
}
