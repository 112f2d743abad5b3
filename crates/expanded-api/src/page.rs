//! Page E5h of the vital product data, by which a program in a guest finds disks that take the commands.
//!
//! ```text
//!   byte  0-3    "SMSX"
//!         4, 5   major and minor version
//!         6      encodings: bit 0 JSON
//!         7      0
//!         8, 9   operation codes of IN and OUT
//!        10-11   rights of who asks: bit n is the n-th of `Right::ALL`
//!        12-15   most bytes of a request
//!        16-31   UUID of the disk
//!        32-33   longest wait, in milliseconds
//!        34-35   answers that are kept
//! ```

use api::Right;

use crate::{IN, KEPT, MAJOR, MAX_PAYLOAD, MAX_WAIT_MS, MINOR, OUT};

const MAGIC: &[u8; 4] = b"SMSX";

/// What the page says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// Version of the commands.
    pub major: u8,
    /// Version of the commands.
    pub minor: u8,
    /// What who asks may do.
    pub rights: Vec<Right>,
    /// Most bytes of a request.
    pub max_payload: u32,
    /// The disk's identifier.
    pub uuid: [u8; 16],
}

impl Page {
    /// Bytes of the page, without the four of its header.
    pub const LENGTH: usize = 36;

    /// A page of this version.
    pub fn new(rights: Vec<Right>, uuid: [u8; 16]) -> Self {
        Self {
            major: MAJOR,
            minor: MINOR,
            rights,
            max_payload: u32::try_from(MAX_PAYLOAD).unwrap_or(u32::MAX),
            uuid,
        }
    }

    /// The bytes, without the header of four that all pages have.
    pub fn encode(&self) -> [u8; Self::LENGTH] {
        let mut bytes = [0; Self::LENGTH];
        bytes[..4].copy_from_slice(MAGIC);
        (bytes[4], bytes[5]) = (self.major, self.minor);
        bytes[6] = 1;
        (bytes[8], bytes[9]) = (IN, OUT);
        let rights = Right::ALL.iter().enumerate();
        let rights = rights.filter(|(_, right)| self.rights.contains(right));
        let bits = rights.fold(0_u16, |bits, (number, _)| bits | 1 << number);
        bytes[10..12].copy_from_slice(&bits.to_be_bytes());
        bytes[12..16].copy_from_slice(&self.max_payload.to_be_bytes());
        bytes[16..32].copy_from_slice(&self.uuid);
        bytes[32..34].copy_from_slice(&MAX_WAIT_MS.to_be_bytes());
        bytes[34..36].copy_from_slice(&u16::try_from(KEPT).unwrap_or(u16::MAX).to_be_bytes());
        bytes
    }

    /// What the page says; more than is known may follow. None if it is not such a page.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes = bytes.first_chunk::<{ Self::LENGTH }>()?;
        if bytes[..4] != *MAGIC || bytes[6] & 1 == 0 || (bytes[8], bytes[9]) != (IN, OUT) {
            return None;
        }
        let bits = u16::from_be_bytes([bytes[10], bytes[11]]);
        let rights = Right::ALL.into_iter().enumerate();
        let rights = rights.filter(|(number, _)| bits >> number & 1 != 0);
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&bytes[16..32]);
        Some(Self {
            major: bytes[4],
            minor: bytes[5],
            rights: rights.map(|(_, right)| right).collect(),
            max_payload: u32::from_be_bytes([bytes[12], bytes[13], bytes[14], bytes[15]]),
            uuid,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_survives() {
        for rights in [vec![Right::Observe], Right::ALL.to_vec()] {
            let page = Page::new(rights, [9; 16]);
            assert_eq!(Page::decode(&page.encode()), Some(page.clone()));
            let mut longer = page.encode().to_vec();
            longer.push(1);
            assert_eq!(Page::decode(&longer), Some(page.clone()));
            assert_eq!(Page::decode(&longer[..35]), None);
            longer[0] = b'X';
            assert_eq!(Page::decode(&longer), None);
        }
    }
}
