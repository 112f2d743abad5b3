//! Network cards of a guest: what to attach and how it fares.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{DeviceId, DeviceState, InvalidValue, QueueSize, string_type};

/// A network card to be given to the guest: a `[[net]]` of vm.toml, the body of `POST /v1/vm/nets`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct NetConfig {
    /// Name within the machine; by default "net0", "net1", ...
    #[serde(default, skip_serializing_if = "DeviceId::is_unassigned")]
    pub id: DeviceId,
    /// What the card is connected to.
    #[serde(default)]
    pub backend: NetBackend,
    /// The tap interface, with backend "tap" only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap: Option<TapName>,
    /// Hardware address; by default derived from the names of machine and card (always present once loaded).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddress>,
    /// Pairs of receive and transmit queues, 1 to 8.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 8))]
    pub queues: u8,
    /// Buffers that fit in a queue.
    #[serde(default)]
    pub queue_size: QueueSize,
    /// Largest packet in bytes without the Ethernet header, told to the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 576))]
    pub mtu: Option<u16>,
    /// Ports of the host that lead to the guest, with backend "user" only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub forward: Vec<PortForward>,
    /// Offer checksum and segmentation offloads.
    #[serde(default = "yes")]
    pub offload: bool,
}

impl NetConfig {
    /// Most queue pairs of a card.
    pub const MAX_QUEUES: u8 = 8;
    /// Smallest MTU: what every IPv4 host must be able to take (RFC 791).
    pub const MIN_MTU: u16 = 576;

    /// A card on `backend` with every default; identifier and address are unassigned.
    pub fn new(backend: NetBackend) -> Self {
        Self {
            id: DeviceId::default(),
            backend,
            tap: None,
            mac: None,
            queues: one(),
            queue_size: QueueSize::default(),
            mtu: None,
            forward: Vec::new(),
            offload: true,
        }
    }

    /// The card's address: as configured, else derived from the names of machine and card, so that it is the same after
    /// every start and differs between machines.
    pub fn mac_or_derived(&self, machine: &str) -> MacAddress {
        self.mac
            .unwrap_or_else(|| MacAddress::derived(machine, self.id.as_str()))
    }

    /// Checks what the types alone cannot.
    ///
    /// # Errors
    /// The key that is wrong, and why.
    pub fn check(&self) -> Result<(), (&'static str, InvalidValue)> {
        let fail = |key, message: String| Err((key, InvalidValue::new(message)));
        if !(1..=Self::MAX_QUEUES).contains(&self.queues) {
            return fail(
                "queues",
                format!(
                    "{} queue pairs are impossible; use 1 to {}",
                    self.queues,
                    Self::MAX_QUEUES
                ),
            );
        }
        if self.mtu.is_some_and(|mtu| mtu < Self::MIN_MTU) {
            return fail("mtu", format!("use {} to 65535", Self::MIN_MTU));
        }
        match self.backend {
            NetBackend::User if self.tap.is_some() => fail(
                "tap",
                "belongs to backend = \"tap\"; this card has backend = \"user\"".to_owned(),
            ),
            NetBackend::Tap if self.tap.is_none() => fail(
                "tap",
                "is missing; backend = \"tap\" needs the name of the interface, for example tap = \"tap0\""
                    .to_owned(),
            ),
            NetBackend::Tap if !self.forward.is_empty() => fail(
                "forward",
                "belongs to backend = \"user\"; this card has backend = \"tap\"".to_owned(),
            ),
            _ => self.check_forwards(),
        }
    }

    /// One port of the host leads to one port of the guest.
    fn check_forwards(&self) -> Result<(), (&'static str, InvalidValue)> {
        for (number, forward) in self.forward.iter().enumerate() {
            if let Some(other) = self.forward[..number]
                .iter()
                .find(|other| other.overlaps(forward))
            {
                return Err((
                    "forward",
                    InvalidValue::new(format!(
                        "`{forward}` and `{other}` take the same port of the host"
                    )),
                ));
            }
        }
        Ok(())
    }
}

fn one() -> u8 {
    1
}

fn yes() -> bool {
    true
}

/// What a network card is connected to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum NetBackend {
    /// The host's network through `passt`, without any privilege.
    #[default]
    User,
    /// A tap interface that exists on the host, or that smsvmm may create.
    Tap,
}

/// Name of a network interface: 1 to 15 printable ASCII characters without `/`, `:` and `%`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TapName(String);

impl TapName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TapName {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        let allowed = |byte: u8| byte.is_ascii_graphic() && !b"/:%".contains(&byte);
        if (1..=15).contains(&text.len()) && text.bytes().all(allowed) && text != "." && text != ".." {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidValue::new(format!(
                "`{text}` is not the name of an interface; use 1 to 15 characters without spaces, `/`, `:` and `%`"
            )))
        }
    }
}

impl fmt::Display for TapName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// An Ethernet address of one station (not a group).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddress([u8; 6]);

impl MacAddress {
    /// The six octets in the order of transmission.
    pub const fn octets(self) -> [u8; 6] {
        self.0
    }

    /// A locally administered address that depends on the two names only.
    pub fn derived(machine: &str, card: &str) -> Self {
        // FNV-1a: the address must never change with a library's or a compiler's version.
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        for byte in machine.bytes().chain([0]).chain(card.bytes()) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
        // Its last step leaves neighbours alike in the upper bits; this spreads them.
        hash = (hash ^ (hash >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let [a, b, c, d, e, ..] = hash.to_be_bytes();
        Self([0x02, a, b, c, d, e])
    }
}

impl FromStr for MacAddress {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        let invalid = || {
            InvalidValue::new(format!(
                "`{text}` is not an Ethernet address; write six octets, for example \"02:00:00:12:34:56\""
            ))
        };
        let mut octets = [0; 6];
        let mut parts = text.split(':');
        for octet in &mut octets {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(invalid)?;
            if !part.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                return Err(invalid());
            }
            *octet = u8::from_str_radix(part, 16).map_err(|_| invalid())?;
        }
        if parts.next().is_some() {
            return Err(invalid());
        }
        if octets[0] & 1 != 0 || octets == [0; 6] {
            return Err(InvalidValue::new(format!(
                "`{text}` is not the address of a single station; the first octet must be even, for example \"02:00:00:12:34:56\""
            )));
        }
        Ok(Self(octets))
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, f] = self.0;
        write!(formatter, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}

/// Transport protocol of a forwarded port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A port of the host that leads to the guest. Written "tcp:8022:22" or, to listen on one address only,
/// "tcp:127.0.0.1:8022:22" or `udp:[::1]:5353:53`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortForward {
    /// Which packets.
    pub protocol: Protocol,
    /// Address of the host on which to listen; all if absent.
    pub address: Option<IpAddr>,
    /// Port of the host, never 0.
    pub host_port: u16,
    /// Port of the guest, never 0.
    pub guest_port: u16,
}

impl PortForward {
    /// Whether both cannot listen at the same time.
    pub fn overlaps(&self, other: &Self) -> bool {
        let same_address = match (self.address, other.address) {
            (Some(one), Some(two)) => one == two,
            _ => true,
        };
        self.protocol == other.protocol && self.host_port == other.host_port && same_address
    }
}

impl FromStr for PortForward {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        let invalid = || {
            InvalidValue::new(format!(
                "`{text}` is not a forwarded port; write \"tcp:8022:22\" (host's port 8022 to guest's port 22) or \"udp:127.0.0.1:5353:53\""
            ))
        };
        let (protocol, rest) = text.split_once(':').ok_or_else(invalid)?;
        let protocol = match protocol {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            _ => return Err(invalid()),
        };
        let (rest, guest_port) = rest.rsplit_once(':').ok_or_else(invalid)?;
        let (address, host_port) = match rest.rsplit_once(':') {
            None => (None, rest),
            Some((address, port)) => {
                let bare = address
                    .strip_prefix('[')
                    .and_then(|address| address.strip_suffix(']'));
                let address = match bare {
                    Some(bare) => bare.parse::<Ipv6Addr>().ok().map(IpAddr::V6),
                    None => address.parse().ok().filter(IpAddr::is_ipv4),
                };
                (Some(address.ok_or_else(invalid)?), port)
            }
        };
        let port = |text: &str| {
            text.parse::<u16>()
                .ok()
                .filter(|port| *port != 0)
                .ok_or_else(invalid)
        };
        Ok(Self {
            protocol,
            address,
            host_port: port(host_port)?,
            guest_port: port(guest_port)?,
        })
    }
}

impl fmt::Display for PortForward {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self.protocol {
            Protocol::Tcp => "tcp:",
            Protocol::Udp => "udp:",
        })?;
        match self.address {
            Some(IpAddr::V4(address)) => write!(formatter, "{address}:")?,
            Some(IpAddr::V6(address)) => write!(formatter, "[{address}]:")?,
            None => {}
        }
        write!(formatter, "{}:{}", self.host_port, self.guest_port)
    }
}

string_type!(
    TapName,
    "the name of an interface in quotes",
    r"^[!-$&-.0-9;-~]{1,15}$"
);
string_type!(
    MacAddress,
    "an Ethernet address such as \"02:00:00:12:34:56\"",
    r"^[0-9A-Fa-f][02468ACEace](:[0-9A-Fa-f]{2}){5}$"
);
string_type!(
    PortForward,
    "a forwarded port such as \"tcp:8022:22\"",
    r"^(tcp|udp):([^:]+:|\[[0-9A-Fa-f:.]+\]:)?[0-9]{1,5}:[0-9]{1,5}$"
);

/// A network card of a running machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct NetStatus {
    /// What it was attached with.
    #[serde(flatten)]
    pub config: NetConfig,
    /// Where it is in its life.
    pub state: DeviceState,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forwards_are_written_as_they_are_read() {
        for text in ["tcp:8022:22", "udp:127.0.0.1:5353:53", "tcp:[::1]:8080:80"] {
            assert_eq!(text.parse::<PortForward>().unwrap().to_string(), text);
        }
        for text in [
            "8022:22",
            "sctp:1:2",
            "tcp:1",
            "tcp:0:22",
            "tcp:65536:22",
            "tcp:host:1:2",
            "tcp:::1:1:2",
            "tcp:1:2:3",
        ] {
            assert!(text.parse::<PortForward>().is_err(), "{text}");
        }
    }

    #[test]
    fn two_forwards_of_one_port_are_refused() {
        let mut net = NetConfig::new(NetBackend::User);
        net.forward = vec!["tcp:80:80".parse().unwrap(), "udp:80:80".parse().unwrap()];
        assert_eq!(net.check(), Ok(()));
        net.forward.push("tcp:127.0.0.1:80:81".parse().unwrap());
        assert_eq!(net.check().unwrap_err().0, "forward");
    }

    #[test]
    fn derived_addresses_are_stable_local_and_different() {
        let address = MacAddress::derived("web1", "net0");
        assert_eq!(address.octets()[0], 0x02);
        assert_eq!(address, MacAddress::derived("web1", "net0"));
        assert_ne!(address, MacAddress::derived("web1", "net1"));
        assert_ne!(address, MacAddress::derived("web1n", "et0"));
        assert_eq!(address.to_string().parse(), Ok(address));
    }

    #[test]
    fn group_and_malformed_addresses_are_refused() {
        for text in [
            "",
            "01:00:5e:00:00:01",
            "ff:ff:ff:ff:ff:ff",
            "00:00:00:00:00:00",
            "2:0:0:0:0:1",
            "02:00:00:00:00",
            "02:00:00:00:00:00:00",
            "02-00-00-00-00-00",
            "02:00:00:00:00:+1",
        ] {
            assert!(text.parse::<MacAddress>().is_err(), "{text}");
        }
    }
}
