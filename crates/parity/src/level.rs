//! Which instructions there are, and the operations at one level of them: [`Parity`].
//!
//! This is where arguments are checked. What is behind the pointers of [`Kernels`] may rely on equal lengths for its
//! speed and its meaning, but not for memory safety.

use std::fmt;
use std::sync::OnceLock;

use crate::field::{self, POWERS};
use crate::scalar;
#[cfg(target_arch = "x86_64")]
use crate::x86;

/// The data columns of a stripe, in the order of their indexes.
pub(crate) type Columns<'a> = &'a [Option<&'a [u8]>];

/// The operations of one level.
///
/// All are `unsafe` to call for one reason only: the processor must have the level's instructions.
#[allow(clippy::type_complexity, reason = "these are the signatures, each used once")]
pub(crate) struct Kernels {
    pub(crate) xor: unsafe fn(target: &mut [u8], add: bool, sources: &[&[u8]]),
    pub(crate) add_product: unsafe fn(target: &mut [u8], factor: u8, source: &[u8]),
    pub(crate) pq: unsafe fn(p: &mut [u8], q: &mut [u8], data: Columns<'_>),
    pub(crate) recover_from_p: unsafe fn(lost: &mut [u8], p: &[u8], data: Columns<'_>),
    pub(crate) recover_from_q: unsafe fn(lost: &mut [u8], q: &[u8], data: Columns<'_>, factor: u8),
    pub(crate) recover_with_p:
        unsafe fn(lost: &mut [u8], p: &mut [u8], q: &[u8], data: Columns<'_>, factor: u8),
    pub(crate) recover_with_q:
        unsafe fn(lost: &mut [u8], q: &mut [u8], p: &[u8], data: Columns<'_>, factor: u8),
    pub(crate) recover_two:
        unsafe fn(x: &mut [u8], y: &mut [u8], p: &[u8], q: &[u8], data: Columns<'_>, factors: [u8; 2]),
}

/// The scalar twin, which every processor can run.
static SCALAR: Kernels = Kernels {
    xor: |target, add, sources| scalar::xor(target, add, sources, 0),
    add_product: |target, factor, source| scalar::add_product(target, factor, source, 0),
    pq: |p, q, data| scalar::pq(p, q, data, 0),
    recover_from_p: |lost, p, data| scalar::recover_from_p(lost, p, data, 0),
    recover_from_q: |lost, q, data, factor| scalar::recover_from_q(lost, q, data, factor, 0),
    recover_with_p: |lost, p, q, data, factor| scalar::recover_with_p(lost, p, q, data, factor, 0),
    recover_with_q: |lost, q, p, data, factor| scalar::recover_with_q(lost, q, p, data, factor, 0),
    recover_two: |x, y, p, q, data, factors| scalar::recover_two(x, y, p, q, data, factors, 0),
};

/// A set of instructions, from the slowest to the fastest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Byte by byte; the oracle of the tests.
    Scalar,
    /// 16 bytes, multiplication by two table look-ups.
    Ssse3,
    /// 32 bytes, multiplication by two table look-ups.
    Avx2,
    /// 64 bytes (AVX-512 F and BW), multiplication by two table look-ups.
    Avx512,
    /// 64 bytes, multiplication in one instruction.
    Avx512Gfni,
}

impl Level {
    /// Every level, from the slowest to the fastest.
    pub const ALL: [Self; 5] = [
        Self::Scalar,
        Self::Ssse3,
        Self::Avx2,
        Self::Avx512,
        Self::Avx512Gfni,
    ];

    /// The operations of this level, if this processor and its operating system have the instructions.
    fn detect(self) -> Option<&'static Kernels> {
        #[cfg(target_arch = "x86_64")]
        {
            let avx512 = || is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
            match self {
                Self::Scalar => Some(&SCALAR),
                Self::Ssse3 => is_x86_feature_detected!("ssse3").then_some(&x86::with_ssse3::KERNELS),
                Self::Avx2 => is_x86_feature_detected!("avx2").then_some(&x86::with_avx2::KERNELS),
                Self::Avx512 => avx512().then_some(&x86::with_avx512::KERNELS),
                Self::Avx512Gfni => {
                    (avx512() && is_x86_feature_detected!("gfni")).then_some(&x86::with_avx512_gfni::KERNELS)
                }
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            (self == Self::Scalar).then_some(&SCALAR)
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Scalar => "scalar",
            Self::Ssse3 => "ssse3",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Gfni => "avx512+gfni",
        })
    }
}

/// The operations at one level, which this processor is known to have.
///
/// The functions of this crate are those of [`Parity::best`] and say what each operation does; tests and benches take
/// the other levels with [`Parity::with_level`].
#[derive(Clone, Copy)]
pub struct Parity {
    level: Level,
    /// From [`Level::detect`] only, which is what makes the calls below sound.
    kernels: &'static Kernels,
}

impl fmt::Debug for Parity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Parity")
            .field("level", &self.level)
            .finish_non_exhaustive()
    }
}

impl Parity {
    /// The fastest level of this processor, found out once.
    #[must_use]
    pub fn best() -> Self {
        static BEST: OnceLock<Parity> = OnceLock::new();
        *BEST.get_or_init(|| {
            let scalar = Self {
                level: Level::Scalar,
                kernels: &SCALAR,
            };
            Level::ALL
                .into_iter()
                .rev()
                .find_map(Self::with_level)
                .unwrap_or(scalar)
        })
    }

    /// The operations at `level`, or nothing if this processor does not have it.
    #[must_use]
    pub fn with_level(level: Level) -> Option<Self> {
        level.detect().map(|kernels| Self { level, kernels })
    }

    /// Whose instructions these operations use.
    #[must_use]
    pub fn level(self) -> Level {
        self.level
    }

    /// [`crate::xor_into`] at this level.
    pub fn xor_into(self, target: &mut [u8], source: &[u8]) {
        self.xor_all_into(target, &[source]);
    }

    /// [`crate::xor_all_into`] at this level.
    pub fn xor_all_into(self, target: &mut [u8], sources: &[&[u8]]) {
        check_lengths(target.len(), sources.iter().copied());
        // SAFETY: `Level::detect` saw that the processor has the instructions.
        unsafe { (self.kernels.xor)(target, true, sources) }
    }

    /// [`crate::xor`] at this level.
    pub fn xor(self, target: &mut [u8], sources: &[&[u8]]) {
        check_lengths(target.len(), sources.iter().copied());
        // SAFETY: `Level::detect` saw that the processor has the instructions.
        unsafe { (self.kernels.xor)(target, false, sources) }
    }

    /// [`crate::pq`] at this level.
    pub fn pq(self, p: &mut [u8], q: &mut [u8], data: &[Option<&[u8]>]) {
        check_columns(p.len(), [&*q], data);
        // SAFETY: `Level::detect` saw that the processor has the instructions.
        unsafe { (self.kernels.pq)(p, q, data) }
    }

    /// [`crate::update_q`] at this level.
    pub fn update_q(self, q: &mut [u8], index: usize, delta: &[u8]) {
        check_lengths(q.len(), [delta]);
        assert!(index < POWERS, "column {index} of at most {POWERS}");
        // SAFETY: `Level::detect` saw that the processor has the instructions.
        unsafe { (self.kernels.add_product)(q, field::power(index), delta) }
    }

    /// [`crate::recover_from_p`] at this level.
    pub fn recover_from_p(self, lost: &mut [u8], p: &[u8], data: &[Option<&[u8]>]) {
        check_columns(lost.len(), [p], data);
        // SAFETY: `Level::detect` saw that the processor has the instructions.
        unsafe { (self.kernels.recover_from_p)(lost, p, data) }
    }

    /// [`crate::recover_from_q`] at this level.
    pub fn recover_from_q(self, lost: &mut [u8], index: usize, q: &[u8], data: &[Option<&[u8]>]) {
        check_columns(lost.len(), [q], data);
        check_lost(index, data);
        // SAFETY: `Level::detect` saw that the processor has the instructions.
        unsafe { (self.kernels.recover_from_q)(lost, q, data, field::inverse_power(index)) }
    }

    /// [`crate::recover_with_p`] at this level.
    pub fn recover_with_p(
        self,
        lost: &mut [u8],
        p: &mut [u8],
        index: usize,
        q: &[u8],
        data: &[Option<&[u8]>],
    ) {
        check_columns(lost.len(), [&*p, q], data);
        check_lost(index, data);
        // SAFETY: `Level::detect` saw that the processor has the instructions.
        unsafe { (self.kernels.recover_with_p)(lost, p, q, data, field::inverse_power(index)) }
    }

    /// [`crate::recover_with_q`] at this level.
    pub fn recover_with_q(
        self,
        lost: &mut [u8],
        q: &mut [u8],
        index: usize,
        p: &[u8],
        data: &[Option<&[u8]>],
    ) {
        check_columns(lost.len(), [&*q, p], data);
        check_lost(index, data);
        // SAFETY: `Level::detect` saw that the processor has the instructions.
        unsafe { (self.kernels.recover_with_q)(lost, q, p, data, field::power(index)) }
    }

    /// [`crate::recover_two`] at this level.
    pub fn recover_two(
        self,
        lost: [&mut [u8]; 2],
        indexes: [usize; 2],
        p: &[u8],
        q: &[u8],
        data: &[Option<&[u8]>],
    ) {
        let [first, second] = lost;
        let [x, y] = indexes;
        check_columns(first.len(), [&*second, p, q], data);
        check_lost(x, data);
        check_lost(y, data);
        assert_ne!(x, y, "the two lost columns are one");
        // Both indexes are below 255, so the difference of the exponents is not 0 modulo 255 and its power not 1.
        let ratio = field::power(y + POWERS - x);
        let common = field::inverse(ratio ^ 1);
        let factors = [
            field::multiply(ratio, common),
            field::multiply(field::inverse_power(x), common),
        ];
        // SAFETY: `Level::detect` saw that the processor has the instructions.
        unsafe { (self.kernels.recover_two)(first, second, p, q, data, factors) }
    }
}

#[track_caller]
fn check_lengths<'a>(length: usize, others: impl IntoIterator<Item = &'a [u8]>) {
    for other in others {
        assert_eq!(length, other.len(), "columns of different lengths");
    }
}

#[track_caller]
fn check_columns<const N: usize>(length: usize, others: [&[u8]; N], data: Columns<'_>) {
    assert!(
        data.len() <= POWERS,
        "{} data columns of at most {POWERS}",
        data.len()
    );
    check_lengths(length, others);
    check_lengths(length, data.iter().copied().flatten());
}

#[track_caller]
fn check_lost(index: usize, data: Columns<'_>) {
    assert!(
        data[index].is_none(),
        "data column {index} is to be recovered but given"
    );
}
