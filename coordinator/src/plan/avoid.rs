//! PURE. Nodes that are avoided for an instance: each had claimed it and got nowhere with it. The time doubles with every
//! further failure, up to a bound, and has an end: whoever could take it in the end is asked again.
//!
//! Kept in the instance's record, so that offers and claims, which compare its revision, are judged by the same list.

use super::{CLOCK_SKEW_MS, snapshot::millis};
use drover_proto::store::v1::{Avoid, Instance};
use prost_types::Timestamp;

/// Most entries of an instance: those with the latest ends are kept.
const ENTRIES_MAX: usize = 16;

/// How long a node is avoided, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Delays {
    /// The first time.
    pub first_ms: i64,
    /// At most.
    pub max_ms: i64,
}

/// The entry by which a node is avoided now. One that ends later than it can have been meant to was written before the wall
/// clock was put back: it is over.
#[must_use]
pub fn in_force<'a>(instance: &'a Instance, node: &str, now_ms: i64) -> Option<&'a Avoid> {
    let left = |avoid: &Avoid| avoid.until.as_ref().map_or(0, millis).saturating_sub(now_ms);
    let stands = |avoid: &&Avoid| (1..=avoid.delay_ms.saturating_add(CLOCK_SKEW_MS)).contains(&left(avoid));
    instance.avoid.iter().filter(|avoid| avoid.node == node).find(stands)
}

/// How much longer a node is avoided, in milliseconds; 0 when it is not.
#[must_use]
pub fn left_ms(instance: &Instance, node: &str, now_ms: i64) -> i64 {
    let until = in_force(instance, node, now_ms).and_then(|avoid| avoid.until.as_ref());
    until.map_or(0, |until| millis(until).saturating_sub(now_ms).max(0))
}

/// The list with a node that has just failed: twice as long as the last time, if that is not long ago.
#[must_use]
pub fn with(instance: &Instance, node: &str, why: String, now_ms: i64, delays: Delays) -> Vec<Avoid> {
    let ended_ms = |avoid: &Avoid| now_ms.saturating_sub(avoid.until.as_ref().map_or(0, millis));
    let last = instance.avoid.iter().find(|avoid| avoid.node == node && ended_ms(avoid) <= delays.max_ms);
    let delay_ms = last.map_or(delays.first_ms, |last| last.delay_ms.saturating_mul(2)).clamp(1, delays.max_ms.max(1));
    let until = Some(timestamp(now_ms.saturating_add(delay_ms)));
    let mut list = without(instance, node);
    list.push(Avoid { node: node.to_owned(), until, delay_ms, why });
    list.sort_by_key(|avoid| std::cmp::Reverse(avoid.until.as_ref().map_or(0, millis)));
    list.truncate(ENTRIES_MAX);
    list
}

/// The list without a node: it is forgiven.
#[must_use]
pub fn without(instance: &Instance, node: &str) -> Vec<Avoid> {
    instance.avoid.iter().filter(|avoid| avoid.node != node).cloned().collect()
}

fn timestamp(ms: i64) -> Timestamp {
    let nanos = i32::try_from(ms.rem_euclid(1000) * 1_000_000).unwrap_or(0);
    Timestamp { seconds: ms.div_euclid(1000), nanos }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DELAYS: Delays = Delays { first_ms: 1000, max_ms: 5000 };

    fn failed(instance: Instance, node: &str, now_ms: i64) -> Instance {
        Instance { avoid: with(&instance, node, "why".to_owned(), now_ms, DELAYS), ..instance }
    }

    #[test]
    fn the_time_doubles_up_to_its_bound_and_ends() {
        let (mut instance, mut now) = (Instance::default(), 100_000);
        for expected in [1000, 2000, 4000, 5000, 5000] {
            instance = failed(instance, "a", now);
            assert_eq!(left_ms(&instance, "a", now), expected);
            now += expected;
            assert_eq!(left_ms(&instance, "a", now), 0, "it ends");
            assert_eq!(instance.avoid.len(), 1, "one entry for a node");
        }
        now += DELAYS.max_ms + 1;
        assert_eq!(left_ms(&failed(instance.clone(), "a", now), "a", now), 1000, "the last time is long ago");
        assert_eq!(left_ms(&failed(instance, "b", now), "b", now), 1000, "each node has its own");
    }

    #[test]
    fn a_wall_clock_that_was_put_back_avoids_nobody_for_longer_than_was_meant() {
        let instance = failed(Instance::default(), "a", 10_000_000);
        assert_eq!(left_ms(&instance, "a", 10_000_000), 1000);
        assert_eq!(left_ms(&instance, "a", 10_000_000 - 3_600_000), 0);
    }

    #[test]
    fn the_list_is_bounded_and_who_is_forgiven_is_not_on_it() {
        let mut instance = Instance::default();
        for n in 0..100_i64 {
            instance = failed(instance, &format!("n{n}"), 1_000_000 + n);
        }
        assert_eq!(instance.avoid.len(), ENTRIES_MAX);
        assert!(in_force(&instance, "n99", 1_000_099).is_some() && in_force(&instance, "n0", 1_000_099).is_none());
        assert!(without(&instance, "n99").iter().all(|avoid| avoid.node != "n99"));
    }
}
