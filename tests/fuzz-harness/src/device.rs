//! What a device under test is connected to instead of a transport, and the account of its chains.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use virtio_core::vm_memory::{Bytes, GuestAddress};
use virtio_core::{Activation, ActiveQueue, DeviceEvents, GuestMemory, VirtioDevice};

use crate::patience::wait_until;
use crate::ring::{Piece, Ring};

/// Hears that the device gave up.
#[derive(Default)]
pub(crate) struct Events(Mutex<Option<String>>);

impl DeviceEvents for Events {
    fn config_changed(&self) {}

    fn needs_reset(&self, reason: &str) {
        assert!(!reason.is_empty());
        *self.0.lock().unwrap() = Some(reason.to_owned());
    }
}

impl Events {
    /// Why the device gave up, if it did.
    pub(crate) fn reason(&self) -> Option<String> {
        self.0.lock().unwrap().clone()
    }
}

/// Gives `queues` to the device, which must be idle.
pub(crate) fn activate(
    device: &mut dyn VirtioDevice,
    memory: &GuestMemory,
    features: u64,
    queues: Vec<ActiveQueue>,
) -> (Arc<Events>, bool) {
    assert!(device.is_idle());
    let events = Arc::new(Events::default());
    let activation = Activation {
        memory_stays: false,
        memory: Arc::clone(memory),
        features,
        queues,
        events: Arc::clone(&events) as Arc<dyn DeviceEvents>,
    };
    let active = device.activate(activation).is_ok();
    (events, active)
}

/// Resets the device; `meanwhile` is called again and again until it stands still.
pub(crate) fn reset(device: &mut dyn VirtioDevice, mut meanwhile: impl FnMut()) {
    device.reset();
    wait_until("the device to become idle", || {
        meanwhile();
        device.is_idle()
    });
}

/// A chain that came back.
pub(crate) struct Returned {
    pub(crate) pieces: Vec<Piece>,
    /// Bytes that the device says it wrote.
    pub(crate) written: usize,
}

impl Returned {
    /// What the device wrote.
    pub(crate) fn bytes(&self, memory: &GuestMemory) -> Vec<u8> {
        let mut bytes = Vec::new();
        for piece in self.pieces.iter().filter(|piece| piece.writable) {
            let start = bytes.len();
            bytes.resize(start + piece.length as usize, 0);
            memory
                .read_slice(&mut bytes[start..], GuestAddress(piece.address))
                .expect("lent buffers are in memory");
        }
        bytes.truncate(self.written);
        bytes
    }
}

/// The chains that the device has: each comes back once, or never.
#[derive(Default)]
pub(crate) struct Account {
    lent: BTreeMap<u32, Vec<Piece>>,
}

impl Account {
    /// The device may take chain `head` of these pieces.
    pub(crate) fn lend(&mut self, head: u16, pieces: Vec<Piece>) {
        assert!(
            self.lent.insert(head.into(), pieces).is_none(),
            "the driver lends a chain twice"
        );
    }

    /// Takes back what the device has used, in its order.
    pub(crate) fn settle(&mut self, ring: &mut Ring) -> Vec<Returned> {
        let mut settled = Vec::new();
        while let Some((head, written)) = ring.take_used() {
            let pieces = self.lent.remove(&head);
            let pieces =
                pieces.unwrap_or_else(|| panic!("chain {head} came back, but the device did not have it"));
            let room: u32 = pieces.iter().map(Piece::room).sum();
            assert!(
                written <= room,
                "{written} bytes written into the {room} of chain {head}"
            );
            settled.push(Returned {
                pieces,
                written: written as usize,
            });
        }
        settled
    }

    pub(crate) fn is_settled(&self) -> bool {
        self.lent.is_empty()
    }
}
