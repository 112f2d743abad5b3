//! All that a crash can leave behind: for every sector, the durable content or one of the uncertain changes. And all that the end of a process
//! can leave: of what was in flight, every sector or not.

use std::collections::BTreeMap;

use super::medium::{Change, Medium};
use super::rng::{Rng, mix};

/// Changes above so many sectors are decided in eight pieces.
const FINE_SECTORS: u64 = 32768;

/// A piece of a disk whose content after the crash is open.
#[derive(Debug)]
struct Site {
    disk: usize,
    /// Contents beside the durable one; and which change each is from.
    options: Vec<(usize, Change)>,
}

/// The states that a crash of some disks can lead to.
#[derive(Debug)]
pub struct CrashStates {
    /// As they are if nothing of all that is open is kept.
    media: Vec<Medium>,
    /// The power has stayed.
    killed: bool,
    sites: Vec<Site>,
    changes: usize,
    total: Option<u64>,
}

/// One of these states: for each site the option that is kept.
pub(super) type Choices = Vec<Option<usize>>;

/// What states are known by: see [`CrashStates::digests`].
#[derive(Debug)]
pub(super) struct Digests {
    /// Of each disk, if nothing is kept.
    disks: Vec<u64>,
    /// What each option of each site adds to that of its disk.
    sites: Vec<(usize, Vec<u64>)>,
}

impl Digests {
    /// Of a state: equal ones are of disks with equal contents and conditions.
    pub(super) fn of(&self, choices: &Choices) -> u64 {
        let mut disks = self.disks.clone();
        for ((disk, options), choice) in self.sites.iter().zip(choices) {
            if let Some(difference) = choice.and_then(|choice| options.get(choice)) {
                disks[*disk] = disks[*disk].wrapping_add(*difference);
            }
        }
        disks.iter().fold(0, |digest, disk| mix(digest ^ disk))
    }
}

impl CrashStates {
    /// Of these disks, as they are now.
    pub fn new(media: &[Medium]) -> Self {
        Self::of(media, false)
    }

    /// Of these disks, if the process that uses them is killed now.
    pub fn of_kill(media: &[Medium]) -> Self {
        Self::of(media, true)
    }

    fn of(media: &[Medium], killed: bool) -> Self {
        let mut sites = Vec::new();
        let mut changes = 0;
        let mut kept = Vec::with_capacity(media.len());
        for (disk, medium) in media.iter().enumerate() {
            sites_of(disk, medium, killed, &mut changes, &mut sites);
            kept.push(if killed { medium.killed() } else { medium.crashed() });
        }
        let total = sites.iter().try_fold(1_u64, |total, site| {
            total.checked_mul(site.options.len() as u64 + 1)
        });
        Self {
            media: kept,
            killed,
            sites,
            changes,
            total,
        }
    }

    /// How many different states there are, if that fits into 64 bits.
    pub fn total(&self) -> Option<u64> {
        self.total
    }

    /// How many states [`Self::nth`] gives for `limit`: all, if there are so few.
    pub fn count(&self, limit: u64) -> u64 {
        self.total.map_or(limit, |total| total.min(limit)).max(1)
    }

    /// State number `index` of [`Self::count`]. If there are too many for `limit`, the first ones are the telling ones
    /// (nothing kept, all kept, one change kept, one lost, prefixes), then come changes drawn from `seed`, whole and torn.
    pub fn nth(&self, index: u64, limit: u64, seed: u64) -> Vec<Medium> {
        self.build(&self.choose(index, limit, seed))
    }

    /// What [`Self::nth`] keeps.
    pub(super) fn choose(&self, index: u64, limit: u64, seed: u64) -> Choices {
        if self.total.is_some_and(|total| total <= limit) {
            let mut rest = index;
            return self.each(|site| {
                let radix = site.options.len() as u64 + 1;
                let digit = rest % radix;
                rest /= radix;
                usize::try_from(digit).ok()?.checked_sub(1)
            });
        }
        let mut rng = Rng::new(seed ^ index.wrapping_mul(0x2545_f491_4f6c_dd1d));
        let count = self.changes as u64;
        let telling = index.checked_sub(2).map(|rest| (rest / 3, rest % 3));
        match (index, telling) {
            (0, _) => self.each(|_| None),
            (1, _) => self.each(|site| site.options.len().checked_sub(1)),
            (_, Some((change, way))) if change < count => self.keep(|number| match way {
                0 => number as u64 == change,
                1 => number as u64 != change,
                _ => number as u64 <= change,
            }),
            _ => self.draw(&mut rng),
        }
    }

    /// A state drawn from `rng`: whole changes or torn ones, few or many.
    pub fn random_state(&self, rng: &mut Rng) -> Vec<Medium> {
        self.build(&self.draw(rng))
    }

    fn draw(&self, rng: &mut Rng) -> Choices {
        let likely = 1 + rng.below(7);
        if rng.chance(1, 2) {
            let whole: Vec<bool> = (0..self.changes).map(|_| rng.chance(likely, 8)).collect();
            return self.keep(|number| whole.get(number).copied().unwrap_or(false));
        }
        self.each(|site| rng.chance(likely, 8).then(|| rng.index(site.options.len())))
    }

    /// Keeps whole changes; of several for one sector, the last.
    fn keep(&self, kept: impl Fn(usize) -> bool) -> Choices {
        self.each(|site| site.options.iter().rposition(|(number, _)| kept(*number)))
    }

    fn each(&self, choose: impl FnMut(&Site) -> Option<usize>) -> Choices {
        self.sites.iter().map(choose).collect()
    }

    /// The disks in a state.
    pub(super) fn build(&self, choices: &Choices) -> Vec<Medium> {
        let mut media: Vec<_> = self.media.clone();
        for (site, choice) in self.sites.iter().zip(choices) {
            if let Some((_, change)) = choice.and_then(|choice| site.options.get(choice)) {
                media[site.disk].keep(change, self.killed);
            }
        }
        if !self.killed {
            media.iter_mut().for_each(Medium::switch_on);
        }
        media
    }

    /// What tells its states apart.
    pub(super) fn digests(&self) -> Digests {
        let of_option = |site: &Site, change: &Change| {
            let present = self.media[site.disk].image(self.killed);
            present.difference(change.offset, change.length, change.bytes())
        };
        let sites = self.sites.iter().map(|site| {
            let options = site.options.iter().map(|(_, change)| of_option(site, change));
            (site.disk, options.collect())
        });
        Digests {
            disks: self
                .media
                .iter()
                .map(|medium| medium.digest(self.killed))
                .collect(),
            sites: sites.collect(),
        }
    }
}

fn sites_of(disk: usize, medium: &Medium, killed: bool, changes: &mut usize, sites: &mut Vec<Site>) {
    let sector = u64::from(medium.options.sector);
    let mut by_sector: BTreeMap<u64, Vec<(usize, Change)>> = BTreeMap::new();
    for change in medium.uncertain(killed) {
        let number = *changes;
        *changes += 1;
        let end = change.offset + change.length;
        let large = change.length / sector > FINE_SECTORS;
        let step = if large {
            (change.length / 8).next_multiple_of(sector)
        } else {
            sector
        };
        let mut offset = change.offset;
        while offset < end {
            if let Some(part) = change.part(offset, offset + step) {
                if large {
                    let options = vec![(number, part)];
                    sites.push(Site { disk, options });
                } else {
                    by_sector.entry(offset).or_default().push((number, part));
                }
            }
            offset += step;
        }
    }
    let zeroes = vec![0; medium.options.sector as usize];
    let present = medium.image(killed);
    for (offset, mut options) in by_sector {
        // Contents that are there already, or offered by a later change, make no state of their own. Those of several
        // changes stay, so that "keep the last" keeps its meaning.
        if let [(_, only)] = options.as_slice()
            && present.holds(offset, only.bytes().unwrap_or(&zeroes))
        {
            options.clear();
        }
        if !options.is_empty() {
            sites.push(Site { disk, options });
        }
    }
}
