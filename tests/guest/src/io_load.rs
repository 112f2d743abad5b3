//! `io-load DEVICE BLOCK-SIZE DEPTH COUNT [write]`: random direct I/O with a constant number of requests in flight.
//!
//! For measurements inside a guest that has only BusyBox. It keeps the queue full by Linux AIO (io_setup(2)), submitting
//! what completed in one go, as fio's libaio engine does. Prints the number of requests and the time.

use std::fs::OpenOptions;
use std::io::{Error, Result, Seek as _, SeekFrom};
use std::os::fd::{AsRawFd as _, RawFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::process::ExitCode;
use std::time::Instant;

/// What the command line says.
struct Load {
    device: String,
    block_size: usize,
    depth: usize,
    count: u64,
    write: bool,
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let Some(load) = parse(&words) else {
        eprintln!("usage: io-load DEVICE BLOCK-SIZE DEPTH COUNT [write]");
        return ExitCode::from(2);
    };
    match run(&load) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("io-load: {}: {error}", load.device);
            ExitCode::FAILURE
        }
    }
}

fn parse(words: &[String]) -> Option<Load> {
    let block_size: usize = words.get(1)?.parse().ok()?;
    let load = Load {
        device: words.first()?.clone(),
        block_size,
        depth: words.get(2)?.parse().ok()?,
        count: words.get(3)?.parse().ok()?,
        write: words.get(4).is_some_and(|word| word == "write"),
    };
    (block_size.is_multiple_of(512) && block_size > 0 && (1..=256).contains(&load.depth)).then_some(load)
}

fn run(load: &Load) -> Result<()> {
    let mut file = OpenOptions::new()
        .read(true)
        .write(load.write)
        .custom_flags(libc::O_DIRECT)
        .open(&load.device)?;
    let blocks = file.seek(SeekFrom::End(0))? / load.block_size as u64;
    if blocks == 0 {
        return Err(Error::other("it is smaller than a block"));
    }
    let mut queue = Queue::new(file.as_raw_fd(), load)?;
    // xorshift64: the same sequence each time.
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut next_offset = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % blocks
    };
    let begin = Instant::now();
    let mut free: Vec<usize> = (0..load.depth).collect();
    let (mut submitted, mut completed) = (0, 0);
    while completed < load.count {
        let mut batch = Vec::new();
        while submitted < load.count {
            let Some(slot) = free.pop() else { break };
            batch.push((slot, next_offset() * load.block_size as u64));
            submitted += 1;
        }
        queue.submit(&batch)?;
        let done = queue.wait()?;
        completed += done.len() as u64;
        free.extend(done);
    }
    println!(
        "io-load: {completed} requests in {:.3} s",
        begin.elapsed().as_secs_f64()
    );
    Ok(())
}

/// `struct iocb` of linux/aio_abi.h for 64-bit little-endian machines.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Request {
    data: u64,
    key: u32,
    rw_flags: i32,
    opcode: u16,
    priority: i16,
    file: u32,
    buffer: u64,
    length: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    event_file: u32,
}

/// `struct io_event`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Event {
    data: u64,
    object: u64,
    result: i64,
    result2: i64,
}

const _: () = assert!(size_of::<Request>() == 64 && size_of::<Event>() == 32);

/// An AIO context with a buffer for each slot.
struct Queue {
    context: u64,
    requests: Vec<Request>,
    events: Vec<Event>,
    /// Kept for the kernel, which reads and writes it; aligned to pages by hand.
    _memory: Vec<u8>,
}

impl Queue {
    fn new(file: RawFd, load: &Load) -> Result<Self> {
        const PAGE: usize = 4096;
        let stride = load.block_size.next_multiple_of(PAGE);
        let mut memory = vec![0_u8; stride * load.depth + PAGE];
        let address = (memory.as_mut_ptr() as usize).next_multiple_of(PAGE);
        let requests = (0..load.depth)
            .map(|slot| Request {
                data: slot as u64,
                opcode: u16::from(load.write),
                file: file.unsigned_abs(),
                buffer: (address + slot * stride) as u64,
                length: load.block_size as u64,
                ..Request::default()
            })
            .collect();
        let mut context = 0_u64;
        // SAFETY: io_setup writes one u64 through the pointer, which is valid and initialized to 0 as it demands.
        let result = unsafe { libc::syscall(libc::SYS_io_setup, load.depth, &raw mut context) };
        if result < 0 {
            return Err(Error::last_os_error());
        }
        Ok(Self {
            context,
            requests,
            events: vec![Event::default(); load.depth],
            _memory: memory,
        })
    }

    /// Hands slots with their offsets to the kernel.
    fn submit(&mut self, batch: &[(usize, u64)]) -> Result<()> {
        for &(slot, offset) in batch {
            if let Some(request) = self.requests.get_mut(slot) {
                request.offset = i64::try_from(offset).map_err(Error::other)?;
            }
        }
        let mut pointers: Vec<*mut Request> = batch
            .iter()
            .filter_map(|&(slot, _)| self.requests.get_mut(slot).map(|request| request as *mut _))
            .collect();
        while !pointers.is_empty() {
            // SAFETY: the pointers are to requests in self.requests, whose buffers lie in self._memory; both live as long as
            // the context, and each buffer is as long as its request says.
            let result = unsafe {
                libc::syscall(
                    libc::SYS_io_submit,
                    self.context,
                    pointers.len(),
                    pointers.as_mut_ptr(),
                )
            };
            let taken = usize::try_from(result).map_err(|_| Error::last_os_error())?;
            pointers.drain(..taken);
        }
        Ok(())
    }

    /// Waits for at least one completion; returns the slots that are free again.
    fn wait(&mut self) -> Result<Vec<usize>> {
        let (context, room, none) = (
            self.context,
            self.events.len(),
            std::ptr::null_mut::<libc::timespec>(),
        );
        // SAFETY: the kernel writes at most `room` events into self.events, which has that length.
        let result = unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                context,
                1_usize,
                room,
                self.events.as_mut_ptr(),
                none,
            )
        };
        let count = usize::try_from(result).map_err(|_| Error::last_os_error())?;
        let mut slots = Vec::new();
        for event in self.events.iter().take(count) {
            if event.result < 0 {
                return Err(Error::from_raw_os_error(
                    i32::try_from(-event.result).unwrap_or(libc::EIO),
                ));
            }
            slots.push(usize::try_from(event.data).map_err(Error::other)?);
        }
        Ok(slots)
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // SAFETY: the context is ours; io_destroy waits for what is in flight, so that no buffer is used afterwards.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.context) };
    }
}
