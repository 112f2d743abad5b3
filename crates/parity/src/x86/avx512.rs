//! Vectors of 64 bytes, with and without GFNI, which has multiplication by a matrix of bits in one instruction.

#![allow(clippy::inline_always, reason = "see crate::kernel")]

use std::arch::x86_64::{
    __m512i, _mm_loadu_si128, _mm512_add_epi8, _mm512_and_si512, _mm512_broadcast_i32x4,
    _mm512_gf2p8affine_epi64_epi8, _mm512_loadu_si512, _mm512_maskz_mov_epi8, _mm512_movepi8_mask,
    _mm512_set1_epi8, _mm512_set1_epi64, _mm512_setzero_si512, _mm512_shuffle_epi8, _mm512_srli_epi64,
    _mm512_storeu_si512, _mm512_ternarylogic_epi64, _mm512_xor_si512,
};

use crate::field::{BIT_MATRICES, NIBBLE_PRODUCTS, REDUCTION};
use crate::kernel::Simd;

/// The table of truth of a ^ b ^ c.
const XOR3: i32 = 0x96;

/// The processor has AVX-512 F and BW.
#[derive(Clone, Copy)]
pub(super) struct Avx512(());

impl Avx512 {
    /// # Safety
    /// The processor has AVX-512 F and BW.
    #[inline(always)]
    pub(super) unsafe fn new() -> Self {
        Self(())
    }
}

impl Simd for Avx512 {
    type Vector = __m512i;
    /// The products of the low and of the high nibble.
    type Factor = [__m512i; 2];
    const WIDTH: usize = 64;

    #[inline(always)]
    fn zero(self) -> __m512i {
        // SAFETY: the token proves AVX-512 F.
        unsafe { _mm512_setzero_si512() }
    }

    #[inline(always)]
    fn load(self, bytes: &[u8]) -> __m512i {
        let bytes = &bytes[..Self::WIDTH];
        // SAFETY: the token proves AVX-512 F, the slice has 64 readable bytes, the load needs no alignment.
        unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
    }

    #[inline(always)]
    fn store(self, bytes: &mut [u8], vector: __m512i) {
        let bytes = &mut bytes[..Self::WIDTH];
        // SAFETY: the token proves AVX-512 F, the slice has 64 writable bytes, the store needs no alignment.
        unsafe { _mm512_storeu_si512(bytes.as_mut_ptr().cast(), vector) }
    }

    #[inline(always)]
    fn add(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: the token proves AVX-512 F.
        unsafe { _mm512_xor_si512(a, b) }
    }

    #[inline(always)]
    fn double_add(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: the token proves AVX-512 F and BW.
        unsafe {
            let overflow = _mm512_movepi8_mask(a);
            let reduction = _mm512_maskz_mov_epi8(overflow, _mm512_set1_epi8(REDUCTION.cast_signed()));
            _mm512_ternarylogic_epi64::<XOR3>(_mm512_add_epi8(a, a), reduction, b)
        }
    }

    #[inline(always)]
    fn factor(self, factor: u8) -> [__m512i; 2] {
        let [low, high] = &NIBBLE_PRODUCTS[usize::from(factor)];
        // SAFETY: the token proves AVX-512 F, both tables have 16 readable bytes, the loads need no alignment.
        unsafe {
            [
                _mm512_broadcast_i32x4(_mm_loadu_si128(low.as_ptr().cast())),
                _mm512_broadcast_i32x4(_mm_loadu_si128(high.as_ptr().cast())),
            ]
        }
    }

    #[inline(always)]
    fn multiply(self, factor: [__m512i; 2], a: __m512i) -> __m512i {
        // SAFETY: the token proves AVX-512 F and BW.
        unsafe {
            let nibble = _mm512_set1_epi8(15);
            let low = _mm512_shuffle_epi8(factor[0], _mm512_and_si512(a, nibble));
            let high = _mm512_shuffle_epi8(factor[1], _mm512_and_si512(_mm512_srli_epi64::<4>(a), nibble));
            _mm512_xor_si512(low, high)
        }
    }
}

/// The processor has AVX-512 F and BW, and GFNI.
#[derive(Clone, Copy)]
pub(super) struct Avx512Gfni(Avx512);

impl Avx512Gfni {
    /// # Safety
    /// The processor has AVX-512 F and BW, and GFNI.
    #[inline(always)]
    pub(super) unsafe fn new() -> Self {
        // SAFETY: the caller promises more.
        Self(unsafe { Avx512::new() })
    }
}

impl Simd for Avx512Gfni {
    type Vector = __m512i;
    /// The matrix, eight times.
    type Factor = __m512i;
    const WIDTH: usize = 64;

    #[inline(always)]
    fn zero(self) -> __m512i {
        self.0.zero()
    }

    #[inline(always)]
    fn load(self, bytes: &[u8]) -> __m512i {
        self.0.load(bytes)
    }

    #[inline(always)]
    fn store(self, bytes: &mut [u8], vector: __m512i) {
        self.0.store(bytes, vector);
    }

    #[inline(always)]
    fn add(self, a: __m512i, b: __m512i) -> __m512i {
        self.0.add(a, b)
    }

    #[inline(always)]
    fn double_add(self, a: __m512i, b: __m512i) -> __m512i {
        self.add(self.multiply(self.factor(2), a), b)
    }

    #[inline(always)]
    fn factor(self, factor: u8) -> __m512i {
        let matrix = BIT_MATRICES[usize::from(factor)];
        // SAFETY: the token proves AVX-512 F.
        unsafe { _mm512_set1_epi64(matrix.cast_signed()) }
    }

    #[inline(always)]
    fn multiply(self, factor: __m512i, a: __m512i) -> __m512i {
        // SAFETY: the token proves AVX-512 F and GFNI.
        unsafe { _mm512_gf2p8affine_epi64_epi8::<0>(a, factor) }
    }
}
