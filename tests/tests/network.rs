//! Packets go both ways between a guest and its host, by a tap interface or by the user network, and arrive as they were sent.
//!
//! Every transfer ends with both sides' SHA-256 of what they have ([`stories::transfer`]).

use std::fs::File;
use std::io::{self, Write as _};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use stories::transfer::{download, make_data, same, upload};
use stories::{Host, Story, Vm};

/// The host's and the guest's address on a tap interface.
pub(crate) const HOST: &str = "10.7.0.1";
const GUEST: &str = "10.7.0.2";

/// The real one: BusyBox, which is `sh` in the lab, prefers its own, which knows no tap interfaces.
const IP: &str = "/bin/ip";

/// For the longer stories: a lab on a busy machine is slow.
const LIMIT: Duration = Duration::from_secs(220);

/// Bits of virtio-net's features (virtio 1.2 §5.1.3).
mod feature {
    pub(crate) const CSUM: usize = 0;
    pub(crate) const GUEST_CSUM: usize = 1;
    pub(crate) const MTU: usize = 3;
    pub(crate) const GUEST_TSO4: usize = 7;
    pub(crate) const HOST_TSO4: usize = 11;
    pub(crate) const MRG_RXBUF: usize = 15;
    pub(crate) const MQ: usize = 22;
}

/// A story that makes and deletes interfaces of its host.
fn on_a_host_of_its_own(story: impl FnOnce(&Host) -> Result<()>) {
    Story::default().changes_the_host().tell(story);
}

/// A tap interface as vm-toml.md tells to make it, with an address.
pub(crate) fn make_tap(host: &Host, name: &str, more: &str) -> Result<()> {
    host.sh(&format!(
        "{IP} tuntap add dev {name} mode tap {more}; {IP} address add {HOST}/24 dev {name}; {IP} link set {name} up"
    ))
    .map(drop)
}

/// Gives the guest's card its address.
pub(crate) fn set_address(vm: &mut Vm) -> Result<()> {
    vm.guest(&format!(
        "ip address add {GUEST}/24 dev eth0 && ip link set eth0 up && ping -c 1 -w 10 {HOST} > /dev/null"
    ))
    .map(drop)
}

/// What the guest's driver and the device agreed on for `eth0`: the sysfs file has bit 0 first.
fn agreed(vm: &mut Vm, bit: usize) -> Result<bool> {
    let bits = vm.guest("cat /sys/class/net/eth0/device/features")?;
    Ok(bits.as_bytes().get(bit) == Some(&b'1'))
}

/// Packets and bytes that an interface of the host counted.
#[derive(Clone, Copy, Debug)]
struct Traffic {
    packets: u64,
    bytes: u64,
}

impl Traffic {
    /// `direction` is `rx` for what the guest sent and `tx` for what it got.
    fn of(host: &Host, tap: &str, direction: &str) -> Result<Self> {
        let number = |what| -> Result<u64> {
            let path = format!("/sys/class/net/{tap}/statistics/{direction}_{what}");
            Ok(host.sh(&format!("cat {path}"))?.parse()?)
        };
        Ok(Self {
            packets: number("packets")?,
            bytes: number("bytes")?,
        })
    }

    /// Bytes per packet since `before`.
    fn mean_since(self, before: Self) -> u64 {
        (self.bytes - before.bytes) / (self.packets - before.packets).max(1)
    }
}

/// Transfers both ways; the mean size of the packets that carried them: the guest's, then the host's.
fn transfer_and_measure(host: &Host, vm: &mut Vm, tap: &str) -> Result<[u64; 2]> {
    vm.guest("dmesg -c > /dev/null")?;
    make_data(host, vm)?;
    let before = Traffic::of(host, tap, "rx")?;
    upload(host, vm, HOST)?;
    let sent = Traffic::of(host, tap, "rx")?.mean_since(before);
    let before = Traffic::of(host, tap, "tx")?;
    download(host, vm, HOST)?;
    let received = Traffic::of(host, tap, "tx")?.mean_since(before);
    println!("bytes per packet: {sent} from the guest, {received} to it");
    // Nothing was repaired on the way.
    let errors =
        "awk '/^Tcp:/ { print $NF }' /proc/net/snmp; cat /sys/class/net/eth0/statistics/*_errors | sort -u";
    assert_eq!(vm.guest(errors)?, "InCsumErrors\n0\n0\n");
    assert_eq!(
        host.sh("awk '/^Tcp:/ { print $NF }' /proc/net/snmp")?,
        "InCsumErrors\n0"
    );
    assert_eq!(vm.kernel_warnings()?, "");
    Ok([sent, received])
}

/// `tcpdump` on a tap interface, until one packet of the guest met a condition.
struct Capture<'a> {
    host: &'a Host,
}

impl<'a> Capture<'a> {
    fn start(host: &'a Host, tap: &str, filter: &str) -> Result<Self> {
        host.sh(&format!(
            "(timeout 100 tcpdump -Z root -i {tap} -n -vv -c 1 'tcp and src {GUEST} and {filter}'; echo end) > captured 2>&1 < /dev/null & \
             for n in $(seq 500); do grep -q 'listening on' captured && exit; sleep 0.02; done; cat captured; exit 1"
        ))?;
        Ok(Self { host })
    }

    /// The packet in tcpdump's words.
    fn packet(self) -> Result<String> {
        self.host
            .sh("for n in $(seq 500); do grep -q '^end$' captured && break; sleep 0.02; done; cat captured; grep -q '^end$' captured")
    }
}

#[test]
fn a_tap_carries_what_a_guest_sends_and_gets_in_packets_that_the_host_cuts() {
    on_a_host_of_its_own(|host| {
        make_tap(host, "tap0", "")?;
        let mut vm = host
            .vm("offload")
            .toml("[[net]]\nbackend = \"tap\"\ntap = \"tap0\"")
            .interactive()?;
        set_address(&mut vm)?;
        for bit in [
            feature::CSUM,
            feature::GUEST_CSUM,
            feature::GUEST_TSO4,
            feature::HOST_TSO4,
            feature::MRG_RXBUF,
        ] {
            ensure!(agreed(&mut vm, bit)?, "feature {bit} was not agreed on");
        }
        let capture = Capture::start(host, "tap0", "greater 3000")?;
        let [sent, received] = transfer_and_measure(host, &mut vm, "tap0")?;
        // On average more than the MTU allows, both ways.
        ensure!(sent > 2000 && received > 2000, "{sent}, {received}");
        // Whoever looks at the tap sees packets of more than its MTU, whose checksum is yet to be computed.
        let packet = capture.packet()?;
        ensure!(packet.contains("(incorrect -> "), "{packet}");
        vm.finish()?;
        Ok(())
    });
}

#[test]
fn without_offloads_a_tap_carries_whole_packets_with_good_checksums() {
    on_a_host_of_its_own(|host| {
        make_tap(host, "tap0", "")?;
        let mut vm = host
            .vm("plain")
            .toml("[[net]]\nbackend = \"tap\"\ntap = \"tap0\"\noffload = false")
            .interactive()?;
        set_address(&mut vm)?;
        for bit in [
            feature::CSUM,
            feature::GUEST_CSUM,
            feature::GUEST_TSO4,
            feature::HOST_TSO4,
        ] {
            ensure!(!agreed(&mut vm, bit)?, "feature {bit} was agreed on");
        }
        let capture = Capture::start(host, "tap0", "greater 1000")?;
        let [sent, received] = transfer_and_measure(host, &mut vm, "tap0")?;
        ensure!((1000..=1514).contains(&sent), "{sent}");
        ensure!((1000..=1514).contains(&received), "{received}");
        let packet = capture.packet()?;
        ensure!(packet.contains("(correct)"), "{packet}");
        vm.finish()?;
        Ok(())
    });
}

/// Interrupts of each queue of the guest's card: `[input.0, output.0, input.1, ...]`.
fn queue_interrupts(vm: &mut Vm, queues: usize) -> Result<Vec<u64>> {
    let table = vm.guest("cat /proc/interrupts")?;
    let mut counts = Vec::new();
    for queue in 0..queues {
        for direction in ["input", "output"] {
            let name = format!("-{direction}.{queue}");
            let line = table
                .lines()
                .find(|line| line.trim_end().ends_with(&name))
                .with_context(|| format!("no interrupt {name} in\n{table}"))?;
            counts.push(
                line.split_whitespace()
                    .filter_map(|word| word.parse::<u64>().ok())
                    .sum(),
            );
        }
    }
    Ok(counts)
}

#[test]
fn each_queue_of_a_card_carries_the_packets_of_its_processor() {
    on_a_host_of_its_own(|host| {
        make_tap(host, "tap0", "multi_queue")?;
        let mut vm = host
            .vm("queues")
            .cpus(2)
            .toml("[[net]]\nbackend = \"tap\"\ntap = \"tap0\"\nqueues = 2")
            .interactive()?;
        set_address(&mut vm)?;
        ensure!(agreed(&mut vm, feature::MQ)?, "one queue only");
        assert_eq!(
            vm.guest("ls -1 /sys/class/net/eth0/queues")?,
            "rx-0\nrx-1\ntx-0\ntx-1\n"
        );
        make_data(host, &mut vm)?;
        let mut before = queue_interrupts(&mut vm, 2)?;
        for processor in 0..2 {
            vm.guest(&format!("taskset -p {} $$", 1 << processor))?;
            upload(host, &mut vm, HOST)?;
            download(host, &mut vm, HOST)?;
            let after = queue_interrupts(&mut vm, 2)?;
            let more: Vec<u64> = after
                .iter()
                .zip(&before)
                .map(|(after, before)| after - before)
                .collect();
            println!("interrupts while processor {processor} works: {more:?}");
            let (mine, other) = (2 * processor, 2 - 2 * processor);
            for direction in 0..2 {
                // The other queue may have the connections' ends.
                ensure!(
                    more[mine + direction] > 20 && more[mine + direction] > 2 * more[other + direction],
                    "processor {processor}: {more:?}"
                );
            }
            before = after;
        }
        vm.finish()?;
        Ok(())
    });
}

/// What BusyBox's DHCP client does with a lease.
pub(crate) const LEASE: &str = r#"#!/bin/sh
[ "$1" = bound ] || exit 0
ip address add "$ip/$mask" dev "$interface"
ip route add "$router" dev "$interface"
ip route add default via "$router" dev "$interface"
echo "$router" > /tmp/gateway
echo "$ip" > /tmp/address
echo "$mtu" > /tmp/mtu
"#;

/// Has the guest ask for an address; the gateway's, under which it finds its host.
pub(crate) fn lease(vm: &mut Vm) -> Result<String> {
    vm.guest("ip link set eth0 up && udhcpc -i eth0 -n -q -O mtu -s /lease > /dev/null 2>&1")?;
    Ok(vm.guest("cat /tmp/gateway")?.trim().to_owned())
}

#[test]
fn the_user_network_leads_from_the_guest_to_the_host_and_from_forwarded_ports_to_the_guest() {
    Story::default().tell(|host| {
        let port = free_port()?;
        let mut vm = host
            .vm("user").limit(LIMIT)
            .file("lease", 0o755, LEASE)
            .file("serve", 0o755, "#!/bin/sh\nread -r line && [ \"$line\" = 'all of it' ] && cat /tmp/up\n")
            .toml(&format!(
                "[[net]]\nbackend = \"user\"\nforward = [\"tcp:127.0.0.1:{port}:2222\"]"
            ))
            .interactive()?;
        let gateway = lease(&mut vm)?;
        make_data(host, &mut vm)?;
        for mtu in ["1500", &vm.guest("cat /tmp/mtu")?] {
            // passt of its own accord offers very large packets, which many guests accept.
            println!("user network with packets of {} bytes", mtu.trim());
            vm.guest(&format!("ip link set eth0 mtu {}", mtu.trim()))?;
            upload(host, &mut vm, &gateway)?;
            download(host, &mut vm, &gateway)?;
        }

        // And now the host begins. It also speaks first: passt of Debian 12 does not complete the connection before.
        for (direction, server) in [("up", "-e /serve"), ("down", "<> /tmp/open > /tmp/down")] {
            vm.guest("rm -f /tmp/down")?;
            vm.guest(&format!(
                "(nc -l -p 2222 {server}; echo $? > /tmp/served) & until netstat -ltn | grep -q :2222; do usleep 20000; done"
            ))?;
            let mut connection = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
            connection.set_read_timeout(Some(Duration::from_secs(60)))?;
            if direction == "up" {
                connection.write_all(b"all of it\n")?;
                io::copy(&mut connection, &mut File::create(host.folder().join("up"))?)?;
            } else {
                io::copy(&mut File::open(host.folder().join("down"))?, &mut connection)?;
                connection.shutdown(Shutdown::Write)?;
                io::copy(&mut connection, &mut io::sink())?;
            }
            drop(connection);
            vm.guest_until("[ -e /tmp/served ]")?;
            vm.guest("rm /tmp/served")?;
            same(host, direction, &mut vm, &format!("/tmp/{direction}"))?;
        }
        vm.finish()?;
        Ok(())
    });
}

/// A TCP port of this host that nobody uses.
pub(crate) fn free_port() -> Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

/// Hardware addresses of the guest's cards.
fn addresses(host: &Host, name: &str) -> Result<Vec<String>> {
    let cards = "[[net]]\n[[net]]\n[[net]]\nmac = \"52:54:00:ab:cd:ef\"\nmtu = 1400";
    let outcome = host
        .vm(name)
        .toml(cards)
        .script("cd /sys/class/net; cat eth0/address eth1/address eth2/address; cat eth0/mtu eth2/mtu")
        .run()?
        .success()?;
    Ok(outcome
        .script_output()
        .split_whitespace()
        .map(str::to_owned)
        .collect())
}

#[test]
fn a_card_has_the_address_and_mtu_given_or_an_address_of_its_own_that_stays() {
    Story::default().tell(|host| {
        let first = addresses(host, "one")?;
        let [a, b, given, mtu, small_mtu] = &first[..] else {
            anyhow::bail!("{first:?}");
        };
        ensure!(
            given == "52:54:00:ab:cd:ef" && mtu == "1500" && small_mtu == "1400",
            "{first:?}"
        );
        for derived in [a, b] {
            let octet = u8::from_str_radix(&derived[..2], 16)?;
            ensure!(
                octet & 3 == 2,
                "{derived} is not a locally administered address of one card"
            );
        }
        ensure!(a != b, "two cards have the address {a}");
        assert_eq!(addresses(host, "one")?, first);
        let other = addresses(host, "two")?;
        ensure!(
            other[0] != *a && other[1] != *b,
            "two machines have the same: {other:?}"
        );
        Ok(())
    });
}

#[test]
fn a_taps_large_packets_go_whole_where_its_mtu_allows() {
    on_a_host_of_its_own(|host| {
        make_tap(host, "tap0", "")?;
        host.sh("/bin/ip link set tap0 mtu 9000")?;
        let mut vm = host
            .vm("jumbo")
            .toml("[[net]]\nbackend = \"tap\"\ntap = \"tap0\"\noffload = false")
            .interactive()?;
        set_address(&mut vm)?;
        ensure!(agreed(&mut vm, feature::MTU)?, "the guest is not told the MTU");
        assert_eq!(vm.guest("cat /sys/class/net/eth0/mtu")?, "9000\n");
        let [sent, received] = transfer_and_measure(host, &mut vm, "tap0")?;
        ensure!((4000..=9014).contains(&sent), "{sent}");
        ensure!((4000..=9014).contains(&received), "{received}");
        vm.finish()?;
        Ok(())
    });
}

/// Processor time that a machine took until now, in hundredths of a second.
fn processor_time(vm: &Vm) -> Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", vm.pid()?.as_raw_nonzero()))?;
    let (_, fields) = stat.rsplit_once(") ").context("no name in stat")?;
    let fields: Vec<&str> = fields.split(' ').collect();
    Ok(fields[11].parse::<u64>()? + fields[12].parse::<u64>()?)
}

/// What must hold after a card's other end went away.
fn lives_without_its_link(vm: &mut Vm) -> Result<()> {
    vm.until_logged("a network card lost its link device=\"net0\"")?;
    vm.guest_until("[ $(cat /sys/class/net/eth0/carrier) = 0 ]")?;
    // Packets go nowhere, and nothing waits for them or turns in circles.
    vm.guest(&format!("ping -c 2 -w 2 {HOST} > /dev/null; [ $? = 1 ]"))?;
    let before = processor_time(vm)?;
    thread::sleep(Duration::from_secs(2));
    let took = processor_time(vm)? - before;
    ensure!(
        took < 40,
        "an idle machine took {took} hundredths of a second in two seconds"
    );
    // The driver may let the card go and take it again; so does a reboot.
    vm.guest(
        "d=$(basename $(readlink /sys/class/net/eth0/device)); cd /sys/bus/virtio/drivers/virtio_net; \
         echo $d > unbind && echo $d > bind; ip link set eth0 up; cat /sys/class/net/eth0/carrier; cd /",
    )?;
    assert_eq!(vm.guest("cat /sys/class/net/eth0/carrier")?, "0\n");
    assert_eq!(vm.kernel_warnings()?, "");
    vm.begin("reboot -f")?;
    vm.wait_until_ready()?;
    vm.guest("ip link set eth0 up")?;
    assert_eq!(vm.guest("cat /sys/class/net/eth0/carrier")?, "0\n");
    let status = vm.manage(&["status"])?;
    ensure!(status.contains("net0"), "{status}");
    Ok(())
}

#[test]
fn a_guest_lives_on_when_its_tap_is_deleted() {
    on_a_host_of_its_own(|host| {
        make_tap(host, "tap0", "")?;
        let mut vm = host
            .vm("pulled")
            .limit(LIMIT)
            .toml("[[net]]\nbackend = \"tap\"\ntap = \"tap0\"")
            .interactive()?;
        set_address(&mut vm)?;
        vm.guest("dmesg -c > /dev/null")?;
        host.sh("/bin/ip link delete tap0")?;
        lives_without_its_link(&mut vm)?;

        // What helps, and what vm-toml.md says.
        vm.manage(&["detach", "net0"])?;
        make_tap(host, "tap0", "")?;
        vm.manage(&["attach-net", "--id", "net0", "--tap", "tap0"])?;
        vm.guest_until("[ -e /sys/class/net/eth0 ]")?;
        set_address(&mut vm)?;
        vm.finish()?;
        Ok(())
    });
}

#[test]
fn a_guest_lives_on_when_passt_is_killed() {
    on_a_host_of_its_own(|host| {
        let mut vm = host
            .vm("alone")
            .limit(LIMIT)
            .file("lease", 0o755, LEASE)
            .toml("[[net]]\nbackend = \"user\"")
            .interactive()?;
        let gateway = lease(&mut vm)?;
        vm.guest(&format!(
            "ping -c 1 -w 10 {gateway} > /dev/null; dmesg -c > /dev/null"
        ))?;
        host.sh("pkill -KILL passt")?;
        lives_without_its_link(&mut vm)?;
        vm.finish()?;
        Ok(())
    });
}

#[test]
fn cards_that_are_attached_later_carry_packets_too() {
    on_a_host_of_its_own(|host| {
        make_tap(host, "tap0", "")?;
        let mut vm = host
            .vm("late")
            .limit(LIMIT)
            .file("lease", 0o755, LEASE)
            .interactive()?;
        let events = vm.events()?;
        vm.guest("modprobe virtio_net")?;
        vm.manage(&["attach-net", "--id", "wire", "--tap", "tap0"])?;
        events.wait_for("wire in use by the guest")?;
        vm.guest_until("[ -e /sys/class/net/eth0 ]")?;
        set_address(&mut vm)?;
        let [sent, received] = transfer_and_measure(host, &mut vm, "tap0")?;
        ensure!(sent > 1514 && received > 1514, "{sent}, {received}");
        vm.manage(&["detach", "wire"])?;
        vm.guest_until("[ ! -e /sys/class/net/eth0 ]")?;

        // Nobody holds the tap any more. The user network's passt is started by the helper now.
        host.sh("/bin/ip link delete tap0")?;
        vm.manage(&["attach-net", "--id", "user"])?;
        events.wait_for("user in use by the guest")?;
        vm.guest_until("[ -e /sys/class/net/eth0 ]")?;
        let gateway = lease(&mut vm)?;
        upload(host, &mut vm, &gateway)?;
        download(host, &mut vm, &gateway)?;
        vm.finish()?;
        Ok(())
    });
}

#[test]
fn two_guests_on_a_bridge_reach_each_other() {
    on_a_host_of_its_own(|host| {
        host.sh(&format!(
            "modprobe bridge; {IP} link add br0 type bridge; {IP} link set br0 up"
        ))?;
        let mut guests = Vec::new();
        for number in 1..=2 {
            host.sh(&format!(
                "{IP} tuntap add dev tap{number} mode tap; {IP} link set tap{number} master br0; {IP} link set tap{number} up"
            ))?;
            let mut vm = host
                .vm(&format!("guest{number}"))
                .toml(&format!("[[net]]\nbackend = \"tap\"\ntap = \"tap{number}\""))
                .interactive()?;
            vm.guest(&format!(
                "ip address add 10.7.0.{number}/24 dev eth0; ip link set eth0 up"
            ))?;
            guests.push(vm);
        }
        let [one, two] = &mut guests[..] else {
            anyhow::bail!("no two guests");
        };
        one.guest("ping -c 1 -w 20 10.7.0.2 > /dev/null; head -c 4194304 /dev/urandom > /tmp/data")?;
        let before = Traffic::of(host, "tap2", "tx")?;
        two.guest("(nc -l -p 7777 -e dd of=/tmp/data 2> /dev/null; echo > /tmp/served) & until netstat -ltn | grep -q :7777; do usleep 20000; done")?;
        one.guest("nc 10.7.0.2 7777 -e cat /tmp/data")?;
        two.guest_until("[ -e /tmp/served ]")?;
        let mean = Traffic::of(host, "tap2", "tx")?.mean_since(before);
        println!("bytes per packet: {mean}");
        // Nobody cut them on the way from guest to guest.
        ensure!(mean > 1514, "{mean}");
        let sums = [
            one.guest("sha256sum < /tmp/data")?,
            two.guest("sha256sum < /tmp/data")?,
        ];
        ensure!(sums[0].len() >= 64 && sums[0] == sums[1], "{sums:?}");
        for vm in guests {
            vm.finish()?;
        }
        Ok(())
    });
}

#[test]
fn a_network_that_is_not_there_is_said_with_the_remedy_before_anything_starts() {
    on_a_host_of_its_own(|host| {
        make_tap(host, "tap0", "")?;
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let forward = format!(
            "backend = \"user\"\nforward = [\"tcp:127.0.0.1:{}:22\"]",
            port.local_addr()?.port()
        );
        let user = host
            .vm("holder")
            .toml("[[net]]\nbackend = \"tap\"\ntap = \"tap0\"")
            .interactive()?;
        for (card, said) in [
            (
                "backend = \"tap\"\ntap = \"tap7\"",
                &["no network interface tap7", "ip tuntap add dev tap7"][..],
            ),
            ("backend = \"tap\"\ntap = \"tap0\"", &["tap0 is busy"]),
            ("backend = \"tap\"\ntap = \"lo\"", &["lo is not a tap interface"]),
            (&forward, &["passt", &port.local_addr()?.port().to_string()]),
        ] {
            let outcome = host.vm("refused").toml(&format!("[[net]]\n{card}")).run()?;
            println!("{}", outcome.log.trim());
            ensure!(outcome.exit_code() == Some(1), "{:?}", outcome.status);
            ensure!(outcome.console.is_empty(), "it started: {}", outcome.console);
            for words in said {
                ensure!(outcome.log.contains(words), "{words}: {}", outcome.log);
            }
        }
        user.finish()?;
        Ok(())
    });
}
