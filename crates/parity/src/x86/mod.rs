//! The levels of x86-64: vectors of 16, 32 and 64 bytes, and for each the operations compiled with its instruction set.
//!
//! All of the crate's `unsafe` is here and in [`crate::level`], of three kinds: the proof that the processor has the
//! instructions (a token, made inside of functions with `#[target_feature]` only), intrinsics that need that proof,
//! and loads and stores, which check the length of the slice first.

mod avx2;
mod avx512;
mod ssse3;

/// The operations of [`crate::kernel`] for one kind of vector.
macro_rules! kernels {
    ($level:ident, $token:path, $features:literal) => {
        pub(crate) mod $level {
            use crate::kernel;
            use crate::level::{Columns, Kernels};

            #[target_feature(enable = $features)]
            fn xor(target: &mut [u8], add: bool, sources: &[&[u8]]) {
                // SAFETY: this function has the target features that the token stands for; so below.
                kernel::xor(unsafe { <$token>::new() }, target, add, sources);
            }

            #[target_feature(enable = $features)]
            fn add_product(target: &mut [u8], factor: u8, source: &[u8]) {
                // SAFETY: see `xor`.
                kernel::add_product(unsafe { <$token>::new() }, target, factor, source);
            }

            #[target_feature(enable = $features)]
            fn pq(p: &mut [u8], q: &mut [u8], data: Columns<'_>) {
                // SAFETY: see `xor`.
                kernel::pq(unsafe { <$token>::new() }, p, q, data);
            }

            #[target_feature(enable = $features)]
            fn recover_from_p(lost: &mut [u8], p: &[u8], data: Columns<'_>) {
                // SAFETY: see `xor`.
                kernel::recover_from_p(unsafe { <$token>::new() }, lost, p, data);
            }

            #[target_feature(enable = $features)]
            fn recover_from_q(lost: &mut [u8], q: &[u8], data: Columns<'_>, factor: u8) {
                // SAFETY: see `xor`.
                kernel::recover_from_q(unsafe { <$token>::new() }, lost, q, data, factor);
            }

            #[target_feature(enable = $features)]
            fn recover_with_p(lost: &mut [u8], p: &mut [u8], q: &[u8], data: Columns<'_>, factor: u8) {
                // SAFETY: see `xor`.
                kernel::recover_with_p(unsafe { <$token>::new() }, lost, p, q, data, factor);
            }

            #[target_feature(enable = $features)]
            fn recover_with_q(lost: &mut [u8], q: &mut [u8], p: &[u8], data: Columns<'_>, factor: u8) {
                // SAFETY: see `xor`.
                kernel::recover_with_q(unsafe { <$token>::new() }, lost, q, p, data, factor);
            }

            #[target_feature(enable = $features)]
            fn recover_two(
                x: &mut [u8],
                y: &mut [u8],
                p: &[u8],
                q: &[u8],
                data: Columns<'_>,
                factors: [u8; 2],
            ) {
                // SAFETY: see `xor`.
                kernel::recover_two(unsafe { <$token>::new() }, x, y, p, q, data, factors);
            }

            /// To be called only where the processor has the instructions of this level.
            pub(crate) static KERNELS: Kernels = Kernels {
                xor,
                add_product,
                pq,
                recover_from_p,
                recover_from_q,
                recover_with_p,
                recover_with_q,
                recover_two,
            };
        }
    };
}

kernels!(with_ssse3, crate::x86::ssse3::Ssse3, "ssse3");
kernels!(with_avx2, crate::x86::avx2::Avx2, "avx2");
kernels!(with_avx512, crate::x86::avx512::Avx512, "avx512f,avx512bw");
kernels!(
    with_avx512_gfni,
    crate::x86::avx512::Avx512Gfni,
    "avx512f,avx512bw,gfni"
);
