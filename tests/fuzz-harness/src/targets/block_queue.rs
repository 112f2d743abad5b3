//! The whole virtio-blk device: two queues, served by an I/O worker's thread, over several lives.

use std::sync::Arc;

use arbitrary::Unstructured;
use block_io::{Geometry, Worker, WorkerHandle, WorkerOptions};
use storage_virtualizer::virtio_blk::{VirtioBlk, VirtioBlkOptions, blk_feature};
use virtio_core::{GuestMemory, VirtioDevice, feature};

use crate::blk::{self, Planned};
use crate::device::{Account, Events, activate, reset};
use crate::disk::{MemoryDisk, initial_content};
use crate::memory::{Watch, guest_memory};
use crate::patience::wait_until;
use crate::ring::{Arena, MAX_SIZE, Ring};

const QUEUES: u16 = 2;

struct Bench {
    memory: GuestMemory,
    geometry: Geometry,
    disk: Arc<MemoryDisk>,
    device: VirtioBlk<Arc<MemoryDisk>>,
    /// What the disk should hold, as long as all requests were decent.
    content: Vec<u8>,
}

struct Queue {
    ring: Ring,
    account: Account,
    requests: Vec<Planned>,
}

pub(super) fn run(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let memory = guest_memory();
    let geometry = blk::geometry(input)?;
    let disk = Arc::new(MemoryDisk::new(&memory, geometry, true));
    let options = VirtioBlkOptions {
        serial: String::from_utf8_lossy(blk::ID).trim_end_matches('\0').to_owned(),
        queues: QUEUES,
        queue_size: MAX_SIZE,
        ..VirtioBlkOptions::default()
    };
    let device = VirtioBlk::new(Arc::clone(&disk), &options, vec![worker()]).expect("a device");
    let mut bench = Bench {
        memory,
        geometry,
        disk,
        device,
        content: initial_content(geometry.size),
    };
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
        let mut features = feature::RING_INDIRECT_DESC | blk_feature::FLUSH;
        for bit in [feature::RING_EVENT_IDX, blk_feature::CONFIG_WCE] {
            features |= if input.arbitrary()? { bit } else { 0 };
        }
        let size = 1 << input.int_in_range(2..=MAX_SIZE.ilog2())?;
        let mut queues: Vec<Queue> = (0..QUEUES)
            .map(|index| Queue {
                ring: Ring::new(&self.memory, index, size, features & feature::RING_EVENT_IDX != 0),
                account: Account::default(),
                requests: Vec::new(),
            })
            .collect();
        let active = (0..)
            .zip(&queues)
            .map(|(index, queue)| queue.ring.active(index))
            .collect();
        let (events, active) = activate(&mut self.device, &self.memory, features, active);
        assert!(active);
        let mut spoilt = false;
        for _ in 0..input.int_in_range(1..=4)? {
            self.config_access(input)?;
            spoilt |= self.batch(input, &mut queues, &events, spoilt)?;
            if input.ratio(1, 8)? {
                break;
            }
        }
        reset(&mut self.device, || {});
        let watch = Watch::new(&self.memory);
        queues.iter().for_each(|queue| queue.ring.ring_doorbell());
        watch.assert_unchanged();
        self.content = self.disk.content();
        Ok(())
    }

    fn config_access(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let mut data = vec![0; input.int_in_range(1..=8)?];
        input.fill_buffer(&mut data)?;
        let offset = if input.ratio(1, 8)? {
            input.arbitrary()?
        } else {
            input.int_in_range(0..=64)?
        };
        self.device.write_config(offset, &data);
        self.device.read_config(offset, &mut data);
        Ok(())
    }

    /// Some requests at once, waited for. Whether there was anything wrong with them; `spoilt`: so it was before.
    fn batch(
        &mut self,
        input: &mut Unstructured<'_>,
        queues: &mut [Queue],
        events: &Events,
        mut spoilt: bool,
    ) -> arbitrary::Result<bool> {
        let mut arena = Arena::new();
        for queue in queues.iter_mut() {
            for _ in 0..input.int_in_range(0..=4)? {
                let request = blk::plan(input, &queue.ring, &mut arena, &self.geometry)?;
                let indirect = input.ratio(1, 4)?;
                let Some(head) = queue.ring.store_chain(&mut arena, &request.pieces, indirect) else {
                    continue;
                };
                queue.ring.make_available(head);
                if !spoilt {
                    queue.account.lend(head, request.pieces.clone());
                }
                spoilt |= !request.is_whole;
                queue.requests.push(request);
            }
            if input.ratio(1, 8)? {
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
        if spoilt {
            let over = || events.reason().is_some() || queues.iter().all(|queue| queue.ring.is_used_up());
            wait_until("the device to use or refuse the chains", over);
        } else {
            self.settle(queues, events);
            for queue in queues.iter() {
                watch.allow_device(&[], &queue.ring);
                for request in &queue.requests {
                    watch.allow_device(&request.pieces, &queue.ring);
                }
            }
            watch.assert_unchanged();
        }
        for queue in queues {
            queue.ring.recycle();
            queue.requests.clear();
        }
        Ok(spoilt)
    }

    /// Waits for the answers of decent requests and looks at them.
    fn settle(&mut self, queues: &mut [Queue], events: &Events) {
        wait_until("the answers of the device", || {
            for queue in queues.iter_mut() {
                queue.account.settle(&mut queue.ring);
            }
            queues.iter().all(|queue| queue.account.is_settled())
        });
        assert_eq!(events.reason(), None);
        let requests: Vec<&Planned> = queues.iter().flat_map(|queue| &queue.requests).collect();
        for request in &requests {
            assert!(request.answer(&self.memory).1 <= 2, "no status");
        }
        // The order of several is the device's choice.
        if let [request] = requests[..] {
            let (status, data) = request.expected(&self.geometry, &mut self.content);
            let answer = request.answer(&self.memory);
            assert_eq!(answer.1, status as u8);
            data.inspect(|data| assert_eq!(answer.0[..data.len()], data[..]));
            assert!(
                self.disk.content() == self.content,
                "the disk holds what nobody wrote"
            );
        }
        self.content = self.disk.content();
    }
}
