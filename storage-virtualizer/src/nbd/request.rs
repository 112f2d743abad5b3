//! Requests of the transmission phase: from bytes that anybody may have sent to what is asked for.
//!
//! ```text
//!   bytes ──Head::decode──► Head ──Head::check──► Request: a range within the disk, flags that make sense
//!                             │                     └─ or Refusal: error number and words for the client
//!                             └ how many bytes of data follow, whatever the check says
//! ```

use block_io::nbd::protocol::{
    EXTENDED_REQUEST, EXTENDED_REQUEST_MAGIC, REQUEST, REQUEST_MAGIC, command, error, flag, u16_at, u32_at,
    u64_at,
};
use block_io::{Durability, ZeroMode};

/// A request without its data, as it came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Head {
    /// Flags.
    pub flags: u16,
    /// Kind.
    pub command: u16,
    /// The client's name for it.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
}

/// Bytes that are no request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NoRequest(
    /// What is there instead of the magic number.
    pub u32,
);

/// What a client asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    /// Read bytes.
    Read {
        /// First byte.
        offset: u64,
        /// Bytes, at most [`Limits::payload`].
        length: u32,
    },
    /// Write the data that follow.
    Write {
        /// First byte.
        offset: u64,
        /// Bytes, at most [`Limits::payload`].
        length: u32,
        /// When to answer.
        durability: Durability,
    },
    /// Flush.
    Flush,
    /// Discard.
    Trim {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
        /// When to answer.
        durability: Durability,
    },
    /// Write zeroes.
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
        /// When to answer.
        durability: Durability,
        /// What may become of the space.
        mode: ZeroMode,
    },
    /// Describe blocks.
    BlockStatus {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
        /// No more than one extent.
        one: bool,
    },
}

/// A request that is answered with an error at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Refusal {
    /// The protocol's number.
    pub error: u32,
    /// For people.
    pub message: &'static str,
}

/// What requests may ask for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Size of the disk in bytes.
    pub size: u64,
    /// Offsets and lengths are multiples of this; a power of two.
    pub block: u32,
    /// Most bytes of one read or write.
    pub payload: u32,
    /// No writes.
    pub read_only: bool,
    /// [`flag::DONT_FRAGMENT`] was offered.
    pub structured: bool,
    /// Extended headers were agreed on.
    pub extended: bool,
    /// Fast zeroes are possible.
    pub fast_zeroes: bool,
    /// A context was selected.
    pub has_contexts: bool,
}

impl Head {
    /// The request at the start of `bytes` and its length; `None` if there are too few bytes.
    ///
    /// # Errors
    /// There is no request.
    pub(super) fn decode(bytes: &[u8], extended: bool) -> Result<Option<(Self, usize)>, NoRequest> {
        let Some(magic) = u32_at(bytes, 0) else {
            return Ok(None);
        };
        let (expected, length) = if extended {
            (EXTENDED_REQUEST_MAGIC, EXTENDED_REQUEST)
        } else {
            (REQUEST_MAGIC, REQUEST)
        };
        if magic != expected {
            return Err(NoRequest(magic));
        }
        Ok(Self::fields(bytes, extended).map(|head| (head, length)))
    }

    fn fields(bytes: &[u8], extended: bool) -> Option<Self> {
        Some(Self {
            flags: u16_at(bytes, 4)?,
            command: u16_at(bytes, 6)?,
            cookie: u64_at(bytes, 8)?,
            offset: u64_at(bytes, 16)?,
            length: if extended {
                u64_at(bytes, 24)?
            } else {
                u32_at(bytes, 24)?.into()
            },
        })
    }

    /// Bytes of data that follow, whether the request makes sense or not.
    pub(super) fn payload(&self, extended: bool) -> u64 {
        let announced = extended && self.flags & flag::PAYLOAD_LENGTH != 0;
        if self.command == command::WRITE || announced {
            self.length
        } else {
            0
        }
    }

    /// What is asked for.
    ///
    /// # Errors
    /// Something that makes no sense, or is not allowed.
    pub(super) fn check(&self, limits: &Limits) -> Result<Request, Refusal> {
        let flags = self.checked_flags(limits)?;
        let durability = if flags & flag::FUA != 0 {
            Durability::Durable
        } else {
            Durability::Volatile
        };
        let offset = self.offset;
        match self.command {
            command::READ => {
                let length = self.data_length(limits)?;
                self.within(limits, error::INVALID)?;
                Ok(Request::Read { offset, length })
            }
            command::WRITE => {
                Self::may_write(limits)?;
                let length = self.data_length(limits)?;
                self.within(limits, error::NO_SPACE)?;
                Ok(Request::Write {
                    offset,
                    length,
                    durability,
                })
            }
            command::FLUSH if (offset, self.length) != (0, 0) => Err(invalid("a flush has no range")),
            command::FLUSH => Ok(Request::Flush),
            command::TRIM => {
                Self::may_write(limits)?;
                self.within(limits, error::INVALID)?;
                Ok(Request::Trim {
                    offset,
                    length: self.length,
                    durability,
                })
            }
            command::WRITE_ZEROES => {
                Self::may_write(limits)?;
                self.within(limits, error::NO_SPACE)?;
                // Allocated zeroes may have to be written.
                let fast = limits.fast_zeroes && flags & flag::NO_HOLE == 0;
                if flags & flag::FAST_ZERO != 0 && !fast {
                    return Err(Refusal {
                        error: error::NOT_SUPPORTED,
                        message: "zeroes are not faster than writing them",
                    });
                }
                Ok(Request::WriteZeroes {
                    offset,
                    length: self.length,
                    durability,
                    mode: if flags & flag::NO_HOLE != 0 {
                        ZeroMode::KeepAllocated
                    } else {
                        ZeroMode::MayUnmap
                    },
                })
            }
            command::BLOCK_STATUS => {
                if !limits.has_contexts {
                    return Err(invalid("no metadata context was selected"));
                }
                if self.length == 0 {
                    return Err(invalid("the status of no bytes"));
                }
                self.within(limits, error::INVALID)?;
                Ok(Request::BlockStatus {
                    offset,
                    length: self.length,
                    one: flags & flag::REQUEST_ONE != 0,
                })
            }
            _ => Err(invalid("an unknown command")),
        }
    }

    /// The flags, if all are ones that the command has.
    fn checked_flags(&self, limits: &Limits) -> Result<u16, Refusal> {
        let known = match self.command {
            command::READ if limits.structured => flag::DONT_FRAGMENT,
            // Clients may send it with every write.
            command::WRITE if limits.extended => flag::PAYLOAD_LENGTH,
            command::WRITE_ZEROES => flag::NO_HOLE | flag::FAST_ZERO,
            command::BLOCK_STATUS => flag::REQUEST_ONE,
            _ => 0,
        };
        if self.flags & !(known | flag::FUA) == 0 {
            Ok(self.flags)
        } else {
            Err(invalid("a flag that this command does not have"))
        }
    }

    fn may_write(limits: &Limits) -> Result<(), Refusal> {
        if limits.read_only {
            return Err(Refusal {
                error: error::PERM,
                message: "the export is read-only",
            });
        }
        Ok(())
    }

    fn data_length(&self, limits: &Limits) -> Result<u32, Refusal> {
        match u32::try_from(self.length) {
            Ok(length) if length <= limits.payload => Ok(length),
            _ => Err(invalid("more than the announced maximum of one request")),
        }
    }

    fn within(&self, limits: &Limits, outside: u32) -> Result<(), Refusal> {
        let end = self.offset.checked_add(self.length);
        if end.is_none_or(|end| end > limits.size) {
            return Err(Refusal {
                error: outside,
                message: "the range ends beyond the disk",
            });
        }
        let mask = u64::from(limits.block) - 1;
        if (self.offset | self.length) & mask != 0 {
            return Err(invalid(
                "offset or length is no multiple of the announced minimum block",
            ));
        }
        Ok(())
    }
}

fn invalid(message: &'static str) -> Refusal {
    Refusal {
        error: error::INVALID,
        message,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        size: 1 << 20,
        block: 512,
        payload: 1 << 16,
        read_only: false,
        structured: true,
        extended: false,
        fast_zeroes: false,
        has_contexts: true,
    };

    fn head(command: u16, flags: u16, offset: u64, length: u64) -> Head {
        Head {
            flags,
            command,
            cookie: 1,
            offset,
            length,
        }
    }

    fn errors(head: Head, limits: &Limits) -> u32 {
        head.check(limits).unwrap_err().error
    }

    #[test]
    fn heads_are_decoded_when_they_are_complete() {
        let mut bytes = vec![0x25, 0x60, 0x95, 0x13, 0, 3, 0, 6];
        bytes.extend(7_u64.to_be_bytes());
        bytes.extend(0x1000_u64.to_be_bytes());
        bytes.extend(0x200_u32.to_be_bytes());
        let expected = Head {
            flags: 3,
            command: 6,
            cookie: 7,
            offset: 0x1000,
            length: 0x200,
        };
        for length in 0..28 {
            assert_eq!(Head::decode(&bytes[..length], false), Ok(None));
        }
        assert_eq!(Head::decode(&bytes, false), Ok(Some((expected, 28))));
        assert_eq!(Head::decode(&bytes, true), Err(NoRequest(0x2560_9513)));
        bytes[..4].copy_from_slice(&EXTENDED_REQUEST_MAGIC.to_be_bytes());
        bytes.truncate(24);
        bytes.extend((1_u64 << 40).to_be_bytes());
        assert_eq!(Head::decode(&bytes[..31], true), Ok(None));
        let expected = Head {
            length: 1 << 40,
            ..expected
        };
        assert_eq!(Head::decode(&bytes, true), Ok(Some((expected, 32))));
        assert_eq!(
            Head::decode(b"GET / HTTP/1.1", false),
            Err(NoRequest(0x4745_5420))
        );
    }

    #[test]
    fn what_lies_outside_of_the_disk_is_refused_with_the_number_that_the_protocol_wants() {
        for (offset, length) in [(1 << 20, 512), ((1 << 20) - 512, 1024), (u64::MAX - 511, 1024)] {
            assert_eq!(
                errors(head(command::READ, 0, offset, length), &LIMITS),
                error::INVALID
            );
            assert_eq!(
                errors(head(command::WRITE, 0, offset, length), &LIMITS),
                error::NO_SPACE
            );
            assert_eq!(
                errors(head(command::TRIM, 0, offset, length), &LIMITS),
                error::INVALID
            );
            assert_eq!(
                errors(head(command::WRITE_ZEROES, 0, offset, length), &LIMITS),
                error::NO_SPACE
            );
            assert_eq!(
                errors(head(command::BLOCK_STATUS, 0, offset, length), &LIMITS),
                error::INVALID
            );
        }
        assert_eq!(errors(head(command::READ, 0, 1, 512), &LIMITS), error::INVALID);
        assert_eq!(
            errors(head(command::READ, 0, 0, 1 << 17), &LIMITS),
            error::INVALID
        );
        assert!(head(command::WRITE_ZEROES, 0, 0, 1 << 20).check(&LIMITS).is_ok());
    }

    #[test]
    fn flags_are_those_of_the_command_and_fua_is_allowed_everywhere() {
        for command in [0, 1, 4, 6, 7] {
            assert!(head(command, flag::FUA, 0, 512).check(&LIMITS).is_ok());
        }
        assert!(head(command::FLUSH, flag::FUA, 0, 0).check(&LIMITS).is_ok());
        for (command, flags) in [
            (command::READ, flag::NO_HOLE),
            (command::WRITE, flag::DONT_FRAGMENT),
            (command::WRITE, flag::PAYLOAD_LENGTH),
            (command::TRIM, flag::FAST_ZERO),
            (command::BLOCK_STATUS, 1 << 9),
            (command::FLUSH, flag::REQUEST_ONE),
        ] {
            assert_eq!(errors(head(command, flags, 0, 0), &LIMITS), error::INVALID);
        }
        let fast = head(command::WRITE_ZEROES, flag::FAST_ZERO, 0, 512);
        assert_eq!(errors(fast, &LIMITS), error::NOT_SUPPORTED);
        let simple = Limits {
            structured: false,
            fast_zeroes: true,
            ..LIMITS
        };
        assert!(fast.check(&simple).is_ok());
        let allocated = head(command::WRITE_ZEROES, flag::FAST_ZERO | flag::NO_HOLE, 0, 512);
        assert_eq!(errors(allocated, &simple), error::NOT_SUPPORTED);
        assert_eq!(
            errors(head(command::READ, flag::DONT_FRAGMENT, 0, 512), &simple),
            error::INVALID
        );
    }

    #[test]
    fn nothing_writes_to_a_read_only_export_and_unknown_commands_are_refused() {
        let limits = Limits {
            read_only: true,
            has_contexts: false,
            ..LIMITS
        };
        for command in [command::WRITE, command::TRIM, command::WRITE_ZEROES] {
            assert_eq!(errors(head(command, 0, 0, 512), &limits), error::PERM);
        }
        assert!(head(command::FLUSH, 0, 0, 0).check(&limits).is_ok());
        assert_eq!(errors(head(command::FLUSH, 0, 512, 0), &limits), error::INVALID);
        assert_eq!(
            errors(head(command::BLOCK_STATUS, 0, 0, 512), &limits),
            error::INVALID
        );
        assert_eq!(
            errors(head(command::BLOCK_STATUS, 0, 0, 0), &LIMITS),
            error::INVALID
        );
        for unknown in [5, 8, 99] {
            assert_eq!(errors(head(unknown, 0, 0, 512), &LIMITS), error::INVALID);
        }
    }

    #[test]
    fn data_follow_writes_and_what_announces_them() {
        assert_eq!(head(command::WRITE, 0, 0, 512).payload(false), 512);
        assert_eq!(
            head(command::READ, flag::PAYLOAD_LENGTH, 0, 512).payload(false),
            0
        );
        assert_eq!(
            head(command::READ, flag::PAYLOAD_LENGTH, 0, 512).payload(true),
            512
        );
        assert_eq!(head(command::READ, 0, 0, 512).payload(true), 0);
    }
}
