//! The descriptor of a virtual disk: what was made by the code and then changed is refused, or makes sense and is written as it was read.

use arbitrary::Unstructured;
use storage_virtualizer::disk::{example, survives};

pub(super) fn run(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let mut bytes = example();
    assert!(survives(&bytes));
    for _ in 0..input.int_in_range(0..=6_u8)? {
        if bytes.is_empty() {
            break;
        }
        // Most of a slot is empty.
        let most = bytes.len().min(320);
        let place = input.int_in_range(0..=most - 1)?;
        match input.int_in_range(0..=4_u8)? {
            0 => bytes.truncate(place),
            1 => bytes.insert(place, input.arbitrary()?),
            2 => {
                let wide: u32 = *input.choose(&[0, 1, 255, 256, 257, 0xffff, 0x7fff_ffff, u32::MAX])?;
                for (byte, new) in bytes.iter_mut().skip(place).zip(wide.to_le_bytes()) {
                    *byte = new;
                }
            }
            _ => bytes[place] = input.arbitrary()?,
        }
    }
    survives(&bytes);
    Ok(())
}
