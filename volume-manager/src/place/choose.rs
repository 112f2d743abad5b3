//! Which devices the members of a section go to.
//!
//! Taking, again and again, a device of the enclosure that has been taken from least, gives the most enclosures and the smallest
//! share of any one. Where some places need more room than others (those with logs), the devices with that room are taken first.
//! With parity that keeps the smallest share, for what is then left in an enclosure is all that a larger choice could have used.
//! The columns of a mirror are looked at one by one: see [`first_column`].

use std::collections::HashMap;

use crate::model::DeviceId;

/// A device that has room for a member.
#[derive(Debug, Clone)]
pub(super) struct Candidate<'a> {
    pub(super) device: DeviceId,
    pub(super) enclosure: &'a str,
    /// Free bytes.
    pub(super) free: u64,
    /// A member would be in one piece.
    pub(super) whole: bool,
    /// Has room for a log besides the member.
    pub(super) large: bool,
}

/// How many devices are wanted, and how they are used.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    pub(super) columns: usize,
    pub(super) legs: usize,
    pub(super) parity: usize,
    /// So many of the first members need room for a log: whole columns of a mirror, or the first columns with parity.
    pub(super) large: usize,
}

impl Wanted {
    fn members(self) -> usize {
        self.columns * self.legs
    }

    fn redundant(self) -> bool {
        self.parity > 0 || self.legs > 1
    }
}

/// Devices in order: first the legs of the first column, then of the second ... None if there are too few.
pub(super) fn choose(candidates: &[Candidate<'_>], wanted: Wanted) -> Option<Vec<DeviceId>> {
    let large: Vec<_> = candidates.iter().filter(|candidate| candidate.large).collect();
    let all: Vec<_> = candidates.iter().collect();
    // Usually there is room for logs everywhere, and every order will do.
    let uniform = pick(&large, wanted, &[], wanted.members()).map(|picked| arrange(picked, wanted));
    // Otherwise those with room for logs come first, and the others fill the rest.
    let mixed = || match wanted.legs {
        1 => {
            let first = pick(&large, wanted, &[], wanted.large)?;
            pick(&all, wanted, &first, wanted.members())
        }
        legs => {
            let first = first_column(&all, wanted)?;
            let mut others = all.clone();
            others.retain(|candidate| !first.iter().any(|other| other.device == candidate.device));
            let rest = Wanted {
                columns: wanted.columns - 1,
                ..wanted
            };
            let picked = pick(&others, wanted, &[], rest.columns * legs)?;
            Some([first, arrange(picked, rest)].concat())
        }
    };
    let chosen = match uniform {
        Some(uniform) if !is_weak(&uniform, wanted) => uniform,
        Some(uniform) => mixed().filter(|mixed| !is_weak(mixed, wanted)).unwrap_or(uniform),
        None => mixed()?,
    };
    Some(chosen.into_iter().map(|candidate| candidate.device).collect())
}

/// The legs of a mirror's first column, which have room for logs, so that the other columns can be as good as possible.
///
/// A column is good if its legs do not all lie in one enclosure. In the `columns - 1` others together that can be for as many as
/// `(columns - 1) * (legs - 1)` devices of any one. What an enclosure has beyond that is of no use to them, so it is used here.
fn first_column<'a>(all: &[&'a Candidate<'a>], wanted: Wanted) -> Option<Vec<&'a Candidate<'a>>> {
    let useful = (wanted.columns - 1) * (wanted.legs - 1);
    let mut left: Vec<_> = all.iter().copied().filter(|candidate| candidate.large).collect();
    left.sort_by_cached_key(|candidate| preference(candidate));
    let mut picked = Vec::new();
    while picked.len() < wanted.legs {
        let cost = |candidate: &Candidate<'_>| {
            let share = in_enclosure(&picked, candidate.enclosure);
            let useless = in_enclosure(all, candidate.enclosure).saturating_sub(useful);
            (share >= wanted.legs - 1, share >= useless, share)
        };
        let cheapest = left
            .iter()
            .enumerate()
            .min_by_key(|(_, candidate)| cost(candidate));
        let (index, _) = cheapest?;
        picked.push(left.remove(index));
    }
    Some(picked)
}

/// How many of `devices` are in an enclosure. One of unknown enclosure shares it with nobody.
fn in_enclosure(devices: &[&Candidate<'_>], enclosure: &str) -> usize {
    if enclosure.is_empty() {
        return 0;
    }
    devices
        .iter()
        .filter(|device| device.enclosure == enclosure)
        .count()
}

/// What decides between devices whose enclosures have been taken from equally often: one piece, then most space.
fn preference(candidate: &Candidate<'_>) -> (bool, std::cmp::Reverse<u64>, DeviceId) {
    (
        !candidate.whole,
        std::cmp::Reverse(candidate.free),
        candidate.device,
    )
}

/// Adds devices until there are `count`.
fn pick<'a>(
    from: &[&'a Candidate<'a>],
    wanted: Wanted,
    taken: &[&'a Candidate<'a>],
    count: usize,
) -> Option<Vec<&'a Candidate<'a>>> {
    let mut picked = taken.to_vec();
    let mut left: Vec<_> = from.to_vec();
    left.retain(|candidate| !taken.iter().any(|other| other.device == candidate.device));
    left.sort_by_cached_key(|candidate| preference(candidate));
    if !wanted.redundant() {
        // There is nothing to spread.
        picked.extend(left.into_iter().take(count.saturating_sub(picked.len())));
        return (picked.len() >= count).then_some(picked);
    }
    let mut shares: HashMap<&str, usize> = HashMap::new();
    for candidate in taken {
        *shares.entry(candidate.enclosure).or_default() += 1;
    }
    while picked.len() < count {
        // A device of unknown enclosure shares it with nobody.
        let share = |candidate: &Candidate<'_>| match candidate.enclosure {
            "" => 0,
            enclosure => shares.get(enclosure).copied().unwrap_or(0),
        };
        let (index, candidate) = left
            .iter()
            .enumerate()
            .min_by_key(|(_, candidate)| share(candidate))?;
        *shares.entry(candidate.enclosure).or_default() += 1;
        picked.push(candidate);
        left.remove(index);
    }
    Some(picked)
}

/// Deals the devices out to mirrored columns so that those of one enclosure go to different columns as far as can be.
fn arrange<'a>(mut picked: Vec<&'a Candidate<'a>>, wanted: Wanted) -> Vec<&'a Candidate<'a>> {
    if wanted.legs < 2 || wanted.columns < 2 {
        return picked;
    }
    picked.sort_by_key(|candidate| candidate.enclosure);
    let columns = (0..wanted.columns).flat_map(|column| picked.iter().skip(column).step_by(wanted.columns));
    columns.copied().collect()
}

/// Whether the failure of one enclosure would take more than is tolerated.
fn is_weak(chosen: &[&Candidate<'_>], wanted: Wanted) -> bool {
    let named = chosen.iter().filter(|device| !device.enclosure.is_empty());
    let mut enclosures = named.map(|device| device.enclosure);
    wanted.redundant()
        && enclosures.any(|enclosure| {
            let columns = chosen.chunks(wanted.legs);
            let lost = columns.filter(|column| in_enclosure(column, enclosure) == column.len());
            lost.count() > wanted.parity
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidates(enclosures: &[&'static str]) -> Vec<Candidate<'static>> {
        let numbered = (0..).zip(enclosures);
        let candidate = |(number, enclosure): (u32, &&'static str)| Candidate {
            device: DeviceId(number),
            enclosure,
            free: 1000 - u64::from(number),
            whole: true,
            large: true,
        };
        numbered.map(candidate).collect()
    }

    fn numbers(chosen: Option<Vec<DeviceId>>) -> Vec<u32> {
        chosen.unwrap().into_iter().map(|device| device.0).collect()
    }

    const RAID6: Wanted = Wanted {
        columns: 6,
        legs: 1,
        parity: 2,
        large: 3,
    };

    #[test]
    fn no_enclosure_gets_more_parts_than_needed() {
        let pool = candidates(&["a", "a", "a", "a", "b", "b", "b", "c", "c"]);
        assert_eq!(numbers(choose(&pool, RAID6)), [0, 4, 7, 1, 5, 8]);
    }

    #[test]
    fn legs_of_a_column_lie_in_different_enclosures() {
        let wanted = Wanted {
            columns: 3,
            legs: 2,
            parity: 0,
            large: 2,
        };
        let pool = candidates(&["a", "a", "a", "b", "b", "b"]);
        let chosen = numbers(choose(&pool, wanted));
        for legs in chosen.chunks(2) {
            assert!((legs[0] < 3) != (legs[1] < 3), "{chosen:?}");
        }
    }

    /// Of the only two columns the first needs room for logs. If it took the two devices that have most space, the second would
    /// lie in "a" alone.
    #[test]
    fn the_column_with_logs_leaves_the_others_a_choice() {
        let wanted = Wanted {
            columns: 2,
            legs: 2,
            parity: 0,
            large: 2,
        };
        let mut pool = candidates(&["b", "", "a", "a"]);
        pool[3].large = false;
        let chosen = numbers(choose(&pool, wanted));
        assert_eq!(chosen, [2, 0, 1, 3]);
    }

    #[test]
    fn devices_with_room_for_logs_come_first() {
        let mut pool = candidates(&["", "", "", "", "", ""]);
        for candidate in &mut pool[..3] {
            candidate.large = false;
        }
        let chosen = numbers(choose(&pool, RAID6));
        assert_eq!(chosen, [3, 4, 5, 0, 1, 2]);
        pool[5].large = false;
        assert_eq!(choose(&pool, RAID6), None);
    }

    #[test]
    fn without_redundancy_only_free_space_counts() {
        let wanted = Wanted {
            columns: 2,
            legs: 1,
            parity: 0,
            large: 0,
        };
        assert_eq!(numbers(choose(&candidates(&["a", "a", "b"]), wanted)), [0, 1]);
    }
}
