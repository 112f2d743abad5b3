//! The operations for any width of vector, each in one pass over memory.
//!
//! [`Simd`] is what a level must be able to do with a vector; the levels are in `x86`. A pass goes block by block:
//! the sums P and Q of a block of four vectors are built in registers over all columns, then the operation makes of
//! them what it wants. So every byte is read once and written once, whatever the number of columns. What is shorter
//! than four vectors goes vector by vector, and what is shorter than one by the scalar twin.
//!
//! Everything here is safe code: slices are cut once per block and column, and the compiler sees that the loads
//! within a block are in range. All functions are `inline(always)`, because only then are they compiled with the
//! instruction set of the function with `#[target_feature]` that calls them.

#![allow(clippy::inline_always, reason = "see above")]

use crate::level::Columns;
use crate::scalar;

/// How many vectors a block has: enough to hide the latency of an instruction, few enough for 16 registers.
const BLOCK: usize = 4;

/// A kind of vector. The value is the proof that this processor has the instructions.
pub(crate) trait Simd: Copy {
    /// A vector of [`Self::WIDTH`] elements of the field.
    type Vector: Copy;
    /// A constant factor, prepared.
    type Factor: Copy;
    /// Bytes in a vector.
    const WIDTH: usize;

    /// All zero.
    fn zero(self) -> Self::Vector;
    /// The first [`Self::WIDTH`] bytes, of any alignment. Panics if there are fewer.
    fn load(self, bytes: &[u8]) -> Self::Vector;
    /// Replaces the first [`Self::WIDTH`] bytes, of any alignment. Panics if there are fewer.
    fn store(self, bytes: &mut [u8], vector: Self::Vector);
    /// a + b.
    fn add(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// 2·a + b.
    fn double_add(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// Prepares a factor.
    fn factor(self, factor: u8) -> Self::Factor;
    /// factor·a.
    fn multiply(self, factor: Self::Factor, a: Self::Vector) -> Self::Vector;
}

/// Does `$body` for every block of a pass over `$length` bytes, first of four vectors each, then of one (`$vectors`
/// says which); its value is where the scalar twin goes on.
macro_rules! for_each_block {
    ($length:expr, $simd:ident, |$at:ident, $vectors:ident| $body:expr) => {{
        let length = $length;
        let mut $at = 0;
        while length - $at >= BLOCK * $simd::WIDTH {
            const $vectors: usize = BLOCK;
            $body;
            $at += BLOCK * $simd::WIDTH;
        }
        while length - $at >= $simd::WIDTH {
            const $vectors: usize = 1;
            $body;
            $at += $simd::WIDTH;
        }
        $at
    }};
}

/// Does `$body` for every column, from the last to the first.
///
/// Four columns per turn, so that each has a load instruction of its own. With one instruction for all, columns that
/// follow each other in memory at equal distances were read at half the speed (measured, `cargo bench -p parity`),
/// probably because a prefetcher takes the distance of the columns for the stride of one stream.
macro_rules! for_each_column {
    ($columns:expr, |$column:ident| $body:expr) => {{
        let (first, groups) = $columns.as_rchunks::<4>();
        for [a, b, c, d] in groups.iter().rev() {
            for_each_column!(@ $column, $body, d, c, b, a);
        }
        for $column in first.iter().rev() {
            $body;
        }
    }};
    (@ $column:ident, $body:expr, $($name:ident),*) => {
        $(let $column = $name; $body;)*
    };
}

#[inline(always)]
pub(crate) fn xor<S: Simd>(simd: S, target: &mut [u8], add: bool, sources: &[&[u8]]) {
    let done = for_each_block!(target.len(), S, |at, VECTORS| {
        let mut sum = if add {
            load::<S, VECTORS>(simd, target, at)
        } else {
            [simd.zero(); VECTORS]
        };
        for_each_column!(sources, |source| sum = add_block(simd, sum, source, at));
        store(simd, target, at, sum);
    });
    scalar::xor(target, add, sources, done);
}

#[inline(always)]
pub(crate) fn recover_from_p<S: Simd>(simd: S, lost: &mut [u8], p: &[u8], data: Columns<'_>) {
    let done = for_each_block!(lost.len(), S, |at, VECTORS| {
        let mut sum = load::<S, VECTORS>(simd, p, at);
        for_each_column!(data, |column| if let Some(bytes) = column {
            sum = add_block(simd, sum, bytes, at);
        });
        store(simd, lost, at, sum);
    });
    scalar::recover_from_p(lost, p, data, done);
}

#[inline(always)]
pub(crate) fn add_product<S: Simd>(simd: S, target: &mut [u8], factor: u8, source: &[u8]) {
    let prepared = simd.factor(factor);
    let done = for_each_block!(target.len(), S, |at, VECTORS| {
        let mut sum = load::<S, VECTORS>(simd, target, at);
        let other = load::<S, VECTORS>(simd, source, at);
        for k in 0..VECTORS {
            sum[k] = simd.add(sum[k], simd.multiply(prepared, other[k]));
        }
        store(simd, target, at, sum);
    });
    scalar::add_product(target, factor, source, done);
}

#[inline(always)]
pub(crate) fn pq<S: Simd>(simd: S, p: &mut [u8], q: &mut [u8], data: Columns<'_>) {
    let done = for_each_block!(p.len(), S, |at, VECTORS| {
        let (p_sum, q_sum) = sums::<S, VECTORS>(simd, data, at);
        store(simd, p, at, p_sum);
        store(simd, q, at, q_sum);
    });
    scalar::pq(p, q, data, done);
}

#[inline(always)]
pub(crate) fn recover_from_q<S: Simd>(simd: S, lost: &mut [u8], q: &[u8], data: Columns<'_>, factor: u8) {
    let prepared = simd.factor(factor);
    let done = for_each_block!(lost.len(), S, |at, VECTORS| {
        let (_, q_rest) = sums::<S, VECTORS>(simd, data, at);
        let mut value = load::<S, VECTORS>(simd, q, at);
        for k in 0..VECTORS {
            value[k] = simd.multiply(prepared, simd.add(value[k], q_rest[k]));
        }
        store(simd, lost, at, value);
    });
    scalar::recover_from_q(lost, q, data, factor, done);
}

#[inline(always)]
pub(crate) fn recover_with_p<S: Simd>(
    simd: S,
    lost: &mut [u8],
    p: &mut [u8],
    q: &[u8],
    data: Columns<'_>,
    factor: u8,
) {
    let prepared = simd.factor(factor);
    let done = for_each_block!(lost.len(), S, |at, VECTORS| {
        let (mut p_sum, q_rest) = sums::<S, VECTORS>(simd, data, at);
        let mut value = load::<S, VECTORS>(simd, q, at);
        for k in 0..VECTORS {
            value[k] = simd.multiply(prepared, simd.add(value[k], q_rest[k]));
            p_sum[k] = simd.add(p_sum[k], value[k]);
        }
        store(simd, lost, at, value);
        store(simd, p, at, p_sum);
    });
    scalar::recover_with_p(lost, p, q, data, factor, done);
}

#[inline(always)]
pub(crate) fn recover_with_q<S: Simd>(
    simd: S,
    lost: &mut [u8],
    q: &mut [u8],
    p: &[u8],
    data: Columns<'_>,
    factor: u8,
) {
    let prepared = simd.factor(factor);
    let done = for_each_block!(lost.len(), S, |at, VECTORS| {
        let (p_rest, mut q_sum) = sums::<S, VECTORS>(simd, data, at);
        let mut value = load::<S, VECTORS>(simd, p, at);
        for k in 0..VECTORS {
            value[k] = simd.add(value[k], p_rest[k]);
            q_sum[k] = simd.add(q_sum[k], simd.multiply(prepared, value[k]));
        }
        store(simd, lost, at, value);
        store(simd, q, at, q_sum);
    });
    scalar::recover_with_q(lost, q, p, data, factor, done);
}

#[inline(always)]
pub(crate) fn recover_two<S: Simd>(
    simd: S,
    x: &mut [u8],
    y: &mut [u8],
    p: &[u8],
    q: &[u8],
    data: Columns<'_>,
    factors: [u8; 2],
) {
    let of_p = simd.factor(factors[0]);
    let of_q = simd.factor(factors[1]);
    let done = for_each_block!(x.len(), S, |at, VECTORS| {
        let (p_rest, q_rest) = sums::<S, VECTORS>(simd, data, at);
        let mut x_value = load::<S, VECTORS>(simd, p, at);
        let mut y_value = load::<S, VECTORS>(simd, q, at);
        for k in 0..VECTORS {
            let p_lost = simd.add(x_value[k], p_rest[k]);
            let q_lost = simd.add(y_value[k], q_rest[k]);
            x_value[k] = simd.add(simd.multiply(of_p, p_lost), simd.multiply(of_q, q_lost));
            y_value[k] = simd.add(p_lost, x_value[k]);
        }
        store(simd, x, at, x_value);
        store(simd, y, at, y_value);
    });
    scalar::recover_two(x, y, p, q, data, factors, done);
}

/// P and Q of one block of every column; Q by Horner's rule, from the last column to the first.
#[inline(always)]
fn sums<S: Simd, const VECTORS: usize>(
    simd: S,
    data: Columns<'_>,
    at: usize,
) -> ([S::Vector; VECTORS], [S::Vector; VECTORS]) {
    let mut p = [simd.zero(); VECTORS];
    let mut q = [simd.zero(); VECTORS];
    for_each_column!(data, |column| match column {
        Some(bytes) => {
            let block = load::<S, VECTORS>(simd, bytes, at);
            for k in 0..VECTORS {
                p[k] = simd.add(p[k], block[k]);
                q[k] = simd.double_add(q[k], block[k]);
            }
        }
        None => {
            for value in &mut q {
                *value = simd.double_add(*value, simd.zero());
            }
        }
    });
    (p, q)
}

#[inline(always)]
fn add_block<S: Simd, const VECTORS: usize>(
    simd: S,
    mut sum: [S::Vector; VECTORS],
    bytes: &[u8],
    at: usize,
) -> [S::Vector; VECTORS] {
    let block = load::<S, VECTORS>(simd, bytes, at);
    for k in 0..VECTORS {
        sum[k] = simd.add(sum[k], block[k]);
    }
    sum
}

#[inline(always)]
fn load<S: Simd, const VECTORS: usize>(simd: S, bytes: &[u8], at: usize) -> [S::Vector; VECTORS] {
    let bytes = &bytes[at..][..VECTORS * S::WIDTH];
    let mut block = [simd.zero(); VECTORS];
    for (k, vector) in block.iter_mut().enumerate() {
        *vector = simd.load(&bytes[k * S::WIDTH..]);
    }
    block
}

#[inline(always)]
fn store<S: Simd, const VECTORS: usize>(simd: S, bytes: &mut [u8], at: usize, block: [S::Vector; VECTORS]) {
    let bytes = &mut bytes[at..][..VECTORS * S::WIDTH];
    for (k, vector) in block.into_iter().enumerate() {
        simd.store(&mut bytes[k * S::WIDTH..], vector);
    }
}
