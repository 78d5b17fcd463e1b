//! The wall clock of the `drover` command: read here and handed on as a value.

/// Seconds since the Unix epoch, now.
#[must_use]
#[allow(clippy::disallowed_methods, reason = "this is the program's clock module")]
pub fn now_seconds() -> i64 {
    jiff::Timestamp::now().as_second()
}

/// A duration in whole seconds for people, two units at most: "42s", "3m12s", "5h03m", "12d4h".
#[must_use]
pub fn age(seconds: i64) -> String {
    let s = seconds.max(0);
    match s {
        0..60 => format!("{s}s"),
        60..3600 => format!("{}m{:02}s", s / 60, s % 60),
        3600..86_400 => format!("{}h{:02}m", s / 3600, s % 3600 / 60),
        _ => format!("{}d{}h", s / 86_400, s % 86_400 / 3600),
    }
}

/// A point in time for people, in UTC; "-" when there is none.
#[must_use]
pub fn utc(time: Option<&prost_types::Timestamp>) -> String {
    time.and_then(|t| jiff::Timestamp::new(t.seconds, 0).ok()).map_or_else(|| "-".to_owned(), |t| t.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_age_has_two_units_at_most() {
        let ages = [-5, 0, 59, 60, 3599, 3600, 86_399, 86_400, 1_000_000].map(age);
        assert_eq!(ages, ["0s", "0s", "59s", "1m00s", "59m59s", "1h00m", "23h59m", "1d0h", "11d13h"]);
    }

    #[test]
    fn a_time_is_shown_in_utc() {
        assert_eq!(utc(Some(&prost_types::Timestamp { seconds: 0, nanos: 5 })), "1970-01-01T00:00:00Z");
        assert_eq!(utc(None), "-");
    }
}
