//! What outlives a process of the simulated computer, and not its power.

use std::rc::Rc;

use super::executor::Sim;
use super::rng::hash_bytes;
use crate::LastingMemory;

/// Memory of the computer that a killed process leaves behind, and that a power cut takes.
#[derive(Debug, Clone, Default)]
pub struct Host {
    pub(super) memory: Vec<u8>,
    pub(super) killed: bool,
}

impl Host {
    /// After a process was killed that had this memory.
    pub(super) fn killed(&self) -> Self {
        Self {
            memory: self.memory.clone(),
            killed: true,
        }
    }

    pub(super) fn digest(&self) -> u64 {
        hash_bytes(&self.memory)
    }
}

/// The memory of a run: see [`Sim::lasting_memory`].
#[derive(Debug)]
pub(super) struct SimMemory(pub(super) Sim);

impl LastingMemory for SimMemory {
    fn size(&self) -> usize {
        self.0.with_host(|host| host.memory.len())
    }

    fn read(&self, offset: usize, target: &mut [u8]) {
        self.0.with_host(|host| {
            let stored = host.memory.get(offset..).unwrap_or_default();
            let length = stored.len().min(target.len());
            target[..length].copy_from_slice(&stored[..length]);
            target[length..].fill(0);
        });
    }

    fn write(&self, offset: usize, source: &[u8]) {
        self.0.with_host(|host| {
            let place = host.memory.get_mut(offset..).unwrap_or_default();
            let length = place.len().min(source.len());
            place[..length].copy_from_slice(&source[..length]);
        });
        self.0.host_changed();
    }

    fn clear(&self) {
        self.0.with_host(|host| host.memory.fill(0));
        self.0.host_changed();
    }
}

impl Sim {
    /// Memory of `size` bytes that outlives the process; all who ask have the same.
    pub fn lasting_memory(&self, size: usize) -> Rc<dyn LastingMemory> {
        self.with_host(|host| {
            let size = size.max(host.memory.len());
            host.memory.resize(size, 0);
        });
        Rc::new(SimMemory(self.clone()))
    }

    /// Whether the run before this one was a process that was killed while the power stayed.
    pub fn is_after_kill(&self) -> bool {
        self.with_host(|host| host.killed)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::super::{DiskOptions, Ended, Rng, RunOptions, World};
    use crate::{AlignedBuffer, BlockDevice, Durability};

    /// Writes a sector, and gives up with the second one in flight.
    fn interrupted() -> World {
        let mut world = World::new([DiskOptions::new("d", 4096)]);
        for after in 0.. {
            let mut begun = world.clone();
            let ran = begun.run(&RunOptions::in_order().crash_after(after), async |sim| {
                sim.lasting_memory(16).write(3, b"kept");
                let mut buffer = AlignedBuffer::new(512);
                buffer.as_mut_slice().fill(1);
                // SAFETY: the buffer is kept until the requests have ended.
                let memory = [unsafe { buffer.io(0, 512) }];
                sim.disk(0).write(0, &memory, Durability::Volatile).await.unwrap();
                sim.disk(0)
                    .write(512, &memory, Durability::Volatile)
                    .await
                    .unwrap();
            });
            let ran = ran.unwrap();
            let medium = &begun.media[0];
            if medium.volatile_changes() == 1 && !medium.in_flight.is_empty() {
                assert_eq!(ran.ended, Ended::Crashed);
                world = begun;
                break;
            }
        }
        world
    }

    fn sectors(world: &World) -> (u8, u8) {
        let mut bytes = [0; 1024];
        world.media[0].peek(0, &mut bytes);
        (bytes[0], bytes[512])
    }

    fn memory(world: &mut World) -> (Vec<u8>, bool) {
        let ran = world.run(&RunOptions::in_order(), async |sim| {
            let mut bytes = vec![9; 8];
            sim.lasting_memory(16).read(0, &mut bytes);
            (bytes, sim.is_after_kill())
        });
        ran.unwrap().ended.done().unwrap()
    }

    #[test]
    fn a_killed_process_leaves_what_had_completed_and_a_power_cut_what_was_durable() {
        let (mut killed, mut cut, mut later) = ([0; 4], [0; 4], [0; 4]);
        let index = |(first, second): (u8, u8)| usize::from(first) * 2 + usize::from(second);
        for seed in 0..200 {
            let mut rng = Rng::new(seed);
            let mut world = interrupted();
            world.kill(&mut rng);
            killed[index(sectors(&world))] += 1;
            assert_eq!(memory(&mut world), (b"\0\0\0kept\0".to_vec(), true));
            // What was volatile is so still.
            world.crash(&mut rng);
            later[index(sectors(&world))] += 1;
            assert_eq!(memory(&mut world), (vec![0; 8], false));
            let mut world = interrupted();
            world.crash(&mut rng);
            cut[index(sectors(&world))] += 1;
            assert_eq!(memory(&mut world), (vec![0; 8], false));
        }
        assert!(
            killed[..2] == [0, 0] && killed[2] > 20 && killed[3] > 20,
            "{killed:?}"
        );
        assert!(cut.iter().all(|count| *count > 5), "{cut:?}");
        assert!(later[0] > 20 && later[2] > 5 && later[3] > 5, "{later:?}");
    }
}
