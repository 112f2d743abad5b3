//! The control queue: the driver's wishes about receive modes, addresses, queues and offloads (virtio 1.2 §5.1.6.5).
//!
//! We do not filter: the guest gets what its network sends to it, and drops what it does not want. So receive modes and
//! filter tables are acknowledged and forgotten, which the specification allows.

use std::sync::{Mutex, PoisonError};

use api::MacAddress;
use virtio_core::read_config_bytes;

use super::backend::NetBackend;
use super::protocol::{STATUS_LINK_UP, command, feature};

/// Bytes of a command that are looked at: class, command, and the longest argument of those that we obey.
pub(super) const REQUEST_SIZE: usize = 2 + 8;

/// What the guest sees in the card's configuration space.
#[derive(Debug)]
pub(super) struct NetConfig {
    mac: Mutex<[u8; 6]>,
    max_pairs: u16,
    mtu: u16,
}

impl NetConfig {
    /// Of a card with address `mac`.
    pub(super) fn new(mac: MacAddress, max_pairs: u16, mtu: Option<u16>) -> Self {
        Self {
            mac: Mutex::new(mac.octets()),
            max_pairs,
            mtu: mtu.unwrap_or(1500),
        }
    }

    /// The bytes of `struct virtio_net_config` (§5.1.4).
    pub(super) fn read(&self, link_up: bool, offset: u64, data: &mut [u8]) {
        let mut bytes = [0; 12];
        bytes[..6].copy_from_slice(&self.mac());
        let status = if link_up { STATUS_LINK_UP } else { 0 };
        bytes[6..8].copy_from_slice(&status.to_le_bytes());
        bytes[8..10].copy_from_slice(&self.max_pairs.to_le_bytes());
        bytes[10..12].copy_from_slice(&self.mtu.to_le_bytes());
        read_config_bytes(&bytes, offset, data);
    }

    pub(super) fn mac(&self) -> [u8; 6] {
        *self.mac.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_mac(&self, mac: [u8; 6]) {
        *self.mac.lock().unwrap_or_else(PoisonError::into_inner) = mac;
    }
}

/// Executes a command, of which `request` has the beginning. `features` are those agreed on. Returns the answer's byte.
pub(super) fn execute(request: &[u8], features: u64, config: &NetConfig, backend: &NetBackend) -> u8 {
    let [class, number, argument @ ..] = request else {
        return command::ACK_ERROR;
    };
    let has = |bits: u64| features & bits == bits;
    let done = match (*class, *number) {
        (command::CLASS_RX, ..=command::RX_ALLMULTI) => has(feature::CTRL_RX) && !argument.is_empty(),
        (command::CLASS_RX, ..=command::RX_NOBCAST) => has(feature::CTRL_RX_EXTRA) && !argument.is_empty(),
        (command::CLASS_MAC, command::MAC_TABLE_SET) => has(feature::CTRL_RX),
        (command::CLASS_MAC, command::MAC_ADDR_SET) => {
            has(feature::CTRL_MAC_ADDR) && set_mac(argument, config)
        }
        (command::CLASS_MQ, command::MQ_VQ_PAIRS_SET) => {
            has(feature::MQ) && set_pairs(argument, config, backend)
        }
        (command::CLASS_GUEST_OFFLOADS, command::GUEST_OFFLOADS_SET) => {
            has(feature::CTRL_GUEST_OFFLOADS) && set_offloads(argument, features, backend)
        }
        _ => false,
    };
    tracing::debug!(class, number, done, "network card: control command");
    if done { command::ACK_OK } else { command::ACK_ERROR }
}

fn set_mac(argument: &[u8], config: &NetConfig) -> bool {
    match argument.first_chunk::<6>() {
        // Not the address of a group, nor none.
        Some(address) if address[0] & 1 == 0 && *address != [0; 6] => {
            config.set_mac(*address);
            true
        }
        _ => false,
    }
}

fn set_pairs(argument: &[u8], config: &NetConfig, backend: &NetBackend) -> bool {
    let Some(pairs) = argument.first_chunk().map(|bytes| u16::from_le_bytes(*bytes)) else {
        return false;
    };
    (1..=config.max_pairs).contains(&pairs)
        && succeeded(backend.set_active_pairs(usize::from(pairs)), "queues")
}

fn set_offloads(argument: &[u8], features: u64, backend: &NetBackend) -> bool {
    let Some(offloads) = argument.first_chunk().map(|bytes| u64::from_le_bytes(*bytes)) else {
        return false;
    };
    offloads & !(features & feature::GUEST_OFFLOADS) == 0
        && succeeded(backend.set_offloads(offloads), "offloads")
}

fn succeeded(result: std::io::Result<()>, what: &str) -> bool {
    if let Err(error) = &result {
        tracing::debug!(%error, what, "the backend refused what the driver asked for");
    }
    result.is_ok()
}
