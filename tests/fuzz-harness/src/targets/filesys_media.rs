//! Every structure of the file system's metadata, one at a time: what was made by the code and then changed is refused, or makes sense and
//! is written as it was read.

use arbitrary::Unstructured;
use filesys::hostile::{Structure, parse};

use crate::filesys_image::{Editor, TABLE, image};

pub(super) fn run(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let editor = Editor::of(&image(false));
    let pages = editor.pages();
    let (structure, mut bytes) = match input.int_in_range(0..=9_u8)? {
        0 => (Structure::Superblock, editor.block(0).to_vec()),
        1 => (Structure::Bitmap, editor.block(33).to_vec()),
        2 => {
            let blocks = editor.journal();
            (Structure::Journal, editor.block(*input.choose(&blocks)?).to_vec())
        }
        3 => {
            let blocks = editor.journal();
            let block = editor.block(*input.choose(&blocks)?);
            let used = usize::from(u16::from_le_bytes([block[60], block[61]]));
            (Structure::Records, block[64..64 + used].to_vec())
        }
        4..=6 => {
            let page = input.choose(&pages)?;
            (
                Structure::Page(page.kind, page.level),
                editor.block(page.block).to_vec(),
            )
        }
        7 => {
            let root = &editor.block(0)[168..184];
            (Structure::Root, root.to_vec())
        }
        _ => {
            let tables: Vec<_> = pages
                .iter()
                .filter(|page| page.kind == TABLE && page.level == 0)
                .collect();
            let page = editor.block(input.choose(&tables)?.block);
            let structure = *input.choose(&[
                Structure::Inode,
                Structure::Inode,
                Structure::Volume,
                Structure::Pin,
                Structure::Name,
            ])?;
            // The first item.
            let length = usize::from(u16::from_le_bytes([page[16], page[17]]));
            (structure, page[18..18 + length].to_vec())
        }
    };
    for _ in 0..input.int_in_range(0..=4_u8)? {
        if bytes.is_empty() {
            break;
        }
        let place = input.choose_index(bytes.len())?;
        match input.int_in_range(0..=5_u8)? {
            0 => bytes.truncate(place),
            1 => bytes.insert(place, input.arbitrary()?),
            2 => {
                let wide: u64 =
                    *input.choose(&[0, 1, 255, 0xffff, 0xffff_ffff, u64::MAX, 1 << 40, 1 << 63])?;
                for (byte, new) in bytes.iter_mut().skip(place).zip(wide.to_le_bytes()) {
                    *byte = new;
                }
            }
            _ => bytes[place] = input.arbitrary()?,
        }
    }
    let _ = parse(structure, &bytes);
    Ok(())
}
