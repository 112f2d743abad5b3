//! The ratios that were to be reached.

use super::subjects::{
    CHAIN, EXTENDED, FLOOR, LIMIT, MIRROR, OVERLAY, PLAIN, PLAIN_HELPED, PLAIN_PINNED, PLAIN_POLLING, RAW,
    SNAPSHOT,
};
use super::{Figures, Measured, median};

/// What is compared.
#[derive(Clone, Copy)]
enum Quantity {
    Iops,
    Cpu,
    Latency,
}

impl Quantity {
    fn of(self, figures: &Figures) -> f64 {
        match self {
            Self::Iops => figures.iops,
            Self::Cpu => figures.micros,
            Self::Latency => figures.latency,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Iops => "IOPS",
            Self::Cpu => "CPU time",
            Self::Latency => "latency",
        }
    }
}

/// The ratio of a subject to another.
struct Goal {
    quantity: Quantity,
    load: &'static str,
    subject: &'static str,
    to: &'static str,
    bound: Bound,
}

#[derive(Clone, Copy)]
enum Bound {
    AtLeast(f64),
    AtMost(f64),
    /// Not a goal, but good to know.
    None,
}

const fn goal(
    quantity: Quantity,
    load: &'static str,
    subject: &'static str,
    to: &'static str,
    bound: Bound,
) -> Goal {
    Goal {
        quantity,
        load,
        subject,
        to,
        bound,
    }
}

use Bound::{AtLeast, AtMost};
use Quantity::{Cpu, Iops, Latency};

const GOALS: &[Goal] = &[
    goal(Cpu, "rr32", PLAIN, FLOOR, AtMost(1.5)),
    goal(Cpu, "rw32", PLAIN, FLOOR, AtMost(1.5)),
    goal(Cpu, "rr32", PLAIN, RAW, AtMost(0.6)),
    goal(Cpu, "rw32", PLAIN, RAW, AtMost(0.6)),
    goal(Cpu, "rr32", PLAIN_PINNED, RAW, AtMost(0.6)),
    goal(Cpu, "rw32", PLAIN_PINNED, RAW, AtMost(0.6)),
    goal(Iops, "rr32", PLAIN, RAW, AtLeast(2.0)),
    goal(Iops, "rw32", PLAIN, RAW, AtLeast(2.0)),
    goal(Iops, "rr32", PLAIN_PINNED, RAW, AtLeast(2.0)),
    goal(Iops, "rw32", PLAIN_PINNED, RAW, AtLeast(2.0)),
    goal(Cpu, "rr32", PLAIN_HELPED, RAW, AtMost(0.6)),
    goal(Cpu, "rw32", PLAIN_HELPED, RAW, AtMost(0.6)),
    goal(Iops, "rr32", PLAIN_HELPED, RAW, AtLeast(2.0)),
    goal(Iops, "rw32", PLAIN_HELPED, RAW, AtLeast(2.0)),
    goal(Cpu, "rw32", MIRROR, PLAIN, AtMost(1.9)),
    goal(Latency, "rr1", PLAIN_POLLING, RAW, AtMost(0.5)),
    goal(Latency, "rw1", PLAIN_POLLING, RAW, AtMost(0.5)),
    goal(Latency, "rr1", PLAIN, RAW, Bound::None),
    goal(Latency, "rw1", PLAIN, RAW, Bound::None),
    goal(Iops, "r128", PLAIN, LIMIT, AtLeast(0.9)),
    goal(Iops, "w128", PLAIN, LIMIT, AtLeast(0.9)),
    goal(Iops, "fw32", SNAPSHOT, OVERLAY, AtLeast(2.0)),
    goal(Iops, "fw32", SNAPSHOT, EXTENDED, Bound::None),
    goal(Cpu, "fw32", SNAPSHOT, OVERLAY, Bound::None),
    goal(Cpu, "fw32", SNAPSHOT, EXTENDED, Bound::None),
    goal(Cpu, "fw32", SNAPSHOT, PLAIN, Bound::None),
    goal(Iops, "rr32", CHAIN, PLAIN, AtLeast(0.95)),
    goal(Cpu, "rr32", CHAIN, PLAIN, AtMost(1.05)),
    goal(Iops, "r128", CHAIN, PLAIN, AtLeast(0.95)),
];

/// Prints every goal whose subjects were measured: the ratio of each round, its median, lowest and highest.
pub(super) fn print(measured: &Measured) {
    println!("\nratios, each of the same round: median (lowest to highest)");
    for goal in GOALS {
        let ratios = ratios(measured, goal);
        let lowest = ratios.iter().copied().fold(f64::INFINITY, f64::min);
        let highest = ratios.iter().copied().fold(0.0, f64::max);
        let Some(ratio) = median(ratios) else { continue };
        let verdict = match goal.bound {
            Bound::AtLeast(bound) => format!("at least {bound}: {}", word(ratio >= bound)),
            Bound::AtMost(bound) => format!("at most {bound}: {}", word(ratio <= bound)),
            Bound::None => String::new(),
        };
        let what = format!(
            "{} {}: {} to {}",
            goal.load,
            goal.quantity.name(),
            goal.subject,
            goal.to
        );
        println!("{what:<76}{ratio:6.2} ({lowest:.2} to {highest:.2})  {verdict}");
    }
}

fn word(met: bool) -> &'static str {
    if met { "met" } else { "MISSED" }
}

fn ratios(measured: &Measured, goal: &Goal) -> Vec<f64> {
    let of = |subject| measured.get(&(subject, goal.load)).map_or(&[][..], Vec::as_slice);
    of(goal.subject)
        .iter()
        .zip(of(goal.to))
        .filter_map(|(one, other)| Some(goal.quantity.of(one.as_ref()?) / goal.quantity.of(other.as_ref()?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::subjects::{LOADS, SUBJECTS};
    use super::*;

    #[test]
    fn every_goal_compares_what_is_measured() {
        for goal in GOALS {
            let load = LOADS.iter().find(|load| load.name == goal.load).expect("a load");
            for name in [goal.subject, goal.to] {
                let subject = SUBJECTS.iter().find(|subject| subject.name == name);
                assert!(
                    subject.expect("a subject").takes(load),
                    "{name} has no {}",
                    goal.load
                );
            }
        }
    }

    #[test]
    fn ratios_are_those_of_the_same_round() {
        let figures = |iops| {
            Some(Figures {
                iops,
                micros: 1.0,
                latency: 1.0,
            })
        };
        let mut measured = Measured::new();
        measured.insert((PLAIN, "rr32"), vec![figures(2.0), None, figures(6.0)]);
        measured.insert((RAW, "rr32"), vec![figures(1.0), figures(7.0), figures(2.0)]);
        let goal = goal(Iops, "rr32", PLAIN, RAW, AtLeast(2.0));
        assert_eq!(ratios(&measured, &goal), [2.0, 3.0]);
    }
}
