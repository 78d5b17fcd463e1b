//! What etcd itself says has happened: a watch by etcdctl, which links none of the product.
//!
//! A claim that is written while one stands is a second owner. Whoever checks more than that takes the whole history, as
//! [`checker`](crate::checker) does.

use crate::etcd::etcdctl;
use anyhow::{Context as _, ensure};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader},
    process::{Child, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::UNIX_EPOCH,
};

/// What all keys of a fleet begin with.
const PREFIX: &str = "/drover/";

/// A change of a key, in the order of the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Key, without the `/drover/` prefix.
    pub key: String,
    /// Encoded record; empty when the key is gone.
    pub value: Vec<u8>,
    /// The key is gone: deleted, or its lease ran out.
    pub deleted: bool,
    /// Revision at which it was made; 0 when it is gone.
    pub create_revision: i64,
    /// Revision of this change.
    pub revision: i64,
    /// Writes since it was made, this one included; 0 when it is gone.
    pub version: i64,
    /// Lease that it hangs on; 0 for none, and when it is gone.
    pub lease: i64,
    /// When the judge heard of it, in milliseconds since the epoch.
    pub at_ms: i64,
}

/// The watch, from the store's first revision on. It outlives an outage of etcd.
#[derive(Debug)]
pub struct Judge {
    etcdctl: Child,
    seen: Arc<Mutex<Vec<Change>>>,
}

/// What became of claims.
#[derive(Debug, Default, Clone)]
pub struct Claims {
    /// Claims written, by instance.
    pub written: BTreeMap<String, usize>,
    /// Claims that were written while one stood.
    pub second_owners: usize,
}

impl Judge {
    /// Watches the etcd at this address.
    ///
    /// # Errors
    /// When etcdctl can't be started.
    pub fn start(endpoint: &str) -> anyhow::Result<Self> {
        let mut etcdctl = etcdctl(endpoint)
            .args(["watch", "--prefix", PREFIX, "--rev", "1", "-w", "json"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("etcdctl")?;
        let lines = BufReader::new(etcdctl.stdout.take().context("etcdctl has no output")?).lines();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let changes = seen.clone();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let Ok(answer) = serde_json::from_str::<Value>(&line) else { continue };
                let at_ms = i64::try_from(UNIX_EPOCH.elapsed().unwrap_or_default().as_millis()).unwrap_or(i64::MAX);
                let read = answer["Events"].as_array().into_iter().flatten().map(|event| change(event, at_ms));
                let read: Vec<Change> = read.filter_map(Result::ok).collect();
                lock(&changes).extend(read);
            }
        });
        Ok(Self { etcdctl, seen })
    }

    /// Everything so far, in order. The judge reads on its own: wait until it has seen what must come.
    #[must_use]
    pub fn changes(&self) -> Vec<Change> {
        lock(&self.seen).clone()
    }

    /// The changes so far of keys that begin so.
    #[must_use]
    pub fn of(&self, prefix: &str) -> Vec<Change> {
        lock(&self.seen).iter().filter(|change| change.key.starts_with(prefix)).cloned().collect()
    }

    /// What became of claims so far.
    #[must_use]
    pub fn claims(&self) -> Claims {
        let mut claims = Claims::default();
        for change in self.of("claims/").iter().filter(|change| !change.deleted) {
            *claims.written.entry(change.key["claims/".len()..].to_owned()).or_default() += 1;
            // The version counts writes since the key was made: above 1, a standing claim was overwritten.
            claims.second_owners += usize::from(change.version > 1);
        }
        claims
    }
}

impl Drop for Judge {
    fn drop(&mut self) {
        let _ = self.etcdctl.kill();
        let _ = self.etcdctl.wait();
    }
}

fn lock(seen: &Mutex<Vec<Change>>) -> MutexGuard<'_, Vec<Change>> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

fn change(event: &Value, at_ms: i64) -> anyhow::Result<Change> {
    let kv = &event["kv"];
    let number = |name: &str| kv[name].as_i64().unwrap_or(0);
    let key = String::from_utf8(base64(kv["key"].as_str().context("a change without a key")?)?)?;
    Ok(Change {
        key: key.strip_prefix(PREFIX).unwrap_or(&key).to_owned(),
        value: base64(kv["value"].as_str().unwrap_or_default())?,
        deleted: event["type"].as_i64() == Some(1) || event["type"].as_str() == Some("DELETE"),
        create_revision: number("create_revision"),
        revision: number("mod_revision"),
        version: number("version"),
        lease: number("lease"),
        at_ms,
    })
}

/// RFC 4648, as etcdctl writes it.
fn base64(text: &str) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut count) = (0_u32, 0);
    for letter in text.bytes().take_while(|letter| *letter != b'=') {
        let value = match letter {
            b'A'..=b'Z' => letter - b'A',
            b'a'..=b'z' => letter - b'a' + 26,
            b'0'..=b'9' => letter - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            other => {
                ensure!(false, "{other:#x} is no letter of base64");
                0
            }
        };
        bits = bits << 6 | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
            bits &= (1 << count) - 1;
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{etcd::Etcd, programs::eventually};
    use std::time::Duration;

    #[test]
    fn base64_is_read() {
        for (text, bytes) in [("", ""), ("Zg==", "f"), ("Zm8=", "fo"), ("Zm9v", "foo"), ("Zm9vYmFy", "foobar")] {
            assert_eq!(base64(text).unwrap(), bytes.as_bytes(), "{text}");
        }
        assert_eq!(base64("//79").unwrap(), [0xff, 0xfe, 0xfd]);
        assert!(base64("a b").is_err());
    }

    #[tokio::test]
    async fn it_sees_every_change_and_a_claim_that_is_written_over_another() {
        let etcd = Etcd::start().await.unwrap();
        etcd.ctl(&["put", "/drover/claims/one", "a"]).unwrap();
        let judge = Judge::start(&etcd.endpoints()[0]).unwrap();
        etcd.ctl(&["del", "/drover/claims/one"]).unwrap();
        etcd.ctl(&["put", "/drover/claims/one", "b"]).unwrap();
        etcd.ctl(&["put", "/drover/claims/two", "b"]).unwrap();
        let seen = async |n: usize| {
            eventually("all changes are seen", Duration::from_secs(10), async || {
                ensure!(judge.changes().len() == n, "{:?}", judge.changes());
                Ok(())
            })
            .await
            .unwrap();
        };
        seen(4).await;
        assert_eq!(judge.claims().second_owners, 0);
        assert_eq!(judge.claims().written, BTreeMap::from([("one".to_owned(), 2), ("two".to_owned(), 1)]));
        assert!(judge.changes()[1].deleted && judge.changes()[2].value == b"b");
        etcd.ctl(&["put", "/drover/claims/two", "c"]).unwrap();
        seen(5).await;
        assert_eq!(judge.claims().second_owners, 1);
    }
}
