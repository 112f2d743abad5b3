//! What went wrong with a command, and how the initiator is told: the one place where failures become sense data.
//!
//! A command fails with a [`Sense`]; its bytes are made at the very end, in the format that the control mode page asks for
//! (SPC-4 §4.5.2 descriptor, §4.5.3 fixed).

use block_io::{IoCause, IoError, Operation};

/// Sense keys (SPC-4 §4.5.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Key {
    /// Nothing to report.
    NoSense = 0x0,
    /// The unit cannot be accessed.
    NotReady = 0x2,
    /// The medium is flawed.
    MediumError = 0x3,
    /// The device failed.
    HardwareError = 0x4,
    /// The command is wrong.
    IllegalRequest = 0x5,
    /// Something has changed since the last command of this initiator.
    UnitAttention = 0x6,
    /// Writing is forbidden.
    DataProtect = 0x7,
    /// A copy between units failed.
    CopyAborted = 0xa,
    /// The command was given up.
    AbortedCommand = 0xb,
    /// What was compared differs.
    Miscompare = 0xe,
}

/// An additional sense code and its qualifier (SPC-4 annex D).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Code(pub u8, pub u8);

macro_rules! codes {
    ($($name:ident = $code:literal, $qualifier:literal;)*) => {
        impl Code {
            $(#[doc = concat!("`", stringify!($name), "`")]
            pub const $name: Self = Self($code, $qualifier);)*
        }
    };
}

codes! {
    NONE = 0x00, 0x00;
    NOT_READY_BECOMING_READY = 0x04, 0x01;
    NOT_READY_INITIALIZING_REQUIRED = 0x04, 0x02;
    NOT_READY_TRANSITION = 0x04, 0x0a;
    NOT_READY_STANDBY = 0x04, 0x0b;
    NOT_READY_UNAVAILABLE = 0x04, 0x0c;
    COMMUNICATION_FAILURE = 0x08, 0x00;
    COPY_TARGET_NOT_REACHABLE = 0x0d, 0x02;
    WRITE_ERROR = 0x0c, 0x00;
    UNRECOVERED_READ_ERROR = 0x11, 0x00;
    PARAMETER_LIST_LENGTH_ERROR = 0x1a, 0x00;
    MISCOMPARE_DURING_VERIFY = 0x1d, 0x00;
    INVALID_OPERATION_CODE = 0x20, 0x00;
    ACCESS_DENIED_NO_RIGHTS = 0x20, 0x02;
    LBA_OUT_OF_RANGE = 0x21, 0x00;
    INVALID_FIELD_IN_CDB = 0x24, 0x00;
    LOGICAL_UNIT_NOT_SUPPORTED = 0x25, 0x00;
    INVALID_FIELD_IN_PARAMETER_LIST = 0x26, 0x00;
    INVALID_RELEASE_OF_PERSISTENT_RESERVATION = 0x26, 0x04;
    TOO_MANY_TARGET_DESCRIPTORS = 0x26, 0x06;
    UNSUPPORTED_TARGET_DESCRIPTOR = 0x26, 0x07;
    TOO_MANY_SEGMENT_DESCRIPTORS = 0x26, 0x08;
    UNSUPPORTED_SEGMENT_DESCRIPTOR = 0x26, 0x09;
    WRITE_PROTECTED = 0x27, 0x00;
    SOFTWARE_WRITE_PROTECTED = 0x27, 0x02;
    SPACE_ALLOCATION_FAILED = 0x27, 0x07;
    NOT_READY_TO_READY_CHANGE = 0x28, 0x00;
    POWER_ON_OCCURRED = 0x29, 0x00;
    TARGET_RESET = 0x29, 0x02;
    LOGICAL_UNIT_RESET = 0x29, 0x03;
    NEXUS_LOSS = 0x29, 0x07;
    MODE_PARAMETERS_CHANGED = 0x2a, 0x01;
    RESERVATIONS_PREEMPTED = 0x2a, 0x03;
    RESERVATIONS_RELEASED = 0x2a, 0x04;
    REGISTRATIONS_PREEMPTED = 0x2a, 0x05;
    ASYMMETRIC_ACCESS_CHANGED = 0x2a, 0x06;
    CAPACITY_CHANGED = 0x2a, 0x09;
    COMMAND_SEQUENCE_ERROR = 0x2c, 0x00;
    SAVING_NOT_SUPPORTED = 0x39, 0x00;
    MEDIUM_NOT_PRESENT = 0x3a, 0x00;
    INQUIRY_DATA_CHANGED = 0x3f, 0x03;
    SELF_TEST_FAILED = 0x3e, 0x03;
    REPORTED_LUNS_CHANGED = 0x3f, 0x0e;
    INTERNAL_TARGET_FAILURE = 0x44, 0x00;
    MEDIUM_REMOVAL_PREVENTED = 0x53, 0x02;
    INSUFFICIENT_RESOURCES = 0x55, 0x03;
    INSUFFICIENT_REGISTRATION_RESOURCES = 0x55, 0x04;
}

/// Which field of a command or of its parameter list is wrong (SPC-4 §4.5.2.4.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Field {
    /// Whether it is in the CDB and not in the parameter list.
    pub in_cdb: bool,
    /// Number of its first byte.
    pub byte: u16,
    /// Its highest bit in that byte; none if the field is whole bytes.
    pub bit: Option<u8>,
}

/// A failure, or something to report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sense {
    /// The kind.
    pub key: Key,
    /// What exactly.
    pub code: Code,
    /// A block, an offset, a difference of lengths: what the code says.
    pub information: Option<u64>,
    /// The wrong field.
    pub field: Option<Field>,
}

impl Sense {
    /// A failure without more to say.
    pub const fn new(key: Key, code: Code) -> Self {
        Self {
            key,
            code,
            information: None,
            field: None,
        }
    }

    /// An ILLEGAL REQUEST.
    pub const fn illegal(code: Code) -> Self {
        Self::new(Key::IllegalRequest, code)
    }

    /// The field of the CDB that begins at byte `byte` is wrong; `bit` is its highest bit if it is not whole bytes.
    pub const fn in_cdb(byte: u16, bit: Option<u8>) -> Self {
        Self::illegal(Code::INVALID_FIELD_IN_CDB).at(true, byte, bit)
    }

    /// The field of the parameter list that begins at byte `byte` is wrong.
    pub(super) const fn in_parameters(byte: u16, bit: Option<u8>) -> Self {
        Self::illegal(Code::INVALID_FIELD_IN_PARAMETER_LIST).at(false, byte, bit)
    }

    /// Names the field: its first byte, and its highest bit if it is not whole bytes.
    pub const fn at(mut self, in_cdb: bool, byte: u16, bit: Option<u8>) -> Self {
        self.field = Some(Field { in_cdb, byte, bit });
        self
    }

    pub(super) const fn with_information(mut self, information: u64) -> Self {
        self.information = Some(information);
        self
    }

    /// The sense data of an error of the disk with blocks of `block` bytes.
    #[cold]
    pub fn of(error: &IoError, block: u32) -> Self {
        let lba = error.offset() / u64::from(block.max(1));
        if error.is_no_space() {
            return Self::new(Key::DataProtect, Code::SPACE_ALLOCATION_FAILED);
        }
        if error.is_transport() {
            return Self::new(Key::HardwareError, Code::COMMUNICATION_FAILURE);
        }
        match error.cause() {
            IoCause::ReadOnly => Self::new(Key::DataProtect, Code::WRITE_PROTECTED),
            IoCause::OutOfRange { .. } | IoCause::Truncated => {
                Self::illegal(Code::LBA_OUT_OF_RANGE).with_information(lba)
            }
            IoCause::EarlierFlushFailed => Self::new(Key::HardwareError, Code::WRITE_ERROR),
            IoCause::Misaligned { .. } | IoCause::NotOnWorker => {
                Self::new(Key::HardwareError, Code::INTERNAL_TARGET_FAILURE)
            }
            IoCause::NoProgress | IoCause::ConnectionLost { .. } | IoCause::Os(_) => {
                match error.operation() {
                    Operation::Read => {
                        Self::new(Key::MediumError, Code::UNRECOVERED_READ_ERROR).with_information(lba)
                    }
                    Operation::Flush => Self::new(Key::MediumError, Code::WRITE_ERROR),
                    Operation::Write | Operation::Discard | Operation::WriteZeroes => {
                        Self::new(Key::MediumError, Code::WRITE_ERROR).with_information(lba)
                    }
                }
            }
        }
    }

    /// The bytes, in descriptor format or in the fixed one.
    pub fn encode(&self, descriptors: bool) -> SenseData {
        let mut data = SenseData::default();
        if descriptors {
            self.put_descriptors(&mut data);
        } else {
            self.put_fixed(&mut data);
        }
        data
    }

    fn put_fixed(&self, data: &mut SenseData) {
        data.length = FIXED_LENGTH;
        let bytes = &mut data.bytes;
        bytes[0] = 0x70;
        bytes[2] = self.key as u8;
        // What does not fit is not valid, and then not given.
        if let Some(information) = self.information.and_then(|value| u32::try_from(value).ok()) {
            bytes[0] |= 0x80;
            bytes[3..7].copy_from_slice(&information.to_be_bytes());
        }
        bytes[7] = FIXED_LENGTH - 8;
        (bytes[12], bytes[13]) = (self.code.0, self.code.1);
        if let Some(field) = self.field {
            bytes[15..18].copy_from_slice(&field.bytes());
        }
    }

    fn put_descriptors(&self, data: &mut SenseData) {
        let bytes = &mut data.bytes;
        bytes[0] = 0x72;
        bytes[1] = self.key as u8;
        (bytes[2], bytes[3]) = (self.code.0, self.code.1);
        let mut at = 8;
        if let Some(information) = self.information {
            bytes[at..at + 3].copy_from_slice(&[0x00, 0x0a, 0x80]);
            bytes[at + 4..at + 12].copy_from_slice(&information.to_be_bytes());
            at += 12;
        }
        if let Some(field) = self.field {
            bytes[at..at + 2].copy_from_slice(&[0x02, 0x06]);
            bytes[at + 4..at + 7].copy_from_slice(&field.bytes());
            at += 8;
        }
        // At most 28.
        data.length = u8::try_from(at).unwrap_or(u8::MAX);
        bytes[7] = data.length - 8;
    }
}

impl Field {
    fn bytes(self) -> [u8; 3] {
        let [high, low] = self.byte.to_be_bytes();
        let bit = self.bit.map_or(0, |bit| 0x08 | (bit & 7));
        [0x80 | if self.in_cdb { 0x40 } else { 0 } | bit, high, low]
    }
}

const FIXED_LENGTH: u8 = 18;

/// Encoded sense data; empty if there are none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SenseData {
    bytes: [u8; 28],
    length: u8,
}

impl SenseData {
    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length)]
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_field_has_its_pointer_in_both_formats() {
        let sense = Sense::in_cdb(0x102, Some(5)).with_information(7);
        let fixed = sense.encode(false);
        assert_eq!(fixed.as_slice().len(), 18);
        assert_eq!(fixed.as_slice()[..8], [0xf0, 0, 5, 0, 0, 0, 7, 10]);
        assert_eq!(fixed.as_slice()[12..], [0x24, 0, 0, 0xcd, 1, 2]);
        let descriptors = sense.encode(true);
        assert_eq!(
            descriptors.as_slice(),
            [
                0x72, 5, 0x24, 0, 0, 0, 0, 20, 0, 10, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 7, 2, 6, 0, 0, 0xcd, 1,
                2, 0
            ]
        );
    }

    #[test]
    fn information_that_does_not_fit_the_fixed_format_is_not_given() {
        let sense = Sense::new(Key::MediumError, Code::WRITE_ERROR).with_information(1 << 32);
        assert_eq!(sense.encode(false).as_slice()[..8], [0x70, 0, 3, 0, 0, 0, 0, 10]);
        assert_eq!(sense.encode(true).as_slice()[12..20], (1_u64 << 32).to_be_bytes());
    }

    #[test]
    fn errors_of_the_disk_have_the_sense_data_that_initiators_act_on() {
        let device: std::sync::Arc<str> = "disk".into();
        let of = |operation, cause: IoCause| {
            let sense = Sense::of(&IoError::new(&device, operation, 8192, 512, cause), 512);
            (sense.key, sense.code, sense.information)
        };
        let os = |number| IoCause::Os(std::io::Error::from_raw_os_error(number));
        let write = Operation::Write;
        assert_eq!(
            of(write, os(libc::ENOSPC)),
            (Key::DataProtect, Code(0x27, 7), None)
        );
        assert_eq!(
            of(write, IoCause::ReadOnly),
            (Key::DataProtect, Code(0x27, 0), None)
        );
        assert_eq!(
            of(write, os(libc::EIO)),
            (Key::MediumError, Code(0x0c, 0), Some(16))
        );
        assert_eq!(
            of(Operation::Read, os(libc::EIO)),
            (Key::MediumError, Code(0x11, 0), Some(16))
        );
        assert_eq!(
            of(Operation::Read, os(libc::ENODEV)),
            (Key::HardwareError, Code(0x08, 0), None)
        );
        assert_eq!(
            of(Operation::Flush, IoCause::EarlierFlushFailed),
            (Key::HardwareError, Code(0x0c, 0), None)
        );
    }
}
