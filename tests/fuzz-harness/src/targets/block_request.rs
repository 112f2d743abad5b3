//! virtio-blk without threads: chains become memory, memory becomes requests, requests become operations on a disk, and
//! the outcome is what a model says. Flawed chains are refused, or do what they say, within guest memory.

use std::pin::pin;
use std::task::{Context, Poll, Waker};

use arbitrary::Unstructured;
use storage_virtualizer::chain::{Buffers, Table};
use storage_virtualizer::virtio_blk::{Context as Disk, decode, execute, status_of};
use virtio_core::GuestMemory;
use virtio_core::vm_memory::GuestAddress;

use crate::blk::{self, ID, Planned};
use crate::disk::{MemoryDisk, initial_content};
use crate::memory::{Watch, guest_memory};
use crate::ring::{Arena, MAX_SIZE, Ring};

pub(super) fn run(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let memory = guest_memory();
    let geometry = blk::geometry(input)?;
    let disk = MemoryDisk::new(&memory, geometry, false);
    let mut content = initial_content(geometry.size);
    let mut ring = Ring::new(&memory, 0, MAX_SIZE, false);
    let table = Table {
        address: GuestAddress(ring.table()),
        size: ring.size,
        indirect: !input.ratio(1, 8)?,
    };
    let write_back = input.arbitrary()?;
    let mut buffers = Buffers::default();
    while !input.is_empty() {
        let mut arena = Arena::new();
        let request = blk::plan(input, &ring, &mut arena, &geometry)?;
        let indirect = table.indirect && input.ratio(1, 4)?;
        let Some(mut head) = ring.store_chain(&mut arena, &request.pieces, indirect) else {
            ring.recycle();
            continue;
        };
        let spoilt = input.ratio(1, 4)?;
        if spoilt {
            ring.spoil(input)?;
            if input.ratio(1, 8)? {
                head = input.arbitrary()?;
            }
        }
        let mut watch = Watch::new(&memory);
        let served = serve(&disk, &mut buffers, table, &memory, head, write_back);
        if !spoilt {
            watch.allow_device(&request.pieces, &ring);
            watch.assert_unchanged();
        }
        if request.is_whole && !spoilt {
            assert!(served);
            assert_answer(&request, &memory, &geometry, &mut content);
        } else {
            // It may be another request now: the model learns from the disk.
            content = disk.content();
        }
        assert!(disk.content() == content, "the disk holds what nobody wrote");
        if input.ratio(1, 2)? {
            ring.recycle();
        }
    }
    Ok(())
}

/// What a queue server does with a chain. Whether it could be answered.
fn serve(
    disk: &MemoryDisk,
    buffers: &mut Buffers,
    table: Table,
    memory: &GuestMemory,
    head: u16,
    write_back: bool,
) -> bool {
    if buffers.take_chain(table, memory, head).is_err() {
        return false;
    }
    let lengths: u64 = buffers.writable().iter().map(|piece| piece.len() as u64).sum();
    assert_eq!(lengths, u64::from(buffers.writable_length()));
    let Ok(decoded) = decode(buffers) else {
        return false;
    };
    let status = match decoded.request {
        Ok(request) => {
            let future = pin!(execute(
                disk,
                &request,
                Disk {
                    id: ID,
                    write_back,
                    outlived: write_back
                }
            ));
            match future.poll(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(outcome) => status_of(&outcome),
                Poll::Pending => panic!("this disk answers at once"),
            }
        }
        Err(status) => status,
    };
    decoded.status.fill(status as u8);
    true
}

fn assert_answer(request: &Planned, memory: &GuestMemory, geometry: &block_io::Geometry, content: &mut [u8]) {
    let (status, data) = request.expected(geometry, content);
    let answer = request.answer(memory);
    assert_eq!(answer.1, status as u8);
    if let Some(data) = data {
        assert_eq!(answer.0[..data.len()], data);
    }
}
