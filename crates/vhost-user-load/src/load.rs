//! Loads: one thread per virtqueue keeps so many requests in flight, each thread on a part of the disk of its own.
//!
//! In verify mode a thread remembers of every block what was written and what was acknowledged, checks every read, and at the end
//! reads all blocks again. No block is read or written while a write to it is in flight, so what must be there is certain; only
//! for writes that a killed server left open both are right, old and new.

use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::socket_peercred;
use serde::Serialize;
use storage_virtualizer::virtio_blk::{Status, kind};

use crate::front_end::{self, FrontEnd};
use crate::histogram::{Histogram, Latency};
use crate::pattern::{self, Data, Expected, Run};
use crate::queue::Queue;

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lowercase")]
pub enum Pattern {
    /// Reads at random places.
    RandRead,
    /// Writes at random places.
    RandWrite,
    /// Half of each at random places.
    Mixed,
    /// Reads one after the other.
    Read,
    /// Writes one after the other.
    Write,
}

impl fmt::Display for Pattern {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::RandRead => "randread",
            Self::RandWrite => "randwrite",
            Self::Mixed => "mixed",
            Self::Read => "read",
            Self::Write => "write",
        })
    }
}

/// A load.
#[derive(Debug, Clone)]
pub struct Load {
    /// The server and the queues.
    pub front_end: front_end::Options,
    /// What is asked for.
    pub pattern: Pattern,
    /// Requests in flight per queue.
    pub depth: u16,
    /// For how long.
    pub duration: Duration,
    /// Bytes of the disk that are used, from its beginning; all by default.
    pub range: Option<u64>,
    /// Use each place once only: the load ends when all were used, or when its time is over.
    pub once: bool,
    /// Requests begin at multiples of this many bytes; by default of the block size.
    pub stride: Option<u32>,
    /// What is written. In verify mode it changes with each write, else each slot of a queue keeps its data.
    pub data: Data,
    /// Check what is read.
    pub verify: bool,
    /// A flush after so many requests; 0 for none.
    pub flush_every: u32,
    /// Go on with a new server when the connection is lost.
    pub reconnect: bool,
    /// A request that is not answered in this time is lost.
    pub patience: Duration,
    /// Process whose CPU time is measured; by default that at the other end of the socket.
    pub pid: Option<u32>,
    /// Decides the random places.
    pub seed: u64,
}

/// What came of a load.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// What was asked for.
    pub pattern: Pattern,
    /// Bytes per request.
    pub block_size: u32,
    /// Requests in flight per queue.
    pub depth: u16,
    /// Virtqueues.
    pub queues: u16,
    /// How long it took.
    pub seconds: f64,
    /// Reads and writes that were answered.
    pub operations: u64,
    /// Reads and writes per second.
    pub iops: f64,
    /// Throughput.
    pub mib_per_second: f64,
    /// In microseconds.
    pub latency: Latency,
    /// User and system time of the server's process per read or write, in microseconds; none if the server is this process.
    pub server_cpu_micros: Option<f64>,
    /// Connections that were made again.
    pub reconnects: u32,
    /// Blocks whose content was checked at the end.
    pub verified_blocks: u64,
}

/// Runs a load to its end.
///
/// # Errors
/// The server is not there, answers an error, loses a request, or in verify mode: data.
pub fn run(load: &Load) -> Result<Report> {
    let block = u64::from(load.front_end.block_size);
    ensure!(
        block != 0 && block % 512 == 0,
        "a block has a multiple of 512 bytes"
    );
    let stride = load.stride.map_or(block, u64::from);
    ensure!(
        stride >= block && stride.is_multiple_of(512),
        "the distance of requests is a multiple of 512 bytes, and not below the block size"
    );
    ensure!(
        !load.verify || stride == block,
        "only what is everywhere can be checked"
    );
    let mut front_end = FrontEnd::connect(&load.front_end)?;
    let writes = !matches!(load.pattern, Pattern::RandRead | Pattern::Read);
    ensure!(!(writes && front_end.is_read_only()), "the disk is read-only");
    let blocks = load.range.unwrap_or(u64::MAX).min(front_end.capacity()) / stride;
    let queues = front_end.queues()?;
    let each = blocks / queues.len() as u64;
    ensure!(
        each > u64::from(load.depth),
        "the disk is too small for this load"
    );
    let mut lanes = Vec::new();
    for (number, queue) in (0_u64..).zip(queues) {
        ensure!(
            load.depth <= queue.slots(),
            "a queue of {} entries takes no {} requests of this size",
            load.front_end.queue_size,
            load.depth
        );
        lanes.push(Lane::new(load, queue, number * each, each, number)?);
    }
    let pid = load.pid.or_else(|| {
        let peer = socket_peercred(front_end.socket())
            .ok()?
            .pid
            .as_raw_nonzero()
            .get();
        u32::try_from(peer)
            .ok()
            .filter(|peer| *peer != std::process::id())
    });
    let before = pid.map(cpu_time).transpose()?;
    let start = Instant::now();
    let abort = AtomicBool::new(false);
    let mut reconnects = 0;
    let lanes = std::thread::scope(|scope| -> Result<Vec<Lane<'_>>> {
        let threads: Vec<_> = lanes
            .into_iter()
            .map(|mut lane| {
                let abort = &abort;
                scope.spawn(move || -> Result<Lane<'_>> {
                    let outcome = lane.drive(start + load.duration, abort);
                    if outcome.is_err() {
                        abort.store(true, Ordering::Relaxed);
                    }
                    outcome.map(|()| lane)
                })
            })
            .collect();
        let mut lost = Ok(());
        while !threads.iter().all(std::thread::ScopedJoinHandle::is_finished) {
            if !has_gone(&front_end)? || abort.load(Ordering::Relaxed) {
                continue;
            }
            lost = if load.reconnect {
                reconnects += 1;
                front_end.reconnect().context("the server does not come back")
            } else {
                Err(anyhow::anyhow!("the server closed the connection"))
            };
            if lost.is_err() {
                abort.store(true, Ordering::Relaxed);
                break;
            }
        }
        let lanes = threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| bail!("a load thread panicked")))
            .collect::<Result<Vec<_>>>();
        lost?;
        lanes
    })?;
    let seconds = lanes
        .iter()
        .filter_map(|lane| lane.measured)
        .max()
        .unwrap_or_default()
        .as_secs_f64();
    let mut histogram = Histogram::default();
    lanes.iter().for_each(|lane| histogram.merge(&lane.histogram));
    let operations = histogram.count();
    let spent = match (pid, before) {
        (Some(pid), Some(before)) if !load.verify => {
            cpu_time(pid).ok().map(|after| after.saturating_sub(before))
        }
        _ => None,
    };
    #[expect(clippy::cast_precision_loss, reason = "for display")]
    Ok(Report {
        pattern: load.pattern,
        block_size: load.front_end.block_size,
        depth: load.depth,
        queues: load.front_end.queues,
        seconds,
        operations,
        iops: operations as f64 / seconds,
        mib_per_second: (operations * block) as f64 / seconds / f64::from(1 << 20),
        latency: histogram.latency(),
        server_cpu_micros: spent.map(|spent| spent.as_secs_f64() * 1e6 / operations.max(1) as f64),
        reconnects,
        verified_blocks: lanes.iter().map(|lane| lane.verified).sum(),
    })
}

/// Whether the server hung up; waits a little for it.
fn has_gone(front_end: &FrontEnd) -> Result<bool> {
    let limit = Timespec::try_from(Duration::from_millis(20))?;
    let mut fds = [PollFd::from_borrowed_fd(
        front_end.socket().as_fd(),
        PollFlags::IN,
    )];
    match poll(&mut fds, Some(&limit)) {
        Ok(ready) => Ok(ready != 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// User and system time of a process, to the nanosecond: some loads are short.
fn cpu_time(pid: u32) -> Result<Duration> {
    let pid = i32::try_from(pid)?;
    let mut clock = 0;
    // SAFETY: the clock's number is written to a variable.
    let answer = unsafe { libc::clock_getcpuclockid(pid, &raw mut clock) };
    ensure!(
        answer == 0,
        "process {pid} has no clock: {}",
        io::Error::from_raw_os_error(answer)
    );
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the time is written to a variable.
    let answer = unsafe { libc::clock_gettime(clock, &raw mut time) };
    ensure!(
        answer == 0,
        "the clock of process {pid} cannot be read: {}",
        io::Error::last_os_error()
    );
    Ok(Duration::new(
        u64::try_from(time.tv_sec)?,
        u32::try_from(time.tv_nsec)?,
    ))
}

/// The place for a turn, so that all of `count` get one, and not in their order.
fn scattered(turn: u64, count: u64) -> u64 {
    // About the golden ratio of them, with no common divisor.
    let near = u128::from(count) * 1_618_033_989 / 1_000_000_000 + 1;
    let common = |mut one: u128, mut other: u128| {
        while other != 0 {
            (one, other) = (other, one % other);
        }
        one
    };
    let step = (near..)
        .find(|step| common(*step, count.into()) == 1)
        .unwrap_or(1);
    u64::try_from(u128::from(turn) * step % u128::from(count.max(1))).unwrap_or(0)
}

/// A number that no other run has.
fn started() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now.as_secs() << 30 ^ u64::from(now.subsec_nanos()) ^ u64::from(std::process::id()) << 48
}

/// A request in flight.
#[derive(Debug, Clone, Copy)]
struct Pending {
    kind: u32,
    block: u64,
    since: Instant,
}

/// One queue's thread.
struct Lane<'a> {
    load: &'a Load,
    queue: Queue,
    /// First block, and how many.
    first: u64,
    count: u64,
    pending: Vec<Option<Pending>>,
    free: Vec<u16>,
    random: u64,
    run: Run,
    next: u64,
    since_flush: u32,
    /// Blocks that are read or written right now, and what they contain; only in verify mode.
    busy: Vec<bool>,
    expected: Vec<Expected>,
    buffer: Vec<u8>,
    sweep: Option<u64>,
    histogram: Histogram,
    measured: Option<Duration>,
    verified: u64,
}

impl<'a> Lane<'a> {
    fn new(load: &'a Load, queue: Queue, first: u64, count: u64, number: u64) -> Result<Self> {
        let watched = if load.verify { usize::try_from(count)? } else { 0 };
        let mut lane = Self {
            pending: vec![None; usize::from(queue.slots())],
            free: (0..load.depth).rev().collect(),
            random: (load.seed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15)) | 1,
            load,
            run: Run::new(started()),
            queue,
            first,
            count,
            next: 0,
            since_flush: 0,
            busy: vec![false; watched],
            expected: vec![Expected::default(); watched],
            buffer: vec![0; load.front_end.block_size as usize],
            sweep: None,
            histogram: Histogram::default(),
            measured: None,
            verified: 0,
        };
        for slot in 0..load.depth {
            match load.data {
                Data::Noise => lane.make_noise(),
                Data::Words => pattern::fill(&mut lane.buffer, load.data, lane.run, slot.into(), 0),
            }
            lane.queue.data(slot, lane.buffer.len())?.copy_from(&lane.buffer);
        }
        Ok(lane)
    }

    /// Data that does not compress: a disk in compressed memory must not seem better than it is.
    fn make_noise(&mut self) {
        for at in (0..self.buffer.len()).step_by(8) {
            let word = self.draw().to_le_bytes();
            self.buffer[at..at + 8].copy_from_slice(&word);
        }
    }

    fn draw(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    fn drive(&mut self, end: Instant, abort: &AtomicBool) -> Result<()> {
        let start = Instant::now();
        let mut heard = start;
        loop {
            let now = Instant::now();
            let over = now >= end || self.has_used_all();
            if !over {
                self.refill(now)?;
            } else if self.load.verify && self.sweep != Some(self.count) {
                self.measured.get_or_insert(now - start);
                self.sweep_on(now)?;
            }
            self.queue.notify()?;
            if self.free.len() == usize::from(self.load.depth) && over {
                self.measured.get_or_insert(now - start);
                return Ok(());
            }
            if !self.queue.wait(Duration::from_millis(100))? {
                if abort.load(Ordering::Relaxed) {
                    bail!("given up");
                }
                if heard.elapsed() > self.load.patience {
                    let open = usize::from(self.load.depth) - self.free.len();
                    bail!(
                        "{open} requests were not answered in {:?}: they are forgotten",
                        self.load.patience
                    );
                }
                continue;
            }
            heard = Instant::now();
            while let Some(slot) = self.queue.take_used()? {
                self.complete(slot, heard)?;
            }
        }
    }

    /// Has as many requests in flight as is wanted.
    fn refill(&mut self, now: Instant) -> Result<()> {
        while !self.has_used_all()
            && let Some(slot) = self.free.pop()
        {
            if self.load.flush_every != 0 && self.since_flush >= self.load.flush_every {
                self.since_flush = 0;
                self.submit(slot, kind::FLUSH, 0, now)?;
                continue;
            }
            let writes = match self.load.pattern {
                Pattern::RandRead | Pattern::Read => false,
                Pattern::RandWrite | Pattern::Write => true,
                Pattern::Mixed => self.draw() & (1 << 40) != 0,
            };
            let block = self.choose()?;
            self.since_flush += 1;
            self.submit(slot, if writes { kind::OUT } else { kind::IN }, block, now)?;
        }
        Ok(())
    }

    fn has_used_all(&self) -> bool {
        self.load.once && self.next >= self.count
    }

    /// A block of this lane that nothing is in flight for, if that matters.
    fn choose(&mut self) -> Result<u64> {
        if self.load.once {
            let turn = self.next;
            self.next += 1;
            return Ok(match self.load.pattern {
                Pattern::Read | Pattern::Write => turn,
                _ => scattered(turn, self.count),
            });
        }
        loop {
            let block = match self.load.pattern {
                Pattern::Read | Pattern::Write => {
                    self.next = (self.next + 1) % self.count;
                    self.next
                }
                _ => self.draw() % self.count,
            };
            if !self.load.verify || !self.busy[usize::try_from(block)?] {
                return Ok(block);
            }
        }
    }

    /// Reads everything again that was written.
    fn sweep_on(&mut self, now: Instant) -> Result<()> {
        let mut block = self.sweep.unwrap_or(0);
        while block < self.count && !self.free.is_empty() {
            let index = usize::try_from(block)?;
            if self.busy[index] {
                // A write that is still in flight: it will be answered.
                break;
            }
            if self.expected[index].begun != 0
                && let Some(slot) = self.free.pop()
            {
                self.verified += 1;
                self.submit(slot, kind::IN, block, now)?;
            }
            block += 1;
        }
        self.sweep = Some(block);
        Ok(())
    }

    fn submit(&mut self, slot: u16, kind: u32, block: u64, since: Instant) -> Result<()> {
        let size = self.load.front_end.block_size;
        if self.load.verify && kind != kind::FLUSH {
            let index = usize::try_from(block)?;
            self.busy[index] = true;
            if kind == kind::OUT {
                let expected = &mut self.expected[index];
                expected.begun += 1;
                let (number, generation) = (self.first + block, expected.begun);
                pattern::fill(&mut self.buffer, self.load.data, self.run, number, generation);
                self.queue.data(slot, self.buffer.len())?.copy_from(&self.buffer);
            }
        }
        self.pending[usize::from(slot)] = Some(Pending { kind, block, since });
        let sector = (self.first + block) * u64::from(self.load.stride.unwrap_or(size) / 512);
        match kind {
            kind::FLUSH => self.queue.submit(slot, kind, 0, 0, false),
            _ => self.queue.submit(slot, kind, sector, size, kind == kind::IN),
        }
        Ok(())
    }

    fn complete(&mut self, slot: u16, now: Instant) -> Result<()> {
        let pending = self.pending[usize::from(slot)]
            .take()
            .with_context(|| format!("slot {slot} was answered twice"))?;
        let status = self.queue.status(slot);
        ensure!(
            status == Status::Ok as u8,
            "request {} of block {} was answered with status {status}",
            pending.kind,
            pending.block
        );
        if pending.kind != kind::FLUSH {
            if self.sweep.is_none() {
                self.histogram.add(now.saturating_duration_since(pending.since));
            }
            if self.load.verify {
                self.account(slot, pending)?;
            }
        }
        self.free.push(slot);
        Ok(())
    }

    fn account(&mut self, slot: u16, pending: Pending) -> Result<()> {
        let index = usize::try_from(pending.block)?;
        self.busy[index] = false;
        if pending.kind == kind::OUT {
            self.expected[index].acknowledged = self.expected[index].begun;
        } else {
            self.queue
                .data(slot, self.buffer.len())?
                .copy_to(&mut self.buffer);
            pattern::check(
                &self.buffer,
                self.load.data,
                self.run,
                self.first + pending.block,
                self.expected[index],
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_place_has_one_turn() {
        for count in [1, 2, 3, 89, 4096, 6765, 10_000] {
            let mut turns: Vec<u64> = (0..count).map(|turn| scattered(turn, count)).collect();
            turns.sort_unstable();
            assert!(turns.into_iter().eq(0..count), "{count}");
        }
    }
}
