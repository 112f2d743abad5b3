//! The micro-guest's memory: its code and the tables that 64-bit mode needs.
//!
//! ```text
//!   0x01000 PML4   0x02000 PDPT   0x03000 PD   0x04000 PT (identity, 4 KiB pages)
//!   0x05000 GDT    0x06000 IDT    0x07000 TSS
//!   0x08000 code (up to 12 KiB)   0x0b000 data   0x0d000 stack   0x10000 user page
//!   0x12000 end; nothing is mapped beyond, so that 0x30000 faults
//! ```

/// Guest-physical addresses; all below 64 KiB but the user page.
pub(super) const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const PT: u64 = 0x4000;
pub(super) const GDT: u64 = 0x5000;
pub(super) const IDT: u64 = 0x6000;
pub(super) const TSS: u64 = 0x7000;
pub(super) const CODE: u64 = 0x8000;
pub(super) const DATA: u64 = 0xb000;
pub(super) const STACK_TOP: u64 = 0xe000;
const USER: u64 = 0x1_0000;
/// Bytes of memory that the micro-guest has.
pub(super) const MEMORY_SIZE: usize = 0x1_2000;

/// Segment selectors: the order is what SYSCALL and SYSRET demand (AMD64 APM vol. 2 §6.1.1).
pub(super) const KERNEL_CODE: u16 = 0x08;
pub(super) const KERNEL_DATA: u16 = 0x10;
pub(super) const TASK: u16 = 0x30;
/// Descriptors: null, kernel code, kernel data, user code (32 bit, unused), user data, user code; the TSS takes two.
const DESCRIPTORS: [u64; 6] = [
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x00cf_fb00_0000_ffff,
    0x00cf_f300_0000_ffff,
    0x00af_fb00_0000_ffff,
];
pub(super) const GDT_LIMIT: u16 = 8 * 8 - 1;
/// 32 gates of 16 bytes.
pub(super) const IDT_LIMIT: u16 = 32 * 16 - 1;
pub(super) const TSS_LIMIT: u32 = 0x67;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;
const USER_PAGE: u64 = 4;
const ACCESSED_DIRTY: u64 = 0x60;

std::arch::global_asm!(include_str!("guest.s"));

unsafe extern "C" {
    static smsvmm_microguest_code: u8;
    static smsvmm_microguest_stubs: u8;
    static smsvmm_microguest_breakpoint: u8;
    static smsvmm_microguest_undefined: u8;
    static smsvmm_microguest_page_fault: u8;
    static smsvmm_microguest_steps: u8;
    static smsvmm_microguest_end: u8;
}

/// The assembled guest, as it lies in this program's read-only data.
pub(super) struct Blob {
    code: &'static [u8],
}

impl Blob {
    pub(super) fn get() -> Self {
        let start = &raw const smsvmm_microguest_code;
        let length = offset(&raw const smsvmm_microguest_end);
        // SAFETY: guest.s puts both labels into one section, the end after the start; nothing ever writes there.
        let code = unsafe { std::slice::from_raw_parts(start, length) };
        Self { code }
    }

    /// Guest address at which step `number` starts.
    pub(super) fn step(&self, number: usize) -> Option<u64> {
        let table = &self.code[offset(&raw const smsvmm_microguest_steps)..];
        let entry = table.chunks_exact(4).nth(number)?;
        let entry = u32::from_le_bytes(entry.try_into().ok()?);
        Some(CODE + u64::from(entry))
    }

    /// Number of steps in the guest's table.
    #[cfg(test)]
    pub(super) fn steps(&self) -> usize {
        (self.code.len() - offset(&raw const smsvmm_microguest_steps)) / 4
    }
}

/// Distance of a label from the start of the guest's code.
fn offset(label: *const u8) -> usize {
    label.addr() - (&raw const smsvmm_microguest_code).addr()
}

/// Fills `memory` ([`MEMORY_SIZE`] bytes of zeroes) with code and tables.
pub(super) fn fill(memory: &mut [u8], blob: &Blob) {
    put(memory, CODE, blob.code);
    put(memory, USER, &[0x0f, 0x05, 0xf4]); // syscall; hlt

    let table = PRESENT | WRITABLE | USER_PAGE | ACCESSED_DIRTY;
    put(memory, PML4, &(PDPT | table).to_le_bytes());
    put(memory, PDPT, &(PD | table).to_le_bytes());
    put(memory, PD, &(PT | table).to_le_bytes());
    for page in (0x1000..=USER).step_by(0x1000) {
        let user = if page >= USER { USER_PAGE } else { 0 };
        let entry = page | PRESENT | WRITABLE | ACCESSED_DIRTY | user;
        put(memory, PT + page / 0x1000 * 8, &entry.to_le_bytes());
    }

    for (number, descriptor) in (0_u64..).zip(DESCRIPTORS) {
        put(memory, GDT + number * 8, &descriptor.to_le_bytes());
    }
    // Busy 64-bit TSS (type 0xb), present, base and limit below 64 KiB.
    let tss = u64::from(TSS_LIMIT) | TSS << 16 | 0x8b << 40;
    put(memory, GDT + u64::from(TASK), &tss.to_le_bytes());
    put(memory, TSS + 4, &STACK_TOP.to_le_bytes()); // RSP0
    put(memory, TSS + 102, &104_u16.to_le_bytes()); // no I/O permission map

    for vector in 0..32 {
        let stub = CODE + to_u64(offset(&raw const smsvmm_microguest_stubs)) + vector * 8;
        gate(memory, vector, stub);
    }
    for (vector, handler) in [
        (3, &raw const smsvmm_microguest_breakpoint),
        (6, &raw const smsvmm_microguest_undefined),
        (14, &raw const smsvmm_microguest_page_fault),
    ] {
        gate(memory, vector, CODE + to_u64(offset(handler)));
    }
}

/// An interrupt gate (AMD64 APM vol. 2 §4.8.4) to `target`, which lies below 64 KiB.
fn gate(memory: &mut [u8], vector: u64, target: u64) {
    let low = (target & 0xffff) | u64::from(KERNEL_CODE) << 16 | 0x8e00 << 32;
    put(memory, IDT + vector * 16, &low.to_le_bytes());
}

/// The data page as each step finds it: zeroes, and the default of MXCSR where one step loads it from.
pub(super) fn reset_data(memory: &mut [u8]) {
    put(memory, DATA, &[0; 0x1000]);
    put(memory, DATA + 0x810, &0x1f80_u32.to_le_bytes());
}

fn put(memory: &mut [u8], address: u64, bytes: &[u8]) {
    let start = usize::try_from(address).unwrap_or(usize::MAX);
    memory[start..start + bytes.len()].copy_from_slice(bytes);
}

fn to_u64(value: usize) -> u64 {
    u64::try_from(value).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_fits_and_stubs_are_where_the_gates_point() {
        let blob = Blob::get();
        assert!(to_u64(blob.code.len()) <= DATA - CODE);
        let stubs = offset(&raw const smsvmm_microguest_stubs);
        for vector in 0..32_u8 {
            // push imm8
            let at = stubs + usize::from(vector) * 8;
            assert_eq!(blob.code[at..at + 2], [0x6a, vector]);
        }
    }
}
