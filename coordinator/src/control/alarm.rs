//! The alarm of the invariants: each replica judges the history of the store as it sees it, by the same code as the
//! simulation, and counts what breaks a rule. It is 0 for as long as all is well; it stops nothing.
//!
//! Bounded: the checker keeps what stands in the store, without events and lists of models, and the last claims made.

use super::clock;
use crate::{
    invariants::{Checker, Rule, Settings},
    store::{Changes, Listing},
};
use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// Longest lag of a view, and difference of two coordinators' clocks, that is held against nobody.
const SLACK: Duration = Duration::from_secs(5);

/// Handle: cheap to clone.
#[derive(Debug, Clone)]
pub struct Alarm(Arc<Mutex<Checker>>);

impl Alarm {
    /// Judges nothing yet; `grace` is the time that a node is given to come back: the time to live of a session.
    #[must_use]
    pub fn new(grace: Duration) -> Self {
        let ms = |time: Duration| i64::try_from(time.as_millis()).unwrap_or(i64::MAX);
        let settings = Settings { grace_ms: ms(grace), slack_ms: ms(SLACK), orders: false };
        Self(Arc::new(Mutex::new(Checker::new(settings))))
    }

    /// The store as it is: at the beginning, and after a break in what is seen of it.
    pub(super) fn begin(&self, listing: &Listing) {
        self.lock().begin(listing);
    }

    /// What has changed since.
    pub(super) fn take(&self, changes: &Changes) {
        let mut checker = self.lock();
        let before = checker.violations().len();
        checker.store(clock::now_ms(), changes);
        // The checker keeps the first hundred in words: that many are told.
        for violation in checker.violations().iter().skip(before) {
            tracing::error!(rule = %violation.rule, "an invariant is broken: {violation}");
        }
    }

    /// How often each rule was broken since the start of this replica, by its name.
    #[must_use]
    pub fn counts(&self) -> Vec<(String, u64)> {
        let checker = self.lock();
        let of = |rule: &Rule| (rule.to_string(), checker.counts().get(rule).copied().unwrap_or(0));
        Rule::OF_HISTORY.iter().map(of).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Checker> {
        // Should judging ever panic, what it has counted before is still whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        control::view::View,
        store::{Op, Store, Txn, keys, memory::Memory, records, schema},
    };
    use drover_proto::{store::v1 as record, v1::InstanceState, v1::Token};
    use tokio_util::sync::CancellationToken;

    const WAIT: Duration = Duration::from_secs(10);

    fn of(alarm: &Alarm, rule: Rule) -> u64 {
        let name = rule.to_string();
        alarm.counts().into_iter().find(|(of, _)| *of == name).unwrap().1
    }

    #[tokio::test(start_paused = true)]
    async fn a_violation_that_a_replica_sees_is_counted_by_its_rule() {
        let store: Store = Arc::new(Memory::start(1));
        schema::open(&store, None).await.unwrap();
        let alarm = Alarm::new(Duration::from_secs(10));
        let view = View::judged(store.clone(), alarm.clone(), CancellationToken::new());
        let write = async |then: Vec<Op>| {
            let revision = store.txn(Txn { then, ..Txn::default() }).await.unwrap().revision;
            view.at_least(revision, WAIT).await.unwrap();
        };
        write(vec![records::put(keys::node("a"), &record::Node::default(), 0)]).await;
        assert!(alarm.counts().len() == Rule::OF_HISTORY.len() && alarm.counts().iter().all(|(_, n)| *n == 0));
        let status = record::Status {
            token: Some(Token { generation: 1, revision: 2 }),
            node: "a".to_owned(),
            state: InstanceState::Ready.into(),
            ..record::Status::default()
        };
        write(vec![records::put(keys::status("m-222222"), &status, 0)]).await;
        assert_eq!((of(&alarm, Rule::StaleEffect), of(&alarm, Rule::StaleRun)), (1, 0), "nobody owns it");
    }
}
