//! Vectors of 32 bytes. The byte shuffle works in each half of 16 bytes for itself, so the tables are there twice.

#![allow(clippy::inline_always, reason = "see crate::kernel")]

use std::arch::x86_64::{
    __m256i, _mm_loadu_si128, _mm256_add_epi8, _mm256_and_si256, _mm256_broadcastsi128_si256,
    _mm256_cmpgt_epi8, _mm256_loadu_si256, _mm256_set1_epi8, _mm256_setzero_si256, _mm256_shuffle_epi8,
    _mm256_srli_epi64, _mm256_storeu_si256, _mm256_xor_si256,
};

use crate::field::{NIBBLE_PRODUCTS, REDUCTION};
use crate::kernel::Simd;

/// The processor has AVX2.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

impl Avx2 {
    /// # Safety
    /// The processor has AVX2.
    #[inline(always)]
    pub(super) unsafe fn new() -> Self {
        Self(())
    }
}

impl Simd for Avx2 {
    type Vector = __m256i;
    /// The products of the low and of the high nibble.
    type Factor = [__m256i; 2];
    const WIDTH: usize = 32;

    #[inline(always)]
    fn zero(self) -> __m256i {
        // SAFETY: the token proves AVX2.
        unsafe { _mm256_setzero_si256() }
    }

    #[inline(always)]
    fn load(self, bytes: &[u8]) -> __m256i {
        let bytes = &bytes[..Self::WIDTH];
        // SAFETY: the token proves AVX2, the slice has 32 readable bytes, the load needs no alignment.
        unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
    }

    #[inline(always)]
    fn store(self, bytes: &mut [u8], vector: __m256i) {
        let bytes = &mut bytes[..Self::WIDTH];
        // SAFETY: the token proves AVX2, the slice has 32 writable bytes, the store needs no alignment.
        unsafe { _mm256_storeu_si256(bytes.as_mut_ptr().cast(), vector) }
    }

    #[inline(always)]
    fn add(self, a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: the token proves AVX2.
        unsafe { _mm256_xor_si256(a, b) }
    }

    /// Bytes with bit 7 are negative: the comparison makes a mask of them.
    #[inline(always)]
    fn double_add(self, a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: the token proves AVX2.
        unsafe {
            let overflow = _mm256_cmpgt_epi8(_mm256_setzero_si256(), a);
            let reduction = _mm256_and_si256(overflow, _mm256_set1_epi8(REDUCTION.cast_signed()));
            _mm256_xor_si256(_mm256_xor_si256(_mm256_add_epi8(a, a), reduction), b)
        }
    }

    #[inline(always)]
    fn factor(self, factor: u8) -> [__m256i; 2] {
        let [low, high] = &NIBBLE_PRODUCTS[usize::from(factor)];
        // SAFETY: the token proves AVX2, both tables have 16 readable bytes, the loads need no alignment.
        unsafe {
            [
                _mm256_broadcastsi128_si256(_mm_loadu_si128(low.as_ptr().cast())),
                _mm256_broadcastsi128_si256(_mm_loadu_si128(high.as_ptr().cast())),
            ]
        }
    }

    #[inline(always)]
    fn multiply(self, factor: [__m256i; 2], a: __m256i) -> __m256i {
        // SAFETY: the token proves AVX2.
        unsafe {
            let nibble = _mm256_set1_epi8(15);
            let low = _mm256_shuffle_epi8(factor[0], _mm256_and_si256(a, nibble));
            let high = _mm256_shuffle_epi8(factor[1], _mm256_and_si256(_mm256_srli_epi64::<4>(a), nibble));
            _mm256_xor_si256(low, high)
        }
    }
}
