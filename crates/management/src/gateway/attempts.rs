//! Who fails to say who it is too often waits.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// Failures that are free.
const FREE: u32 = 5;
/// The wait after the first failure that is not free; each more doubles it.
const FIRST_WAIT: Duration = Duration::from_secs(1);
/// The longest wait.
const LONGEST_WAIT: Duration = Duration::from_secs(300);
/// After so long without a failure all are forgotten.
const FORGET: Duration = Duration::from_secs(900);
/// Addresses that are remembered.
const MAX_ADDRESSES: usize = 4096;

#[derive(Debug, Clone, Copy)]
struct Failures {
    count: u32,
    last: Instant,
}

impl Failures {
    fn wait(&self) -> Duration {
        match self.count.checked_sub(FREE) {
            None | Some(0) => Duration::ZERO,
            Some(over) => FIRST_WAIT
                .saturating_mul(1 << (over - 1).min(16))
                .min(LONGEST_WAIT),
        }
    }
}

/// Failures by address.
#[derive(Debug, Default)]
pub(super) struct Attempts(BTreeMap<IpAddr, Failures>);

impl Attempts {
    /// How long `address` has to wait before it may try again.
    pub(super) fn wait(&self, address: IpAddr, now: Instant) -> Option<Duration> {
        let failures = self.0.get(&place(address))?;
        let wait = failures.wait().saturating_sub(now.duration_since(failures.last));
        (!wait.is_zero()).then_some(wait)
    }

    /// `address` has failed.
    pub(super) fn failed(&mut self, address: IpAddr, now: Instant) {
        let address = place(address);
        if self.0.len() >= MAX_ADDRESSES && !self.0.contains_key(&address) {
            self.0
                .retain(|_, failures| now.duration_since(failures.last) < FORGET);
            if self.0.len() >= MAX_ADDRESSES {
                // Whoever was quiet longest is forgotten.
                let oldest = self.0.iter().min_by_key(|(_, failures)| failures.last);
                if let Some(oldest) = oldest.map(|(address, _)| *address) {
                    self.0.remove(&oldest);
                }
            }
        }
        let failures = self.0.entry(address).or_insert(Failures { count: 0, last: now });
        if now.duration_since(failures.last) >= FORGET {
            failures.count = 0;
        }
        failures.count = failures.count.saturating_add(1);
        failures.last = now;
    }

    /// `address` has shown who it is.
    pub(super) fn succeeded(&mut self, address: IpAddr) {
        self.0.remove(&place(address));
    }
}

/// Of IPv6, who has one address has all of its /64.
pub(super) fn place(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            IpAddr::V6([a, b, c, d, 0, 0, 0, 0].into())
        }
        address => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_and_end_and_success_forgives() {
        let (one, other): (IpAddr, IpAddr) = ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
        let mut attempts = Attempts::default();
        let now = Instant::now();
        for _ in 0..FREE {
            assert_eq!(attempts.wait(one, now), None);
            attempts.failed(one, now);
        }
        assert_eq!(attempts.wait(one, now), None);
        attempts.failed(one, now);
        assert_eq!(attempts.wait(one, now), Some(FIRST_WAIT));
        attempts.failed(one, now);
        assert_eq!(attempts.wait(one, now), Some(2 * FIRST_WAIT));
        assert_eq!(attempts.wait(other, now), None);
        assert_eq!(attempts.wait(one, now + 3 * FIRST_WAIT), None);
        for _ in 0..100 {
            attempts.failed(one, now);
        }
        assert_eq!(attempts.wait(one, now), Some(LONGEST_WAIT));
        attempts.succeeded(one);
        assert_eq!(attempts.wait(one, now), None);
    }

    #[test]
    fn a_network_of_addresses_is_one_and_memory_is_limited() {
        let mut attempts = Attempts::default();
        let now = Instant::now();
        for number in 0..20_u16 {
            attempts.failed(format!("2001:db8::{number:x}").parse().unwrap(), now);
        }
        assert!(attempts.wait("2001:db8::ffff".parse().unwrap(), now).is_some());
        assert!(attempts.wait("::ffff:10.0.0.1".parse().unwrap(), now).is_none());
        for number in 0..200 + u32::try_from(MAX_ADDRESSES).unwrap() {
            attempts.failed(IpAddr::from(number.to_be_bytes()), now);
        }
        assert!(attempts.0.len() <= MAX_ADDRESSES);
    }
}
