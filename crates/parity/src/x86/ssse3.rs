//! Vectors of 16 bytes.

#![allow(clippy::inline_always, reason = "see crate::kernel")]

use std::arch::x86_64::{
    __m128i, _mm_add_epi8, _mm_and_si128, _mm_cmpgt_epi8, _mm_loadu_si128, _mm_set1_epi8, _mm_setzero_si128,
    _mm_shuffle_epi8, _mm_srli_epi64, _mm_storeu_si128, _mm_xor_si128,
};

use crate::field::{NIBBLE_PRODUCTS, REDUCTION};
use crate::kernel::Simd;

/// The processor has SSSE3.
#[derive(Clone, Copy)]
pub(super) struct Ssse3(());

impl Ssse3 {
    /// # Safety
    /// The processor has SSSE3.
    #[inline(always)]
    pub(super) unsafe fn new() -> Self {
        Self(())
    }
}

impl Simd for Ssse3 {
    type Vector = __m128i;
    /// The products of the low and of the high nibble.
    type Factor = [__m128i; 2];
    const WIDTH: usize = 16;

    #[inline(always)]
    fn zero(self) -> __m128i {
        // SAFETY: the token proves SSSE3.
        unsafe { _mm_setzero_si128() }
    }

    #[inline(always)]
    fn load(self, bytes: &[u8]) -> __m128i {
        let bytes = &bytes[..Self::WIDTH];
        // SAFETY: the token proves SSSE3, the slice has 16 readable bytes, the load needs no alignment.
        unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
    }

    #[inline(always)]
    fn store(self, bytes: &mut [u8], vector: __m128i) {
        let bytes = &mut bytes[..Self::WIDTH];
        // SAFETY: the token proves SSSE3, the slice has 16 writable bytes, the store needs no alignment.
        unsafe { _mm_storeu_si128(bytes.as_mut_ptr().cast(), vector) }
    }

    #[inline(always)]
    fn add(self, a: __m128i, b: __m128i) -> __m128i {
        // SAFETY: the token proves SSSE3.
        unsafe { _mm_xor_si128(a, b) }
    }

    /// Bytes with bit 7 are negative: the comparison makes a mask of them.
    #[inline(always)]
    fn double_add(self, a: __m128i, b: __m128i) -> __m128i {
        // SAFETY: the token proves SSSE3.
        unsafe {
            let overflow = _mm_cmpgt_epi8(_mm_setzero_si128(), a);
            let reduction = _mm_and_si128(overflow, _mm_set1_epi8(REDUCTION.cast_signed()));
            _mm_xor_si128(_mm_xor_si128(_mm_add_epi8(a, a), reduction), b)
        }
    }

    #[inline(always)]
    fn factor(self, factor: u8) -> [__m128i; 2] {
        let [low, high] = &NIBBLE_PRODUCTS[usize::from(factor)];
        [self.load(low), self.load(high)]
    }

    #[inline(always)]
    fn multiply(self, factor: [__m128i; 2], a: __m128i) -> __m128i {
        // SAFETY: the token proves SSSE3.
        unsafe {
            let nibble = _mm_set1_epi8(15);
            let low = _mm_shuffle_epi8(factor[0], _mm_and_si128(a, nibble));
            let high = _mm_shuffle_epi8(factor[1], _mm_and_si128(_mm_srli_epi64::<4>(a), nibble));
            _mm_xor_si128(low, high)
        }
    }
}
