//! Chooses a configuration among those found, says which devices stand how to it, and claims it for a new opening.

use std::collections::BTreeMap;
use std::fmt;
use std::rc::Rc;

use block_io::{BlockDevice, IoError, cover};

use super::commit::Store;
use super::history::{Relation, relation};
use super::media::{Held, Media};
use super::quorum::{self, Set};
use super::scan::{Found, Scan};
use super::together;
use crate::format::slot::Header;
use crate::format::{CheckError, encode};
use crate::model::{Configuration, DeviceId, Incarnation, MAX_INCARNATIONS, Uuid};

/// What a person orders against the rules.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Force {
    /// Nothing.
    #[default]
    No,
    /// To open without a majority: what the missing devices know beyond this is lost.
    WithoutMajority,
    /// To take the history of these devices when there are two: what the others know beyond this is lost.
    Side(Vec<Uuid>),
}

/// How a device stands to the chosen configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It holds it.
    Current,
    /// It holds the one before, or one that was tried in vain: nothing was acknowledged since without it.
    Lagging,
    /// It became a holder just with the chosen one, which did not reach it.
    New,
    /// It should hold it, or the one before, and does not: it came back with old content. Its members must be detached.
    Stale,
    /// It is faulty by the chosen one.
    Faulty,
}

/// A device of the pool that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Present {
    /// Its number.
    pub id: DeviceId,
    /// Its name as given.
    pub path: String,
    /// How it stands.
    pub standing: Standing,
}

/// One of several histories.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Side {
    /// Its newest epoch.
    pub epoch: u64,
    /// Its incarnations.
    pub incarnations: Vec<Incarnation>,
    /// The devices that hold it: name as given, and identity.
    pub devices: Vec<(String, Uuid)>,
}

impl fmt::Display for Side {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let paths: Vec<&str> = self.devices.iter().map(|(path, _)| path.as_str()).collect();
        write!(formatter, "epoch {} on {}, opened", self.epoch, paths.join(", "))?;
        // The last ones tell the difference.
        for incarnation in self.incarnations.iter().rev().take(3) {
            let forced = if incarnation.forced { " by force" } else { "" };
            write!(
                formatter,
                " at epoch {}{forced} ({})",
                incarnation.first_epoch, incarnation.id
            )?;
        }
        Ok(())
    }
}

fn list<T: fmt::Display>(items: &[T], separator: &str) -> String {
    items
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(separator)
}

/// Why a pool does not open.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// None of the devices is of a pool, or of the one that was asked for.
    #[error("no device of the pool was found: name all its devices")]
    NoPool,
    /// The devices are of several pools and none was asked for.
    #[error("the devices are of several pools ({}): say which", list(.0, ", "))]
    SeveralPools(Vec<String>),
    /// A device was given twice, or a copy of it.
    #[error(
        "{first} and {second} are the same device {device}, or one is a copy of the other: give only one of them"
    )]
    Duplicate {
        /// Identity of the device.
        device: Uuid,
        /// A name.
        first: String,
        /// Another name.
        second: String,
    },
    /// There are labels, but no configuration: the pool was never finished, or all copies are damaged.
    #[error("none of the {0} devices has a valid configuration: the pool was never finished, or is damaged")]
    NoConfiguration(usize),
    /// Two histories, each with changes that the other one does not have.
    #[error(
        "the pool was changed on some of its devices without the others, so there are several histories: {}. Choose one of them by force; what the others have beyond it is lost",
        list(.0, "; ")
    )]
    SplitBrain(Vec<Side>),
    /// Not enough devices.
    #[error(
        "{present} of {holders} devices with the pool's configuration are there, which is not enough; missing: {}. Attach them, or force it, which loses what only they know",
        list(.missing, ", ")
    )]
    NoMajority {
        /// Holders that are there and not stale.
        present: usize,
        /// Holders.
        holders: usize,
        /// Those that are not there or stale: number and name.
        missing: Vec<String>,
    },
    /// Too many devices failed while the pool was claimed; nothing was changed.
    #[error("too few devices took the claim of the pool: {}", list(.failed, "; "))]
    ClaimFailed {
        /// Errors of devices.
        failed: Vec<IoError>,
    },
    /// What was read cannot be written again: cannot happen.
    #[error(transparent)]
    Check(#[from] CheckError),
}

/// The configuration to be opened. Nothing was written yet.
#[derive(Debug)]
pub struct Choice<D> {
    found: Vec<(DeviceId, Found<D>)>,
    held: Held,
    present: Vec<Present>,
    absent: Vec<DeviceId>,
    forced: bool,
    /// Higher than any claimed so far.
    term: u64,
}

/// A pool that was claimed for this opening.
#[derive(Debug)]
pub struct Opened<D> {
    /// Takes commits. The first one must begin an incarnation: see [`Self::begin`].
    pub store: Store<D>,
    /// The newest configuration.
    pub configuration: Configuration,
    /// The devices that are there, in order of their numbers.
    pub present: Vec<Present>,
    /// The others of the configuration: to be made faulty by the first commit.
    pub absent: Vec<DeviceId>,
    /// Those of the present that did not take the claim: to be made faulty by the first commit, too.
    pub failed: Vec<(DeviceId, IoError)>,
    /// Whether a person forced it.
    pub forced: bool,
}

impl<D> Opened<D> {
    /// The configuration with which the first commit begins, still to be changed by what is absent, failed and stale.
    pub fn begin(&self, incarnation: Uuid) -> Configuration {
        let mut next = self.configuration.clone();
        next.epoch += 1;
        if next.incarnations.len() >= MAX_INCARNATIONS {
            next.incarnations.remove(0);
        }
        next.incarnations.push(Incarnation {
            id: incarnation,
            first_epoch: next.epoch,
            forced: self.forced,
        });
        next
    }
}

/// The holders of a configuration.
pub(crate) fn holders(configuration: &Configuration) -> Set {
    let devices = configuration.devices.iter();
    devices
        .filter(|device| device.is_holder())
        .map(|device| device.id)
        .collect()
}

/// The device's number in the chosen configuration, or else in its own slot.
fn number<D>(found: &Found<D>, chosen: &Configuration) -> Option<DeviceId> {
    let identity = found.media.label.device;
    let device = chosen.devices.iter().find(|device| device.uuid == identity);
    device
        .map(|device| device.id)
        .or_else(|| Some(found.held.as_ref()?.header.number))
}

fn standing<D>(found: &Found<D>, id: DeviceId, chosen: &Held) -> Standing {
    let configuration = &chosen.configuration;
    if let Some(device) = configuration.device(id)
        && !device.is_holder()
    {
        return Standing::Faulty;
    }
    match &found.held {
        Some(held) if held.configuration == *configuration => Standing::Current,
        Some(held) if is_one_behind(held, chosen) => Standing::Lagging,
        _ if configuration.device(id).is_some() && !chosen.held_before(id) && found.is_new(chosen) => {
            Standing::New
        }
        _ => Standing::Stale,
    }
}

/// Whether nothing was acknowledged since without it: it holds the configuration before, or one that was tried first.
fn is_one_behind(held: &Held, chosen: &Held) -> bool {
    let tried_first = held.header.epoch == chosen.header.epoch
        && held.header.incarnation == chosen.header.incarnation
        && held.header.term == chosen.header.term
        && held.header.attempt < chosen.header.attempt;
    if tried_first {
        cover!("store: a device holds what was tried first");
        return true;
    }
    held.configuration.epoch + 1 == chosen.configuration.epoch
        && relation(&chosen.configuration, &held.configuration) == Relation::Ancestor
}

impl<D> Found<D> {
    /// Whether it was no holder of the configuration before the chosen one, by what is known. A first configuration has
    /// none before, and one without a list of its predecessor's holders has all its own holders in that list.
    fn is_new(&self, chosen: &Held) -> bool {
        !chosen.header.previous.is_empty() || self.held.is_none()
    }
}

/// The found devices of one pool.
fn of_pool<D>(scan: Scan<D>, pool: Option<Uuid>) -> Result<Vec<Found<D>>, OpenError> {
    let pools = scan.pools();
    let pool = match pool {
        Some(pool) => pool,
        None if pools.len() > 1 => {
            let names = pools.iter().map(|(pool, name)| format!("{name} {pool}"));
            return Err(OpenError::SeveralPools(names.collect()));
        }
        None => *pools.keys().next().ok_or(OpenError::NoPool)?,
    };
    let found: Vec<Found<D>> = scan
        .found
        .into_iter()
        .filter(|found| found.media.label.pool == pool)
        .collect();
    if found.is_empty() {
        return Err(OpenError::NoPool);
    }
    let mut seen = BTreeMap::new();
    for found in &found {
        let device = found.media.label.device;
        if let Some(first) = seen.insert(device, found.path.clone()) {
            let second = found.path.clone();
            return Err(OpenError::Duplicate {
                device,
                first,
                second,
            });
        }
    }
    Ok(found)
}

impl Held {
    /// The newest is the greatest.
    fn order(&self) -> (u64, u64, u32) {
        (self.header.term, self.header.epoch, self.header.attempt)
    }

    /// Whether a device was a holder of the last durable configuration before this one.
    fn held_before(&self, id: DeviceId) -> bool {
        self.header
            .previous
            .first()
            .is_some_and(|holders| holders.contains(&id))
    }
}

fn same(one: &Held, other: &Held) -> bool {
    one.order() == other.order() && one.configuration == other.configuration
}

/// The different configurations that were found, as histories.
fn sides<D>(found: &[Found<D>], chosen: &Held) -> Vec<Side> {
    let mut tips: Vec<&Held> = vec![chosen];
    for held in found.iter().filter_map(|found| found.held.as_ref()) {
        let foreign =
            !same(held, chosen) && relation(&chosen.configuration, &held.configuration) == Relation::Foreign;
        if foreign && !tips.iter().any(|tip| same(tip, held)) {
            tips.push(held);
        }
    }
    let side = |tip: &&Held| Side {
        epoch: tip.configuration.epoch,
        incarnations: tip.configuration.incarnations.clone(),
        devices: found
            .iter()
            .filter(|found| found.held.as_ref().is_some_and(|held| same(held, tip)))
            .map(|found| (found.path.clone(), found.media.label.device))
            .collect(),
    };
    tips.iter().map(side).collect()
}

impl<D> Scan<D> {
    /// The newest configuration of `pool`, or of the only pool there is, and what stands how to it.
    ///
    /// # Errors
    /// There is none, there are several histories, or not enough devices to be sure that it is the newest.
    pub fn choose(self, pool: Option<Uuid>, force: &Force) -> Result<Choice<D>, OpenError> {
        let found = of_pool(self, pool)?;
        let eligible = |found: &&Found<D>| match force {
            Force::Side(devices) => devices.contains(&found.media.label.device),
            _ => true,
        };
        let candidates = found
            .iter()
            .filter(eligible)
            .filter_map(|found| found.held.as_ref());
        let chosen = candidates.max_by_key(|held| held.order());
        let chosen = chosen.ok_or(OpenError::NoConfiguration(found.len()))?.clone();
        let sides = sides(&found, &chosen);
        let split = sides.len() > 1;
        if split {
            cover!("store: split brain");
            if !matches!(force, Force::Side(_)) {
                return Err(OpenError::SplitBrain(sides));
            }
        }
        let term = found
            .iter()
            .filter_map(|found| found.held.as_ref())
            .map(|held| held.header.claimed)
            .max();
        let mut choice = Choice {
            found: Vec::new(),
            held: chosen,
            present: Vec::new(),
            absent: Vec::new(),
            forced: split,
            term: term.unwrap_or(0) + 1,
        };
        choice.place(found);
        if let Err(error) = choice.check_majority() {
            if *force == Force::No {
                return Err(error);
            }
            cover!("store: opened without a majority by force");
            choice.forced = true;
        }
        Ok(choice)
    }
}

impl<D> Choice<D> {
    /// Says of each device how it stands.
    fn place(&mut self, found: Vec<Found<D>>) {
        for found in found {
            let Some(id) = number(&found, &self.held.configuration) else {
                cover!("store: a labelled device is not in the configuration");
                continue;
            };
            if self.held.configuration.device(id).is_some() {
                let standing = standing(&found, id, &self.held);
                let path = found.path.clone();
                self.present.push(Present { id, path, standing });
                match standing {
                    Standing::Lagging => cover!("store: a device lags by one epoch"),
                    Standing::New => cover!("store: a new device has no configuration yet"),
                    Standing::Stale => cover!("store: a stale device"),
                    Standing::Faulty => cover!("store: a faulty device is back"),
                    Standing::Current => {}
                }
            }
            self.found.push((id, found));
        }
        self.found.sort_by_key(|(id, _)| *id);
        self.present.sort_by_key(|present| present.id);
        let there: Set = self.present.iter().map(|present| present.id).collect();
        let devices = self.held.configuration.devices.iter().map(|device| device.id);
        self.absent = devices.filter(|id| !there.contains(id)).collect();
    }

    /// Devices that count: they hold the chosen configuration, or the one before, or never held one.
    fn counted(&self) -> Set {
        let counts = |id: DeviceId, found: &Found<D>| match standing(found, id, &self.held) {
            Standing::Current | Standing::Lagging | Standing::New => true,
            Standing::Stale => false,
            Standing::Faulty => {
                let held = found.held.as_ref();
                held.is_some_and(|held| same(held, &self.held) || is_one_behind(held, &self.held))
            }
        };
        let found = self.found.iter().filter(|(id, found)| counts(*id, found));
        found.map(|(id, _)| *id).collect()
    }

    fn previous(&self) -> Vec<Set> {
        let previous = self.held.header.previous.iter();
        previous
            .map(|holders| holders.iter().copied().collect())
            .collect()
    }

    fn check_majority(&self) -> Result<(), OpenError> {
        let holders = holders(&self.held.configuration);
        let counted = self.counted();
        let have = self
            .found
            .iter()
            .filter(|(_, found)| found.held.as_ref().is_some_and(|held| same(held, &self.held)));
        let have: Set = have.map(|(id, _)| *id).collect();
        if quorum::may_open(&self.previous(), &holders, &counted, &have) {
            return Ok(());
        }
        cover!("store: no majority");
        let previous = self.previous();
        let wanted: Set = previous.iter().chain([&holders]).flatten().copied().collect();
        let name = |id: &DeviceId| match self.held.configuration.device(*id) {
            Some(device) => format!("{id} ({})", device.name),
            None => id.to_string(),
        };
        Err(OpenError::NoMajority {
            present: holders.intersection(&counted).count(),
            holders: holders.len(),
            missing: wanted.difference(&counted).map(name).collect(),
        })
    }

    /// The configuration.
    pub fn configuration(&self) -> &Configuration {
        &self.held.configuration
    }

    /// Its devices that are there, in order of their numbers.
    pub fn present(&self) -> &[Present] {
        &self.present
    }

    /// Its devices that are not there.
    pub fn absent(&self) -> &[DeviceId] {
        &self.absent
    }

    /// Whether the rules were overruled.
    pub fn is_forced(&self) -> bool {
        self.forced
    }
}

impl<D: BlockDevice> Choice<D> {
    /// Claims the pool: repairs labels, writes the chosen configuration with a new term to all devices that count.
    ///
    /// # Errors
    /// Too few devices took it.
    pub async fn claim(self) -> Result<Opened<D>, OpenError> {
        let payload = encode(&self.held.configuration)?;
        let counted = self.counted();
        let (holders, previous) = (holders(&self.held.configuration), self.previous());
        let header = Header {
            claimed: self.term,
            ..self.held.header.clone()
        };
        let writes = self.found.iter().map(|(id, found)| {
            let (media, payload) = (found.media.clone(), &payload);
            let header = Header {
                number: *id,
                ..header.clone()
            };
            let wanted =
                counted.contains(id) && (holders.contains(id) || previous.iter().any(|set| set.contains(id)));
            async move { claim_one(media, found, wanted.then_some(header), payload).await }
        });
        let results = together::all(writes).await;
        let mut devices = BTreeMap::new();
        let mut failed = Vec::new();
        let mut have = Set::new();
        for ((id, _), (media, result)) in self.found.iter().zip(results) {
            match result {
                Err(error) => {
                    cover!("store: a device fails when the pool is claimed");
                    failed.push((*id, error));
                }
                Ok(()) if counted.contains(id) => {
                    have.insert(*id);
                }
                Ok(()) => {}
            }
            if self.held.configuration.device(*id).is_some() {
                devices.insert(*id, media);
            }
        }
        let enough = quorum::is_durable(&previous, &holders, &have) || self.forced && !have.is_empty();
        if !enough {
            let failed = failed.into_iter().map(|(_, error)| error).collect();
            return Err(OpenError::ClaimFailed { failed });
        }
        failed.retain(|(id, _)| holders.contains(id));
        let gone = failed.iter().map(|(id, _)| *id).collect();
        Ok(Opened {
            store: Store::opened(
                devices,
                Configuration::clone(&self.held.configuration),
                self.term,
                self.forced,
                gone,
            ),
            configuration: Rc::unwrap_or_clone(self.held.configuration),
            present: self.present,
            absent: self.absent,
            failed,
            forced: self.forced,
        })
    }
}

async fn claim_one<D: BlockDevice>(
    mut media: Media<D>,
    found: &Found<D>,
    header: Option<Header>,
    payload: &[u8],
) -> (Media<D>, Result<(), IoError>) {
    let mut result = media.repair_label(found.copies).await;
    if let (Ok(()), Some(header)) = (&result, header) {
        result = media.put(header, payload).await;
    }
    (media, result)
}
