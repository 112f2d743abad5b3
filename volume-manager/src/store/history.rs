//! Whether one configuration explains another: is it its past, or was it given up, or is it of another history?
//!
//! A pool's history is a line of configurations; each opening begins an incarnation, and within one the epochs grow by one.
//! A line can fork when a crash leaves a configuration on few devices and the next opening does not see them: such a
//! configuration was never acknowledged, and it is at most one epoch beyond the fork, because each next one is only written
//! when the one before is durable. Anything else beyond a fork is another history, and so is everything beyond a fork that
//! a forced opening made.

use crate::model::{Configuration, Incarnation};

/// What one configuration is to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Relation {
    /// It is in its past.
    Ancestor,
    /// It was interrupted, never acknowledged, and given up.
    GivenUp,
    /// Its history is another.
    Foreign,
}

/// The incarnation that both have in common last: its place in each list.
fn last_common(one: &[Incarnation], other: &[Incarnation]) -> Option<(usize, usize)> {
    one.iter().enumerate().rev().find_map(|(place, incarnation)| {
        let there = other.iter().rposition(|candidate| candidate == incarnation)?;
        Some((place, there))
    })
}

/// The last epoch of incarnation number `place`.
fn end(configuration: &Configuration, place: usize) -> u64 {
    let next = configuration.incarnations.get(place + 1);
    next.map_or(configuration.epoch, |next| next.first_epoch.saturating_sub(1))
}

/// What `other` is to `chosen`, which is another configuration.
pub(crate) fn relation(chosen: &Configuration, other: &Configuration) -> Relation {
    let Some((here, there)) = last_common(&chosen.incarnations, &other.incarnations) else {
        return Relation::Foreign;
    };
    let fork = end(chosen, here).min(end(other, there));
    let forced = |configuration: &Configuration, place: usize| {
        configuration
            .incarnations
            .get(place + 1)
            .is_some_and(|next| next.forced)
    };
    if other.epoch <= fork {
        // With the same epoch within one incarnation, it was tried before this one.
        return if chosen.epoch > other.epoch {
            Relation::Ancestor
        } else {
            Relation::GivenUp
        };
    }
    // `chosen` itself must have gone on from the fork, or it is the past of `other`.
    let went_on = chosen.epoch > fork;
    if other.epoch == fork.saturating_add(1) && went_on && !forced(chosen, here) && !forced(other, there) {
        return Relation::GivenUp;
    }
    Relation::Foreign
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Uuid;

    /// Incarnations as (identity, first epoch, forced), and the epoch.
    fn configuration(epoch: u64, incarnations: &[(u128, u64, bool)]) -> Configuration {
        let incarnation = |&(id, first_epoch, forced): &(u128, u64, bool)| Incarnation {
            id: Uuid(id),
            first_epoch,
            forced,
        };
        Configuration {
            pool: Uuid(1),
            name: "tank".into(),
            epoch,
            incarnations: incarnations.iter().map(incarnation).collect(),
            devices: Vec::new(),
            volumes: Vec::new(),
            jobs: Vec::new(),
            next_device: 0,
            next_volume: 0,
            next_job: 0,
        }
    }

    const A: (u128, u64, bool) = (0xa, 1, false);

    #[test]
    fn what_lies_on_the_line_is_an_ancestor() {
        let chosen = configuration(9, &[A, (0xb, 4, false), (0xc, 8, false)]);
        assert_eq!(
            relation(&chosen, &configuration(8, &[A, (0xb, 4, false), (0xc, 8, false)])),
            Relation::Ancestor
        );
        assert_eq!(
            relation(&chosen, &configuration(7, &[A, (0xb, 4, false)])),
            Relation::Ancestor
        );
        assert_eq!(relation(&chosen, &configuration(1, &[A])), Relation::Ancestor);
        let cut = configuration(9, &[(0xb, 4, false), (0xc, 8, false)]);
        assert_eq!(
            relation(&cut, &configuration(5, &[A, (0xb, 4, false)])),
            Relation::Ancestor,
            "cut off"
        );
    }

    #[test]
    fn one_step_beyond_a_fork_was_given_up_and_two_are_another_history() {
        let chosen = configuration(9, &[A, (0xb, 4, false)]);
        assert_eq!(relation(&chosen, &configuration(4, &[A])), Relation::GivenUp);
        assert_eq!(
            relation(&chosen, &configuration(4, &[A, (0xd, 4, false)])),
            Relation::GivenUp
        );
        assert_eq!(relation(&chosen, &configuration(5, &[A])), Relation::Foreign);
        assert_eq!(
            relation(&chosen, &configuration(5, &[A, (0xd, 4, false)])),
            Relation::Foreign
        );
        assert_eq!(
            relation(&chosen, &configuration(5, &[A, (0xd, 5, false)])),
            Relation::Foreign
        );
    }

    #[test]
    fn beyond_a_forced_opening_nothing_was_given_up() {
        let chosen = configuration(9, &[A, (0xb, 4, true)]);
        assert_eq!(relation(&chosen, &configuration(3, &[A])), Relation::Ancestor);
        assert_eq!(relation(&chosen, &configuration(4, &[A])), Relation::Foreign);
        let chosen = configuration(9, &[A, (0xb, 4, false)]);
        assert_eq!(
            relation(&chosen, &configuration(4, &[A, (0xd, 4, true)])),
            Relation::Foreign
        );
    }

    #[test]
    fn a_successor_and_a_stranger_are_not_explained() {
        let chosen = configuration(3, &[A]);
        assert_eq!(relation(&chosen, &configuration(4, &[A])), Relation::Foreign);
        assert_eq!(
            relation(&chosen, &configuration(4, &[A, (0xb, 4, false)])),
            Relation::Foreign
        );
        assert_eq!(
            relation(&chosen, &configuration(3, &[(0xe, 1, false)])),
            Relation::Foreign
        );
    }
}
