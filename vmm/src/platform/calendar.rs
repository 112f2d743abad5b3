//! Seconds since 1970 to dates and back, in the proleptic Gregorian calendar. Time zones and leap seconds do not exist here.

use api::Utc;

/// A date and a time of day, UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DateTime {
    /// 0..=9999.
    pub(super) year: u16,
    /// 1..=12.
    pub(super) month: u8,
    /// 1..=31.
    pub(super) day: u8,
    /// 0..=23.
    pub(super) hour: u8,
    /// 0..=59.
    pub(super) minute: u8,
    /// 0..=59.
    pub(super) second: u8,
    /// 1 is Sunday. Ignored when a date is set.
    pub(super) weekday: u8,
}

impl DateTime {
    pub(super) fn century(&self) -> u8 {
        narrow(u64::from(self.year / 100))
    }

    pub(super) fn year_of_century(&self) -> u8 {
        narrow(u64::from(self.year % 100))
    }
}

const SECONDS_PER_DAY: i64 = 86_400;
/// Days from 0000-03-01 to 1970-01-01.
const EPOCH_DAYS: i64 = 719_468;
/// 9999-12-31T23:59:59, what fits into the clock's registers.
const LAST_SECOND: i64 = 253_402_300_799;

/// The date at `seconds` since 1970, limited to 1970 to 9999.
pub(super) fn from_unix_seconds(seconds: i64) -> DateTime {
    let seconds = seconds.clamp(0, LAST_SECOND).unsigned_abs();
    let utc = Utc::from_unix(seconds);
    DateTime {
        year: u16::try_from(utc.year).unwrap_or(u16::MAX),
        month: narrow(utc.month),
        day: narrow(utc.day),
        hour: narrow(utc.hour),
        minute: narrow(utc.minute),
        second: narrow(utc.second),
        // 1970-01-01 was a Thursday.
        weekday: narrow((seconds / SECONDS_PER_DAY.unsigned_abs() + 4) % 7 + 1),
    }
}

/// Seconds since 1970 at `time`, unless it is no date.
pub(super) fn to_unix_seconds(time: &DateTime) -> Option<i64> {
    let valid = (1970..=9999).contains(&time.year)
        && (1..=12).contains(&time.month)
        && (1..=days_of_month(time.year, time.month)).contains(&time.day)
        && time.hour < 24
        && time.minute < 60
        && time.second < 60;
    if !valid {
        return None;
    }
    let (month, day) = (i64::from(time.month), i64::from(time.day));
    let year = i64::from(time.year) - i64::from(month <= 2);
    let month_from_march = (month + 9) % 12;
    let day_of_year = (153 * month_from_march + 2) / 5 + day - 1;
    let days = 365 * year + year / 4 - year / 100 + year / 400 + day_of_year - EPOCH_DAYS;
    let of_day = i64::from(time.hour) * 3600 + i64::from(time.minute) * 60 + i64::from(time.second);
    Some(days * SECONDS_PER_DAY + of_day)
}

fn days_of_month(year: u16, month: u8) -> u8 {
    let leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    match month {
        2 if leap => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// For values that are below 256 by construction.
fn narrow(value: u64) -> u8 {
    debug_assert!((0..256).contains(&value));
    u8::try_from(value).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn show(seconds: i64) -> String {
        let time = from_unix_seconds(seconds);
        format!(
            "{:04}-{:02}-{:02} {:02}:{:02}:{:02} {}",
            time.year, time.month, time.day, time.hour, time.minute, time.second, time.weekday
        )
    }

    #[test]
    fn known_instants_are_right() {
        // Compared with date -u -d @N.
        assert_eq!(show(0), "1970-01-01 00:00:00 5");
        assert_eq!(show(951_782_400), "2000-02-29 00:00:00 3");
        assert_eq!(show(1_709_251_199), "2024-02-29 23:59:59 5");
        assert_eq!(show(1_795_233_600), "2026-11-21 04:00:00 7");
        assert_eq!(show(4_107_542_400), "2100-03-01 00:00:00 2");
        assert_eq!(show(LAST_SECOND), "9999-12-31 23:59:59 6");
    }

    #[test]
    fn impossible_dates_are_refused() {
        let date = from_unix_seconds(1_709_164_800);
        assert_eq!((date.month, date.day), (2, 29));
        assert_eq!(to_unix_seconds(&DateTime { year: 2023, ..date }), None);
        assert_eq!(to_unix_seconds(&DateTime { month: 0, ..date }), None);
        assert_eq!(to_unix_seconds(&DateTime { month: 13, ..date }), None);
        assert_eq!(to_unix_seconds(&DateTime { hour: 24, ..date }), None);
        assert_eq!(to_unix_seconds(&DateTime { second: 165, ..date }), None);
    }

    proptest! {
        #[test]
        fn there_and_back_is_the_same(seconds in 0..=LAST_SECOND) {
            prop_assert_eq!(to_unix_seconds(&from_unix_seconds(seconds)), Some(seconds));
        }
    }
}
