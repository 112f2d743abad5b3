//! Sockets, cores and threads, and the APIC ids that tell the guest of them.
//!
//! An APIC id is made of fields, each as wide as the count of its level needs:
//!
//! ```text
//!   bit  31 ............ package_bits ........ thread_bits ...... 0
//!        │   socket    │       core         │      thread         │
//! ```
//!
//! So ids have gaps where a count is no power of two: 3 cores need two bits, and the second socket starts at id 4.

/// The most vCPUs of a machine.
pub const CPU_COUNT_MAX: u32 = 64;

/// Why a topology cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TopologyError {
    /// One of the counts is zero.
    #[error(
        "{sockets} sockets with {cores} cores with {threads} threads: each of these numbers must be at least 1"
    )]
    Zero {
        /// Sockets.
        sockets: u32,
        /// Cores per socket.
        cores: u32,
        /// Threads per core.
        threads: u32,
    },
    /// More vCPUs than are possible.
    #[error(
        "{sockets} sockets with {cores} cores with {threads} threads are more than the {CPU_COUNT_MAX} CPUs that a \
         machine may have"
    )]
    TooManyCpus {
        /// Sockets.
        sockets: u32,
        /// Cores per socket.
        cores: u32,
        /// Threads per core.
        threads: u32,
    },
}

/// How the vCPUs are grouped. vCPU indices count threads first, then cores, then sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topology {
    sockets: u32,
    cores: u32,
    threads: u32,
}

impl Topology {
    /// `sockets` packages with `cores` cores each with `threads` threads each.
    ///
    /// # Errors
    /// A count is zero, or their product more than [`CPU_COUNT_MAX`].
    pub fn new(sockets: u32, cores: u32, threads: u32) -> Result<Self, TopologyError> {
        let count = sockets
            .checked_mul(cores)
            .and_then(|count| count.checked_mul(threads));
        match count {
            Some(0) => Err(TopologyError::Zero {
                sockets,
                cores,
                threads,
            }),
            Some(count) if count <= CPU_COUNT_MAX => Ok(Self {
                sockets,
                cores,
                threads,
            }),
            _ => Err(TopologyError::TooManyCpus {
                sockets,
                cores,
                threads,
            }),
        }
    }

    /// Number of sockets.
    pub fn sockets(&self) -> u32 {
        self.sockets
    }

    /// Cores of a socket.
    pub fn cores(&self) -> u32 {
        self.cores
    }

    /// Threads of a core.
    pub fn threads(&self) -> u32 {
        self.threads
    }

    /// Threads of a socket.
    pub fn threads_per_socket(&self) -> u32 {
        self.cores * self.threads
    }

    /// Number of vCPUs.
    pub fn cpu_count(&self) -> u32 {
        self.sockets * self.cores * self.threads
    }

    /// Width of the thread field of an APIC id.
    pub fn thread_bits(&self) -> u32 {
        bits_for(self.threads)
    }

    /// Width of the thread and core fields of an APIC id.
    pub fn package_bits(&self) -> u32 {
        bits_for(self.cores) + self.thread_bits()
    }

    /// Where vCPU `index` is. Indices behind the last vCPU give sockets behind the last.
    pub fn place(&self, index: u32) -> Place {
        Place {
            socket: index / self.threads_per_socket(),
            core: index / self.threads % self.cores,
            thread: index % self.threads,
        }
    }

    /// The local APIC id of vCPU `index`. Never 255 or more for a vCPU of the machine.
    pub fn apic_id(&self, index: u32) -> u32 {
        let Place { socket, core, thread } = self.place(index);
        socket << self.package_bits() | core << self.thread_bits() | thread
    }

    /// The local APIC ids of all vCPUs in order.
    pub fn apic_ids(&self) -> Vec<u32> {
        (0..self.cpu_count()).map(|index| self.apic_id(index)).collect()
    }
}

/// Where a vCPU is, each number counted from 0 within the level above.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// Socket of the machine.
    pub socket: u32,
    /// Core of the socket.
    pub core: u32,
    /// Thread of the core.
    pub thread: u32,
}

/// Bits that are needed to tell `count` things apart.
fn bits_for(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_as_wide_as_their_counts_need() {
        let topology = Topology::new(2, 3, 2).unwrap();
        assert_eq!((topology.thread_bits(), topology.package_bits()), (1, 3));
        assert_eq!(topology.apic_ids(), [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]);
    }

    #[test]
    fn one_thread_and_core_need_no_bits() {
        assert_eq!(Topology::new(5, 1, 1).unwrap().apic_ids(), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn impossible_counts_are_refused() {
        for (sockets, cores, threads) in [(0, 1, 1), (1, 0, 1), (1, 1, 0)] {
            assert_eq!(
                Topology::new(sockets, cores, threads),
                Err(TopologyError::Zero {
                    sockets,
                    cores,
                    threads
                })
            );
        }
        for (sockets, cores, threads) in [(1, 65, 1), (8, 9, 1), (u32::MAX, 2, 1)] {
            assert_eq!(
                Topology::new(sockets, cores, threads),
                Err(TopologyError::TooManyCpus {
                    sockets,
                    cores,
                    threads
                })
            );
        }
    }
}
