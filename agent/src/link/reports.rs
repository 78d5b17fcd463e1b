//! PURE: which reports of state are to be sent. Level-triggered: the latest state of each owned instance, again until it
//! was acknowledged. The states that a quick start passes through are told only if it stays in them: each report is a
//! write to the store.

use crate::instance::board::Entry;
use drover_proto::v1::{InstanceState, StatusAck, StatusReport};
use std::{collections::BTreeMap, time::Duration};

/// A report that is not acknowledged is sent again after this time.
pub const RESEND_AFTER: Duration = Duration::from_secs(3);

/// How long a state that should soon pass has to last until it is reported.
pub const PASSES_WITHIN: Duration = Duration::from_millis(200);

#[derive(Debug, Clone)]
struct Sent {
    entry: Entry,
    at: Duration,
    acknowledged: bool,
}

/// What was sent on this stream, and what of it was acknowledged.
#[derive(Debug, Default)]
pub struct Reports {
    sent: BTreeMap<String, Sent>,
    /// Since when a state that should soon pass is not reported.
    held_back: BTreeMap<String, Duration>,
}

impl Reports {
    /// The reports to send now; `now` is any clock that only goes forward.
    #[must_use]
    pub fn due(&mut self, entries: &BTreeMap<String, Entry>, now: Duration) -> Vec<(String, StatusReport)> {
        let owned = entries.iter().filter(|(_, entry)| entry.owned);
        owned.filter(|(i, e)| self.is_due(i, e, now)).map(|(i, e)| (i.clone(), e.report(i))).collect()
    }

    fn is_due(&mut self, instance: &str, entry: &Entry, now: Duration) -> bool {
        if let Some(sent) = self.sent.get(instance).filter(|sent| sent.entry == *entry) {
            return !sent.acknowledged && now >= sent.at + RESEND_AFTER;
        }
        if !passes(entry) {
            return true;
        }
        let since = *self.held_back.entry(instance.to_owned()).or_insert(now);
        now >= since + PASSES_WITHIN
    }

    /// Whether something is to be looked at again within [`PASSES_WITHIN`].
    #[must_use]
    pub fn holds_back(&self) -> bool {
        !self.held_back.is_empty()
    }

    /// A report was sent.
    pub fn sent(&mut self, instance: &str, entry: Entry, now: Duration) {
        self.held_back.remove(instance);
        self.sent.insert(instance.to_owned(), Sent { entry, at: now, acknowledged: false });
    }

    /// An acknowledgement has come. It is for the last report only when token and state are those of it.
    pub fn acknowledged(&mut self, ack: &StatusAck) {
        if let Some(sent) = self.sent.get_mut(&ack.instance)
            && Some(sent.entry.token) == ack.token
            && i32::from(sent.entry.state) == ack.state
        {
            sent.acknowledged = true;
        }
    }

    /// The reports that were acknowledged and still say how it is.
    #[must_use]
    pub fn acknowledged_of(&self, entries: &BTreeMap<String, Entry>) -> Vec<StatusReport> {
        let same = |instance: &str, entry: &Entry| {
            self.sent.get(instance).is_some_and(|sent| sent.acknowledged && sent.entry == *entry)
        };
        entries.iter().filter(|(i, e)| e.owned && same(i, e)).map(|(i, e)| e.report(i)).collect()
    }

    /// Forgets instances that are not here any more.
    pub fn retain(&mut self, entries: &BTreeMap<String, Entry>) {
        self.sent.retain(|instance, _| entries.contains_key(instance));
        self.held_back.retain(|instance, _| entries.get(instance).is_some_and(|entry| entry.owned && passes(entry)));
    }
}

/// Whether an instance is on its way to another state.
fn passes(entry: &Entry) -> bool {
    matches!(entry.state, InstanceState::Claimed | InstanceState::Starting | InstanceState::Loading)
}

#[cfg(test)]
mod tests {
    use super::*;
    use drover_proto::v1::Token;

    fn entry(state: InstanceState, owned: bool) -> Entry {
        Entry {
            token: Token { generation: 1, revision: 5 },
            owned,
            state,
            pid: 1,
            restarts: 0,
            message: String::new(),
            since: prost_types::Timestamp::default(),
            progressed_at: prost_types::Timestamp::default(),
            traceparent: String::new(),
            exit_code: None,
            exit_signal: None,
            memory_bytes: 0,
        }
    }

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn the_latest_state_is_sent_again_until_it_is_acknowledged() {
        let mut reports = Reports::default();
        let mut entries = BTreeMap::from([("a".to_owned(), entry(InstanceState::Loading, true))]);
        assert_eq!(reports.due(&entries, at(0)).len(), 0, "it may pass at once");
        assert!(reports.holds_back());
        assert_eq!(reports.due(&entries, PASSES_WITHIN).len(), 1);
        reports.sent("a", entries["a"].clone(), at(0));
        assert!(!reports.holds_back());
        assert_eq!(reports.due(&entries, at(2)).len(), 0);
        assert_eq!(reports.due(&entries, at(3)).len(), 1);
        // A newer state goes out at once, and the acknowledgement of the older one does not count for it.
        entries.insert("a".to_owned(), entry(InstanceState::Ready, true));
        assert_eq!(reports.due(&entries, at(3)).len(), 1);
        reports.sent("a", entries["a"].clone(), at(3));
        let ack = |state: InstanceState| StatusAck {
            instance: "a".to_owned(),
            token: Some(Token { generation: 1, revision: 5 }),
            accepted: true,
            state: state.into(),
        };
        reports.acknowledged(&ack(InstanceState::Loading));
        assert_eq!(reports.due(&entries, at(6)).len(), 1);
        reports.acknowledged(&ack(InstanceState::Ready));
        assert_eq!(reports.due(&entries, at(60)).len(), 0);
    }

    #[test]
    fn what_is_not_owned_is_not_reported() {
        let entries = BTreeMap::from([("a".to_owned(), entry(InstanceState::Ready, false))]);
        assert_eq!(Reports::default().due(&entries, at(0)).len(), 0);
    }
}
