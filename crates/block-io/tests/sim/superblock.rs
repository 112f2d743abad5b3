//! The sample system: a value kept in two slots, written in turn, each with a version and a checksum. Four ways to get it
//! wrong, too.

use block_io::cover;
use block_io::sim::{DiskOptions, Failure, Scenario, Shared, Sim, SimDisk, World, fingerprint};
use block_io::{BlockDevice, Durability};

/// Two sectors, so that a slot can be torn.
const SLOT: usize = 1024;
const SLOTS: [u64; 2] = [0, 4096];

/// How it is built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Build {
    Right,
    NoFlush,
    SingleSlot,
    NoChecksum,
    /// Recovery writes over the only good slot.
    RecoversInPlace,
}

/// What was promised: the value is one from `acknowledged` to `begun`.
#[derive(Debug, Clone, Default, Hash)]
pub(crate) struct Promise {
    acknowledged: u64,
    begun: u64,
}

/// Some updates of the value.
pub(crate) struct Updates {
    pub(crate) build: Build,
    pub(crate) count: u64,
    /// Whether equal states are tried once.
    pub(crate) once: bool,
}

fn checksum(bytes: &[u8]) -> u64 {
    let (words, _) = bytes.as_chunks::<8>();
    let words = words.iter().map(|word| u64::from_le_bytes(*word));
    // Rotated, so that equal words do not cancel each other; what is left of the time is the simulator's.
    words.fold(1, |sum: u64, word| {
        sum.rotate_left(5).wrapping_add(word ^ (word >> 7))
    })
}

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn encode(version: u64, value: u64) -> Vec<u8> {
    let mut slot = vec![0; SLOT];
    slot[8..16].copy_from_slice(&version.to_le_bytes());
    slot[16..24].copy_from_slice(&value.to_le_bytes());
    slot[SLOT - 16..SLOT - 8].copy_from_slice(&version.to_le_bytes());
    slot[SLOT - 8..].copy_from_slice(&value.to_le_bytes());
    let sum = checksum(&slot[8..]);
    slot[..8].copy_from_slice(&sum.to_le_bytes());
    slot
}

impl Updates {
    /// Version and value of a slot.
    fn decode(&self, slot: &[u8]) -> Option<(u64, u64, u64)> {
        let valid = checksum(&slot[8..]) == number(slot, 0);
        if !valid {
            cover!("superblock: torn slot refused");
        }
        (valid || self.build == Build::NoChecksum)
            .then(|| (number(slot, 8), number(slot, 16), number(slot, SLOT - 8)))
    }

    fn place(&self, version: u64) -> u64 {
        match self.build {
            Build::SingleSlot => SLOTS[0],
            _ => SLOTS[usize::from(version % 2 == 1)],
        }
    }

    async fn put(&self, disk: &SimDisk, version: u64, value: u64) -> Result<(), Failure> {
        let slot = encode(version, value);
        disk.write_bytes(self.place(version), &slot, Durability::Volatile)
            .await?;
        if self.build != Build::NoFlush {
            disk.flush().await?;
        }
        Ok(())
    }

    /// The newest version and its value.
    async fn get(&self, disk: &SimDisk) -> Result<(u64, u64), Failure> {
        let mut best = None;
        for offset in SLOTS {
            let slot = disk.read_bytes(offset, SLOT).await?;
            best = best.max(self.decode(&slot));
        }
        let (version, head, tail) = best.ok_or("no valid slot")?;
        if head != tail {
            return Err(format!("version {version} has two values: {head} and {tail}").into());
        }
        Ok((version, head))
    }
}

impl Scenario for Updates {
    type Model = Promise;

    fn world(&self) -> World {
        World::new([DiskOptions::new("disk", 1 << 40)])
    }

    async fn prepare(&self, sim: Sim, _: Shared<Promise>) -> Result<(), Failure> {
        self.put(&sim.disk(0), 1, 0).await
    }

    async fn run(&self, sim: Sim, promise: Shared<Promise>) -> Result<(), Failure> {
        for value in 1..=self.count {
            promise.borrow_mut().begun = value;
            self.put(&sim.disk(0), value + 1, value).await?;
            promise.borrow_mut().acknowledged = value;
        }
        Ok(())
    }

    async fn recover(&self, sim: Sim, promise: Shared<Promise>) -> Result<(), Failure> {
        let disk = sim.disk(0);
        let (version, value) = self.get(&disk).await?;
        let Promise { acknowledged, begun } = promise.borrow().clone();
        if !(acknowledged..=begun).contains(&value) {
            return Err(format!("value {value}, promised was {acknowledged} to {begun}").into());
        }
        if value > acknowledged {
            cover!("superblock: an update that was not acknowledged survives");
        }
        // Recovery writes as well, so that it can be crashed.
        let step = if self.build == Build::RecoversInPlace {
            2
        } else {
            1
        };
        self.put(&disk, version + step, value).await?;
        match self.get(&disk).await? {
            (_, again) if again == value => Ok(()),
            (_, again) => Err(format!("value {value} became {again}").into()),
        }
    }

    fn fingerprint(&self, promise: &Promise) -> Option<u64> {
        self.once.then(|| fingerprint(promise))
    }
}
