//! What happens at a system call that the filter forbids: one clear line, the terminal restored, the end.
//!
//! The kernel sends SIGSYS to the thread instead of making the call. The handler allocates nothing and takes no lock: the
//! thread may have been anywhere.

use std::fmt::{self, Write};
use std::io;
use std::mem;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

use super::names;

/// Exit status of a process that was ended for a violation.
pub const EXIT_STATUS: i32 = 1;
/// `si_code` of a SIGSYS that seccomp sent.
const SYS_SECCOMP: i32 = 1;

/// What to do before the message: a function without arguments, or null.
static BEFORE: AtomicPtr<()> = AtomicPtr::new(ptr::null_mut());

/// Sets what is done before the message of a violation is written, for example restoring the terminal. The function runs in
/// a signal handler: it must not allocate, lock or panic, and make only system calls that every thread may make.
pub fn before_message(function: fn()) {
    BEFORE.store(function as *mut (), Ordering::SeqCst);
}

/// Installs the handler, for the whole process.
pub(super) fn install_handler() -> io::Result<()> {
    // SAFETY: all zeroes are a valid sigaction, which is then filled; the handler keeps to what a handler may do.
    let result = unsafe {
        let mut action = mem::zeroed::<libc::sigaction>();
        action.sa_sigaction = on_violation as *const () as libc::sighandler_t;
        // On the alternate stack where there is one: small stacks need not have room for the message.
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigfillset(&raw mut action.sa_mask);
        libc::sigaction(libc::SIGSYS, &raw const action, ptr::null_mut())
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

extern "C" fn on_violation(_signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel gives a valid siginfo to a handler with SA_SIGINFO.
    if unsafe { (*info).si_code } != SYS_SECCOMP {
        // Somebody sent the signal with `kill`; it means nothing.
        return;
    }
    let before = BEFORE.load(Ordering::SeqCst);
    if !before.is_null() {
        // SAFETY: only `before_message` stores here, and only a function of this type.
        let before = unsafe { mem::transmute::<*mut (), fn()>(before) };
        before();
    }
    // SAFETY: the kernel gives a valid ucontext to a handler with SA_SIGINFO.
    let registers = unsafe { &(*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let register = |name: libc::c_int| {
        usize::try_from(name)
            .ok()
            .and_then(|at| registers.get(at))
            .copied()
            .unwrap_or(0)
    };
    let mut line = Line::default();
    // Cannot fail: what does not fit is cut off.
    let _ = describe(
        &mut line,
        register(libc::REG_RAX),
        [
            register(libc::REG_RDI),
            register(libc::REG_RSI),
            register(libc::REG_RDX),
        ],
    );
    // SAFETY: writes initialised bytes; nobody is left to be told if that fails. Then the process ends, without running any
    // more of it.
    unsafe {
        libc::write(libc::STDERR_FILENO, line.bytes.as_ptr().cast(), line.length);
        libc::_exit(EXIT_STATUS)
    }
}

/// Describes a violation by the calling thread in one line.
fn describe(line: &mut Line, call: i64, arguments: [i64; 3]) -> fmt::Result {
    let mut thread = [0_u8; 16];
    // SAFETY: the name of a thread has at most 16 bytes with its final zero.
    unsafe { libc::prctl(libc::PR_GET_NAME, thread.as_mut_ptr()) };
    let end = thread.iter().position(|byte| *byte == 0).unwrap_or(thread.len());
    line.write_str("smsvmm: thread ")?;
    for byte in &thread[..end] {
        line.write_char(if byte.is_ascii_graphic() {
            char::from(*byte)
        } else {
            '?'
        })?;
    }
    write!(line, " made the forbidden system call {call} (")?;
    line.write_str(names::name(call).unwrap_or("unknown"))?;
    let [first, second, third] = arguments;
    writeln!(
        line,
        ") with arguments {first:#x}, {second:#x}, {third:#x}; the process ends. If the call should be allowed, \
         report this line; sandbox.seccomp = \"log\" (SMSVMM_SECCOMP=log, if it is no machine) runs without enforcement"
    )
}

/// A line on the stack; what is too long is cut off.
struct Line {
    bytes: [u8; 512],
    length: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self {
            bytes: [0; 512],
            length: 0,
        }
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if let Some(place) = self.bytes.get_mut(self.length) {
                *place = byte;
                self.length += 1;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_violation_is_described_in_one_line() {
        let mut line = Line::default();
        describe(&mut line, libc::SYS_socket, [2, 1, 0]).unwrap();
        let text = std::str::from_utf8(&line.bytes[..line.length]).unwrap();
        assert!(
            text.contains("forbidden system call 41 (socket) with arguments 0x2, 0x1, 0x0"),
            "{text}"
        );
        assert!(text.ends_with("without enforcement\n"), "{text}");
        assert_eq!(text.lines().count(), 1);
    }

    #[test]
    fn a_line_that_is_too_long_is_cut_off() {
        let mut line = Line::default();
        for _ in 0..100 {
            line.write_str("0123456789").unwrap();
        }
        assert_eq!(line.length, line.bytes.len());
    }
}
