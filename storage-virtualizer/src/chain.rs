//! From a descriptor chain, which a guest wrote and may have written wrongly, to pieces of memory.
//!
//! virtio-queue has an iterator for this that ends at the first bad descriptor as if the chain ended there. A disk must
//! not take half of a chain for a whole one, so this says what is wrong.

use block_io::IoBuf;
use virtio_core::virtio_queue::desc::split::Descriptor;
use virtio_core::vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileMemory, VolatileSlice,
};

/// The longest chain that is accepted, in descriptors; also what QEMU and Linux' vhost take at most.
pub const MAX_DESCRIPTORS: u32 = 1024;

/// Why a chain cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// A descriptor's number is not below the size of its table.
    #[error("descriptor {index} is not in the table of {size}")]
    OutOfTable {
        /// Number of the descriptor.
        index: u16,
        /// Descriptors in the table.
        size: u32,
    },
    /// The chain is longer than its table (so it is a loop), or than any that is accepted.
    #[error("the chain has a loop or more than {MAX_DESCRIPTORS} descriptors")]
    TooLong,
    /// The table or what a descriptor points to is not guest memory.
    #[error("{length} bytes at {address:#x} are not guest memory")]
    OutOfMemory {
        /// Guest-physical address.
        address: u64,
        /// Length in bytes.
        length: u64,
    },
    /// An indirect descriptor that the specification forbids (virtio 1.2 §2.7.5.3).
    #[error("invalid indirect descriptor")]
    Indirect,
    /// A buffer that the device reads comes after one that it writes (virtio 1.2 §2.7.4.2).
    #[error("a readable buffer follows a writable one")]
    Order,
    /// The buffers have more than 4 GiB together (virtio 1.2 §2.7.5.2).
    #[error("the chain is longer than 4 GiB")]
    TooLarge,
}

/// Where a queue's descriptors are.
#[derive(Debug, Clone, Copy)]
pub struct Table {
    /// Guest-physical address of the descriptor table.
    pub address: GuestAddress,
    /// Descriptors in it.
    pub size: u16,
    /// Whether indirect descriptors were negotiated.
    pub indirect: bool,
}

/// The memory of a chain: first what the device reads, then what it writes. Adjacent buffers are joined.
#[derive(Debug, Default)]
pub struct Buffers {
    pieces: Vec<IoBuf>,
    readable: usize,
    writable_length: u32,
}

impl Buffers {
    /// What the device reads.
    pub fn readable(&self) -> &[IoBuf] {
        &self.pieces[..self.readable]
    }

    /// What the device writes.
    pub fn writable(&self) -> &[IoBuf] {
        &self.pieces[self.readable..]
    }

    /// Sum of the lengths of what the device writes.
    pub fn writable_length(&self) -> u32 {
        self.writable_length
    }

    /// Both, to be cut.
    pub(crate) fn split_mut(&mut self) -> (&mut [IoBuf], &mut [IoBuf]) {
        self.pieces.split_at_mut(self.readable)
    }

    /// Takes the chain that begins with descriptor `head`; what was there before is gone. The result points into
    /// `memory`: whoever gives it to a device keeps a clone of the memory's `Arc` until the requests have ended.
    ///
    /// # Errors
    /// The chain breaks the rules; the content is of no use then.
    pub fn take_chain(
        &mut self,
        table: Table,
        memory: &GuestMemoryMmap,
        head: u16,
    ) -> Result<(), ChainError> {
        self.pieces.clear();
        self.readable = 0;
        self.writable_length = 0;
        let mut size = u32::from(table.size);
        let mut place = Place::new(memory, table.address, size);
        let mut index = head;
        let mut steps = size.min(MAX_DESCRIPTORS);
        let mut in_indirect = false;
        let mut length: u32 = 0;
        let mut writing = false;
        loop {
            if u32::from(index) >= size {
                return Err(ChainError::OutOfTable { index, size });
            }
            steps = steps.checked_sub(1).ok_or(ChainError::TooLong)?;
            let descriptor = place.read(index)?;
            if descriptor.refers_to_indirect_table() {
                let entries = descriptor.len() / DESCRIPTOR_SIZE;
                if in_indirect
                    || !table.indirect
                    || descriptor.has_next()
                    || entries == 0
                    || descriptor.len() % DESCRIPTOR_SIZE != 0
                {
                    return Err(ChainError::Indirect);
                }
                in_indirect = true;
                (size, index) = (entries, 0);
                place = Place::new(memory, descriptor.addr(), size);
                steps = entries.min(MAX_DESCRIPTORS);
                continue;
            }
            length = length.checked_add(descriptor.len()).ok_or(ChainError::TooLarge)?;
            if descriptor.is_write_only() {
                writing = true;
                self.writable_length += descriptor.len();
            } else if writing {
                return Err(ChainError::Order);
            }
            self.add(memory, &descriptor, writing)?;
            if !descriptor.has_next() {
                return Ok(());
            }
            index = descriptor.next();
        }
    }

    fn add(
        &mut self,
        memory: &GuestMemoryMmap,
        descriptor: &Descriptor,
        writing: bool,
    ) -> Result<(), ChainError> {
        let outside = ChainError::OutOfMemory {
            address: descriptor.addr().0,
            length: descriptor.len().into(),
        };
        let (address, length) = (descriptor.addr(), descriptor.len() as usize);
        // As a rule it lies in one region.
        if let Ok(slice) = memory.get_slice(address, length) {
            self.add_slice(&slice, writing);
            return Ok(());
        }
        for slice in memory.get_slices(address, length) {
            self.add_slice(&slice.map_err(|_| outside)?, writing);
        }
        Ok(())
    }

    fn add_slice(&mut self, slice: &VolatileSlice<'_>, writing: bool) {
        if slice.is_empty() {
            return;
        }
        // SAFETY: the memory is mapped for reading and writing as long as `memory`'s owner, who keeps it until the
        // requests have ended. Nobody has a reference to guest memory.
        let piece = unsafe { IoBuf::new(slice.ptr_guard_mut().as_ptr(), slice.len()) };
        // Readable and writable pieces are never joined.
        let joins = !writing || self.pieces.len() > self.readable;
        match self.pieces.last_mut() {
            Some(last) if joins && last.is_followed_by(&piece) => *last = last.joined(&piece),
            _ => self.pieces.push(piece),
        }
        if !writing {
            self.readable = self.pieces.len();
        }
    }
}

const DESCRIPTOR_SIZE: u32 = 16;

/// Where the descriptors of a table are.
struct Place<'a> {
    memory: &'a GuestMemoryMmap,
    address: GuestAddress,
    /// All of it, if it lies in one region, as it does as a rule: that is looked for once.
    whole: Option<VolatileSlice<'a>>,
}

impl<'a> Place<'a> {
    fn new(memory: &'a GuestMemoryMmap, address: GuestAddress, size: u32) -> Self {
        let length = size as usize * DESCRIPTOR_SIZE as usize;
        Self {
            memory,
            address,
            whole: memory.get_slice(address, length).ok(),
        }
    }

    fn read(&self, index: u16) -> Result<Descriptor, ChainError> {
        let offset = usize::from(index) * DESCRIPTOR_SIZE as usize;
        if let Some(whole) = &self.whole
            && let Ok(descriptor) = whole.get_ref(offset)
        {
            return Ok(descriptor.load());
        }
        let outside = ChainError::OutOfMemory {
            address: self.address.0,
            length: u64::from(DESCRIPTOR_SIZE),
        };
        let address = self.address.0.checked_add(offset as u64).ok_or(outside)?;
        self.memory.read_obj(GuestAddress(address)).map_err(|_| outside)
    }
}
