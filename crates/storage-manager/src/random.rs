//! Identities, drawn from the operating system's random numbers.

use api::{Problem, ProblemKind};
use rustix::rand::{GetRandomFlags, getrandom};
use volume_manager::model::Uuid;

/// A random number.
pub(crate) fn number() -> Result<u64, Problem> {
    bytes().map(u64::from_le_bytes)
}

/// A random UUID (RFC 9562, version 4).
pub(crate) fn uuid() -> Result<Uuid, Problem> {
    let mut bytes: [u8; 16] = bytes()?;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    Ok(Uuid(u128::from_be_bytes(bytes)))
}

fn bytes<const LENGTH: usize>() -> Result<[u8; LENGTH], Problem> {
    let mut bytes = [0; LENGTH];
    let mut filled = 0;
    while filled < bytes.len() {
        match getrandom(&mut bytes[filled..], GetRandomFlags::empty()) {
            Ok(count) => filled += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                return Err(Problem::new(
                    ProblemKind::Host,
                    format!("the kernel gives no random numbers: {error}"),
                ));
            }
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_differ_and_are_of_version_4() {
        let (one, other) = (uuid().unwrap(), uuid().unwrap());
        assert_ne!(one, other);
        assert_eq!(&one.to_string()[14..15], "4");
    }
}
