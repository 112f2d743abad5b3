//! The scalar twin: every operation byte by byte, as the formulae are written.
//!
//! It is what the SIMD levels are compared with, what does the last bytes that fill no vector, and what runs where
//! there is no SIMD. Each function works on the bytes from `from` to the end; lengths were checked by the caller.

use crate::field::{double, multiply};
use crate::level::Columns;

pub(crate) fn xor(target: &mut [u8], add: bool, sources: &[&[u8]], from: usize) {
    for (at, byte) in target.iter_mut().enumerate().skip(from) {
        let start = if add { *byte } else { 0 };
        *byte = sources.iter().fold(start, |sum, source| sum ^ source[at]);
    }
}

pub(crate) fn add_product(target: &mut [u8], factor: u8, source: &[u8], from: usize) {
    for (byte, other) in target.iter_mut().zip(source).skip(from) {
        *byte ^= multiply(factor, *other);
    }
}

pub(crate) fn pq(p: &mut [u8], q: &mut [u8], data: Columns<'_>, from: usize) {
    for at in from..p.len() {
        (p[at], q[at]) = sums(data, at);
    }
}

pub(crate) fn recover_from_p(lost: &mut [u8], p: &[u8], data: Columns<'_>, from: usize) {
    for at in from..lost.len() {
        lost[at] = p[at] ^ sums(data, at).0;
    }
}

pub(crate) fn recover_from_q(lost: &mut [u8], q: &[u8], data: Columns<'_>, factor: u8, from: usize) {
    for at in from..lost.len() {
        lost[at] = multiply(factor, q[at] ^ sums(data, at).1);
    }
}

pub(crate) fn recover_with_p(
    lost: &mut [u8],
    p: &mut [u8],
    q: &[u8],
    data: Columns<'_>,
    factor: u8,
    from: usize,
) {
    for at in from..lost.len() {
        let (p_rest, q_rest) = sums(data, at);
        lost[at] = multiply(factor, q[at] ^ q_rest);
        p[at] = p_rest ^ lost[at];
    }
}

pub(crate) fn recover_with_q(
    lost: &mut [u8],
    q: &mut [u8],
    p: &[u8],
    data: Columns<'_>,
    factor: u8,
    from: usize,
) {
    for at in from..lost.len() {
        let (p_rest, q_rest) = sums(data, at);
        lost[at] = p[at] ^ p_rest;
        q[at] = q_rest ^ multiply(factor, lost[at]);
    }
}

pub(crate) fn recover_two(
    x: &mut [u8],
    y: &mut [u8],
    p: &[u8],
    q: &[u8],
    data: Columns<'_>,
    factors: [u8; 2],
    from: usize,
) {
    for at in from..x.len() {
        let (p_rest, q_rest) = sums(data, at);
        let p_lost = p[at] ^ p_rest;
        let q_lost = q[at] ^ q_rest;
        x[at] = multiply(factors[0], p_lost) ^ multiply(factors[1], q_lost);
        y[at] = p_lost ^ x[at];
    }
}

/// P and Q of one byte of every column; Q by Horner's rule, from the last column to the first.
fn sums(data: Columns<'_>, at: usize) -> (u8, u8) {
    let (mut p, mut q) = (0, 0);
    for column in data.iter().rev() {
        let byte = column.map_or(0, |bytes| bytes[at]);
        p ^= byte;
        q = double(q) ^ byte;
    }
    (p, q)
}
