//! The messages of vhost-user: their numbers, and their bodies as types. Nothing here touches a socket.
//!
//! ```text
//!   header:  request u32   flags u32 (version 1, bit 2 reply, bit 3 a reply is wanted)   size u32
//!   body:    `size` bytes; descriptors travel beside it
//! ```
//! All numbers are in the byte order of the host, which is little-endian here. The names are those of the specification
//! ("Vhost-user Protocol" in QEMU's documentation).

/// Bytes of a header.
pub const HEADER: usize = 12;
/// The longest body that is accepted: a configuration space of 256 bytes with its header, a table of 8 regions, are shorter.
pub const MAX_BODY: usize = 4096;
/// The most descriptors beside a message: one for each region of a memory table.
pub const MAX_FDS: usize = 8;
/// The most regions in one [`request::SET_MEM_TABLE`].
pub const MAX_TABLE_REGIONS: usize = 8;

/// Requests of a front-end.
#[expect(missing_docs, reason = "the specification's names")]
pub mod request {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;

    /// The specification's name of a request, for messages to people.
    pub fn name(request: u32) -> &'static str {
        match request {
            GET_FEATURES => "GET_FEATURES",
            SET_FEATURES => "SET_FEATURES",
            SET_OWNER => "SET_OWNER",
            SET_MEM_TABLE => "SET_MEM_TABLE",
            SET_VRING_NUM => "SET_VRING_NUM",
            SET_VRING_ADDR => "SET_VRING_ADDR",
            SET_VRING_BASE => "SET_VRING_BASE",
            GET_VRING_BASE => "GET_VRING_BASE",
            SET_VRING_KICK => "SET_VRING_KICK",
            SET_VRING_CALL => "SET_VRING_CALL",
            SET_VRING_ERR => "SET_VRING_ERR",
            GET_PROTOCOL_FEATURES => "GET_PROTOCOL_FEATURES",
            SET_PROTOCOL_FEATURES => "SET_PROTOCOL_FEATURES",
            GET_QUEUE_NUM => "GET_QUEUE_NUM",
            SET_VRING_ENABLE => "SET_VRING_ENABLE",
            SET_BACKEND_REQ_FD => "SET_BACKEND_REQ_FD",
            GET_CONFIG => "GET_CONFIG",
            SET_CONFIG => "SET_CONFIG",
            GET_INFLIGHT_FD => "GET_INFLIGHT_FD",
            SET_INFLIGHT_FD => "SET_INFLIGHT_FD",
            RESET_DEVICE => "RESET_DEVICE",
            _ => "a message",
        }
    }
}

/// Requests of a back-end, on a channel of its own.
pub mod backend_request {
    /// The configuration space changed: read it again.
    pub const CONFIG_CHANGE_MSG: u32 = 2;
}

/// Bits of [`request::GET_PROTOCOL_FEATURES`].
#[expect(missing_docs, reason = "the specification's names")]
pub mod protocol_feature {
    pub const MQ: u64 = 1 << 0;
    pub const REPLY_ACK: u64 = 1 << 3;
    pub const BACKEND_REQ: u64 = 1 << 5;
    pub const CONFIG: u64 = 1 << 9;
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    pub const RESET_DEVICE: u64 = 1 << 13;
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
}

/// `VHOST_USER_F_PROTOCOL_FEATURES`, among the features of the device.
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// A message that does not have the shape of its kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// Not version 1 of the protocol.
    #[error("the message has flags {flags:#x}: not version 1")]
    Version {
        /// The flags.
        flags: u32,
    },
    /// The body is longer than any.
    #[error("a body of {size} bytes is longer than any message")]
    TooLong {
        /// Length of the body.
        size: u32,
    },
    /// The body has not the length of its kind.
    #[error("the body of message {request} has {size} bytes, which is not its length")]
    Size {
        /// Number of the request.
        request: u32,
        /// Length of the body.
        size: usize,
    },
}

/// The beginning of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// One of [`request`].
    pub request: u32,
    /// It answers a request.
    pub is_reply: bool,
    /// The sender wants to hear how it went.
    pub needs_reply: bool,
    /// Bytes of the body.
    pub size: u32,
}

impl Header {
    /// Takes a header apart.
    ///
    /// # Errors
    /// It is not one of this protocol.
    pub fn decode(bytes: [u8; HEADER]) -> Result<Self, MessageError> {
        let number = |at: usize| u32_at(&bytes, at);
        let (request, flags, size) = (number(0), number(4), number(8));
        if flags & VERSION_MASK != VERSION {
            return Err(MessageError::Version { flags });
        }
        if size as usize > MAX_BODY {
            return Err(MessageError::TooLong { size });
        }
        Ok(Self {
            request,
            is_reply: flags & REPLY != 0,
            needs_reply: flags & NEED_REPLY != 0,
            size,
        })
    }

    /// The bytes on the wire.
    pub fn encode(self) -> [u8; HEADER] {
        let flags =
            VERSION | if self.is_reply { REPLY } else { 0 } | if self.needs_reply { NEED_REPLY } else { 0 };
        let mut bytes = [0; HEADER];
        bytes[..4].copy_from_slice(&self.request.to_le_bytes());
        bytes[4..8].copy_from_slice(&flags.to_le_bytes());
        bytes[8..].copy_from_slice(&self.size.to_le_bytes());
        bytes
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut number = [0; 4];
    number.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(number)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut number = [0; 8];
    number.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(number)
}

/// A piece of the guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// Where the guest sees it.
    pub guest: u64,
    /// Bytes.
    pub size: u64,
    /// Where the front-end sees it: rings are given by such addresses.
    pub user: u64,
    /// Where it begins in its file.
    pub offset: u64,
}

impl Region {
    /// Bytes on the wire.
    pub const LENGTH: usize = 32;

    fn decode(bytes: &[u8]) -> Self {
        Self {
            guest: u64_at(bytes, 0),
            size: u64_at(bytes, 8),
            user: u64_at(bytes, 16),
            offset: u64_at(bytes, 24),
        }
    }

    /// The bytes on the wire.
    pub fn encode(&self) -> [u8; Self::LENGTH] {
        let mut bytes = [0; Self::LENGTH];
        for (index, number) in [self.guest, self.size, self.user, self.offset].iter().enumerate() {
            bytes[index * 8..index * 8 + 8].copy_from_slice(&number.to_le_bytes());
        }
        bytes
    }
}

/// Where a ring lies, in addresses of the front-end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingAddresses {
    /// Descriptors.
    pub descriptors: u64,
    /// Used ring.
    pub used: u64,
    /// Available ring.
    pub available: u64,
}

impl RingAddresses {
    /// The body of [`request::SET_VRING_ADDR`] for queue `index`, without a log of writes.
    pub fn encode(&self, index: u32) -> [u8; 40] {
        let mut bytes = [0; 40];
        bytes[..4].copy_from_slice(&index.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.descriptors.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.used.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.available.to_le_bytes());
        bytes
    }
}

/// The body of messages that give queue `index` a number.
pub fn ring_state(index: u32, number: u32) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&index.to_le_bytes());
    bytes[4..].copy_from_slice(&number.to_le_bytes());
    bytes
}

/// The body of [`request::SET_MEM_TABLE`].
pub fn memory_table(regions: &[Region]) -> Vec<u8> {
    let count = u32::try_from(regions.len()).unwrap_or(u32::MAX);
    let mut bytes = [count.to_le_bytes(), [0; 4]].concat();
    for region in regions {
        bytes.extend_from_slice(&region.encode());
    }
    bytes
}

/// The body of [`request::GET_CONFIG`] and [`request::SET_CONFIG`]: `bytes` of the configuration space from `offset` on.
pub fn config(offset: u32, bytes: &[u8]) -> Vec<u8> {
    let size = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    let mut body = [offset.to_le_bytes(), size.to_le_bytes(), [0; 4]].concat();
    body.extend_from_slice(bytes);
    body
}

/// The body of [`request::GET_INFLIGHT_FD`] and [`request::SET_INFLIGHT_FD`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InflightArea {
    /// Bytes of the area.
    pub size: u64,
    /// Where it begins in its file.
    pub offset: u64,
    /// Queues in it.
    pub queues: u16,
    /// Entries of each.
    pub entries: u16,
}

impl InflightArea {
    /// The bytes on the wire; some have four more, as C pads it.
    pub const LENGTH: usize = 20;

    /// The bytes on the wire.
    pub fn encode(&self) -> [u8; Self::LENGTH] {
        let mut bytes = [0; Self::LENGTH];
        bytes[..8].copy_from_slice(&self.size.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.offset.to_le_bytes());
        bytes[16..18].copy_from_slice(&self.queues.to_le_bytes());
        bytes[18..].copy_from_slice(&self.entries.to_le_bytes());
        bytes
    }

    /// The same as C pads it, which all servers take.
    pub fn encode_padded(&self) -> [u8; 24] {
        let mut bytes = [0; 24];
        bytes[..Self::LENGTH].copy_from_slice(&self.encode());
        bytes
    }
}

/// The bodies of messages, taken apart.
#[derive(Debug, Clone, Copy)]
pub struct Body<'a> {
    request: u32,
    bytes: &'a [u8],
}

impl<'a> Body<'a> {
    /// The body of a message of kind `request`.
    pub fn new(request: u32, bytes: &'a [u8]) -> Self {
        Self { request, bytes }
    }

    fn wrong_size(&self) -> MessageError {
        MessageError::Size {
            request: self.request,
            size: self.bytes.len(),
        }
    }

    fn exactly(&self, length: usize) -> Result<&'a [u8], MessageError> {
        if self.bytes.len() == length {
            Ok(self.bytes)
        } else {
            Err(self.wrong_size())
        }
    }

    /// One number.
    ///
    /// # Errors
    /// The length is wrong, as everywhere here.
    pub fn number(&self) -> Result<u64, MessageError> {
        Ok(u64_at(self.exactly(8)?, 0))
    }

    /// The state of a ring: its index and a number.
    ///
    /// # Errors
    /// The length is wrong.
    pub fn ring_state(&self) -> Result<(u32, u32), MessageError> {
        let bytes = self.exactly(8)?;
        Ok((u32_at(bytes, 0), u32_at(bytes, 4)))
    }

    /// A ring's index and addresses.
    ///
    /// # Errors
    /// The length is wrong.
    pub fn ring_addresses(&self) -> Result<(u32, RingAddresses), MessageError> {
        let bytes = self.exactly(40)?;
        let addresses = RingAddresses {
            descriptors: u64_at(bytes, 8),
            used: u64_at(bytes, 16),
            available: u64_at(bytes, 24),
        };
        Ok((u32_at(bytes, 0), addresses))
    }

    /// All regions of a table.
    ///
    /// # Errors
    /// The length is wrong, or there are more than [`MAX_TABLE_REGIONS`].
    pub fn regions(&self) -> Result<Vec<Region>, MessageError> {
        let (head, rest) = self.bytes.split_at_checked(8).ok_or_else(|| self.wrong_size())?;
        let count = u32_at(head, 0) as usize;
        // Some send the whole table, some only what is used of it.
        let used = count * Region::LENGTH;
        if count > MAX_TABLE_REGIONS || rest.len() < used || rest.len() > MAX_TABLE_REGIONS * Region::LENGTH {
            return Err(self.wrong_size());
        }
        Ok(rest[..used]
            .chunks_exact(Region::LENGTH)
            .map(Region::decode)
            .collect())
    }

    /// A single region.
    ///
    /// # Errors
    /// The length is wrong.
    pub fn region(&self) -> Result<Region, MessageError> {
        Ok(Region::decode(&self.exactly(8 + Region::LENGTH)?[8..]))
    }

    /// A part of the configuration space: offset and bytes.
    ///
    /// # Errors
    /// The length is wrong.
    pub fn config(&self) -> Result<(u32, &'a [u8]), MessageError> {
        let (head, rest) = self.bytes.split_at_checked(12).ok_or_else(|| self.wrong_size())?;
        let payload = rest
            .get(..u32_at(head, 4) as usize)
            .ok_or_else(|| self.wrong_size())?;
        Ok((u32_at(head, 0), payload))
    }

    /// The record of what is in flight.
    ///
    /// # Errors
    /// The length is wrong.
    pub fn inflight(&self) -> Result<InflightArea, MessageError> {
        if self.bytes.len() != 24 {
            self.exactly(InflightArea::LENGTH)?;
        }
        let ends = u32_at(self.bytes, 16).to_le_bytes();
        Ok(InflightArea {
            size: u64_at(self.bytes, 0),
            offset: u64_at(self.bytes, 8),
            queues: u16::from_le_bytes([ends[0], ends[1]]),
            entries: u16::from_le_bytes([ends[2], ends[3]]),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_the_wire_and_others_versions_are_refused() {
        let header = Header {
            request: request::SET_CONFIG,
            is_reply: false,
            needs_reply: true,
            size: 40,
        };
        assert_eq!(Header::decode(header.encode()), Ok(header));
        let mut bytes = header.encode();
        bytes[4] = 2;
        assert!(matches!(Header::decode(bytes), Err(MessageError::Version { .. })));
        let long = Header { size: 4097, ..header };
        assert_eq!(
            Header::decode(long.encode()),
            Err(MessageError::TooLong { size: 4097 })
        );
    }

    #[test]
    fn a_table_that_promises_more_regions_than_it_has_is_refused() {
        let mut bytes = vec![0; 8 + Region::LENGTH];
        bytes[0] = 1;
        assert_eq!(
            Body::new(request::SET_MEM_TABLE, &bytes).regions().unwrap().len(),
            1
        );
        bytes[0] = 2;
        assert!(Body::new(request::SET_MEM_TABLE, &bytes).regions().is_err());
        bytes[..4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(Body::new(request::SET_MEM_TABLE, &bytes).regions().is_err());
    }

    #[test]
    fn a_configuration_is_as_long_as_it_says_or_refused() {
        let mut bytes = vec![7; 12 + 4];
        bytes[..12].copy_from_slice(&[32, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(
            Body::new(request::SET_CONFIG, &bytes).config(),
            Ok((32, &[7_u8][..]))
        );
        bytes[4] = 5;
        assert!(Body::new(request::SET_CONFIG, &bytes).config().is_err());
        assert!(Body::new(request::SET_CONFIG, &bytes[..11]).config().is_err());
    }
}
