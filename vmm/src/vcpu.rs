//! vCPU threads: run the guest until it exits, answer the exit, run it again.
//!
//! All vCPUs of a machine share one [`Gate`], which says whether they may run:
//!
//! ```text
//!               pause()                     stop()
//!   Paused ◄──────────────► Running ──────────────────► Stopped (threads end)
//!               resume()        └─ a vCPU asks for reset or power-off: the gate closes at once, so that
//!                                  no vCPU enters the guest again before the main loop has decided
//! ```
//!
//! A vCPU that is inside KVM_RUN is fetched by a signal. The signal alone could arrive just before the ioctl and be lost,
//! so its handler also sets `immediate_exit` in the vCPU's shared page: whichever side of the system call it hits, KVM_RUN
//! returns. A waiting guest (HLT) sleeps in the kernel and does not wake this process.

use std::cell::Cell;
use std::io;
use std::ptr;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_bindings::kvm_run;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::bus::Bus;

/// Why a vCPU wants the machine to stop.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, thiserror::Error)]
pub enum VcpuFault {
    /// The guest lost control of itself so far that the processor shut down.
    #[error("triple fault on vCPU {vcpu}")]
    TripleFault {
        /// Number of the vCPU.
        vcpu: u8,
    },
    /// KVM met something it cannot do, for example an instruction that it cannot emulate.
    #[error("KVM cannot continue vCPU {vcpu} ({what}) at instruction {rip:#x}")]
    Internal {
        /// Number of the vCPU.
        vcpu: u8,
        /// KVM's reason.
        what: String,
        /// Guest instruction pointer.
        rip: u64,
    },
    /// KVM_RUN itself failed.
    #[error("vCPU {vcpu} cannot run: {what}")]
    Run {
        /// Number of the vCPU.
        vcpu: u8,
        /// The system's answer.
        what: String,
    },
}

/// Where vCPUs report what they cannot answer themselves. Called on vCPU threads.
pub trait VcpuEvents: Send + Sync {
    /// The vCPU cannot go on; it waits at the gate afterwards.
    fn fault(&self, fault: VcpuFault);
}

const RUNNING: u8 = 0;
const PAUSED: u8 = 1;
const STOPPED: u8 = 2;

/// Says whether vCPUs may run, and waits for them.
#[derive(Debug)]
pub struct Gate {
    state: AtomicU8,
    /// Number of vCPU threads that wait at the gate.
    waiting: Mutex<usize>,
    changed: Condvar,
}

impl Gate {
    /// A closed gate.
    pub fn new() -> Self {
        Gate {
            state: AtomicU8::new(PAUSED),
            waiting: Mutex::new(0),
            changed: Condvar::new(),
        }
    }

    /// Closes the gate without waiting: vCPUs stop when they next come by. Does nothing once stopped.
    pub fn close(&self) {
        let _ = self
            .state
            .compare_exchange(RUNNING, PAUSED, Ordering::SeqCst, Ordering::SeqCst);
    }

    fn lock(&self) -> MutexGuard<'_, usize> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, state: u8) {
        let _guard = self.lock();
        self.state.store(state, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// Waits until vCPUs may run. False: they shall end.
    fn pass(&self) -> bool {
        match self.state.load(Ordering::SeqCst) {
            RUNNING => return true,
            STOPPED => return false,
            _ => {}
        }
        let mut waiting = self.lock();
        *waiting += 1;
        self.changed.notify_all();
        while self.state.load(Ordering::SeqCst) == PAUSED {
            waiting = self.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
        *waiting -= 1;
        self.state.load(Ordering::SeqCst) == RUNNING
    }
}

impl Default for Gate {
    fn default() -> Self {
        Self::new()
    }
}

/// What a vCPU thread needs besides its vCPU.
#[derive(Clone)]
pub struct VcpuContext {
    /// Port I/O.
    pub ports: Arc<Bus>,
    /// Memory-mapped I/O.
    pub mmio: Arc<Bus>,
    /// Where faults are reported.
    pub events: Arc<dyn VcpuEvents>,
    /// Runs first on each vCPU thread: pins it, installs its seccomp filter.
    pub on_start: Arc<dyn Fn(u8) -> io::Result<()> + Send + Sync>,
}

/// Counts of what brought vCPUs out to this process (not of exits that the kernel handled).
#[derive(Debug, Default)]
pub struct ExitCounters {
    /// Port reads and writes.
    pub ports: AtomicU64,
    /// Memory-mapped reads and writes.
    pub mmio: AtomicU64,
    /// Everything else, interruptions by signal included.
    pub other: AtomicU64,
}

/// All vCPU threads of a machine.
#[derive(Debug)]
pub struct Vcpus {
    gate: Arc<Gate>,
    threads: Vec<JoinHandle<VcpuFd>>,
    counters: Arc<ExitCounters>,
}

/// How long vCPUs may take to come to the gate before the next kick; a kick can be late, never lost.
const KICK_PERIOD: Duration = Duration::from_millis(100);

impl Vcpus {
    /// Starts a thread for each vCPU; they wait at the closed gate.
    ///
    /// # Errors
    /// A thread cannot be started, or its preparation failed. Those already started are ended.
    pub fn start(vcpus: Vec<VcpuFd>, gate: Arc<Gate>, context: &VcpuContext) -> io::Result<Self> {
        register_signal_handler(kick_signal(), on_kick)
            .map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        let mut started = Vcpus {
            gate,
            threads: Vec::new(),
            counters: Arc::default(),
        };
        for (index, vcpu) in (0..).zip(vcpus) {
            let (ready, prepared) = std::sync::mpsc::sync_channel(1);
            let (gate, context, counters) = (started.gate.clone(), context.clone(), started.counters.clone());
            let thread = std::thread::Builder::new()
                .name(format!("vcpu{index}"))
                .spawn(move || {
                    let result = (context.on_start)(index);
                    let failed = result.is_err();
                    let _ = ready.send(result);
                    if failed {
                        vcpu
                    } else {
                        Runner {
                            index,
                            vcpu,
                            gate,
                            context,
                            counters,
                        }
                        .run()
                    }
                })?;
            started.threads.push(thread);
            prepared
                .recv()
                .unwrap_or_else(|_| Err(io::Error::other("the vCPU thread ended at once")))?;
        }
        Ok(started)
    }

    /// Lets all vCPUs run.
    pub fn resume(&self) {
        self.gate.set(RUNNING);
    }

    /// Stops all vCPUs at an instruction boundary and waits until none is in the guest.
    pub fn pause(&self) {
        self.gate.close();
        let mut waiting = self.gate.lock();
        while *waiting < self.threads.iter().filter(|thread| !thread.is_finished()).count() {
            drop(waiting);
            self.kick();
            waiting = self.gate.lock();
            let running = self.threads.iter().filter(|thread| !thread.is_finished()).count();
            if *waiting < running {
                waiting = self
                    .gate
                    .changed
                    .wait_timeout(waiting, KICK_PERIOD)
                    .unwrap_or_else(PoisonError::into_inner)
                    .0;
            }
        }
    }

    /// Exits to this process so far.
    pub fn counters(&self) -> &ExitCounters {
        &self.counters
    }

    fn kick(&self) {
        for thread in self.threads.iter().filter(|thread| !thread.is_finished()) {
            // Fails only for a thread that has just ended.
            let _ = thread.kill(kick_signal());
        }
    }

    /// Ends all vCPU threads and waits for them.
    pub fn stop(&mut self) {
        self.gate.set(STOPPED);
        while self.threads.iter().any(|thread| !thread.is_finished()) {
            self.kick();
            let waiting = self.gate.lock();
            let _ = self.gate.changed.wait_timeout(waiting, Duration::from_millis(2));
        }
        for thread in self.threads.drain(..) {
            let name = thread.thread().name().unwrap_or("vcpu").to_owned();
            if thread.join().is_err() {
                tracing::error!(thread = name, "a vCPU thread had panicked");
            }
        }
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.stop();
    }
}

fn kick_signal() -> libc::c_int {
    SIGRTMIN()
}

thread_local! {
    /// The `immediate_exit` byte of the vCPU that this thread runs.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

extern "C" fn on_kick(_signal: libc::c_int, _info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // Nothing here but a load and a store: the handler may interrupt any code of this thread.
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: set by `Runner::run` to a byte of the vCPU's mapped page, and cleared before the vCPU goes away.
        unsafe { flag.write_volatile(1) };
    }
}

/// One vCPU thread at work.
struct Runner {
    index: u8,
    vcpu: VcpuFd,
    gate: Arc<Gate>,
    context: VcpuContext,
    counters: Arc<ExitCounters>,
}

impl Runner {
    fn run(mut self) -> VcpuFd {
        IMMEDIATE_EXIT.set(&raw mut self.vcpu.get_kvm_run().immediate_exit);
        loop {
            // This order lets no kick get lost: the gate is closed before the kick, and the flag is cleared before the gate
            // is looked at.
            self.vcpu.set_kvm_immediate_exit(0);
            if !self.gate.pass() {
                break;
            }
            if let Err(fault) = self.step() {
                self.gate.close();
                self.context.events.fault(fault);
            }
        }
        IMMEDIATE_EXIT.set(ptr::null_mut());
        self.vcpu
    }

    /// Enters the guest once and answers its exit.
    fn step(&mut self) -> Result<(), VcpuFault> {
        let vcpu = self.index;
        let internal = |what: String, fd: &VcpuFd| VcpuFault::Internal {
            vcpu,
            what,
            rip: fd.get_regs().map_or(0, |registers| registers.rip),
        };
        let page: *const kvm_run = self.vcpu.get_kvm_run();
        let counter = match self.vcpu.run() {
            Ok(VcpuExit::IoOut(port, data)) => {
                for element in data.chunks(port_width(page)) {
                    self.context.ports.write(u64::from(port), element);
                }
                &self.counters.ports
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                for element in data.chunks_mut(port_width(page)) {
                    self.context.ports.read(u64::from(port), element);
                }
                &self.counters.ports
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                self.context.mmio.write(address, data);
                &self.counters.mmio
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                self.context.mmio.read(address, data);
                &self.counters.mmio
            }
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt) => &self.counters.other,
            Ok(VcpuExit::Shutdown) => return Err(VcpuFault::TripleFault { vcpu }),
            Ok(VcpuExit::SystemEvent(kind, _)) => {
                return Err(internal(format!("system event {kind}"), &self.vcpu));
            }
            Ok(VcpuExit::FailEntry(reason, _)) => {
                return Err(internal(
                    format!("the processor refuses to enter the guest, reason {reason:#x}"),
                    &self.vcpu,
                ));
            }
            Ok(VcpuExit::InternalError) => {
                let what = internal_error(&mut self.vcpu);
                return Err(internal(what, &self.vcpu));
            }
            Ok(other) => {
                let what = format!("unexpected exit {other:?}");
                return Err(internal(what, &self.vcpu));
            }
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => &self.counters.other,
            Err(error) => {
                return Err(VcpuFault::Run {
                    vcpu,
                    what: error.to_string(),
                });
            }
        };
        counter.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// Bytes per element of the port access that just exited: a string instruction (`rep outsb`) brings many elements at once.
fn port_width(page: *const kvm_run) -> usize {
    // SAFETY: `page` is the vCPU's shared page, mapped as long as the vCPU lives; the vCPU is out of the guest with a port
    // exit, so the kernel has filled this member of the union and does not change it.
    let width = unsafe { (*page).__bindgen_anon_1.io.size };
    usize::from(width.max(1))
}

/// Reads what KVM says of an internal error (KVM API §5, `KVM_EXIT_INTERNAL_ERROR`).
fn internal_error(vcpu: &mut VcpuFd) -> String {
    // SAFETY: after KVM_EXIT_INTERNAL_ERROR the kernel has filled this member of the union.
    let error = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal };
    let what = match error.suberror {
        1 => "an instruction that it cannot emulate",
        2 => "two exceptions at once",
        3 => "an exit while an event was being delivered",
        4 => "an unexpected exit reason",
        _ => "an internal error",
    };
    let count = usize::try_from(error.ndata).unwrap_or(0).min(error.data.len());
    format!(
        "{what}, suberror {}, data {:x?}",
        error.suberror,
        &error.data[..count]
    )
}
