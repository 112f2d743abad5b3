//! Every level gives what the scalar twin gives, and the scalar twin gives what the definition says.

#![allow(clippy::unwrap_used, reason = "the helpers are tests too")]

use parity::{Level, Parity};
use proptest::collection::vec;
use proptest::prelude::*;

/// Longer than the largest block (four vectors of 64 bytes) and a bit, so that every loop runs.
const LONGEST: usize = 700;

fn levels() -> impl Iterator<Item = Parity> {
    Level::ALL.into_iter().filter_map(Parity::with_level)
}

fn twin() -> Parity {
    Parity::with_level(Level::Scalar).unwrap()
}

/// Multiplication in the field as it is taught, independent of the crate's tables.
fn multiply(a: u8, b: u8) -> u8 {
    let mut product = (0..8)
        .filter(|bit| b >> bit & 1 == 1)
        .fold(0u16, |sum, bit| sum ^ u16::from(a) << bit);
    for bit in (8..16).rev() {
        if product >> bit & 1 == 1 {
            product ^= 0x11d << (bit - 8);
        }
    }
    u8::try_from(product).unwrap()
}

/// P and Q by definition: sums of D and of g^i·D.
fn define(data: &[Option<&[u8]>], length: usize) -> (Vec<u8>, Vec<u8>) {
    let (mut p, mut q) = (vec![0; length], vec![0; length]);
    let mut weight = 1;
    for column in data {
        for (at, byte) in column.iter().copied().flatten().enumerate() {
            p[at] ^= byte;
            q[at] ^= multiply(weight, *byte);
        }
        weight = multiply(weight, 2);
    }
    (p, q)
}

/// Bytes that look like noise and are the same in every run.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length);
    for _ in 0..length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.push(state.to_be_bytes()[0]);
    }
    bytes
}

fn stripe(columns: usize, length: usize) -> Vec<Vec<u8>> {
    (0..columns)
        .map(|index| noise(u64::try_from(index).unwrap() + 1, length))
        .collect()
}

fn all_but<'a>(columns: &'a [Vec<u8>], lost: &[usize]) -> Vec<Option<&'a [u8]>> {
    let given = |(index, column): (usize, &'a Vec<u8>)| (!lost.contains(&index)).then_some(&column[..]);
    columns.iter().enumerate().map(given).collect()
}

/// A buffer whose window starts anywhere, with bytes around it that nobody may touch.
struct Misaligned {
    bytes: Vec<u8>,
    start: usize,
}

impl Misaligned {
    const GUARD: usize = 64;

    fn new(content: &[u8], shift: usize) -> Self {
        let start = Self::GUARD + shift;
        let mut bytes = vec![0xa5; start + content.len() + Self::GUARD];
        bytes[start..start + content.len()].copy_from_slice(content);
        Self { bytes, start }
    }

    fn window(&mut self) -> &mut [u8] {
        let end = self.bytes.len() - Self::GUARD;
        &mut self.bytes[self.start..end]
    }

    /// The window, once it is seen that the guards are whole.
    fn content(&self) -> &[u8] {
        let (before, rest) = self.bytes.split_at(self.start);
        let (window, after) = rest.split_at(rest.len() - Self::GUARD);
        assert!(
            before.iter().chain(after).all(|byte| *byte == 0xa5),
            "wrote beside the window"
        );
        window
    }
}

/// Columns of one length that start at different offsets of their buffers, some of them missing.
#[derive(Debug)]
struct Stripe {
    length: usize,
    columns: Vec<(usize, Vec<u8>, bool)>,
    outputs: [usize; 2],
    old: [Vec<u8>; 2],
    factor: usize,
}

impl Stripe {
    fn data(&self) -> Vec<Option<&[u8]>> {
        self.columns
            .iter()
            .map(|(shift, bytes, given)| given.then_some(&bytes[*shift..]))
            .collect()
    }

    fn sources(&self) -> Vec<&[u8]> {
        self.columns
            .iter()
            .map(|(shift, bytes, _)| &bytes[*shift..])
            .collect()
    }
}

prop_compose! {
    fn any_stripe()(length in 0..LONGEST, count in 1usize..12)
        (columns in vec((0..64usize, vec(any::<u8>(), length + 64), prop::bool::weighted(0.8)), count),
         outputs in [0..64usize, 0..64usize],
         old in [vec(any::<u8>(), length), vec(any::<u8>(), length)],
         factor in 0..255usize,
         length in Just(length))
        -> Stripe
    {
        let cut = |(shift, mut bytes, given): (usize, Vec<u8>, bool)| {
            bytes.truncate(shift + length);
            (shift, bytes, given)
        };
        Stripe { length, columns: columns.into_iter().map(cut).collect(), outputs, old, factor }
    }
}

/// What `operation` leaves in its two outputs, which start as `stripe.old`.
fn outcome(stripe: &Stripe, operation: impl FnOnce(&mut [u8], &mut [u8])) -> [Vec<u8>; 2] {
    let [mut first, mut second] = [0, 1].map(|n| Misaligned::new(&stripe.old[n], stripe.outputs[n]));
    operation(first.window(), second.window());
    [first.content().to_vec(), second.content().to_vec()]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn every_level_gives_what_the_scalar_twin_gives(stripe in any_stripe()) {
        let data = stripe.data();
        let sources = stripe.sources();
        let delta = sources[0];
        // The surviving P and Q may be anything: the arithmetic must agree all the same.
        let (p, q) = (&stripe.old[0][..], &stripe.old[1][..]);
        let mut short = data.clone();
        let x = stripe.factor % data.len();
        short[x] = None;
        let mut shorter = short.clone();
        let y = (x + 1) % data.len();
        shorter[y] = None;

        let everything = |parity: Parity| [
            outcome(&stripe, |a, b| { parity.xor(a, &sources); parity.xor(b, &[]); }),
            outcome(&stripe, |a, b| { parity.xor_all_into(a, &sources); parity.xor_into(b, delta); }),
            outcome(&stripe, |a, b| parity.pq(a, b, &data)),
            outcome(&stripe, |a, _| parity.update_q(a, stripe.factor, delta)),
            outcome(&stripe, |a, b| {
                parity.recover_from_p(a, p, &short);
                parity.recover_from_q(b, x, q, &short);
            }),
            outcome(&stripe, |a, b| parity.recover_with_p(a, b, x, q, &short)),
            outcome(&stripe, |a, b| parity.recover_with_q(a, b, x, p, &short)),
            outcome(&stripe, |a, b| if x != y { parity.recover_two([a, b], [x, y], p, q, &shorter) }),
        ];
        let expected = everything(twin());
        for parity in levels() {
            prop_assert_eq!(&everything(parity), &expected, "{:?}", parity.level());
        }
    }

    #[test]
    fn the_scalar_twin_follows_the_definition(stripe in any_stripe()) {
        let data = stripe.data();
        let [p, q] = outcome(&stripe, |a, b| twin().pq(a, b, &data));
        let expected = define(&data, stripe.length);
        prop_assert_eq!((p, q), expected);
        let delta = stripe.sources()[0];
        let weight = (0..stripe.factor).fold(1, |weight, _| multiply(weight, 2));
        let [q, _] = outcome(&stripe, |a, _| twin().update_q(a, stripe.factor, delta));
        for at in 0..stripe.length {
            prop_assert_eq!(q[at], stripe.old[0][at] ^ multiply(weight, delta[at]));
        }
    }

    #[test]
    fn deltas_lead_where_a_whole_stripe_leads(stripe in any_stripe(), index in any::<prop::sample::Index>()) {
        let index = index.index(stripe.columns.len());
        let data = stripe.data();
        let zeroes = vec![0; stripe.length];
        let new = &stripe.old[0][..];
        let mut changed = data.clone();
        changed[index] = Some(new);
        let expected = define(&changed, stripe.length);
        for parity in levels() {
            let (mut p, mut q) = define(&data, stripe.length);
            let mut delta = zeroes.clone();
            parity.xor(&mut delta, &[data[index].unwrap_or(&zeroes), new]);
            parity.xor_into(&mut p, &delta);
            parity.update_q(&mut q, index, &delta);
            prop_assert_eq!((&p, &q), (&expected.0, &expected.1));
        }
    }
}

/// Loses columns in every way that P and Q can heal, and demands the bytes back.
fn lose_and_recover(parity: Parity, columns: &[Vec<u8>], pairs: impl Iterator<Item = [usize; 2]>) {
    let length = columns[0].len();
    let whole = all_but(columns, &[]);
    let (p, q) = define(&whole, length);
    let level = parity.level();
    let blank = || vec![0xee; length];

    for x in 0..columns.len() {
        let data = all_but(columns, &[x]);
        let (mut lost, mut other) = (blank(), blank());
        parity.recover_from_p(&mut lost, &p, &data);
        assert!(lost == columns[x], "{level}: {x} from P");
        lost = blank();
        parity.recover_from_q(&mut lost, x, &q, &data);
        assert!(lost == columns[x], "{level}: {x} from Q");
        lost = blank();
        parity.recover_with_p(&mut lost, &mut other, x, &q, &data);
        assert!(lost == columns[x] && other == p, "{level}: {x} and P");
        (lost, other) = (blank(), blank());
        parity.recover_with_q(&mut lost, &mut other, x, &p, &data);
        assert!(lost == columns[x] && other == q, "{level}: {x} and Q");
    }
    for [x, y] in pairs {
        let data = all_but(columns, &[x, y]);
        let (mut first, mut second) = (blank(), blank());
        parity.recover_two([&mut first, &mut second], [x, y], &p, &q, &data);
        assert!(
            first == columns[x] && second == columns[y],
            "{level}: {x} and {y}"
        );
    }
    let (mut new_p, mut new_q) = (blank(), blank());
    parity.pq(&mut new_p, &mut new_q, &whole);
    assert!(new_p == p && new_q == q, "{level}: P and Q");
}

#[test]
fn every_pair_of_lost_columns_is_recovered() {
    for columns in 1..=16 {
        let columns = stripe(columns, 333);
        for parity in levels() {
            let count = columns.len();
            let pairs = (0..count)
                .flat_map(|x| (0..count).map(move |y| [x, y]))
                .filter(|[x, y]| x != y);
            lose_and_recover(parity, &columns, pairs);
        }
    }
}

#[test]
fn a_stripe_of_255_data_columns_recovers_too() {
    let columns = stripe(255, 131);
    for parity in levels() {
        // Every distance once, and the ends.
        let pairs = (1..255)
            .map(|y| [(y * 7) % y, y])
            .chain([[254, 0], [0, 254], [253, 254]]);
        lose_and_recover(parity, &columns, pairs);
    }
}

#[test]
fn q_worked_out_by_hand() {
    // 1·0x01 + 2·0x80 + 4·0xff: 2·0x80 = 0x1d; 2·0xff = 0xfe + 0x1d = 0xe3, 4·0xff = 0xc6 + 0x1d = 0xdb.
    let columns = [vec![0x01; 100], vec![0x80; 100], vec![0xff; 100]];
    for parity in levels() {
        let (mut p, mut q) = (vec![0; 100], vec![0; 100]);
        parity.pq(&mut p, &mut q, &all_but(&columns, &[]));
        assert_eq!(p, [0x01 ^ 0x80 ^ 0xff; 100]);
        assert_eq!(q, [0x01 ^ 0x1d ^ 0xdb; 100]);
    }
}

#[test]
fn missing_columns_count_as_zeroes() {
    let columns = stripe(5, 200);
    let zeroes = vec![0; 200];
    let mut written_out = all_but(&columns, &[]);
    written_out[1] = Some(&zeroes);
    written_out[4] = Some(&zeroes);
    for parity in levels() {
        let mut sums = [(); 4].map(|()| vec![1; 200]);
        let [p, q, p_missing, q_missing] = &mut sums;
        parity.pq(p, q, &written_out);
        parity.pq(p_missing, q_missing, &all_but(&columns, &[1, 4]));
        assert_eq!(p, p_missing);
        assert_eq!(q, q_missing);
        parity.pq(p, q, &[]);
        assert_eq!((&*p, &*q), (&zeroes, &zeroes));
    }
}

#[test]
fn the_best_level_is_the_last_that_there_is() {
    let last = levels().last().unwrap().level();
    assert_eq!(Parity::best().level(), last);
    assert!(levels().next().unwrap().level() == Level::Scalar);
}

#[test]
#[should_panic(expected = "columns of different lengths")]
fn columns_of_different_lengths_are_refused() {
    parity::xor(&mut [0; 4], &[&[0; 4], &[0; 3]]);
}

#[test]
#[should_panic(expected = "to be recovered but given")]
fn a_lost_column_that_is_given_is_refused() {
    parity::recover_from_q(&mut [0; 4], 0, &[0; 4], &[Some(&[0; 4])]);
}

#[test]
#[should_panic(expected = "column 255 of at most 255")]
fn an_index_without_a_power_of_its_own_is_refused() {
    parity::update_q(&mut [0; 4], 255, &[0; 4]);
}

#[test]
#[should_panic(expected = "256 data columns of at most 255")]
fn too_many_columns_are_refused() {
    parity::pq(&mut [0; 4], &mut [0; 4], &[None; 256]);
}
