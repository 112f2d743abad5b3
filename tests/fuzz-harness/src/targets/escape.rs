//! The console's escape filter: however keystrokes are cut into reads, the outcome is the same, and nothing is invented.

use arbitrary::Unstructured;
use vmm::console::EscapeFilter;

pub(super) fn run(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let key = input.int_in_range(0..=0x1f)?;
    let mut pieces = Vec::new();
    while !input.is_empty() {
        let mut piece = vec![0; input.int_in_range(0..=8)?];
        for byte in &mut piece {
            *byte = if input.ratio(1, 4)? {
                key
            } else {
                input.arbitrary()?
            };
        }
        pieces.push(piece);
    }
    let typed = pieces.concat();

    let (mut filter, mut guest, mut actions) = (EscapeFilter::new(key), Vec::new(), Vec::new());
    for piece in &pieces {
        actions.extend(filter.feed(piece, &mut guest));
    }
    let mut at_once = Vec::new();
    assert_eq!(EscapeFilter::new(key).feed(&typed, &mut at_once), actions);
    assert_eq!(at_once, guest);
    assert!(guest.len() + 2 * actions.len() <= typed.len());
    if !typed.contains(&key) {
        assert_eq!(guest, typed);
    }
    Ok(())
}
