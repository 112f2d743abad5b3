//! Runs the micro-guest step by step on a virtual machine of its own.

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, kvm_fpu, kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region,
    kvm_vcpu_events,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

use super::image::{self, Blob};
use super::{FailedStep, Failure, STEPS, TIME_LIMIT, Thoroughness};
use crate::host::HostProblem;

/// Ports on which the guest reports.
const RESULT_PORT: u16 = 0x10;
const EXCEPTION_PORT: u16 = 0x11;

/// What came of the micro-guest.
pub struct Verdict {
    /// The steps that fail; none on a host that can boot a stock kernel.
    pub failed: Vec<FailedStep>,
    /// The end of the virtual machine.
    pub remains: Remains,
}

/// The micro-guest's virtual machine, which a thread gives back to KVM. Dropping this waits for its end.
///
/// That takes KVM some 10 ms, in which it waits for other processors (RCU) and this process can do something else.
#[must_use = "dropped at once, it makes the caller wait"]
#[derive(Debug)]
pub struct Remains(Option<JoinHandle<()>>);

impl Drop for Remains {
    fn drop(&mut self) {
        // The thread has said all it had to say; a panic while it closes files would change nothing.
        drop(self.0.take().map(JoinHandle::join));
    }
}

/// Runs the micro-guest.
///
/// # Errors
/// KVM refuses to create a virtual machine or to run one at all.
pub fn check(kvm: Kvm, thoroughness: Thoroughness) -> Result<Verdict, HostProblem> {
    let (sender, receiver) = mpsc::sync_channel(1);
    // A thread of its own, so that nobody else's signal mask is touched and the timer has a target.
    let thread = std::thread::Builder::new()
        .name("host-check".to_owned())
        .stack_size(256 << 10)
        .spawn(move || match Guest::new(&kvm) {
            Ok(mut guest) => {
                // The receiver waits until it has an answer. The guest ends behind that.
                drop(sender.send(run_steps(&mut guest, thoroughness)));
            }
            Err(problem) => drop(sender.send(Err(problem))),
        })
        .map_err(|source| HostProblem::System {
            action: "start a thread for the micro-guest",
            source,
        })?;
    match receiver.recv() {
        Ok(result) => result.map(|failed| Verdict {
            failed,
            remains: Remains(Some(thread)),
        }),
        Err(mpsc::RecvError) => Err(HostProblem::System {
            action: "run the micro-guest: its thread ended without an answer",
            source: io::ErrorKind::Other.into(),
        }),
    }
}

fn run_steps(guest: &mut Guest, thoroughness: Thoroughness) -> Result<Vec<FailedStep>, HostProblem> {
    let _timer = Timer::start(&guest.vcpu, TIME_LIMIT)?;
    let mut failed = Vec::new();
    for (number, (instructions, feature)) in STEPS.into_iter().enumerate() {
        if feature.is_some_and(|feature| !feature.is_in(guest.leaf_1_ecx)) {
            continue;
        }
        if let Err(failure) = guest.step(number)? {
            let hang = failure == Failure::Hang;
            failed.push(FailedStep {
                instructions,
                failure,
            });
            if hang || thoroughness == Thoroughness::FirstFailure {
                break;
            }
        }
    }
    Ok(failed)
}

fn refused(action: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> HostProblem {
    move |error| HostProblem::System {
        action,
        source: error.into(),
    }
}

struct Guest {
    vcpu: VcpuFd,
    _vm: VmFd,
    memory: Pages,
    blob: Blob,
    leaf_1_ecx: u32,
    sregs: kvm_sregs,
    fpu: kvm_fpu,
    events: kvm_vcpu_events,
}

impl Guest {
    fn new(kvm: &Kvm) -> Result<Self, HostProblem> {
        let vm = kvm.create_vm().map_err(refused("create a virtual machine"))?;
        let mut memory = Pages::new(image::MEMORY_SIZE).map_err(|source| HostProblem::System {
            action: "map the micro-guest's memory",
            source,
        })?;
        let blob = Blob::get();
        image::fill(memory.bytes(), &blob);
        let slot = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: u64::try_from(image::MEMORY_SIZE).unwrap_or(0),
            userspace_addr: u64::try_from(memory.address.addr().get()).unwrap_or(0),
        };
        // SAFETY: the memory stays mapped until `Guest` is dropped, which drops the vCPU first; nothing runs the guest
        // while `Pages::bytes` lends it out, because both need `&mut`.
        unsafe { vm.set_user_memory_region(slot) }.map_err(refused("give memory to the micro-guest"))?;

        let vcpu = vm.create_vcpu(0).map_err(refused("create a vCPU"))?;
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(refused("list the CPU's features"))?;
        vcpu.set_cpuid2(&cpuid)
            .map_err(refused("give CPU features to the micro-guest"))?;
        let leaf_1_ecx = leaf_ecx(&cpuid, 1);
        let sregs = long_mode(
            vcpu.get_sregs().map_err(refused("read a vCPU's registers"))?,
            leaf_1_ecx,
        );
        let fpu = vcpu
            .get_fpu()
            .map_err(refused("read a vCPU's floating-point registers"))?;
        let events = vcpu
            .get_vcpu_events()
            .map_err(refused("read a vCPU's pending events"))?;
        Ok(Self {
            vcpu,
            _vm: vm,
            memory,
            blob,
            leaf_1_ecx,
            sregs,
            fpu,
            events,
        })
    }

    /// Runs one step from fresh registers. The outer error means that nothing can be run, the inner one is the finding.
    fn step(&mut self, number: usize) -> Result<Result<(), Failure>, HostProblem> {
        let Some(rip) = self.blob.step(number) else {
            return Ok(Err(Failure::Exit("no such step".to_owned())));
        };
        image::reset_data(self.memory.bytes());
        let regs = kvm_regs {
            rip,
            rsp: image::STACK_TOP,
            rdi: image::DATA,
            rsi: image::DATA + 0x800,
            rflags: 2,
            ..Default::default()
        };
        // What a failed step may have left pending must not disturb the next one.
        self.vcpu
            .set_vcpu_events(&self.events)
            .map_err(refused("reset a vCPU's pending events"))?;
        self.vcpu
            .set_sregs(&self.sregs)
            .map_err(refused("put a vCPU into 64-bit mode"))?;
        self.vcpu
            .set_fpu(&self.fpu)
            .map_err(refused("reset a vCPU's floating-point registers"))?;
        self.vcpu
            .set_regs(&regs)
            .map_err(refused("set a vCPU's registers"))?;
        self.run()
    }

    fn run(&mut self) -> Result<Result<(), Failure>, HostProblem> {
        let result = match self.vcpu.run() {
            Ok(VcpuExit::IoOut(RESULT_PORT, [0])) => Ok(()),
            Ok(VcpuExit::IoOut(RESULT_PORT, _)) => Err(Failure::WrongResult),
            Ok(VcpuExit::IoOut(EXCEPTION_PORT, [vector, ..])) => Err(Failure::Exception(*vector)),
            Ok(VcpuExit::InternalError) => return self.internal_error().map(Err),
            Ok(exit) => Err(Failure::Exit(format!("{exit:?}"))),
            Err(error) if error.errno() == libc::EINTR => Err(Failure::Hang),
            Err(error) => Err(Failure::Exit(io::Error::from(error).to_string())),
        };
        Ok(result)
    }

    fn internal_error(&mut self) -> Result<Failure, HostProblem> {
        let run = self.vcpu.get_kvm_run();
        // SAFETY: the exit reason was KVM_EXIT_INTERNAL_ERROR, for which KVM fills this member of the union.
        let suberror = unsafe { run.__bindgen_anon_1.internal.suberror };
        let rip = self
            .vcpu
            .get_regs()
            .map_err(refused("read a vCPU's registers"))?
            .rip;
        let start = usize::try_from(rip).unwrap_or(usize::MAX);
        let memory = self.memory.bytes();
        // No x86 instruction is longer than 15 bytes; half of that is enough to recognise one.
        let bytes = memory
            .get(start..)
            .map_or(&[][..], |rest| &rest[..rest.len().min(8)])
            .to_vec();
        Ok(Failure::Emulation { suberror, rip, bytes })
    }
}

fn leaf_ecx(cpuid: &CpuId, leaf: u32) -> u32 {
    let entry = cpuid
        .as_slice()
        .iter()
        .find(|entry| entry.function == leaf && entry.index == 0);
    entry.map_or(0, |entry| entry.ecx)
}

/// System registers of 64-bit mode with paging, ring 0.
fn long_mode(mut sregs: kvm_sregs, leaf_1_ecx: u32) -> kvm_sregs {
    const CR0: u64 = 1 << 31 | 1 << 16 | 1 << 5 | 1 << 4 | 1 << 1 | 1; // PG WP NE ET MP PE
    const CR4_PAE: u64 = 1 << 5;
    const CR4_OSFXSR_OSXMMEXCPT: u64 = 3 << 9;
    const CR4_OSXSAVE: u64 = 1 << 18;
    const EFER: u64 = 1 << 10 | 1 << 8 | 1; // LMA LME SCE
    const XSAVE: u32 = 1 << 26;
    let segment = |selector, type_, long| kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: 1 - long,
        s: 1,
        l: long,
        g: 1,
        ..Default::default()
    };
    sregs.cs = segment(image::KERNEL_CODE, 0xb, 1);
    let data = segment(image::KERNEL_DATA, 0x3, 0);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment {
        base: image::TSS,
        limit: image::TSS_LIMIT,
        selector: image::TASK,
        type_: 0xb,
        present: 1,
        ..Default::default()
    };
    (sregs.gdt.base, sregs.gdt.limit) = (image::GDT, image::GDT_LIMIT);
    (sregs.idt.base, sregs.idt.limit) = (image::IDT, image::IDT_LIMIT);
    sregs.cr0 = CR0;
    sregs.cr3 = image::PML4;
    let xsave = if leaf_1_ecx & XSAVE == 0 { 0 } else { CR4_OSXSAVE };
    sregs.cr4 = CR4_PAE | CR4_OSFXSR_OSXMMEXCPT | xsave;
    sregs.efer = EFER;
    sregs
}

/// Anonymous memory of this process.
struct Pages {
    address: NonNull<u8>,
    length: usize,
}

impl Pages {
    fn new(length: usize) -> io::Result<Self> {
        use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
        let flags = MapFlags::PRIVATE;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches nothing that exists.
        let address = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                flags,
            )
        }?;
        let address = NonNull::new(address.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { address, length })
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the mapping has this length and lives as long as `self`; the guest, the only other writer, runs only
        // within calls that borrow `Guest` mutably, so not while this borrow lasts.
        unsafe { std::slice::from_raw_parts_mut(self.address.as_ptr(), self.length) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length; nobody holds a borrow of it when it is dropped.
        // A failure would leak memory only.
        let _ = unsafe { rustix::mm::munmap(self.address.as_ptr().cast(), self.length) };
    }
}

/// Ends a KVM_RUN of this thread that lasts too long.
///
/// The signal is blocked in this thread and let through only by KVM_RUN, which then returns EINTR; it is never delivered,
/// so there is no handler.
struct Timer(libc::timer_t);

/// `struct kvm_signal_mask` with the kernel's sigset of 8 bytes.
#[repr(C)]
struct SignalMask {
    length: u32,
    set: [u8; 8],
}

/// _IOW(KVMIO, 0x8b, struct kvm_signal_mask)
const KVM_SET_SIGNAL_MASK: libc::Ioctl = 0x4004_ae8b;

impl Timer {
    fn start(vcpu: &VcpuFd, limit: Duration) -> Result<Self, HostProblem> {
        let system = |action| move |source| HostProblem::System { action, source };
        let signal = libc::SIGRTMAX() - 1;
        block(signal).map_err(system("block a signal"))?;
        let mask = SignalMask {
            length: 8,
            set: (!(1_u64 << (signal - 1))).to_le_bytes(),
        };
        // SAFETY: `mask` is what this ioctl reads: a length and that many bytes.
        let result = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_SIGNAL_MASK, &raw const mask) };
        if result != 0 {
            return Err(system("set a vCPU's signal mask")(io::Error::last_os_error()));
        }
        Self::arm(signal, limit).map_err(system("start a timer"))
    }

    /// Makes a timer that sends `signal` to this thread after `limit`.
    fn arm(signal: i32, limit: Duration) -> io::Result<Self> {
        // SAFETY: all-zero is a valid sigevent.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = signal;
        // SAFETY: gettid has no preconditions.
        event.sigev_notify_thread_id = unsafe { libc::gettid() };
        let mut id: libc::timer_t = std::ptr::null_mut();
        // SAFETY: both pointers are valid for the call.
        if unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut id) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let timer = Self(id);
        let once = libc::itimerspec {
            it_interval: libc::timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
            it_value: libc::timespec {
                tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(limit.subsec_nanos()),
            },
        };
        // SAFETY: the timer exists and the pointer is valid for the call; the old value is not asked for.
        if unsafe { libc::timer_settime(timer.0, 0, &raw const once, std::ptr::null_mut()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(timer)
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        // SAFETY: made by timer_create and deleted only here. A failure would leave a timer for a thread that is about to
        // end, which the kernel then drops.
        let _ = unsafe { libc::timer_delete(self.0) };
    }
}

/// Blocks `signal` in this thread.
fn block(signal: i32) -> io::Result<()> {
    // SAFETY: `set` is initialised by sigemptyset before it is used; all pointers are valid for the calls.
    let result = unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, signal);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut())
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(result))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_guest_that_does_not_end_is_stopped_in_time() {
        let Ok(kvm) = Kvm::new() else {
            eprintln!("no /dev/kvm here");
            return;
        };
        let started = Instant::now();
        let result = std::thread::spawn(move || {
            let mut guest = Guest::new(&kvm).unwrap();
            let step = guest.blob.step(0).unwrap();
            let start = usize::try_from(step).unwrap();
            guest.memory.bytes()[start..start + 2].copy_from_slice(&[0xeb, 0xfe]); // jmp to itself
            let _timer = Timer::start(&guest.vcpu, Duration::from_millis(100)).unwrap();
            guest.step(0).unwrap()
        });
        assert_eq!(result.join().unwrap(), Err(Failure::Hang));
        assert!(
            started.elapsed() < Duration::from_secs(2),
            "{:?}",
            started.elapsed()
        );
    }
}
