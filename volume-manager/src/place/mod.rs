//! Where things lie: from a configuration to new extents. Pure functions; nothing is changed and nothing is read or written.
//!
//! ```text
//!   FreeSpace::of   data areas minus all extents                              free.rs
//!   place_section   columns × legs devices, a member on each, and the logs    section.rs, choose.rs
//!   place_volume    a section, or several where none is possible; and logs    volume.rs
//!   extend_section  longer members, or more sections; split, merge            change.rs
//!   place_member    one device for a leg that is added, moved or rebuilt      member.rs
//!   place_bitmap    the copies of a volume's bitmap                           member.rs
//!   verify          whether a whole configuration keeps the rules             verify.rs
//! ```
//!
//! The rules:
//! - A member lies on one device, and no device holds two members of a section: neither two legs nor two columns.
//! - New extents go to devices that are `Active`, of the class and among the devices that the volume asks for, whose blocks are
//!   not larger than the volume's. Spares are used when asked for.
//! - The members of a redundant section are spread over as many enclosures as can be, so that the failure of one takes no more
//!   than the layout tolerates. Where the pool has too few, the placement is done all the same and says so ([`Spread`]).
//! - Then the devices with the most free space are taken, so that they fill evenly; of their free runs the smallest that holds a
//!   member; several (at most [`MAX_PIECES`]) only if no single one does. Extents are whole blocks, long ones begin at multiples
//!   of [`ALIGNMENT`] where that costs no additional piece.
//! - A section with parity has `parity + 1` copies of its log, on the devices of its first `parity + 1` columns: as many devices as
//!   the layout tolerates may fail and a copy remains; if all of them fail, the section is lost anyway. By the same argument these
//!   devices (of a mirror: those of the first column) hold the activity log and the bitmap ([`log_devices`]).

mod change;
mod choose;
mod error;
mod free;
mod member;
mod section;
mod verify;
mod volume;

#[cfg(test)]
mod pool;
#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;

use crate::model::{Attributes, Configuration, DeviceId, DeviceState, Member, MemberState, Section, Volume};

pub use change::{Extended, extend_section, merge_sections, shorten_section, split_section};
pub use error::{PlaceError, Shortage, Unfit};
pub use free::{ALIGNMENT, DeviceSpace, FreeSpace, MAX_PIECES};
pub use member::{MemberRequest, PlacedMember, place_bitmap, place_log, place_member};
pub use section::{
    DEFAULT_STRIPE_UNIT, MAX_LEGS, PlacedSection, SectionRequest, log_size, place_section, resolve_layout,
};
pub use verify::{log_devices_suffice, verify};
pub use volume::{PlacedVolume, place_volume, place_volume_in};

/// What the failure of a whole enclosure means for a section.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spread {
    /// No enclosure's failure takes more than the layout tolerates; or the section tolerates nothing anyway.
    Enclosures,
    /// Some enclosure holds more than may fail at once: only failures of single devices are made good.
    Devices,
}

/// Devices, one of which is there whenever the section can be used: they hold the activity log and the bitmap of its volume.
/// Those of all members of the first `parity + 1` columns, whatever the members' states; none if there is no redundancy.
pub fn log_devices(section: &Section) -> Vec<DeviceId> {
    if !section.is_redundant() {
        return Vec::new();
    }
    let count = usize::try_from(section.parity).map_or(usize::MAX, |parity| parity.saturating_add(1));
    let members = section
        .columns
        .iter()
        .take(count)
        .flat_map(|column| &column.members);
    // A member needs all its devices, so the first one stands for it.
    let devices = members.filter_map(|member| Some(member.extents.first()?.device));
    let mut devices: Vec<_> = devices.collect();
    devices.sort_unstable();
    devices.dedup();
    devices
}

/// The log devices that a volume should have, as its sections are now: those of its first redundant section, or as they are, if
/// these are those of another one. None if no section is redundant. A volume whose only section with two members is one that
/// is being moved is redundant too: with the second member the log devices come, with the first they go.
pub fn volume_log_devices(volume: &Volume) -> Vec<DeviceId> {
    let sections = volume.sections.iter().map(log_devices);
    let mut choices = sections.filter(|devices| !devices.is_empty()).peekable();
    let first = choices.peek().cloned().unwrap_or_default();
    let mut present = volume.log_devices.clone();
    present.sort_unstable();
    choices.find(|devices| *devices == present).unwrap_or(first)
}

/// Whether the failure of any one enclosure is made good. Counts the members that are in sync.
pub fn spread(config: &Configuration, section: &Section) -> Spread {
    if !section.is_redundant() {
        return Spread::Enclosures;
    }
    let mut enclosures: Vec<&str> = member_devices(section)
        .filter_map(|id| Some(config.device(id)?.enclosure.as_str()))
        .filter(|enclosure| !enclosure.is_empty())
        .collect();
    enclosures.sort_unstable();
    enclosures.dedup();
    let inside = |id: DeviceId, enclosure: &str| {
        config
            .device(id)
            .is_some_and(|device| device.enclosure == enclosure)
    };
    let survives = |enclosure: &str| {
        let lost = section.columns.iter().filter(|column| {
            let mut good = column
                .members
                .iter()
                .filter(|member| member.state == MemberState::InSync);
            good.all(|member| {
                member
                    .extents
                    .iter()
                    .any(|extent| inside(extent.device, enclosure))
            })
        });
        lost.count() as u64 <= u64::from(section.parity)
    };
    match enclosures.into_iter().all(survives) {
        true => Spread::Enclosures,
        false => Spread::Devices,
    }
}

/// The devices of all members of a section.
fn member_devices(section: &Section) -> impl Iterator<Item = DeviceId> {
    let members = section.columns.iter().flat_map(|column| &column.members);
    members.flat_map(devices_of)
}

/// The devices of a member; one, unless it was placed by other rules.
fn devices_of(member: &Member) -> impl Iterator<Item = DeviceId> {
    member.extents.iter().map(|extent| extent.device)
}

/// Which devices may get new extents.
struct Rules<'a> {
    attributes: &'a Attributes,
    block: u32,
    excluded: &'a [DeviceId],
    use_spares: bool,
    /// A person chose this device: class and named devices do not matter.
    only: Option<DeviceId>,
}

impl Rules<'_> {
    /// Whether a device may, not regarding its free space.
    fn judge(&self, device: &crate::model::Device) -> Result<(), Unfit> {
        let attributes = self.attributes;
        let spare = device.state == DeviceState::Spare;
        match self.only {
            Some(only) if only != device.id => return Err(Unfit::NotNamed),
            Some(_) => {}
            None => {
                if !attributes.class.is_empty() && attributes.class != device.class {
                    return Err(Unfit::Class);
                }
                // A spare takes over wherever it is needed.
                let named = attributes.devices.is_empty() || attributes.devices.contains(&device.id);
                let takes_over = spare && self.use_spares;
                if !named && !takes_over {
                    return Err(Unfit::NotNamed);
                }
            }
        }
        match device.state {
            DeviceState::Active => {}
            DeviceState::Spare if self.use_spares => {}
            DeviceState::Spare => return Err(Unfit::Spare),
            DeviceState::Evacuating => return Err(Unfit::Evacuating),
            DeviceState::Faulty { .. } => return Err(Unfit::Faulty),
        }
        if device.block > self.block {
            return Err(Unfit::Block {
                device: device.block,
                volume: self.block,
            });
        }
        if self.excluded.contains(&device.id) {
            return Err(Unfit::Excluded);
        }
        Ok(())
    }
}
