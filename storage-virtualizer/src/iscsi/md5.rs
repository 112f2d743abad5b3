//! MD5 (RFC 1321), for CHAP, which every iSCSI initiator can use with it and some with nothing else.
//!
//! MD5 is broken where somebody chooses both of two messages; a CHAP response does not depend on that, and still other
//! algorithms are preferred where the initiator has them (`chap`).

const BLOCK: usize = 64;
/// Shifts of the four rounds, each four times in turn (RFC 1321 §3.4).
const SHIFTS: [[u32; 4]; 4] = [[7, 12, 17, 22], [5, 9, 14, 20], [4, 11, 16, 23], [6, 10, 15, 21]];

/// The sine table (RFC 1321 §3.4): the integer part of 2^32 · |sin(i)|.
fn constant(step: u32) -> u32 {
    let sine = (f64::from(step) + 1.0).sin().abs() * 4_294_967_296.0;
    // Not negative and below 2^32.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "in range, and it is to be cut"
    )]
    let value = sine as u32;
    value
}

/// The digest of `message`.
pub(super) fn md5(message: &[u8]) -> [u8; 16] {
    let mut padded = message.to_vec();
    padded.push(0x80);
    let length = (padded.len() + 8).next_multiple_of(BLOCK) - 8;
    padded.resize(length, 0);
    padded.extend((message.len() as u64).wrapping_mul(8).to_le_bytes());
    let mut state: [u32; 4] = [0x6745_2301, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476];
    for block in padded.chunks_exact(BLOCK) {
        mix(&mut state, block);
    }
    let mut digest = [0; 16];
    for (bytes, word) in digest.chunks_exact_mut(4).zip(state) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    digest
}

fn mix(state: &mut [u32; 4], block: &[u8]) {
    let word = |index: u32| {
        let at = usize::try_from(index % 16).unwrap_or(0) * 4;
        u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
    };
    let [mut a, mut b, mut c, mut d] = *state;
    for step in 0..64_u32 {
        let (function, index) = match step / 16 {
            0 => (b & c | !b & d, step),
            1 => (d & b | !d & c, 5 * step + 1),
            2 => (b ^ c ^ d, 3 * step + 5),
            _ => (c ^ (b | !d), 7 * step),
        };
        let round = usize::try_from(step / 16).unwrap_or(0);
        let shift = SHIFTS[round][usize::try_from(step % 4).unwrap_or(0)];
        let sum = a
            .wrapping_add(function)
            .wrapping_add(constant(step))
            .wrapping_add(word(index));
        (a, d, c) = (d, c, b);
        b = b.wrapping_add(sum.rotate_left(shift));
    }
    for (word, change) in state.iter_mut().zip([a, b, c, d]) {
        *word = word.wrapping_add(change);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::iscsi::text::hexadecimal;

    #[test]
    fn digests_are_those_of_the_standard() {
        // RFC 1321 appendix A.5.
        for (message, expected) in [
            ("", "d41d8cd98f00b204e9800998ecf8427e"),
            ("a", "0cc175b9c0f1b6a831c399e269772661"),
            ("message digest", "f96b697d7cb7938d525a2f31aaf161d0"),
            (
                "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789",
                "d174ab98d277d9f5a5611c2c9f419d9f",
            ),
            (
                "12345678901234567890123456789012345678901234567890123456789012345678901234567890",
                "57edf4a22be3c955ac49da2e2107b67a",
            ),
        ] {
            assert_eq!(
                hexadecimal(&md5(message.as_bytes())),
                format!("0x{expected}"),
                "{message}"
            );
        }
    }
}
