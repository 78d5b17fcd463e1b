//! PURE. Which of several instances gets a request: the least busy one in proportion to its slots, ties at random.

/// How busy an instance is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Load {
    /// Requests of this gateway in flight there.
    pub(super) in_flight: u64,
    /// Requests that it works on at the same time.
    pub(super) slots: u32,
}

/// The place of the least busy one, without the place `not` unless there is no other. `random` decides between equals.
pub(super) fn pick(loads: &[Load], not: Option<usize>, random: u64) -> Option<usize> {
    let others = loads.len() > usize::from(not.is_some_and(|not| not < loads.len()));
    let open = |at: usize| !others || Some(at) != not;
    // a/b < c/d as a*d < c*b: exact, and no division.
    let busier = |a: Load, b: Load| {
        (u128::from(a.in_flight) * u128::from(b.slots)).cmp(&(u128::from(b.in_flight) * u128::from(a.slots)))
    };
    let least =
        loads.iter().enumerate().filter(|(at, _)| open(*at)).map(|(_, load)| *load).min_by(|a, b| busier(*a, *b))?;
    let equals = || loads.iter().enumerate().filter(|(at, load)| open(*at) && busier(**load, least).is_eq());
    let count = equals().count() as u64;
    equals().nth((random % count.max(1)) as usize).map(|(at, _)| at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn load((in_flight, slots): (u64, u32)) -> Load {
        Load { in_flight, slots }
    }

    #[test]
    fn the_least_busy_in_proportion_to_its_slots_gets_it() {
        let loads = [(1, 1), (3, 4), (2, 2)].map(load);
        assert_eq!(pick(&loads, None, 7), Some(1));
        assert_eq!(pick(&[], None, 7), None);
        let tied = [(1, 2), (2, 4), (4, 4)].map(load);
        assert_eq!((pick(&tied, None, 0), pick(&tied, None, 1), pick(&tied, None, 2)), (Some(0), Some(1), Some(0)));
    }

    #[test]
    fn a_retry_goes_elsewhere_unless_there_is_no_elsewhere() {
        assert_eq!(pick(&[(0, 4), (9, 4)].map(load), Some(0), 0), Some(1));
        assert_eq!(pick(&[(0, 4)].map(load), Some(0), 0), Some(0));
        assert_eq!(pick(&[(0, 4)].map(load), Some(5), 0), Some(0));
    }

    proptest! {
        #[test]
        fn none_that_may_be_chosen_is_less_busy(
            loads in prop::collection::vec((0u64..20, 1u32..9), 1..12), not in prop::option::of(0usize..12), random: u64,
        ) {
            let loads: Vec<Load> = loads.into_iter().map(load).collect();
            let at = pick(&loads, not, random).unwrap();
            let share = |load: Load| load.in_flight as f64 / f64::from(load.slots);
            for (other, load) in loads.iter().enumerate() {
                prop_assert!(Some(other) == not || share(loads[at]) <= share(*load) + 1e-9);
            }
            prop_assert!(loads.len() == 1 || Some(at) != not);
        }
    }
}
