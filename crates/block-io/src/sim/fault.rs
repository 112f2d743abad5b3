//! Faults: named ones by rule, random ones by rate, and a policy that keeps them within the promised redundancy.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;
use std::rc::Rc;

use super::rng::Rng;
use crate::Operation;

/// What can go wrong with one request.
///
/// A device that returns with old content is no fault of a request: keep a clone of its [`Medium`](super::Medium), and
/// put it back with [`Sim::replace`](super::Sim::replace) or into [`World::media`](super::World).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It fails with EIO.
    Error,
    /// One bit in its range flips before it is done, and nobody says so.
    BitRot,
    /// A write that is reported as done, and never was.
    LostWrite,
    /// A write that is reported as done, but went so many bytes further (wrapping at the end of the disk).
    MisdirectedWrite(u64),
    /// A write that fails with ENOSPC.
    NoSpace,
    /// The disk is gone: this request and all later ones fail with ENODEV, until [`Sim::attach`](super::Sim::attach).
    Drop,
    /// This and all later requests take so many times as long.
    Slow(u64),
}

impl Fault {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::BitRot => "bit rot",
            Self::LostWrite => "lost write",
            Self::MisdirectedWrite(_) => "misdirected write",
            Self::NoSpace => "no space",
            Self::Drop => "dropped device",
            Self::Slow(_) => "slow device",
        }
    }

    fn fits(self, operation: Operation) -> bool {
        let writes = matches!(operation, Operation::Write | Operation::WriteZeroes);
        match self {
            Self::LostWrite | Self::MisdirectedWrite(_) | Self::NoSpace => writes,
            Self::BitRot => matches!(operation, Operation::Read | Operation::Write),
            Self::Error | Self::Drop | Self::Slow(_) => true,
        }
    }
}

/// A fault for the next requests that match. Rules do not ask the policy.
#[derive(Debug, Clone)]
pub struct FaultRule {
    /// What happens.
    pub fault: Fault,
    /// Which operations; `None` for all.
    pub operation: Option<Operation>,
    /// Requests that touch this range of bytes; flushes always do.
    pub range: Range<u64>,
    /// So many matching requests pass first.
    pub skip: u64,
    /// So many are hit after that; `None` for ever.
    pub times: Option<u64>,
}

impl FaultRule {
    /// Hits the next request of the kind `operation`, once.
    pub fn once(fault: Fault, operation: Operation) -> Self {
        Self {
            fault,
            operation: Some(operation),
            range: 0..u64::MAX,
            skip: 0,
            times: Some(1),
        }
    }

    /// Hits every request of the kind `operation` from now on.
    pub fn always(fault: Fault, operation: Operation) -> Self {
        Self {
            times: None,
            ..Self::once(fault, operation)
        }
    }

    /// Hits only requests that touch `range`.
    #[must_use]
    pub fn within(mut self, range: Range<u64>) -> Self {
        self.range = range;
        self
    }

    /// Lets `count` matching requests pass first.
    #[must_use]
    pub fn after(mut self, count: u64) -> Self {
        self.skip = count;
        self
    }
}

/// The fault of the first rule that hits; uses the rules up.
pub(super) fn by_rule(rules: &mut Vec<FaultRule>, operation: Operation, range: &Range<u64>) -> Option<Fault> {
    let mut hit = None;
    rules.retain_mut(|rule| {
        let touches =
            operation == Operation::Flush || (rule.range.start < range.end && range.start < rule.range.end);
        let kind = rule.operation.is_none_or(|wanted| wanted == operation);
        if hit.is_some() || !kind || !touches || !rule.fault.fits(operation) {
            return true;
        }
        if rule.skip > 0 {
            rule.skip -= 1;
            return true;
        }
        hit = Some(rule.fault);
        if let Some(times) = &mut rule.times {
            *times -= 1;
        }
        rule.times != Some(0)
    });
    hit
}

/// How often requests are hit, in 100,000.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are those of `Fault`")]
pub struct FaultRates {
    pub error: u32,
    pub bit_rot: u32,
    pub lost_write: u32,
    pub misdirected_write: u32,
    pub no_space: u32,
    pub drop: u32,
    pub slow: u32,
}

impl FaultRates {
    fn draw(&self, rng: &mut Rng, sector: u64) -> Option<Fault> {
        let kinds = [
            (self.error, Fault::Error),
            (self.bit_rot, Fault::BitRot),
            (self.lost_write, Fault::LostWrite),
            (self.misdirected_write, Fault::MisdirectedWrite(0)),
            (self.no_space, Fault::NoSpace),
            (self.drop, Fault::Drop),
            (self.slow, Fault::Slow(20)),
        ];
        let mut draw = rng.below(100_000);
        for (rate, fault) in kinds {
            let Some(rest) = draw.checked_sub(u64::from(rate)) else {
                return Some(match fault {
                    Fault::MisdirectedWrite(_) => Fault::MisdirectedWrite((1 + rng.below(64)) * sector),
                    fault => fault,
                });
            };
            draw = rest;
        }
        None
    }
}

/// A fault that is about to happen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hit {
    /// Number of the disk in [`World::media`](super::World).
    pub disk: usize,
    /// What.
    pub fault: Fault,
    /// The bytes whose content or service is in danger.
    pub range: Range<u64>,
}

/// Which faults may happen together. Knows the redundancy of the system under test.
pub trait FaultPolicy {
    /// Whether this may happen now. If so, it is counted as damage.
    fn allows(&mut self, hit: &Hit) -> bool;

    /// The system has repaired or replaced `disk`: what hit it counts no more.
    fn healed(&mut self, disk: usize);
}

/// At most `limit` disks carry damage at one time: for layouts that survive the loss of `limit` whole devices.
#[derive(Debug, Clone)]
pub struct AtMostDevices {
    limit: usize,
    damaged: BTreeSet<usize>,
}

impl AtMostDevices {
    /// The policy for `limit` devices.
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            damaged: BTreeSet::new(),
        }
    }

    /// The disks that carry damage.
    pub fn damaged(&self) -> &BTreeSet<usize> {
        &self.damaged
    }
}

impl FaultPolicy for AtMostDevices {
    fn allows(&mut self, hit: &Hit) -> bool {
        if self.damaged.len() >= self.limit && !self.damaged.contains(&hit.disk) {
            return false;
        }
        // A slow device gives the right answers.
        if !matches!(hit.fault, Fault::Slow(_)) {
            self.damaged.insert(hit.disk);
        }
        true
    }

    fn healed(&mut self, disk: usize) {
        self.damaged.remove(&disk);
    }
}

/// Random faults: rates, and what limits them. Copies share the policy.
#[derive(Clone, Default)]
pub struct FaultPlan {
    /// How often.
    pub rates: FaultRates,
    /// Which may happen together; without a policy, none happen at random.
    pub policy: Option<Rc<RefCell<dyn FaultPolicy>>>,
}

impl fmt::Debug for FaultPlan {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("FaultPlan")
            .field("rates", &self.rates)
            .finish_non_exhaustive()
    }
}

impl FaultPlan {
    /// Faults at `rates` as far as `policy` allows.
    pub fn new(rates: FaultRates, policy: impl FaultPolicy + 'static) -> Self {
        Self {
            rates,
            policy: Some(Rc::new(RefCell::new(policy))),
        }
    }

    pub(super) fn draw(
        &self,
        rng: &mut Rng,
        disk: usize,
        operation: Operation,
        range: &Range<u64>,
        sector: u64,
    ) -> Option<Fault> {
        let policy = self.policy.as_ref()?;
        if self.rates == FaultRates::default() {
            return None;
        }
        let fault = self.rates.draw(rng, sector)?;
        let range = range.clone();
        let allowed = fault.fits(operation) && policy.borrow_mut().allows(&Hit { disk, fault, range });
        allowed.then_some(fault)
    }
}
