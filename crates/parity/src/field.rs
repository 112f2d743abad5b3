//! The field GF(2^8) with the polynomial x^8 + x^4 + x^3 + x^2 + 1 (0x11d) and the generator g = 2.
//!
//! Addition is exclusive or. Every element but 0 is a power of g, so that multiplication is an addition of logarithms
//! modulo 255. All tables are made at compile time.

/// What doubling adds when bit 7 leaves the byte: the polynomial without x^8.
pub(crate) const REDUCTION: u8 = 0x1d;

/// How many different powers the generator has, and so how many data columns a Q can tell apart.
pub(crate) const POWERS: usize = 255;

/// `EXP[n]` is g^n, twice around, so that a sum of two logarithms needs no modulo.
static EXP: [u8; 2 * POWERS] = exponentials();

/// `LOG[a]` is the n with g^n = a; `LOG[0]` has no meaning.
static LOG: [u8; 256] = logarithms();

/// For each factor c the products c·n (first half) and c·16n (second half) for n in 0..16: with them one byte shuffle
/// per nibble multiplies a whole vector by c.
pub(crate) static NIBBLE_PRODUCTS: [[[u8; 16]; 2]; 256] = nibble_products();

/// For each factor c the multiplication by c as a matrix of bits, in the form of the GFNI instruction `gf2p8affineqb`:
/// byte 7 - i says which bits of the operand are added to give bit i of the product. (The multiplication that GFNI has
/// of its own, `gf2p8mulb`, is in a field with another polynomial.)
pub(crate) static BIT_MATRICES: [u64; 256] = bit_matrices();

/// 2·a.
pub(crate) const fn double(a: u8) -> u8 {
    (a << 1) ^ (REDUCTION & 0u8.wrapping_sub(a >> 7))
}

/// a·b.
#[inline]
pub(crate) fn multiply(a: u8, b: u8) -> u8 {
    if a == 0 || b == 0 {
        return 0;
    }
    EXP[usize::from(LOG[usize::from(a)]) + usize::from(LOG[usize::from(b)])]
}

/// g^n.
pub(crate) fn power(n: usize) -> u8 {
    EXP[n % POWERS]
}

/// g^-n.
pub(crate) fn inverse_power(n: usize) -> u8 {
    EXP[POWERS - n % POWERS]
}

/// The b with a·b = 1; `a` is not 0.
pub(crate) fn inverse(a: u8) -> u8 {
    debug_assert_ne!(a, 0, "0 has no inverse");
    inverse_power(usize::from(LOG[usize::from(a)]))
}

const fn exponentials() -> [u8; 2 * POWERS] {
    let mut table = [0; 2 * POWERS];
    let mut value = 1;
    let mut n = 0;
    while n < table.len() {
        table[n] = value;
        value = double(value);
        n += 1;
    }
    table
}

const fn logarithms() -> [u8; 256] {
    let mut table = [0; 256];
    let mut value = 1;
    let mut n = 0u8;
    while n < 255 {
        table[value as usize] = n;
        value = double(value);
        n += 1;
    }
    table
}

/// The products of `factor` and the eight powers of x.
const fn doublings(factor: u8) -> [u8; 8] {
    let mut products = [factor; 8];
    let mut bit = 1;
    while bit < 8 {
        products[bit] = double(products[bit - 1]);
        bit += 1;
    }
    products
}

const fn nibble_products() -> [[[u8; 16]; 2]; 256] {
    let mut table = [[[0; 16]; 2]; 256];
    let mut factor = 0u8;
    loop {
        let products = doublings(factor);
        let mut nibble = 0;
        while nibble < 16 {
            let mut bit = 0;
            while bit < 4 {
                if nibble >> bit & 1 == 1 {
                    table[factor as usize][0][nibble] ^= products[bit];
                    table[factor as usize][1][nibble] ^= products[bit + 4];
                }
                bit += 1;
            }
            nibble += 1;
        }
        if factor == u8::MAX {
            return table;
        }
        factor += 1;
    }
}

const fn bit_matrices() -> [u64; 256] {
    let mut table = [0; 256];
    let mut factor = 0u8;
    loop {
        let products = doublings(factor);
        let mut rows = [0u8; 8];
        let mut row = 0;
        while row < 8 {
            let mut bit = 0;
            while bit < 8 {
                rows[7 - row] |= (products[bit] >> row & 1) << bit;
                bit += 1;
            }
            row += 1;
        }
        table[factor as usize] = u64::from_le_bytes(rows);
        if factor == u8::MAX {
            return table;
        }
        factor += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Multiplication as it is taught: the product of two polynomials, then the remainder by 0x11d.
    fn multiply_slowly(a: u8, b: u8) -> u8 {
        let mut product = 0u16;
        for bit in 0..8 {
            if b >> bit & 1 == 1 {
                product ^= u16::from(a) << bit;
            }
        }
        for bit in (8..16).rev() {
            if product >> bit & 1 == 1 {
                product ^= 0x11d << (bit - 8);
            }
        }
        u8::try_from(product).unwrap()
    }

    #[test]
    fn powers_worked_out_by_hand() {
        // 2^8 = 0x1d by definition, and the next ones by shifting: 0x3a, 0x74, 0xe8, then 0x1d0 - 0x11d = 0xcd, ...
        let by_hand = [
            0x01, 0x02, 0x04, 0x08, 0x10, 0x20, 0x40, 0x80, 0x1d, 0x3a, 0x74, 0xe8, 0xcd, 0x87,
        ];
        for (n, value) in by_hand.into_iter().enumerate() {
            assert_eq!(power(n), value, "2^{n}");
        }
        // Half of 1 is 0x8e: doubled it is 0x11c - 0x11d.
        assert_eq!(power(254), 0x8e);
        assert_eq!(inverse_power(1), 0x8e);
        assert_eq!(power(255), 1);
    }

    #[test]
    fn every_product_is_that_of_polynomials() {
        for a in 0..=u8::MAX {
            for b in 0..=u8::MAX {
                assert_eq!(multiply(a, b), multiply_slowly(a, b), "{a} · {b}");
            }
        }
    }

    #[test]
    fn every_table_of_every_factor_gives_the_products() {
        for c in 0..=u8::MAX {
            for a in 0..=u8::MAX {
                let expected = multiply_slowly(c, a);
                let [low, high] = &NIBBLE_PRODUCTS[usize::from(c)];
                assert_eq!(low[usize::from(a & 15)] ^ high[usize::from(a >> 4)], expected);
                let rows = BIT_MATRICES[usize::from(c)].to_le_bytes();
                let mut product = 0;
                for bit in 0..8 {
                    product |= u8::from((rows[7 - bit] & a).count_ones() % 2 == 1) << bit;
                }
                assert_eq!(product, expected, "{c} · {a}");
            }
        }
    }

    #[test]
    fn the_generator_has_255_different_powers() {
        let mut seen = [false; 256];
        for n in 0..POWERS {
            let value = power(n);
            assert!(!seen[usize::from(value)], "2^{n} repeats");
            assert_ne!(value, 0);
            seen[usize::from(value)] = true;
            assert_eq!(multiply_slowly(value, inverse(value)), 1);
            assert_eq!(multiply_slowly(value, inverse_power(n)), 1);
        }
    }
}
