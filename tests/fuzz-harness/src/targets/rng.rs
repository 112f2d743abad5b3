//! The entropy source on an event loop that runs in this thread.

use arbitrary::Unstructured;
use event_manager::EventManager;
use virtio_core::feature;
use vmm::devices::event_loop::Subscriber;
use vmm::devices::rng::Rng;

use crate::device::{Account, activate, reset};
use crate::memory::{Watch, guest_memory};
use crate::ring::{Arena, MAX_SIZE, Ring};

/// One go gives 256 KiB, and a ring can ask for 2 MiB.
const TURNS: usize = 64;

pub(super) fn run(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let mut event_loop = EventManager::<Subscriber>::new().expect("an epoll instance");
    let mut rng = Rng::new(event_loop.remote_endpoint());
    while !input.is_empty() {
        live(input, &mut event_loop, &mut rng)?;
    }
    Ok(())
}

/// One life of the device, from activation to reset.
fn live(
    input: &mut Unstructured<'_>,
    event_loop: &mut EventManager<Subscriber>,
    rng: &mut Rng,
) -> arbitrary::Result<()> {
    let memory = guest_memory();
    let event_index = input.arbitrary()?;
    let size = 1 << input.int_in_range(1..=MAX_SIZE.ilog2())?;
    let mut ring = Ring::new(&memory, 0, size, event_index);
    let features = feature::RING_INDIRECT_DESC | if event_index { feature::RING_EVENT_IDX } else { 0 };
    let (events, active) = activate(rng, &memory, features, vec![ring.active(0)]);
    assert!(active);
    let mut account = Account::default();
    let mut spoilt = false;
    for _ in 0..input.int_in_range(1..=6)? {
        let mut arena = Arena::new();
        let mut lent = Vec::new();
        for _ in 0..input.int_in_range(0..=6)? {
            let mut pieces = Vec::new();
            if input.ratio(1, 8)? {
                arena.cut(input, 16, false, &mut pieces)?;
            }
            let length = input.int_in_range(0..=3000)?;
            arena.cut(input, length, true, &mut pieces)?;
            let indirect = input.ratio(1, 4)?;
            if let Some(head) = ring.store_chain(&mut arena, &pieces, indirect) {
                ring.make_available(head);
                lent.extend(&pieces);
                account.lend(head, pieces);
            }
        }
        if input.ratio(1, 8)? {
            ring.spoil(input)?;
            spoilt = true;
        }
        ring.ask_for_interrupt(input.int_in_range(0..=1)?, input.arbitrary()?);
        let mut watch = Watch::new(&memory);
        ring.publish();
        ring.ring_doorbell();
        for _ in 0..TURNS {
            event_loop.run_with_timeout(0).expect("an event loop");
        }
        if spoilt {
            continue;
        }
        assert_eq!(events.reason(), None);
        account.settle(&mut ring);
        assert!(account.is_settled(), "a chain did not come back");
        watch.allow_device(&lent, &ring);
        watch.assert_unchanged();
        ring.recycle();
    }
    reset(rng, || {});
    let watch = Watch::new(&memory);
    ring.ring_doorbell();
    event_loop.run_with_timeout(0).expect("an event loop");
    watch.assert_unchanged();
    Ok(())
}
