//! The numbers of the NBD protocol (its document, `proto.md`): what client and server both need to know.
//!
//! Everything on the wire is big-endian. Lengths of requests and replies are those of their fixed parts.

/// First bytes of every server.
pub const SERVER_MAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
/// Begins each option, and follows [`SERVER_MAGIC`] in the newstyle handshake.
pub const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
/// Follows [`SERVER_MAGIC`] in the oldstyle handshake.
pub const OLD_STYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// Begins each reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Begins a request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Begins a request with extended headers.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// Begins a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Begins a chunk of a structured reply.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;
/// Begins a chunk of a reply with extended headers.
pub const EXTENDED_CHUNK_MAGIC: u32 = 0x6e8a_278c;

/// Length of a request without its data.
pub const REQUEST: usize = 28;
/// Length of a request with extended headers, without its data.
pub const EXTENDED_REQUEST: usize = 32;
/// Length of a simple reply without its data.
pub const SIMPLE_REPLY: usize = 16;
/// Length of the head of a chunk of a structured reply.
pub const CHUNK: usize = 20;
/// The same with extended headers.
pub const EXTENDED_CHUNK: usize = 32;
/// Longest string that may be sent: names of exports, messages, queries.
pub const LONGEST_TEXT: usize = 4096;
/// The largest request that a side must take when block sizes were not agreed on.
pub const DEFAULT_MAXIMUM: u32 = 32 << 20;

/// Flags of both sides in the handshake: fixed newstyle.
pub const FIXED_NEWSTYLE: u16 = 1;
/// The same: no 124 zeroes after `NBD_OPT_EXPORT_NAME`.
pub const NO_ZEROES: u16 = 1 << 1;

/// Options of the handshake.
pub mod option {
    /// `NBD_OPT_EXPORT_NAME`
    pub const EXPORT_NAME: u32 = 1;
    /// `NBD_OPT_ABORT`
    pub const ABORT: u32 = 2;
    /// `NBD_OPT_LIST`
    pub const LIST: u32 = 3;
    /// `NBD_OPT_STARTTLS`
    pub const STARTTLS: u32 = 5;
    /// `NBD_OPT_INFO`
    pub const INFO: u32 = 6;
    /// `NBD_OPT_GO`
    pub const GO: u32 = 7;
    /// `NBD_OPT_STRUCTURED_REPLY`
    pub const STRUCTURED_REPLY: u32 = 8;
    /// `NBD_OPT_LIST_META_CONTEXT`
    pub const LIST_META_CONTEXT: u32 = 9;
    /// `NBD_OPT_SET_META_CONTEXT`
    pub const SET_META_CONTEXT: u32 = 10;
    /// `NBD_OPT_EXTENDED_HEADERS`
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Replies to options.
pub mod reply {
    /// `NBD_REP_ACK`
    pub const ACK: u32 = 1;
    /// `NBD_REP_SERVER`
    pub const SERVER: u32 = 2;
    /// `NBD_REP_INFO`
    pub const INFO: u32 = 3;
    /// `NBD_REP_META_CONTEXT`
    pub const META_CONTEXT: u32 = 4;
    /// The bit of all errors.
    pub const ERROR: u32 = 1 << 31;
    /// `NBD_REP_ERR_UNSUP`
    pub const UNSUPPORTED: u32 = ERROR | 1;
    /// `NBD_REP_ERR_POLICY`
    pub const POLICY: u32 = ERROR | 2;
    /// `NBD_REP_ERR_INVALID`
    pub const INVALID: u32 = ERROR | 3;
    /// `NBD_REP_ERR_TLS_REQD`
    pub const TLS_REQUIRED: u32 = ERROR | 5;
    /// `NBD_REP_ERR_UNKNOWN`: no such export
    pub const UNKNOWN: u32 = ERROR | 6;
    /// `NBD_REP_ERR_SHUTDOWN`
    pub const SHUTDOWN: u32 = ERROR | 7;
    /// `NBD_REP_ERR_BLOCK_SIZE_REQD`
    pub const BLOCK_SIZE_REQUIRED: u32 = ERROR | 8;
    /// `NBD_REP_ERR_TOO_BIG`
    pub const TOO_BIG: u32 = ERROR | 9;
}

/// Kinds of information about an export (`NBD_INFO_*`).
pub mod info {
    /// Size and transmission flags.
    pub const EXPORT: u16 = 0;
    /// The name in its canonical form.
    pub const NAME: u16 = 1;
    /// A text for people.
    pub const DESCRIPTION: u16 = 2;
    /// Minimum, preferred and maximum block size.
    pub const BLOCK_SIZE: u16 = 3;
}

/// What an export can do (transmission flags).
pub mod can {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1;
    /// Takes no writes.
    pub const READ_ONLY: u16 = 1 << 1;
    /// `NBD_CMD_FLUSH`.
    pub const FLUSH: u16 = 1 << 2;
    /// [`super::flag::FUA`].
    pub const FUA: u16 = 1 << 3;
    /// `NBD_CMD_TRIM`.
    pub const TRIM: u16 = 1 << 5;
    /// `NBD_CMD_WRITE_ZEROES`.
    pub const WRITE_ZEROES: u16 = 1 << 6;
    /// [`super::flag::DONT_FRAGMENT`].
    pub const DONT_FRAGMENT: u16 = 1 << 7;
    /// Flushes on one connection count for all.
    pub const MULTI_CONN: u16 = 1 << 8;
    /// [`super::flag::FAST_ZERO`].
    pub const FAST_ZERO: u16 = 1 << 11;
}

/// Flags of a request.
pub mod flag {
    /// Answer when it is on the medium.
    pub const FUA: u16 = 1;
    /// Zeroes keep their space.
    pub const NO_HOLE: u16 = 1 << 1;
    /// One chunk of data at most.
    pub const DONT_FRAGMENT: u16 = 1 << 2;
    /// One extent at most.
    pub const REQUEST_ONE: u16 = 1 << 3;
    /// Zeroes without writing them, or none.
    pub const FAST_ZERO: u16 = 1 << 4;
    /// The length is that of data that follow (extended headers).
    pub const PAYLOAD_LENGTH: u16 = 1 << 5;
}

/// Kinds of requests.
pub mod command {
    /// `NBD_CMD_READ`
    pub const READ: u16 = 0;
    /// `NBD_CMD_WRITE`
    pub const WRITE: u16 = 1;
    /// `NBD_CMD_DISC`
    pub const DISCONNECT: u16 = 2;
    /// `NBD_CMD_FLUSH`
    pub const FLUSH: u16 = 3;
    /// `NBD_CMD_TRIM`
    pub const TRIM: u16 = 4;
    /// `NBD_CMD_WRITE_ZEROES`
    pub const WRITE_ZEROES: u16 = 6;
    /// `NBD_CMD_BLOCK_STATUS`
    pub const BLOCK_STATUS: u16 = 7;
}

/// Chunks of structured replies.
pub mod chunk {
    /// Flag: the last one of its reply.
    pub const DONE: u16 = 1;
    /// `NBD_REPLY_TYPE_NONE`
    pub const NONE: u16 = 0;
    /// `NBD_REPLY_TYPE_OFFSET_DATA`
    pub const OFFSET_DATA: u16 = 1;
    /// `NBD_REPLY_TYPE_OFFSET_HOLE`
    pub const OFFSET_HOLE: u16 = 2;
    /// `NBD_REPLY_TYPE_BLOCK_STATUS`
    pub const BLOCK_STATUS: u16 = 5;
    /// `NBD_REPLY_TYPE_BLOCK_STATUS_EXT`
    pub const BLOCK_STATUS_EXT: u16 = 6;
    /// The bit of all errors.
    pub const ERROR_BIT: u16 = 1 << 15;
    /// `NBD_REPLY_TYPE_ERROR`
    pub const ERROR: u16 = ERROR_BIT | 1;
}

/// States of extents.
pub mod state {
    /// `base:allocation`: no space is allocated.
    pub const HOLE: u32 = 1;
    /// `base:allocation`: reads as zeroes.
    pub const ZERO: u32 = 1 << 1;
    /// `qemu:dirty-bitmap:…`, `smsvmm:changed:…`: it has changed.
    pub const DIRTY: u32 = 1;
}

/// Error numbers of the protocol.
pub mod error {
    /// Not permitted.
    pub const PERM: u32 = 1;
    /// Input or output failed.
    pub const IO: u32 = 5;
    /// No memory.
    pub const NO_MEMORY: u32 = 12;
    /// The request makes no sense.
    pub const INVALID: u32 = 22;
    /// No space.
    pub const NO_SPACE: u32 = 28;
    /// Too large.
    pub const OVERFLOW: u32 = 75;
    /// Not supported.
    pub const NOT_SUPPORTED: u32 = 95;
    /// The server is about to end.
    pub const SHUTDOWN: u32 = 108;
}

/// Two bytes at `at`, if they are there.
pub fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Four bytes at `at`.
pub fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Eight bytes at `at`.
pub fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}
