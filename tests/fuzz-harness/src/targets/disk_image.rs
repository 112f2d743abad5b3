//! qcow2 images as nobody would make them: headers, tables and compressed clusters that say what they like. They are refused, or can be
//! read, or not everywhere.

use arbitrary::Unstructured;
use storage_virtualizer::disk::image::qcow2::survives;

/// An image with a header, its first table, and two second tables, then some data.
fn image(input: &mut Unstructured<'_>) -> arbitrary::Result<Vec<u8>> {
    let bits: u32 = *input.choose(&[9, 9, 12, 14, 16])?;
    let cluster = 1_usize << bits;
    let version = *input.choose(&[2_u32, 3, 3, 3])?;
    let extended = version == 3 && bits >= 14 && input.arbitrary()?;
    let zstd: bool = version == 3 && input.arbitrary()?;
    let entry = if extended { 16 } else { 8 };
    let span = (cluster / entry * cluster) as u64;
    let mut bytes = vec![0_u8; cluster * 6];
    let mut put = |place: usize, value: &[u8]| bytes[place..place + value.len()].copy_from_slice(value);
    put(0, b"QFI\xfb");
    put(4, &version.to_be_bytes());
    put(20, &bits.to_be_bytes());
    let size = input.int_in_range(1..=span * 2)? / 512 * 512;
    put(24, &size.to_be_bytes());
    put(36, &2_u32.to_be_bytes());
    put(40, &(cluster as u64).to_be_bytes());
    if version == 3 {
        let features = (u64::from(extended) << 4) | (u64::from(zstd) << 3);
        put(72, &features.to_be_bytes());
        put(96, &4_u32.to_be_bytes());
        put(100, &112_u32.to_be_bytes());
        put(104, &[u8::from(zstd)]);
    }
    for table in 0..2 {
        let place = if input.ratio(1, 8)? {
            input.arbitrary()?
        } else {
            (cluster * (2 + table)) as u64
        };
        put(cluster + table * 8, &place.to_be_bytes());
        for index in 0..input.int_in_range(0..=4)? {
            let place = cluster * (2 + table) + index * entry;
            let data = (cluster * input.int_in_range(3..=6_usize)?) as u64;
            let split = 62 - (bits - 8);
            let sectors = input.int_in_range(0..=3_u64)? << split;
            let packed = (1 << 62) | sectors | (data + input.int_in_range(0..=600_u64)?);
            let value = match input.int_in_range(0..=7_u8)? {
                0..=2 => packed,
                3..=4 => data | (1 << 63),
                5 => 1,
                6 => data | 1,
                _ => input.arbitrary()?,
            };
            put(place, &value.to_be_bytes());
            if extended {
                put(place + 8, &input.arbitrary::<u64>()?.to_be_bytes());
            }
        }
    }
    // What a compressed cluster may begin with: a stored block of deflate, a frame of zstd.
    let starts: [&[u8]; 4] = [
        &[1, 0, 2, 0xff, 0xfd],
        &[0x28, 0xb5, 0x2f, 0xfd],
        &[0x28, 0xb5, 0x2f, 0xfd, 0x60, 0, 0xfe],
        &[0xed, 0xc1, 1, 1],
    ];
    for place in [cluster * 4, cluster * 5] {
        let start = *input.choose(&starts)?;
        put(place, start);
        let rest = input.bytes(input.len().min(24))?;
        put(place + start.len(), rest);
    }
    Ok(bytes)
}

pub(super) fn run(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let mut bytes = image(input)?;
    survives(&bytes);
    for _ in 0..input.int_in_range(0..=4_u8)? {
        let place = input.choose_index(bytes.len().min(4096))?;
        match input.int_in_range(0..=3_u8)? {
            0 => bytes.truncate(place.max(1)),
            1 => {
                let wide: u64 = *input.choose(&[0, 1, 511, 1 << 32, 1 << 55, u64::MAX, i64::MAX as u64])?;
                for (byte, new) in bytes.iter_mut().skip(place).zip(wide.to_be_bytes()) {
                    *byte = new;
                }
            }
            _ => bytes[place] = input.arbitrary()?,
        }
    }
    survives(&bytes);
    Ok(())
}
