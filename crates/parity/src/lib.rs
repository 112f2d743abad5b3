//! The arithmetic of RAID-5 and RAID-6, bit-compatible with Linux md.
//!
//! A stripe has n data columns D<sub>0</sub> … D<sub>n-1</sub>, n ≤ 255, and of them are made
//!
//! ```text
//! P = D0 + D1 + … + Dn-1                  lost columns: any one, with P alone
//! Q = g^0·D0 + g^1·D1 + … + g^(n-1)·Dn-1  lost columns: any two, with P and Q
//! ```
//!
//! for each byte for itself, in the field GF(2^8) with the polynomial 0x11d and the generator g = 2, where + and -
//! are exclusive or (H. Peter Anvin, *The mathematics of RAID-6*). The index of a column is its place in the stripe's
//! logical order, the same for a column's whole life; on which device it is, and how P and Q rotate, is the caller's
//! business.
//!
//! # What the volume manager does with it
//!
//! | it does | with |
//! |---|---|
//! | full-stripe write, resync | RAID-5 [`xor`], RAID-6 [`pq`] over all data columns |
//! | reconstruct-write | the same, after it has read the columns that are not written |
//! | read-modify-write | delta = old + new by [`xor`]; then [`xor_into`] P and [`update_q`] Q for each written column |
//! | scrub | [`xor`] or [`pq`] into scratch memory, then compare |
//! | degraded read, rebuild | one of the following |
//!
//! | lost | with |
//! |---|---|
//! | one data column | [`recover_from_p`] (cheapest), or [`recover_from_q`] when P is not to be trusted |
//! | P | [`xor`] |
//! | Q, or P and Q | [`pq`] |
//! | one data column and P | [`recover_with_p`] |
//! | one data column and Q | [`recover_with_q`] |
//! | two data columns | [`recover_two`] |
//!
//! Columns are given as `Option`s: `None` counts as zeroes, be it because the column is lost or because the stripe at
//! the end of a volume has none there. Slices may have any alignment and any length, but all the same length in one
//! call; a caller with scattered buffers calls once per piece, since no byte depends on its neighbours.
//!
//! # How it is done
//!
//! Every operation is one pass: each byte is read once and written once, with the sums in registers ([`Level`] says
//! which). Q is built by Horner's rule, so that generation needs doublings only: a shift, and an exclusive or with
//! 0x1d for those bytes that lost their bit 7. Multiplication by other constants takes two shuffles with tables of 16
//! products (one for each nibble) or one GFNI instruction. The level is chosen once per process; [`Parity`] gives
//! each to tests and benches.
//!
//! # Panics
//!
//! All functions panic if lengths differ, if there are more than 255 data columns, if an index is out of range, or if a
//! column that is to be recovered is given too: these are mistakes of the program, never of a guest or a disk.

mod field;
mod kernel;
mod level;
mod scalar;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use level::{Level, Parity};

/// target += source: P after a change of one column by `source` = old + new, or the delta itself.
pub fn xor_into(target: &mut [u8], source: &[u8]) {
    Parity::best().xor_into(target, source);
}

/// target += the sum of `sources`, in one pass.
pub fn xor_all_into(target: &mut [u8], sources: &[&[u8]]) {
    Parity::best().xor_all_into(target, sources);
}

/// target = the sum of `sources`, in one pass: P of a whole stripe. Of no sources it is zero.
pub fn xor(target: &mut [u8], sources: &[&[u8]]) {
    Parity::best().xor(target, sources);
}

/// P and Q of a whole stripe; what they held before does not matter.
pub fn pq(p: &mut [u8], q: &mut [u8], data: &[Option<&[u8]>]) {
    Parity::best().pq(p, q, data);
}

/// Q after data column `index` (0 to 254) changed by `delta` = old + new: Q += g^index·delta.
pub fn update_q(q: &mut [u8], index: usize, delta: &[u8]) {
    Parity::best().update_q(q, index, delta);
}

/// The one lost data column from P: D<sub>x</sub> = P + the sum of the others. RAID-5 needs no more than this.
///
/// `data` has `None` in the place of the lost column (its index does not matter here).
pub fn recover_from_p(lost: &mut [u8], p: &[u8], data: &[Option<&[u8]>]) {
    Parity::best().recover_from_p(lost, p, data);
}

/// The one lost data column from Q: D<sub>x</sub> = g^-x·(Q + Q<sub>x</sub>), where Q<sub>x</sub> is the Q of the
/// others.
///
/// `data` has `None` at `index`.
pub fn recover_from_q(lost: &mut [u8], index: usize, q: &[u8], data: &[Option<&[u8]>]) {
    Parity::best().recover_from_q(lost, index, q, data);
}

/// The lost data column `index` and the lost P, from Q: the column as in [`recover_from_q`], then
/// P = P<sub>x</sub> + D<sub>x</sub>, where P<sub>x</sub> is the P of the others.
pub fn recover_with_p(lost: &mut [u8], p: &mut [u8], index: usize, q: &[u8], data: &[Option<&[u8]>]) {
    Parity::best().recover_with_p(lost, p, index, q, data);
}

/// The lost data column `index` and the lost Q, from P: the column as in [`recover_from_p`], then
/// Q = Q<sub>x</sub> + g^x·D<sub>x</sub>, where Q<sub>x</sub> is the Q of the others.
pub fn recover_with_q(lost: &mut [u8], q: &mut [u8], index: usize, p: &[u8], data: &[Option<&[u8]>]) {
    Parity::best().recover_with_q(lost, q, index, p, data);
}

/// The two lost data columns x and y = `indexes`, in any order, from P and Q.
///
/// With P<sub>xy</sub> and Q<sub>xy</sub> of the others, P + P<sub>xy</sub> = D<sub>x</sub> + D<sub>y</sub> and
/// Q + Q<sub>xy</sub> = g^x·D<sub>x</sub> + g^y·D<sub>y</sub>. Solved:
///
/// ```text
/// Dx = A·(P + Pxy) + B·(Q + Qxy)    A = g^(y-x) / (g^(y-x) + 1)    B = g^-x / (g^(y-x) + 1)
/// Dy = (P + Pxy) + Dx
/// ```
///
/// `data` has `None` at both indexes; `lost` is in the order of `indexes`.
pub fn recover_two(lost: [&mut [u8]; 2], indexes: [usize; 2], p: &[u8], q: &[u8], data: &[Option<&[u8]>]) {
    Parity::best().recover_two(lost, indexes, p, q, data);
}
