//! PURE. Keys, leases and history; time is an argument.

use crate::store::{Change, Changes, Error, KeyValue, Txn, TxnOutcome};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};
use tokio::time::Instant;

/// Shortest time to live that etcd grants, at its default election timeout.
const TTL_MIN: Duration = Duration::from_secs(2);

#[derive(Debug, Clone)]
struct Lease {
    ttl: Duration,
    expires: Instant,
    keys: BTreeSet<String>,
}

#[derive(Debug, Clone)]
pub(super) struct State {
    revision: i64,
    pub(super) keys: BTreeMap<String, KeyValue>,
    leases: BTreeMap<i64, Lease>,
    last_lease: i64,
    /// The last revisions, one entry each without a gap, the newest at the end.
    history: VecDeque<Changes>,
    history_max: usize,
    /// A watch from before this revision is refused.
    compacted: i64,
    /// How often the content was set back; a watch lives as long as one of these.
    life: u64,
}

impl State {
    pub(super) const fn new(history_max: usize) -> Self {
        Self {
            revision: 1,
            keys: BTreeMap::new(),
            leases: BTreeMap::new(),
            last_lease: 0,
            history: VecDeque::new(),
            history_max,
            compacted: 0,
            life: 0,
        }
    }

    pub(super) const fn life(&self) -> u64 {
        self.life
    }

    /// Sets content, history and revision back to those of a copy. Its leases have their full time again; those that are
    /// granted from now on have ids that none has had.
    pub(super) fn restore(&mut self, copy: &Self, now: Instant) {
        let (last_lease, life) = (self.last_lease, self.life + 1);
        *self = Self { last_lease, life, ..copy.clone() };
        self.refresh_leases(now);
    }

    pub(super) const fn revision(&self) -> i64 {
        self.revision
    }

    pub(super) fn get(&self, key: &str) -> Option<KeyValue> {
        self.keys.get(key).cloned()
    }

    pub(super) fn list(&self, prefix: &str) -> Vec<KeyValue> {
        let from = self.keys.range(prefix.to_owned()..);
        from.map(|(_, kv)| kv).take_while(|kv| kv.key.starts_with(prefix)).cloned().collect()
    }

    pub(super) fn txn(&mut self, txn: &Txn) -> Result<TxnOutcome, Error> {
        super::txn::execute(self, txn)
    }

    pub(super) fn grant(&mut self, ttl: Duration, now: Instant) -> i64 {
        let seconds = u64::try_from(ttl.as_millis().div_ceil(1000)).unwrap_or(u64::MAX);
        let ttl = Duration::from_secs(seconds).max(TTL_MIN);
        self.last_lease += 1;
        // No one lives to see a lease of a century end.
        let expires = now + ttl.min(Duration::from_secs(100 * 365 * 86_400));
        self.leases.insert(self.last_lease, Lease { ttl, expires, keys: BTreeSet::new() });
        self.last_lease
    }

    pub(super) fn renew(&mut self, lease: i64, now: Instant) -> Result<Duration, Error> {
        let lease = self.leases.get_mut(&lease).ok_or(Error::LeaseGone)?;
        lease.expires = now + lease.ttl;
        Ok(lease.ttl)
    }

    /// Ends a lease; all keys on it go in one revision.
    pub(super) fn revoke(&mut self, lease: i64) {
        let Some(lease) = self.leases.remove(&lease) else { return };
        let revision = self.revision + 1;
        let mut changes = Vec::new();
        for key in lease.keys {
            self.keys.remove(&key);
            changes.push(Change::Delete { key, revision });
        }
        self.commit(changes);
    }

    pub(super) fn has_lease(&self, lease: i64) -> bool {
        self.leases.contains_key(&lease)
    }

    /// Ends every lease whose time has come, in the order of their times.
    pub(super) fn expire(&mut self, now: Instant) {
        let mut due: Vec<_> =
            self.leases.iter().filter(|(_, l)| l.expires <= now).map(|(id, l)| (l.expires, *id)).collect();
        due.sort_unstable();
        for (_, lease) in due {
            self.revoke(lease);
        }
    }

    pub(super) fn lease_until(&self, lease: i64) -> Option<Instant> {
        self.leases.get(&lease).map(|lease| lease.expires)
    }

    pub(super) fn refresh_leases(&mut self, now: Instant) {
        for lease in self.leases.values_mut() {
            lease.expires = now + lease.ttl;
        }
    }

    pub(super) fn next_expiry(&self) -> Option<Instant> {
        self.leases.values().map(|lease| lease.expires).min()
    }

    /// Writes a key as part of revision `revision`, which [`State::commit`] then makes current.
    pub(super) fn put(&mut self, key: &str, value: &[u8], lease: i64, revision: i64) -> Change {
        let old = self.remove(key);
        let kv = KeyValue {
            key: key.to_owned(),
            value: value.to_vec(),
            create_revision: old.as_ref().map_or(revision, |old| old.create_revision),
            mod_revision: revision,
            version: old.as_ref().map_or(1, |old| old.version + 1),
            lease,
        };
        if let Some(lease) = self.leases.get_mut(&lease) {
            lease.keys.insert(key.to_owned());
        }
        self.keys.insert(key.to_owned(), kv.clone());
        Change::Put(kv)
    }

    /// Removes a key, and its tie to a lease.
    pub(super) fn remove(&mut self, key: &str) -> Option<KeyValue> {
        let old = self.keys.remove(key)?;
        if let Some(lease) = self.leases.get_mut(&old.lease) {
            lease.keys.remove(key);
        }
        Some(old)
    }

    /// Makes a revision of these changes; none make none.
    pub(super) fn commit(&mut self, changes: Vec<Change>) {
        if changes.is_empty() {
            return;
        }
        self.revision += 1;
        self.history.push_back(Changes { changes, revision: self.revision });
        while self.history.len() > self.history_max {
            if let Some(oldest) = self.history.pop_front() {
                self.compacted = oldest.revision + 1;
            }
        }
    }

    pub(super) fn compact(&mut self, revision: i64) -> Result<(), Error> {
        if revision <= self.compacted {
            return Err(Error::Compacted(self.compacted));
        }
        if revision > self.revision {
            return Err(Error::Rejected(format!(
                "compaction at {revision}, but the store is at {} only",
                self.revision
            )));
        }
        self.compacted = revision;
        self.history.retain(|changes| changes.revision >= revision);
        Ok(())
    }

    /// The changes of revision `from` under a prefix (possibly none of them); `None` while that revision is to come.
    pub(super) fn changes(&self, from: i64, prefix: &str) -> Result<Option<Changes>, Error> {
        if from < self.compacted {
            return Err(Error::Compacted(self.compacted));
        }
        // Revisions follow one another without a gap; one from before the first entry changed nothing.
        let first = self.history.front().map_or(self.revision + 1, |changes| changes.revision);
        let Some(entry) = usize::try_from((from - first).max(0)).ok().and_then(|at| self.history.get(at)) else {
            return Ok(None);
        };
        let under = |change: &&Change| match change {
            Change::Put(kv) => kv.key.starts_with(prefix),
            Change::Delete { key, .. } => key.starts_with(prefix),
        };
        Ok(Some(Changes { changes: entry.changes.iter().filter(under).cloned().collect(), revision: entry.revision }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(state: &mut State, key: &str, lease: i64) {
        let change = state.put(key, b"v", lease, state.revision() + 1);
        state.commit(vec![change]);
    }

    #[test]
    fn the_keys_of_a_lease_go_in_one_revision_and_a_key_that_moved_off_it_stays() {
        let now = Instant::now();
        let mut state = State::new(100);
        let lease = state.grant(Duration::from_secs(10), now);
        for key in ["b", "a", "c"] {
            put(&mut state, key, lease);
        }
        put(&mut state, "c", 0);
        let before = state.revision();

        state.expire(now + Duration::from_millis(9_999));
        assert_eq!(state.revision(), before);
        state.expire(now + Duration::from_secs(10));

        let changes = state.changes(before + 1, "").unwrap().unwrap().changes;
        let revision = before + 1;
        assert_eq!(
            changes,
            [Change::Delete { key: "a".to_owned(), revision }, Change::Delete { key: "b".to_owned(), revision },]
        );
        assert_eq!(state.renew(lease, now), Err(Error::LeaseGone));
        assert_eq!(state.list("").len(), 1);
    }

    #[test]
    fn history_is_bounded_and_says_so() {
        let mut state = State::new(3);
        for _ in 0..5 {
            put(&mut state, "k", 0);
        }
        assert_eq!(state.revision(), 6);
        assert_eq!(state.changes(3, ""), Err(Error::Compacted(4)));
        assert_eq!(state.changes(4, "").unwrap().unwrap().revision, 4);
        assert_eq!(state.changes(7, "").unwrap(), None);
    }
}
