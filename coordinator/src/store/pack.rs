//! PURE. Writes that do not depend on each other, packed into as few transactions as the store takes.

use super::{Compare, OPERATIONS_MAX, Op};

/// Bytes of values in a packed transaction: far below the store's limit, so that keys and framing find room beside them.
const BYTES_MAX: usize = 512 * 1024;

/// A write, and what must hold for it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Step {
    /// All must hold.
    pub compare: Vec<Compare>,
    /// Done when they do.
    pub then: Vec<Op>,
}

impl Step {
    /// One step of several: done if all hold. What several compare is compared once.
    pub fn join<'a>(steps: impl IntoIterator<Item = &'a Self>) -> Self {
        let mut joined = Self::default();
        for step in steps {
            for compare in &step.compare {
                if !joined.compare.contains(compare) {
                    joined.compare.push(compare.clone());
                }
            }
            joined.then.extend(step.then.iter().cloned());
        }
        joined
    }

    fn bytes(&self) -> usize {
        let value = |op: &Op| if let Op::Put { value, .. } = op { value.len() } else { 0 };
        self.then.iter().map(value).sum()
    }
}

/// Cuts items into runs, in their order, each of which fits one transaction beside `beside` more comparisons. What does not
/// fit even alone is a run of its own.
#[must_use]
pub fn pack<T>(items: Vec<T>, beside: usize, step: impl Fn(&T) -> &Step) -> Vec<Vec<T>> {
    let mut runs: Vec<Vec<T>> = Vec::new();
    // What the steps of the last run compare.
    let mut compared: Vec<Compare> = Vec::new();
    let (mut ops, mut bytes) = (0, 0);
    for item in items {
        let next = step(&item);
        let (o, b) = (next.then.len(), next.bytes());
        let more = next.compare.iter().filter(|compare| !compared.contains(compare)).count();
        let fits =
            beside + compared.len() + more <= OPERATIONS_MAX && ops + o <= OPERATIONS_MAX && bytes + b <= BYTES_MAX;
        if !fits {
            compared.clear();
            (ops, bytes) = (0, 0);
        }
        for compare in &next.compare {
            if !compared.contains(compare) {
                compared.push(compare.clone());
            }
        }
        (ops, bytes) = (ops + o, bytes + b);
        match runs.last_mut().filter(|_| fits) {
            Some(run) => run.push(item),
            None => runs.push(vec![item]),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(n: usize, compares: usize, bytes: usize) -> Step {
        let compare = |k| Compare::CreateRevision(format!("{n}/{k}"), 0);
        let put = Op::Put { key: n.to_string(), value: vec![0; bytes], lease: 0 };
        Step { compare: (0..compares).map(compare).collect(), then: vec![put] }
    }

    fn sizes(steps: Vec<Step>, beside: usize) -> Vec<usize> {
        pack(steps, beside, |s| s).iter().map(Vec::len).collect()
    }

    #[test]
    fn a_run_is_as_long_as_the_store_takes_and_nothing_is_left_out() {
        let many = |compares, bytes| (0..200).map(|n| step(n, compares, bytes)).collect::<Vec<_>>();
        assert_eq!(sizes(many(1, 1), 0), [128, 72]);
        assert_eq!(sizes(many(1, 1), 1), [127, 73]);
        assert_eq!(sizes(many(4, 1), 1), [31, 31, 31, 31, 31, 31, 14]);
        assert_eq!(sizes(vec![step(0, 1, BYTES_MAX), step(1, 1, 1), step(2, 1, BYTES_MAX)], 0), [1, 1, 1]);
        assert_eq!(sizes(vec![step(0, 1, 1), step(1, 200, 1), step(2, 1, 1)], 0), [1, 1, 1], "the store refuses it");
        assert!(sizes(vec![], 1).is_empty());
        let shared = |n: usize| Step { compare: vec![Compare::Exists("d".to_owned())], ..step(n, 0, 1) };
        assert_eq!(sizes((0..200).map(shared).collect(), 100), [128, 72], "what several compare is compared once");
    }

    #[test]
    fn what_several_compare_is_compared_once() {
        let shared = Compare::Exists("d".to_owned());
        let with =
            |n| Step { compare: vec![Compare::CreateRevision(format!("{n}"), 0), shared.clone()], ..step(n, 0, 1) };
        let joined = Step::join(&[with(1), with(2)]);
        assert_eq!((joined.compare.len(), joined.then.len()), (3, 2));
    }
}
