//! Numbers of virtio 1.2 §5.1: features, configuration space, control commands.

/// Feature bits (§5.1.3).
pub(super) mod feature {
    /// The driver may send packets without checksum.
    pub(crate) const CSUM: u64 = 1 << 0;
    /// The driver takes packets without checksum.
    pub(crate) const GUEST_CSUM: u64 = 1 << 1;
    /// The driver may change the offloads that it takes while it runs.
    pub(crate) const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
    /// The device says the MTU.
    pub(crate) const MTU: u64 = 1 << 3;
    /// The device has a MAC address.
    pub(crate) const MAC: u64 = 1 << 5;
    /// The driver takes TCP segments over IPv4 that are yet to be cut.
    pub(crate) const GUEST_TSO4: u64 = 1 << 7;
    /// The same over IPv6.
    pub(crate) const GUEST_TSO6: u64 = 1 << 8;
    /// The driver takes such segments with ECN.
    pub(crate) const GUEST_ECN: u64 = 1 << 9;
    /// The driver takes UDP datagrams that are yet to be fragmented.
    pub(crate) const GUEST_UFO: u64 = 1 << 10;
    /// The driver may send TCP segments over IPv4 that are yet to be cut.
    pub(crate) const HOST_TSO4: u64 = 1 << 11;
    /// The same over IPv6.
    pub(crate) const HOST_TSO6: u64 = 1 << 12;
    /// The driver may send such segments with ECN.
    pub(crate) const HOST_ECN: u64 = 1 << 13;
    /// The driver may send UDP datagrams that are yet to be fragmented.
    pub(crate) const HOST_UFO: u64 = 1 << 14;
    /// A received packet may fill several buffers.
    pub(crate) const MRG_RXBUF: u64 = 1 << 15;
    /// The configuration says whether the link is up.
    pub(crate) const STATUS: u64 = 1 << 16;
    /// There is a control queue.
    pub(crate) const CTRL_VQ: u64 = 1 << 17;
    /// It takes receive mode commands.
    pub(crate) const CTRL_RX: u64 = 1 << 18;
    /// It takes the further receive mode commands.
    pub(crate) const CTRL_RX_EXTRA: u64 = 1 << 20;
    /// There are several queue pairs.
    pub(crate) const MQ: u64 = 1 << 22;
    /// The control queue sets the MAC address.
    pub(crate) const CTRL_MAC_ADDR: u64 = 1 << 23;
    /// The driver takes UDP segments over IPv4 that are yet to be cut.
    pub(crate) const GUEST_USO4: u64 = 1 << 54;
    /// The same over IPv6.
    pub(crate) const GUEST_USO6: u64 = 1 << 55;
    /// The driver may send UDP segments that are yet to be cut.
    pub(crate) const HOST_USO: u64 = 1 << 56;

    /// With one of these, received packets can be as large as 64 KiB whatever the MTU.
    pub(crate) const GUEST_SEGMENTATION: u64 = GUEST_TSO4 | GUEST_TSO6 | GUEST_UFO | GUEST_USO4 | GUEST_USO6;
    /// All that leaves work to the other side.
    pub(crate) const OFFLOADS: u64 =
        CSUM | HOST_TSO4 | HOST_TSO6 | HOST_ECN | HOST_UFO | HOST_USO | GUEST_OFFLOADS | CTRL_GUEST_OFFLOADS;
    /// All that [`CTRL_GUEST_OFFLOADS`] can switch.
    pub(crate) const GUEST_OFFLOADS: u64 = GUEST_CSUM | GUEST_ECN | GUEST_SEGMENTATION;
}

/// Bytes of `struct virtio_net_hdr_v1`, which precedes every packet in both directions (§5.1.6).
pub(super) const HEADER_SIZE: usize = 12;
/// Where in it the number of mergeable buffers is.
pub(super) const NUM_BUFFERS_OFFSET: usize = 10;

/// The largest frame: an IP packet of 64 KiB with an Ethernet header and a VLAN tag.
pub(super) const MAX_FRAME: usize = 65536 + 14 + 4;
/// The largest packet as it stands in the guest's buffers.
pub(super) const MAX_PACKET: usize = HEADER_SIZE + MAX_FRAME;
/// The smallest frame: an Ethernet header.
pub(super) const MIN_FRAME: usize = 14;

/// `VIRTIO_NET_S_LINK_UP` in the status field of the configuration (§5.1.4).
pub(super) const STATUS_LINK_UP: u16 = 1;

/// Commands of the control queue (§5.1.6.5), as (class, command).
pub(super) mod command {
    /// Receive modes, commands 0 to 5.
    pub(crate) const CLASS_RX: u8 = 0;
    /// The last receive mode command without `CTRL_RX_EXTRA`: all-multicast.
    pub(crate) const RX_ALLMULTI: u8 = 1;
    /// The last receive mode command: no broadcast.
    pub(crate) const RX_NOBCAST: u8 = 5;
    /// MAC address filters.
    pub(crate) const CLASS_MAC: u8 = 1;
    /// Set the filter tables.
    pub(crate) const MAC_TABLE_SET: u8 = 0;
    /// Set the address.
    pub(crate) const MAC_ADDR_SET: u8 = 1;
    /// Multi-queue.
    pub(crate) const CLASS_MQ: u8 = 4;
    /// Set the number of queue pairs.
    pub(crate) const MQ_VQ_PAIRS_SET: u8 = 0;
    /// Offloads.
    pub(crate) const CLASS_GUEST_OFFLOADS: u8 = 5;
    /// Set those that the driver takes.
    pub(crate) const GUEST_OFFLOADS_SET: u8 = 0;
    /// Answer: done.
    pub(crate) const ACK_OK: u8 = 0;
    /// Answer: refused.
    pub(crate) const ACK_ERROR: u8 = 1;
}
