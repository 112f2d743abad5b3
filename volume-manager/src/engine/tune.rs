//! `auto-tune`: moving what makes the load off devices that have more of it than others.
//!
//! The job looks at a window of load, and if a move would help, has it done by a job of kind `Move`, which the configuration
//! keeps, so a crash costs nothing but the window. Then it looks again, until in two windows no move would help.
//!
//! So that nothing goes to and fro:
//! - a device has to be busy for more than half of the time, in two windows, before anything is moved off it;
//! - the busier of the two devices has to become less busy by 15 % of the time at least, as far as can be foretold;
//! - the same volume is not moved off or onto a device twice by one job;
//! - while other jobs copy, nothing is decided: their load is not the guests'.
//!
//! Only active devices of the same class get something, and only where the placement rules allow it.

use std::collections::BTreeSet;
use std::time::Duration;

use block_io::{BlockDevice, Clock, cover};

use super::hot::HotSpots;
use super::job::{Control, Stop};
use super::pool::Pool;
use super::work::LOOK;
use crate::model::{
    Configuration, DeviceId, DeviceState, JobId, JobKind, JobState, MemberId, MemberState, Priority, VolumeId,
};
use crate::place;

/// A device that is busy for less of the time, in thousandths, is left as it is.
const BUSY: u32 = 500;
/// So much less busy, in thousandths, the busier of two devices has to become.
const GAIN: u32 = 150;
/// Most moves of one job.
const MOVES: usize = 64;

/// A move that takes load off a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Advice {
    volume: VolumeId,
    from: DeviceId,
    to: DeviceId,
}

/// The move that helps most; none if none helps enough. `done` names volumes and devices that have had their turn.
fn advise(config: &Configuration, spots: &HotSpots, done: &BTreeSet<(VolumeId, DeviceId)>) -> Option<Advice> {
    let mut helpful: Vec<(u32, MemberId, Advice)> = Vec::new();
    for hot in spots.devices.iter().filter(|load| load.busy > BUSY) {
        let class = config.device(hot.device).map(|device| &device.class);
        for leg in hot
            .legs
            .iter()
            .filter(|leg| !done.contains(&(leg.volume, hot.device)))
        {
            let part = hot.busy * leg.share / 1000;
            for cool in &spots.devices {
                let active = config.device(cool.device).is_some_and(|device| {
                    device.state == DeviceState::Active && Some(&device.class) == class
                });
                let after = (hot.busy - part).max(cool.busy + part);
                if active && after + GAIN <= hot.busy && !done.contains(&(leg.volume, cool.device)) {
                    let advice = Advice {
                        volume: leg.volume,
                        from: hot.device,
                        to: cool.device,
                    };
                    helpful.push((hot.busy - after, leg.member, advice));
                }
            }
        }
    }
    helpful.sort_by_key(|(gain, _, advice)| (std::cmp::Reverse(*gain), advice.volume, advice.to));
    let possible = helpful
        .iter()
        .find(|(_, member, advice)| has_place(config, *member, advice));
    possible.map(|(_, _, advice)| *advice)
}

/// Whether the placement rules let a member lie on the other device.
fn has_place(config: &Configuration, member: MemberId, advice: &Advice) -> bool {
    let Some(volume) = config.volume(advice.volume) else {
        return false;
    };
    let place = volume.sections.iter().enumerate().find_map(|(section, model)| {
        let column = model
            .columns
            .iter()
            .position(|column| column.members.iter().any(|other| other.id == member))?;
        Some((section, column))
    });
    let Some((section, column)) = place else {
        return false;
    };
    let request = place::MemberRequest {
        volume: advice.volume,
        section,
        column,
        replaces: Some(member),
        to: Some(advice.to),
        excluded: &[],
        use_spares: false,
        state: MemberState::Filling { cursor: 0 },
    };
    place::place_member(config, &request).is_ok()
}

impl<D: BlockDevice + 'static, C: Clock + Clone + 'static> Pool<D, C> {
    /// Moves load until no move would help.
    pub(super) async fn auto_tune(&self, window: u32, control: &Control) -> Result<(), Stop> {
        let window = Duration::from_millis(window.into()).max(LOOK);
        let (mut done, mut last) = (BTreeSet::new(), None);
        for _ in 0..MOVES {
            // A moment's load is no reason yet to do something, nor a moment's rest to end.
            let mut balanced = false;
            let advice = loop {
                let spots = self.quiet_window(window, control).await?;
                match advise(&self.0.placing(), &spots, &done) {
                    None if balanced => return Ok(()),
                    Some(advice) if last == Some(advice.from) => break advice,
                    advice => {
                        balanced = advice.is_none();
                        last = advice.map(|advice| advice.from);
                    }
                }
            };
            cover!("tune: load is moved to another device");
            last = None;
            done.extend([(advice.volume, advice.from), (advice.volume, advice.to)]);
            let kind = JobKind::Move {
                volume: advice.volume,
                from: Some(advice.from),
                to: Some(advice.to),
            };
            let moved = self.start(kind, control.throttle()).await;
            let moved = moved.map_err(|error| Stop::because("cannot move load to another device", &error))?;
            self.accompany(moved, control).await?;
        }
        Ok(())
    }

    /// The load of a window in which no other job did anything.
    async fn quiet_window(&self, window: Duration, control: &Control) -> Result<HotSpots, Stop> {
        loop {
            let before = self.sample();
            let until = self.0.clock.now() + window;
            let mut quiet = true;
            while self.0.clock.now() < until {
                control.progress(&self.0.clock, 0).await?;
                self.0.go_on()?;
                quiet &= !self.0.config().jobs.iter().any(|job| {
                    job.state == JobState::Running && !matches!(job.kind, JobKind::AutoTune { .. })
                });
                self.0.clock.sleep(LOOK).await;
            }
            if quiet {
                return Ok(self.sample().since(&before));
            }
        }
    }

    /// Waits for a move; one that fails is left alone, one whose tuning is cancelled is cancelled, too.
    async fn accompany(&self, job: JobId, control: &Control) -> Result<(), Stop> {
        let mut throttle = control.throttle();
        let mut priority = Priority::Normal;
        loop {
            if let Err(stop) = control.progress(&self.0.clock, 0).await {
                if matches!(stop, Stop::Cancelled) {
                    // It may have ended by itself.
                    drop(self.steer(job, JobState::Cancelled).await);
                }
                return Err(stop);
            }
            self.0.go_on()?;
            match self.job(job) {
                Some(moved) if moved.is_live() => {
                    if throttle != control.throttle() {
                        throttle = control.throttle();
                        // It may have ended by itself.
                        drop(self.set_throttle(job, throttle).await);
                    }
                    if priority != control.priority() {
                        priority = control.priority();
                        drop(self.set_priority(job, priority).await);
                    }
                    control.total.set(moved.total);
                    control.done.set(moved.done);
                }
                _ => return Ok(()),
            }
            self.0.clock.sleep(LOOK).await;
        }
    }
}
