//! Who sends commands: an initiator port on a target port (SPC-4 and SAM-5: an I_T nexus).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::unit::SLOTS;

/// A TransportID (SPC-4 §7.6.4): names an initiator port in persistent reservations.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TransportId(Arc<[u8]>);

/// Length of all TransportIDs but those of iSCSI.
const FIXED_LENGTH: usize = 24;
/// Longest TransportID that is taken: an iSCSI name has at most 223 bytes, an ISID 12 digits.
const MAX_LENGTH: usize = 252;

impl TransportId {
    /// An initiator port with a SAS address; what virtual host adapters have.
    pub fn sas(address: u64) -> Self {
        let mut bytes = [0; FIXED_LENGTH];
        bytes[0] = 0x06;
        bytes[4..12].copy_from_slice(&address.to_be_bytes());
        Self(bytes.as_slice().into())
    }

    /// An iSCSI initiator port: the initiator's name and the session's ISID (RFC 7143 §4.2.7).
    pub fn iscsi(name: &str, isid: [u8; 6]) -> Self {
        let mut text = format!("{name},i,0x");
        isid.iter().for_each(|byte| text.push_str(&format!("{byte:02x}")));
        let mut bytes = vec![0x45, 0, 0, 0];
        bytes.extend(text.as_bytes());
        // At least one zero at the end, in whole words.
        bytes.resize((bytes.len() + 1).next_multiple_of(4).max(FIXED_LENGTH), 0);
        let length = u16::try_from(bytes.len() - 4).unwrap_or(u16::MAX);
        bytes[2..4].copy_from_slice(&length.to_be_bytes());
        Self(bytes.into())
    }

    /// The TransportID at the beginning of `bytes`, which an initiator sent. None if it is not one.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let head = bytes.first_chunk::<4>()?;
        let length = match head[0] {
            0x05 | 0x45 => usize::from(u16::from_be_bytes([head[2], head[3]])) + 4,
            // The other transports have one format each.
            0x00 | 0x03 | 0x04 | 0x06 => FIXED_LENGTH,
            _ => return None,
        };
        let well_formed = (FIXED_LENGTH..=MAX_LENGTH).contains(&length) && length.is_multiple_of(4);
        let bytes = bytes.get(..length).filter(|_| well_formed)?;
        Some(Self(bytes.into()))
    }

    /// The name of an iSCSI initiator, without its session's ISID.
    pub fn iscsi_name(&self) -> Option<&str> {
        let text = self.0.strip_prefix(&[0x45])?.get(3..)?;
        let end = text.iter().position(|byte| matches!(byte, b',' | 0))?;
        std::str::from_utf8(text.get(..end)?).ok()
    }

    /// The bytes, as in parameter data.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// One initiator port on one target port. A transport makes one for each: virtio for a VM, iSCSI for a session.
#[derive(Debug)]
pub struct Nexus {
    number: u64,
    initiator: TransportId,
    target_port: u16,
    /// LUNs that the initiator may see, ascending.
    visible: Mutex<Arc<[u16]>>,
}

impl Nexus {
    /// A new nexus of `initiator` on the target port with the relative port identifier `target_port`. It sees no LUN until
    /// [`super::Target::connect`] shows it some.
    pub fn new(initiator: TransportId, target_port: u16) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self {
            number: NEXT.fetch_add(1, Ordering::Relaxed),
            initiator,
            target_port,
            visible: Mutex::default(),
        }
    }

    /// The initiator port.
    pub fn initiator(&self) -> &TransportId {
        &self.initiator
    }

    /// Relative port identifier of the target port.
    pub fn target_port(&self) -> u16 {
        self.target_port
    }

    /// Unique in this process.
    pub(super) fn number(&self) -> u64 {
        self.number
    }

    /// The bit of the units' words that says that there may be something to tell this nexus.
    pub(super) fn mask(&self) -> u64 {
        1 << (self.number % SLOTS)
    }

    /// LUNs that the initiator may see, ascending.
    pub fn visible(&self) -> Arc<[u16]> {
        Arc::clone(&self.visible.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn show(&self, luns: Arc<[u16]>) {
        *self.visible.lock().unwrap_or_else(PoisonError::into_inner) = luns;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transport_ids_have_the_layout_of_their_transport() {
        let sas = TransportId::sas(0x5000_1234_5678_9abc);
        assert_eq!(sas.as_bytes().len(), 24);
        assert_eq!(
            sas.as_bytes()[..12],
            [6, 0, 0, 0, 0x50, 0, 0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc]
        );
        let iscsi = TransportId::iscsi("iqn.2026-01.org.example:host", [0x40, 0, 0, 1, 0, 2]);
        assert_eq!(iscsi.as_bytes()[..2], [0x45, 0]);
        assert_eq!(
            iscsi.as_bytes().len(),
            4 + usize::from(iscsi.as_bytes()[3]),
            "the length counts what follows it"
        );
        assert!(iscsi.as_bytes()[4..].starts_with(b"iqn.2026-01.org.example:host,i,0x400000010002\0"));
        for id in [&sas, &iscsi] {
            let mut bytes = id.as_bytes().to_vec();
            bytes.extend([1, 2, 3]);
            assert_eq!(TransportId::parse(&bytes).as_ref(), Some(id));
            assert_eq!(TransportId::parse(&bytes[..23]), None);
        }
        assert_eq!(TransportId::parse(&[0x0f; 24]), None);
    }
}
