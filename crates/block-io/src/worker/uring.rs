//! io_uring: requests of many tasks go to the kernel, and completions come back, with one system call.
//!
//! Works from kernel 5.6 on. Newer kernels let the ring avoid interrupting the thread: the set-up tries the best flags
//! first and falls back in steps.
//!
//! Requests in a ring do not pass the thread's system call filter. So a ring takes, from kernel 5.10 on, no others than those
//! that are used here: it is made disabled, restricted, and then enabled.
//!
//! Files that are used again and again are registered with the ring: see `files`. So is guest memory, if its pages stay: see `memory`.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::num::NonZeroU64;
use std::os::fd::RawFd;

use io_uring::squeue::{Entry, Flags};
use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, cqueue, opcode, register::Restriction};

use super::engine::{Call, Completion, Request};
use super::files::Files;
use super::local::Shared;
use super::memory::{Memory, Part};

/// Entries of the submission queue: requests that go to the kernel with one call.
const SUBMISSIONS: u32 = 128;
/// Entries of the completion queue. More completions wait in the kernel.
const COMPLETIONS: u32 = 512;
/// The largest transfer that the kernel does at once; it cuts longer ones by itself.
const MAX_TRANSFER: usize = 0x7fff_f000;

/// The kinds of completions, in the upper half of the user data.
const OPERATION: u64 = 0;
const EVENT: u64 = 1 << 32;
const SILENT: u64 = 2 << 32;
const FILES: u64 = 3 << 32;
const KIND: u64 = !0 << 32;

/// `IORING_REGISTER_BUFFERS_UPDATE` of io_uring_register(2): changes which memory a ring knows.
const REGISTER_BUFFERS_UPDATE: u8 = 16;

/// What is written to eventfds.
static ONE: u64 = 1;

const GETEVENTS: u32 = 1;

pub(super) struct UringEngine {
    ring: RefCell<IoUring>,
    /// Absent where the kernel refuses.
    files: Option<Files>,
    /// The same.
    memory: Option<Memory>,
    /// Entries that found the submission queue full while the kernel took nothing.
    backlog: RefCell<VecDeque<Entry>>,
    /// Watches stay armed when they fire (kernel 5.13).
    multishot: Cell<bool>,
    /// Writes to eventfds need no completion (kernel 5.17).
    skip_success: bool,
}

impl UringEngine {
    /// Sets up a ring for this thread.
    ///
    /// # Errors
    /// The kernel has no io_uring, not enough of it, or refuses it.
    pub(super) fn new() -> io::Result<Self> {
        let (ring, disabled) = build()?;
        if !ring.params().is_feature_nodrop() || !ring.params().is_feature_submit_stable() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let mut probe = io_uring::Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [
            opcode::Read::CODE,
            opcode::Write::CODE,
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
            opcode::PollAdd::CODE,
            opcode::PollRemove::CODE,
        ];
        if !needed.iter().all(|code| probe.is_supported(*code)) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let files = Files::new(&ring, &probe);
        let memory = Memory::new(&ring, &probe);
        if disabled {
            let mut restrictions: Vec<_> = needed.into_iter().map(Restriction::sqe_op).collect();
            restrictions.push(Restriction::sqe_op(opcode::FilesUpdate::CODE));
            if let Some(memory) = &memory {
                restrictions.push(Restriction::sqe_op(opcode::ReadFixed::CODE));
                restrictions.push(Restriction::sqe_op(opcode::WriteFixed::CODE));
                if memory.takes_lists {
                    restrictions.push(Restriction::sqe_op(opcode::ReadvFixed::CODE));
                    restrictions.push(Restriction::sqe_op(opcode::WritevFixed::CODE));
                }
                restrictions.push(Restriction::register_op(REGISTER_BUFFERS_UPDATE));
            }
            let flags = Flags::SKIP_SUCCESS | Flags::FIXED_FILE;
            restrictions.push(Restriction::sqe_flags_allowed(flags.bits()));
            ring.submitter().register_restrictions(&mut restrictions)?;
            ring.submitter().register_enable_rings()?;
        }
        Ok(Self {
            skip_success: ring.params().is_feature_skip_cqe_on_success(),
            ring: RefCell::new(ring),
            files,
            memory,
            backlog: RefCell::default(),
            multishot: Cell::new(true),
        })
    }

    pub(super) fn submit(&self, index: u32, request: &Request, shared: &Shared) {
        let (file, flags) = self.file(request, shared);
        let entry = self.entry(request.call, file);
        self.push(entry.flags(flags).user_data(OPERATION | u64::from(index)));
    }

    /// How a call is put to the kernel.
    fn entry(&self, call: Call, file: Fd) -> Entry {
        match call {
            Call::Read {
                offset,
                buffers,
                count,
            } => self.read(file, offset, buffers, count),
            Call::Write {
                offset,
                buffers,
                count,
                flags,
            } => self.write(file, offset, buffers, count, flags),
            Call::Sync => opcode::Fsync::new(file).flags(FsyncFlags::DATASYNC).build(),
            Call::Allocate { mode, offset, length } => opcode::Fallocate::new(file, length)
                .offset(offset)
                .mode(mode)
                .build(),
            Call::Poll { events } => opcode::PollAdd::new(file, events).build(),
            Call::DiscardBlocks { .. } => opcode::Nop::new().build(),
        }
    }

    #[inline]
    fn read(&self, file: Fd, offset: u64, list: *const libc::iovec, count: u32) -> Entry {
        let segments = segments(list, count);
        match (segments, self.held(segments)) {
            ([one], Some(slot)) => {
                let (address, length) = single(one);
                opcode::ReadFixed::new(file, address, length, slot)
                    .offset(offset)
                    .build()
            }
            ([one], None) => {
                let (address, length) = single(one);
                opcode::Read::new(file, address, length).offset(offset).build()
            }
            (_, Some(slot)) => opcode::ReadvFixed::new(file, list, count, slot)
                .offset(offset)
                .build(),
            (_, None) => opcode::Readv::new(file, list, count).offset(offset).build(),
        }
    }

    #[inline]
    fn write(&self, file: Fd, offset: u64, list: *const libc::iovec, count: u32, flags: i32) -> Entry {
        let segments = segments(list, count);
        match (segments, self.held(segments)) {
            ([one], Some(slot)) => {
                let (address, length) = single(one);
                opcode::WriteFixed::new(file, address, length, slot)
                    .offset(offset)
                    .rw_flags(flags)
                    .build()
            }
            ([one], None) => {
                let (address, length) = single(one);
                opcode::Write::new(file, address, length)
                    .offset(offset)
                    .rw_flags(flags)
                    .build()
            }
            (_, Some(slot)) => opcode::WritevFixed::new(file, list, count, slot)
                .offset(offset)
                .rw_flags(flags)
                .build(),
            (_, None) => opcode::Writev::new(file, list, count)
                .offset(offset)
                .rw_flags(flags)
                .build(),
        }
    }

    /// The ring's slot of the memory that a request's segments lie in.
    #[inline]
    fn held(&self, segments: &[libc::iovec]) -> Option<u16> {
        self.memory.as_ref()?.find(segments)
    }

    /// Holds memory from now on: [`Self::hold_next`].
    pub(super) fn hold(&self, part: Part) {
        if let Some(memory) = &self.memory {
            memory.hold(part);
        }
    }

    /// Holds one more piece of memory; says whether there are others.
    #[inline]
    pub(super) fn hold_next(&self) -> bool {
        self.memory
            .as_ref()
            .is_some_and(|memory| memory.hold_next(&self.ring))
    }

    /// Lets go of memory.
    pub(super) fn release(&self, part: Part) {
        if let Some(memory) = &self.memory {
            memory.release(part, &self.ring);
        }
    }

    /// What the ring is to call the request's file.
    #[inline]
    fn file(&self, request: &Request, shared: &Shared) -> (Fd, Flags) {
        if let (Some(files), Some(number)) = (&self.files, request.number) {
            match files.find(number, request.file) {
                Ok(slot) => return (Fd(slot), Flags::FIXED_FILE),
                Err(Some(update)) => {
                    shared.keep_file(number);
                    self.push_update(update);
                }
                Err(None) => {}
            }
        }
        (Fd(request.file), Flags::empty())
    }

    /// The file with `number` is about to be closed: the ring lets go of it.
    pub(super) fn forget_file(&self, number: NonZeroU64) {
        if let Some(update) = self.files.as_ref().and_then(|files| files.forget(number)) {
            self.push_update(update);
        }
    }

    fn push_update(&self, update: Entry) {
        let slot = update.get_user_data();
        self.push(update.user_data(FILES | slot));
    }

    pub(super) fn cancel_poll(&self, index: u32) {
        let entry = opcode::PollRemove::new(OPERATION | u64::from(index)).build();
        self.push(entry.user_data(SILENT));
    }

    pub(super) fn watch(&self, index: u32, event: RawFd) {
        let entry = opcode::PollAdd::new(Fd(event), libc::POLLIN as u32)
            .multi(self.multishot.get())
            .build();
        self.push(entry.user_data(EVENT | u64::from(index)));
    }

    pub(super) fn unwatch(&self, index: u32) {
        let entry = opcode::PollRemove::new(EVENT | u64::from(index)).build();
        self.push(entry.user_data(SILENT));
    }

    pub(super) fn signal(&self, event: RawFd) {
        let mut entry = opcode::Write::new(Fd(event), (&raw const ONE).cast(), 8).build();
        if self.skip_success {
            entry = entry.flags(Flags::SKIP_SUCCESS);
        }
        self.push(entry.user_data(SILENT));
    }

    /// Gives up multishot watches; says whether they were in use.
    pub(super) fn without_multishot(&self) -> bool {
        self.multishot.replace(false)
    }

    fn push(&self, entry: Entry) {
        if !self.backlog.borrow().is_empty() || !self.try_push(&entry) {
            // The queue is full: let the kernel take it, so that the order is kept.
            self.enter(false);
            if !self.backlog.borrow().is_empty() || !self.try_push(&entry) {
                self.backlog.borrow_mut().push_back(entry);
            }
        }
    }

    fn try_push(&self, entry: &Entry) -> bool {
        // SAFETY: what the entry points to stays valid until its completion: `ONE` is static, the descriptors of `files` live
        // as long as the ring and are left alone until it has answered, and for requests the one who awaits them keeps it (contract of `IoBuf::new`; `Operation` waits when it is dropped).
        unsafe { self.ring.borrow_mut().submission().push(entry) }.is_ok()
    }

    pub(super) fn enter(&self, wait: bool) {
        loop {
            loop {
                let Some(entry) = self.backlog.borrow_mut().pop_front() else {
                    break;
                };
                if !self.try_push(&entry) {
                    self.backlog.borrow_mut().push_front(entry);
                    break;
                }
            }
            let waits_here = wait && self.backlog.borrow().is_empty();
            let mut ring = self.ring.borrow_mut();
            let (submitter, submissions, completions) = ring.split();
            let waits_here = waits_here && completions.is_empty();
            let prepared = u32::try_from(submissions.len()).unwrap_or(u32::MAX);
            // SAFETY: `GETEVENTS` takes no argument; the entries were pushed under the promise of `try_push`.
            let entered = unsafe {
                submitter.enter::<libc::sigset_t>(prepared, u32::from(waits_here), GETEVENTS, None)
            };
            drop((submissions, completions));
            drop(ring);
            match entered {
                Ok(_) if self.backlog.borrow().is_empty() => return,
                Ok(taken) if taken > 0 => {}
                // The kernel took nothing: completions must be taken first. The caller does that, and comes again.
                Ok(_) => return,
                Err(error) => match error.raw_os_error() {
                    // A signal, or the kernel wants completions to be taken first, or is short of memory for now.
                    Some(libc::EINTR | libc::EBUSY | libc::EAGAIN | libc::ENOMEM) => return,
                    _ => {
                        // Nothing else is possible with a ring that works. Requests would hang in silence, with the
                        // guest's memory in unknown hands: better to end at once.
                        tracing::error!(%error, "io_uring_enter failed");
                        std::process::abort();
                    }
                },
            }
        }
    }

    /// A completion, or work of the kernel's that becomes one in the next [`Self::enter`].
    pub(super) fn has_completion(&self) -> bool {
        let mut ring = self.ring.borrow_mut();
        let (_, submissions, completions) = ring.split();
        !completions.is_empty() || submissions.taskrun()
    }

    pub(super) fn next_completion(&self) -> Option<Completion> {
        loop {
            let entry = self.ring.borrow_mut().completion().next()?;
            #[expect(clippy::cast_possible_truncation, reason = "the lower half is the index")]
            let index = entry.user_data() as u32;
            let result = entry.result();
            match entry.user_data() & KIND {
                OPERATION => return Some(Completion::Operation { index, result }),
                EVENT => {
                    let armed = cqueue::more(entry.flags());
                    return Some(Completion::Event { index, result, armed });
                }
                FILES => {
                    let files = self.files.as_ref();
                    if let Some(update) = files.and_then(|files| files.answered(index, result)) {
                        self.push_update(update);
                    }
                }
                // The end of a watch that had just fired is not found; everything else should work.
                _ if result < 0 && result != -libc::ENOENT && result != -libc::EALREADY => {
                    let error = io::Error::from_raw_os_error(-result);
                    tracing::error!(%error, "cannot signal an eventfd");
                }
                _ => {}
            }
        }
    }
}

/// The memory of a request that is being prepared.
fn segments<'a>(list: *const libc::iovec, count: u32) -> &'a [libc::iovec] {
    // SAFETY: a request's list is a slice of so many elements, and valid while the request is prepared; nobody keeps what is returned.
    unsafe { std::slice::from_raw_parts(list, count as usize) }
}

/// Address and length of a segment.
fn single(segment: &libc::iovec) -> (*mut u8, u32) {
    let length = u32::try_from(segment.iov_len.min(MAX_TRANSFER)).unwrap_or(u32::MAX);
    (segment.iov_base.cast(), length)
}

/// A ring, and whether it is still disabled.
fn build() -> io::Result<(IoUring, bool)> {
    let steps: [&dyn Fn(&mut io_uring::Builder); 4] = [
        // 6.1: completions are made when the thread enters the kernel, never by interrupting it.
        &|builder| {
            builder
                .setup_single_issuer()
                .setup_defer_taskrun()
                .setup_taskrun_flag()
                .setup_submit_all();
        },
        // 6.0.
        &|builder| {
            builder
                .setup_single_issuer()
                .setup_coop_taskrun()
                .setup_taskrun_flag()
                .setup_submit_all();
        },
        // 5.19.
        &|builder| {
            builder
                .setup_coop_taskrun()
                .setup_taskrun_flag()
                .setup_submit_all();
        },
        &|_| {},
    ];
    let mut refusal = io::Error::from(io::ErrorKind::Unsupported);
    for disabled in [true, false] {
        for step in steps {
            let mut builder = IoUring::builder();
            builder.dontfork().setup_cqsize(COMPLETIONS);
            if disabled {
                builder.setup_r_disabled();
            }
            step(&mut builder);
            match builder.build(SUBMISSIONS) {
                Ok(ring) => return Ok((ring, disabled)),
                Err(error) => refusal = error,
            }
        }
    }
    Err(refusal)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel answers to `entry`.
    fn answer(engine: &UringEngine, entry: &Entry) -> i32 {
        assert!(engine.try_push(entry));
        let ring = &mut *engine.ring.borrow_mut();
        ring.submit_and_wait(1).unwrap();
        ring.completion().next().unwrap().result()
    }

    #[test]
    fn a_ring_takes_no_requests_but_ours() {
        let engine = match UringEngine::new() {
            Ok(engine) => engine,
            Err(error) => return eprintln!("skipped: this machine has no io_uring: {error}"),
        };
        let path = c"/dev/null";
        let open = opcode::OpenAt::new(Fd(libc::AT_FDCWD), path.as_ptr()).build();
        assert_eq!(answer(&engine, &open), -libc::EACCES);
        let socket = opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build();
        assert_eq!(answer(&engine, &socket), -libc::EACCES);
        // No change of the rules afterwards.
        assert!(engine.ring.borrow().submitter().register_enable_rings().is_err());
        assert!(engine.ring.borrow().submitter().register_eventfd(0).is_err());

        let event = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
        let write = opcode::Write::new(
            Fd(std::os::fd::AsRawFd::as_raw_fd(&event)),
            (&raw const ONE).cast(),
            8,
        );
        assert_eq!(answer(&engine, &write.build()), 8);
    }
    #[test]
    fn a_piece_of_memory_is_found_while_it_is_held() {
        let engine = match UringEngine::new() {
            Ok(engine) => engine,
            Err(error) => return eprintln!("skipped: this machine has no io_uring: {error}"),
        };
        if engine.memory.is_none() {
            return eprintln!("skipped: no table of memory here");
        }
        let mut memory = vec![0_u8; 64 << 10];
        let (start, length) = (memory.as_mut_ptr(), memory.len());
        let part = Part::new(start, length);
        let slot = |address: *mut u8, length| {
            let segment = libc::iovec {
                iov_base: address.cast(),
                iov_len: length,
            };
            engine.held(&[segment])
        };
        let at = |place: usize, length| slot(start.wrapping_add(place), length).is_some();
        assert!(!at(0, 4096));
        engine.hold(part);
        engine.hold(part);
        assert!(!at(0, 4096), "not yet");
        assert!(!engine.hold_next());
        assert!(at(0, 4096) && at(length - 1, 1) && at(0, 64 << 10));
        assert!(!at(length - 1, 2) && !at(length, 1) && !at(0, 0));
        assert!(slot(start.wrapping_sub(1), 2).is_none());
        engine.release(part);
        assert!(at(0, 4096), "by somebody else");
        engine.release(part);
        assert!(!at(0, 4096));
        // Nobody knows of it: nothing happens.
        engine.release(part);
    }

    /// `READV_FIXED` is used from 6.16 on.
    fn kernel_takes_lists() -> bool {
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        let mut numbers = release
            .split('.')
            .map(|number| number.parse::<u32>().unwrap_or(0));
        (numbers.next().unwrap(), numbers.next().unwrap()) >= (6, 16)
    }

    #[test]
    fn a_list_in_held_memory_is_asked_for_with_its_slot_where_the_kernel_can() {
        let mut engine = match UringEngine::new() {
            Ok(engine) => engine,
            Err(error) => return eprintln!("skipped: this machine has no io_uring: {error}"),
        };
        let Some(memory) = &mut engine.memory else {
            return eprintln!("skipped: no table of memory here");
        };
        assert!(memory.takes_lists || !kernel_takes_lists());
        if kernel_takes_lists() {
            lists_are_written_and_read(&engine, true);
        }
        // As on older kernels.
        if let Some(memory) = &mut engine.memory {
            memory.takes_lists = false;
        }
        lists_are_written_and_read(&engine, false);
    }

    fn lists_are_written_and_read(engine: &UringEngine, with_slot: bool) {
        let file = tempfile::tempfile().unwrap();
        let file = Fd(std::os::fd::AsRawFd::as_raw_fd(&file));
        let mut memory: Vec<u8> = (0..16_u32 << 10).flat_map(u32::to_le_bytes).collect();
        let mut elsewhere = vec![9_u8; 4096];
        let (start, other) = (memory.as_mut_ptr(), elsewhere.as_mut_ptr());
        let part = Part::new(start, memory.len());
        engine.hold(part);
        assert!(!engine.hold_next());
        let segment = |base: *mut u8, place: usize, length| libc::iovec {
            iov_base: base.wrapping_add(place).cast(),
            iov_len: length,
        };
        let bytes = |list: &[libc::iovec]| -> Vec<u8> {
            let bytes = |segment: &libc::iovec| {
                // SAFETY: it is in one of the two vectors, which nobody else uses.
                unsafe { std::slice::from_raw_parts(segment.iov_base.cast::<u8>(), segment.iov_len) }
            };
            list.iter().flat_map(bytes).copied().collect()
        };
        let held = [
            segment(start, 40_001, 3000),
            segment(start, 5, 5000),
            segment(start, 63 << 10, 1024),
        ];
        let partly = [segment(start, 20_000, 3000), segment(other, 7, 3)];
        for (list, in_slot) in [(&held[..], with_slot), (&partly, false)] {
            let count = u32::try_from(list.len()).unwrap();
            let buffers = list.as_ptr();
            let written = bytes(list);
            let length = i32::try_from(written.len()).unwrap();
            let (offset, flags) = (77, libc::RWF_DSYNC);
            let write = Call::Write {
                offset,
                buffers,
                count,
                flags,
            };
            let write = engine.entry(write, file);
            let read = Call::Read {
                offset,
                buffers,
                count,
            };
            let read = engine.entry(read, file);
            let expected = match in_slot {
                true => (opcode::WritevFixed::CODE, opcode::ReadvFixed::CODE),
                false => (opcode::Writev::CODE, opcode::Readv::CODE),
            };
            let operations = (write.get_opcode(), read.get_opcode());
            assert_eq!(operations, (expected.0.into(), expected.1.into()));
            assert_eq!(answer(engine, &write), length);
            for segment in list {
                // SAFETY: as above.
                unsafe { segment.iov_base.cast::<u8>().write_bytes(0, segment.iov_len) };
            }
            assert_eq!(answer(engine, &read), length);
            assert!(bytes(list) == written);
        }
        engine.release(part);
    }

    #[test]
    fn a_file_joins_at_its_first_request_and_leaves_when_it_is_closed() {
        let engine = match UringEngine::new() {
            Ok(engine) => engine,
            Err(error) => return eprintln!("skipped: this machine has no io_uring: {error}"),
        };
        if engine.files.is_none() {
            return eprintln!("skipped: no table of files here");
        }
        let shared = Shared::new(vmm_sys_util::eventfd::EventFd::new(0).unwrap());
        let sync = |file: &std::fs::File| {
            let request = Request {
                file: std::os::fd::AsRawFd::as_raw_fd(file),
                number: NonZeroU64::new(5),
                call: Call::Sync,
            };
            let how = engine.file(&request, &shared);
            engine.submit(9, &request, &shared);
            loop {
                engine.enter(true);
                if let Some(Completion::Operation { index: 9, result }) = engine.next_completion() {
                    return (how, result);
                }
            }
        };
        let file = tempfile::tempfile().unwrap();
        let ((_, flags), result) = sync(&file);
        assert_eq!((flags, result), (Flags::empty(), 0));
        let ((slot, flags), result) = sync(&file);
        assert_eq!((slot.0, flags, result), (5, Flags::FIXED_FILE, 0));
        engine.forget_file(NonZeroU64::new(5).unwrap());
        engine.enter(true);
        assert!(engine.next_completion().is_none());
        // The slot is empty: who used it would be told.
        let entry = opcode::Fsync::new(Fd(5)).build().flags(Flags::FIXED_FILE);
        assert_eq!(answer(&engine, &entry), -libc::EBADF);
    }
}
